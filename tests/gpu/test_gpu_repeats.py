"""Calls whose buffers come again, on a GPU: they repeat their launches, and compute what a first call does.

The first call at a place launches through Triton's dispatch or the launchers, the second through the launchers, from the
third on only what these launched is launched again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cases
import edges
import pytest
import torch
import triton
from gpu_truth import GPU, check_product

import hybrid_mxfp8 as mx
from hybrid_mxfp8.triton_kernels import launch

pytestmark = pytest.mark.gpu

T, N, K = 96, 136, 160
COUNTS, OTHER_COUNTS = [10, 0, 50, 20], [0, 70, 1, 9]


class Layer:
    """Rows, weights, and all buffers of quantizing and multiplying them."""

    def __init__(self, rng: torch.Generator, device: str = GPU) -> None:
        self.counts = COUNTS
        self.groups = cases.layout(COUNTS, T, device=device)
        self.x = cases.random_rows(T, K, torch.bfloat16, rng).to(device)
        self.xq = cases.poisoned_output(self.groups, K)
        self.wq = mx.quantize_weights(self._weights(rng).to(device), backend="triton")
        self.y = cases.poisoned_product(T, N, torch.bfloat16, torch.device(device))
        size = mx.grouped_gemm_workspace_size(self.wq, T, backend="triton")
        self.workspace = torch.empty(size, dtype=torch.uint8, device=device)

    @staticmethod
    def _weights(rng: torch.Generator) -> torch.Tensor:
        return cases.random_rows(4 * N, K, torch.bfloat16, rng).view(4, N, K)

    def run(self, backend: str | None = None) -> None:
        mx.quantize_grouped(self.x, self.groups, out=self.xq, backend=backend)
        mx.grouped_gemm(self.xq, self.wq, out=self.y, workspace=self.workspace, backend=backend)

    def spoil(self) -> None:
        self.y.fill_(float("nan"))
        self.xq.values.view(torch.uint8).fill_(cases.POISON)
        self.xq.scales.fill_(cases.POISON)

    def refill(self, rng: torch.Generator) -> None:
        """Other numbers, and other counts, in the same memory."""
        self.counts = OTHER_COUNTS
        groups = cases.layout(OTHER_COUNTS, T, device=str(self.x.device))
        for name in ("tokens_per_expert", "expert_offsets", "scale_offsets"):
            getattr(self.groups, name).copy_(getattr(groups, name))
        self.x.copy_(cases.random_rows(T, K, torch.bfloat16, rng))
        wq = mx.quantize_weights(self._weights(rng), backend="reference")
        self.wq.values.view(torch.uint8).copy_(wq.values.view(torch.uint8))
        self.wq.scales.copy_(wq.scales)

    def state(self) -> list[torch.Tensor]:
        return [edges.bits(t).clone() for t in (self.xq.values, self.xq.scales, self.y)]

    def computed(self, run: Callable[[], object]) -> list[torch.Tensor]:
        """What ``run`` leaves, compared with the truth too."""
        self.spoil()
        run()
        torch.cuda.synchronize()
        check_product(self.y, self.xq, self.wq, self.counts)
        return self.state()

    def computed_anew(self) -> list[torch.Tensor]:
        """The same by the long way."""
        cases.forget_calls()
        return self.computed(self.run)


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def warm(layer: Layer, long_way: list[str]) -> list[torch.Tensor]:
    """Called until it repeats, which it must with the versions of Triton that are known."""
    assert launch._launcher_is_known(), triton.__version__
    first = layer.computed(layer.run)
    assert same(layer.computed(layer.run), first)
    long_way.clear()
    assert same(layer.computed(layer.run), first)
    assert long_way == []
    return first


@pytest.mark.sanitizer
def test_what_is_repeated_is_the_same(kernel: str, long_way: list[str], rng: torch.Generator) -> None:
    """And follows its operands: all of them overwritten, the repeated launches compute what first ones do."""
    layer = Layer(rng)
    first = warm(layer, long_way)
    layer.refill(rng)
    second = layer.computed(layer.run)
    assert long_way == []
    assert not same(second, first)
    assert same(layer.computed_anew(), second)
    assert long_way == ["quantize_kernel", *_kernels(kernel)]


def _kernels(kernel: str) -> list[str]:
    return ["dequantize_tokens_kernel", "hopper_gemm_kernel"] if kernel == "hopper" else ["grouped_gemm_kernel"]


def test_in_a_graph(kernel: str, long_way: list[str], rng: torch.Generator) -> None:
    """Repeated launches are captured like others, and replay over whatever the buffers hold then."""
    layer = Layer(rng)
    first = warm(layer, long_way)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layer.run()
    assert long_way == []
    assert same(layer.computed(graph.replay), first)
    layer.refill(rng)
    second = layer.computed(graph.replay)
    assert same(layer.computed_anew(), second)


def test_on_a_side_stream(kernel: str, long_way: list[str], rng: torch.Generator) -> None:
    """The stream is that of each call: behind a stream's work, and not on the stream of the call that is repeated."""
    layer = Layer(rng)
    first = warm(layer, long_way)
    layer.spoil()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(300_000_000)
        layer.run()
    assert long_way == []
    assert bool(layer.y.isnan().all()), "the launches did not wait for their stream"
    stream.synchronize()
    assert same(layer.state(), first)


def test_other_buffers_are_another_call(kernel: str, long_way: list[str], rng: torch.Generator) -> None:
    layer = Layer(rng)
    first = warm(layer, long_way)
    old = (layer.xq, layer.y, layer.workspace)
    layer.spoil()
    layer.xq = cases.poisoned_output(layer.groups, K)
    layer.y = torch.full_like(layer.y, float("nan"))
    layer.workspace = torch.empty_like(layer.workspace)
    assert same(layer.computed(layer.run), first)
    assert long_way == ["quantize_kernel", *_kernels(kernel)]
    assert bool(old[1].isnan().all())
    assert bool((old[0].scales == cases.POISON).all())
    long_way.clear()
    layer.xq, layer.y, layer.workspace = old
    assert same(layer.computed(layer.run), first)
    assert long_way == []


def test_what_is_in_force_is_asked(long_way: list[str], rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")
    layer = Layer(rng)
    first = warm(layer, long_way)
    monkeypatch.setenv("HYBRID_MXFP8_HOPPER_GEMM", "0")
    layer.computed(layer.run)
    assert long_way == ["grouped_gemm_kernel"]
    long_way.clear()
    with mx.use_backend("reference"):
        layer.computed(layer.run)
    layer.computed(lambda: layer.run("reference"))
    assert long_way == []
    monkeypatch.setenv("HYBRID_MXFP8_HOPPER_GEMM", "1")
    for _ in range(2):
        layer.computed(layer.run)
    monkeypatch.delenv("HYBRID_MXFP8_HOPPER_GEMM")
    long_way.clear()
    assert same(layer.computed(layer.run), first)
    assert long_way == []


def test_hooks_see_every_launch(kernel: str, long_way: list[str], rng: torch.Generator) -> None:
    """As a profiler's do; without them calls are repeated again."""
    layer = Layer(rng)
    first = warm(layer, long_way)
    seen: list[str] = []

    def hook(metadata: Any) -> None:
        seen.append(metadata.get()["name"])

    hooks: Any = triton.knobs.runtime.launch_enter_hook
    hooks.add(hook)
    try:
        assert same(layer.computed(layer.run), first)
    finally:
        hooks.remove(hook)
    assert seen == long_way == ["quantize_kernel", *_kernels(kernel)]
    long_way.clear()
    assert same(layer.computed(layer.run), first)
    assert long_way == []
    assert len(seen) == 1 + len(_kernels(kernel))


def test_repeated_calls_allocate_nothing(kernel: str, long_way: list[str], rng: torch.Generator) -> None:
    layer = Layer(rng)
    warm(layer, long_way)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    layer.run()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    assert long_way == []


def test_outputs_that_are_not_given(kernel: str, long_way: list[str], rng: torch.Generator) -> None:
    """Dropped after each call, they come again at the same address; kept, they don't. Both are right."""
    layer = Layer(rng)
    first = warm(layer, long_way)

    def quantize() -> mx.GroupedMXFP8:
        return mx.quantize_grouped(layer.x, layer.groups)

    def multiply() -> torch.Tensor:
        return mx.grouped_gemm(layer.xq, layer.wq)

    used = sum(COUNTS)
    for call in (quantize, multiply):
        for _ in range(4):
            call()
        long_way.clear()
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        call()
        allocated = torch.cuda.memory_stats()["allocation.all.allocated"] - before
        assert allocated == (2 if call is quantize or kernel == "hopper" else 1)
        assert long_way == []
    kept = [(quantize(), multiply()) for _ in range(4)]
    for xq, y in kept:
        assert torch.equal(edges.bits(xq.values[:used]), edges.bits(layer.xq.values[:used]))
        assert torch.equal(edges.bits(y[:used]), edges.bits(layer.y[:used]))
    assert len({y.data_ptr() for _, y in kept}) == 4
    assert same(layer.computed(layer.run), first)


def test_on_another_device_than_the_current(kernel: str, long_way: list[str], rng: torch.Generator) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    layer = Layer(rng, "cuda:1")
    first = warm(layer, long_way)
    with torch.cuda.device(1):
        assert same(layer.computed(layer.run), first)
    assert long_way == []
    assert torch.cuda.current_device() == 0
