"""Plans on a GPU: what a call launches and allocates, hooks, streams, and Triton's launches in the
launcher's place."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import cases
import pytest
import torch
import triton

import hybrid_mxfp8 as mx
from hybrid_mxfp8.dispatch import launcher, plan
from hybrid_mxfp8.dispatch.plan import PLANS
from hybrid_mxfp8.triton_kernels import launch

pytestmark = [pytest.mark.gpu, pytest.mark.sanitizer]
M, H, I, E, TOP_K = 16, 256, 128, 8, 2  # noqa: E741


class Layer:
    """One layer, its operands, and what its calls give."""

    def __init__(self, rng: torch.Generator, tokens: int = M) -> None:
        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=rng).cuda()

        self.w13q = mx.quantize_weights(randn(E, 2 * I, H) * H**-0.5)
        self.w2q = mx.quantize_weights(randn(E, H, I) * I**-0.5)
        self.x = randn(tokens, H).bfloat16()
        self.ids = torch.randint(0, E, (tokens, TOP_K), generator=rng).cuda()
        self.weights = torch.rand(tokens, TOP_K, generator=rng).cuda()
        self.groups = cases.layout([3, 0, 5, 1, 1, 2, 4, 0], device="cuda")
        self.xq = mx.quantize_grouped(self.x, self.groups)
        self.out = torch.empty_like(self.x)
        self.y = torch.empty(tokens, 2 * I, dtype=torch.bfloat16, device="cuda")
        size = mx.grouped_gemm_workspace_size(self.w13q, tokens)
        self.memory = torch.empty(size, dtype=torch.uint8, device="cuda")
        self.workspace = mx.MoEWorkspace(self.w13q, self.w2q, max_tokens=tokens, top_k=TOP_K)

    def forward(self, **options: Any) -> torch.Tensor:
        return mx.moe_forward(self.x, self.w13q, self.w2q, self.ids, self.weights, **options)


@pytest.fixture
def layer(rng: torch.Generator) -> Layer:
    return Layer(rng)


@contextmanager
def hooked() -> Iterator[list[str]]:
    """Names of the kernels that Triton's hooks see meanwhile."""
    names: list[str] = []

    def note(metadata: Any) -> None:
        names.append(metadata.get()["name"])

    triton.knobs.runtime.launch_enter_hook.add(note)
    try:
        yield names
    finally:
        triton.knobs.runtime.launch_enter_hook.remove(note)


def allocations(call: Callable[[], object]) -> int:
    call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    kept = call()
    del kept
    return int(torch.cuda.memory_stats()["allocation.all.allocated"] - before)


hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
PRODUCT = ["dequantize_tokens_kernel", "hopper_gemm_kernel"] if hopper else ["grouped_gemm_kernel"]


def test_what_is_launched_and_allocated(layer: Layer) -> None:
    """Nothing but the outputs, and one arena where the call needs memory of its own."""
    if torch.cuda.get_device_capability()[0] >= 10:
        pytest.skip("compute capability 10 has other kernels")
    product_allocations = 2 if hopper else 1
    counts = layer.groups.tokens_per_expert
    layered = ["rank_kernel", "quantize_kernel", *PRODUCT, "quantize_kernel", *PRODUCT, "combine_kernel"]
    calls: list[tuple[Callable[[], object], list[str], int]] = [
        (lambda: mx.quantize_grouped(layer.x, layer.groups), ["quantize_kernel"], 2),
        (lambda: mx.quantize_grouped(layer.x, layer.groups, out=layer.xq), ["quantize_kernel"], 0),
        (lambda: mx.quantize_grouped(layer.x, counts), ["quantize_kernel"], 3),
        (lambda: mx.grouped_gemm(layer.xq, layer.w13q), PRODUCT, product_allocations),
        (lambda: mx.grouped_gemm(layer.xq, layer.w13q, out=layer.y, workspace=layer.memory), PRODUCT, 0),
        (lambda: layer.forward(), layered, 2),
        (lambda: layer.forward(workspace=layer.workspace, out=layer.out), layered, 0),
    ]
    for call, names, allocated in calls:
        call()
        with hooked() as seen:
            call()
        assert seen == names
        # Where tests/support/sanitize.py makes each tensor an allocation, PyTorch counts none.
        if "PYTORCH_NO_CUDA_MEMORY_CACHING" not in os.environ:
            assert allocations(call) == allocated


def test_hooks_see_every_launch_and_then_none(layer: Layer) -> None:
    expected = layer.forward().clone()
    with hooked() as seen:
        assert torch.equal(layer.forward(), expected)
        first = len(seen)
        PLANS.clear()
        assert torch.equal(layer.forward(), expected)
    assert len(seen) == 2 * first > 0
    assert torch.equal(layer.forward(), expected)
    assert len(seen) == 2 * first


def test_without_a_launcher_triton_launches_the_same(layer: Layer, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [layer.forward(), mx.grouped_gemm(layer.xq, layer.w13q)]

    def refuse() -> None:
        raise launcher.LauncherUnavailableError("no compiler")

    from hybrid_mxfp8.triton_kernels import abi

    monkeypatch.setattr(abi, "load", refuse)
    monkeypatch.setattr(launch, "_compiled", {})
    PLANS.clear()
    for _ in range(2):
        got = [layer.forward(), mx.grouped_gemm(layer.xq, layer.w13q)]
        assert all(map(torch.equal, got, expected))
    PLANS.clear()


def test_sizes_never_seen_give_what_plans_from_scratch_give(
    layer: Layer, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(700, H, generator=rng).bfloat16().cuda()
    ids = torch.randint(-1, E, (700, TOP_K), generator=rng).cuda()
    weights = torch.rand(700, TOP_K, generator=rng).cuda()
    sizes = (512, 16, 2, 3, 17, 100, 1, 127, 128, 129, 511, 513, 700)

    def results() -> list[torch.Tensor]:
        PLANS.clear()
        given = ((x[:m], layer.w13q, layer.w2q, ids[:m], weights[:m]) for m in sizes)
        return [mx.moe_forward(*arguments) for arguments in given]

    followed = results()
    assert 0 < sum(map(len, PLANS._templates.values())) < len(sizes) - 1
    monkeypatch.setattr(plan, "MAX_TEMPLATES", 0)
    assert all(map(torch.equal, followed, results()))
    assert not PLANS._templates


def test_launches_follow_the_current_stream(layer: Layer) -> None:
    """That of the call, not of the plan's first call: behind what was queued there."""
    expected = layer.forward().clone()
    for stream in (torch.cuda.Stream(), torch.cuda.Stream()):
        x = layer.x.clone()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            layer.x.zero_()
            torch.cuda._sleep(20_000_000)
            layer.x.copy_(x)
            got = layer.forward()
        stream.synchronize()
        assert torch.equal(got, expected)


def test_the_recipe_of_cuda_graphs(layer: Layer, rng: torch.Generator) -> None:
    """Warm-up on the default stream, then on a side stream, then capture: one workspace for all."""
    layer.forward(workspace=layer.workspace)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            layer.forward(workspace=layer.workspace, out=layer.out)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layer.forward(workspace=layer.workspace, out=layer.out)
    for _ in range(3):
        layer.x.copy_(torch.randn(layer.x.shape, generator=rng))
        layer.ids.copy_(torch.randint(-1, E, layer.ids.shape, generator=rng))
        graph.replay()
        replayed = layer.out.clone()
        assert torch.equal(replayed, layer.forward(workspace=layer.workspace))


def test_a_workspace_waits_for_the_stream_of_its_last_call(layer: Layer) -> None:
    """An event, no host sync: the second stream's call reads and writes the arena only behind the
    first's."""
    expected = layer.forward().clone()
    first, second = torch.cuda.Stream(), torch.cuda.Stream()
    torch.cuda.synchronize()
    for _ in range(3):
        with torch.cuda.stream(first):
            torch.cuda._sleep(500_000_000)
            a = layer.forward(workspace=layer.workspace)
        with torch.cuda.stream(second):
            b = layer.forward(workspace=layer.workspace)
        assert not second.query(), "the host waited, or the second call did not"
        torch.cuda.synchronize()
        assert torch.equal(a, expected)
        assert torch.equal(b, expected)


def test_threads_share_plans(layer: Layer) -> None:
    """Each with buffers of its own, from threads without a CUDA context before."""
    expected = layer.forward().clone()
    failures: list[object] = []

    def work() -> None:
        try:
            for _ in range(50):
                if not torch.equal(layer.forward(), expected):
                    failures.append("another result")
        except Exception as error:  # reported below
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


@pytest.mark.parametrize("what", ["x", "values", "scales", "weights", "workspace"])
def test_memory_off_a_boundary(layer: Layer, what: str) -> None:
    """Another kernel is compiled for it, or the call is refused; never a misaligned access."""
    shift = {"x": 2, "values": 1, "scales": 4, "weights": 1, "workspace": 16}[what]

    def shifted(t: torch.Tensor) -> torch.Tensor:
        memory = torch.empty(t.nbytes + 256, dtype=torch.uint8, device="cuda")
        there = memory[shift : shift + t.nbytes].view(t.dtype).view(t.shape)
        cases.bits(there).copy_(cases.bits(t))
        return there

    expected = mx.grouped_gemm(layer.xq, layer.w13q)
    x, xq, wq = layer.x, layer.xq, layer.w13q
    if what == "x":
        got = mx.quantize_grouped(shifted(x), layer.groups)
        assert torch.equal(cases.bits(got.values), cases.bits(xq.values))
    elif what == "workspace":
        with pytest.raises(ValueError, match=r"^workspace: must start at a 256-byte boundary"):
            mx.grouped_gemm(xq, wq, workspace=shifted(torch.empty(layer.memory.numel() + 1024, dtype=torch.uint8)))
    elif what == "weights":
        other = mx.ExpertWeights(shifted(wq.values), wq.scales)
        assert float(mx.calc_diff(mx.grouped_gemm(xq, other), expected)) < 1e-9
    else:
        values = shifted(xq.values) if what == "values" else xq.values
        scales = shifted(xq.scales) if what == "scales" else xq.scales
        other_x = mx.GroupedMXFP8(values, scales, xq.groups)
        assert float(mx.calc_diff(mx.grouped_gemm(other_x, wq), expected)) < 1e-9


def _child(results: Any) -> None:
    from hybrid_mxfp8.dispatch.plan import PLANS as plans

    results.put((len(plans._plans), len(launch._compiled)))


def test_a_forked_child_has_no_plans(layer: Layer) -> None:
    layer.forward()
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    child = context.Process(target=_child, args=(results,), daemon=True)
    child.start()
    assert results.get(timeout=60) == (0, 0)
    child.join(60)
    assert torch.equal(layer.forward(), layer.forward())
