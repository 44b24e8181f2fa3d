"""MoE layers whose buffers come again, on a GPU: they repeat all of their launches, and compute what a first call does."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import cases
import moe_truth
import pytest
import torch
import triton

import hybrid_mxfp8 as mx

pytestmark = pytest.mark.gpu

EXPERTS, HIDDEN, INTERMEDIATE, TOP_K = 16, 512, 256, 4
MIN_SNR_DB = 23.0
"""As ``moe_forward`` documents, with room: 23.6 to 23.8 dB measured."""


class Buffers:
    """A layer, with all that calls of it read and write."""

    def __init__(self, rng: torch.Generator, tokens: int) -> None:
        self.truth = self._layer(rng, tokens)
        self.given = moe_truth.to(self.truth, "cuda")
        self.w13q, self.w2q = (mx.quantize_weights(w, backend="triton") for w in (self.given.w13, self.given.w2))
        self.out = torch.empty_like(self.given.x)
        self.workspace = mx.MoEWorkspace(self.w13q, self.w2q, max_tokens=tokens, top_k=TOP_K, backend="triton")

    @staticmethod
    def _layer(rng: torch.Generator, tokens: int) -> moe_truth.Layer:
        shape = {"experts": EXPERTS, "hidden": HIDDEN, "intermediate": INTERMEDIATE, "top_k": TOP_K}
        return moe_truth.make_layer(rng, tokens=tokens, **shape, bias=True, dropped=True)

    def run(self, tokens: int | None = None) -> torch.Tensor:
        given, rows = self.given, slice(tokens)
        return mx.moe_forward(
            given.x[rows],
            self.w13q,
            self.w2q,
            given.ids[rows],
            given.weights[rows],
            w13_bias=given.w13_bias,
            w2_bias=given.w2_bias,
            workspace=self.workspace,
            backend="triton",
            out=self.out[rows],
        )

    def refill(self, rng: torch.Generator) -> None:
        """Other numbers and other choices, in the same memory."""
        self.truth = self._layer(rng, self.out.shape[0])
        for name, tensor in vars(self.truth).items():
            getattr(self.given, name).copy_(tensor)
        for wq, w in ((self.w13q, self.given.w13), (self.w2q, self.given.w2)):
            new = mx.quantize_weights(w, backend="reference")
            wq.values.view(torch.uint8).copy_(new.values.view(torch.uint8))
            wq.scales.copy_(new.scales)

    def computed(self, run: Callable[[], object]) -> torch.Tensor:
        self.out.fill_(float("nan"))
        run()
        torch.cuda.synchronize()
        return self.out.clone()

    def anew(self) -> torch.Tensor:
        """By the long way, in memory that no other call has seen."""
        cases.forget_calls()
        self.workspace = mx.MoEWorkspace(
            self.w13q, self.w2q, max_tokens=self.out.shape[0], top_k=TOP_K, backend="triton"
        )
        return self.computed(self.run)


def warm(buffers: Buffers, long_way: list[str]) -> torch.Tensor:
    """Called until it repeats."""
    first = buffers.computed(buffers.run)
    assert torch.equal(buffers.computed(buffers.run), first)
    assert long_way
    long_way.clear()
    assert torch.equal(buffers.computed(buffers.run), first)
    assert long_way == []
    return first


def check(y: torch.Tensor, buffers: Buffers) -> None:
    assert mx.signal_to_noise_db(moe_truth.forward(buffers.truth), y.cpu()) > MIN_SNR_DB


def kernels(kernel: str, tokens: int) -> list[str]:
    route = ["rank_kernel"] if tokens * TOP_K <= 4096 else ["count_kernel", "sum_kernel", "scatter_kernel"]
    product = ["dequantize_tokens_kernel", "hopper_gemm_kernel"] if kernel == "hopper" else ["grouped_gemm_kernel"]
    products = [*product, "expert_bias_kernel", "quantize_kernel", *product]
    return [*route, "quantize_kernel", *products, "combine_kernel"]


@pytest.mark.parametrize("tokens", [1, 40, 1100])
def test_what_is_repeated_is_the_same(kernel: str, tokens: int, long_way: list[str], rng: torch.Generator) -> None:
    """And follows its operands: all of them overwritten, the repeated launches compute what first ones do."""
    buffers = Buffers(rng, tokens)
    first = warm(buffers, long_way)
    buffers.refill(rng)
    second = buffers.computed(buffers.run)
    assert long_way == []
    assert not torch.equal(second, first)
    check(second, buffers)
    assert torch.equal(buffers.anew(), second)
    assert long_way == kernels(kernel, tokens)


def test_batch_sizes_take_turns(kernel: str, long_way: list[str], rng: torch.Generator) -> None:
    buffers = Buffers(rng, 40)
    sizes = (1, 17, 40)
    for _ in range(2):
        first = {size: buffers.computed(functools.partial(buffers.run, size))[:size] for size in sizes}
    assert long_way
    long_way.clear()
    truth = moe_truth.forward(buffers.truth)
    for size in (*sizes[::-1], *sizes):
        y = buffers.computed(functools.partial(buffers.run, size))
        assert torch.equal(y[:size], first[size])
        assert mx.signal_to_noise_db(truth[:size], y[:size].cpu()) > MIN_SNR_DB
        assert bool(y[size:].isnan().all())
    assert long_way == []


def test_in_a_graph(kernel: str, long_way: list[str], rng: torch.Generator) -> None:
    """Repeated launches are captured like others, and replay over whatever the buffers hold then."""
    buffers = Buffers(rng, 40)
    first = warm(buffers, long_way)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        buffers.run()
    assert long_way == []
    assert torch.equal(buffers.computed(graph.replay), first)
    buffers.refill(rng)
    second = buffers.computed(graph.replay)
    check(second, buffers)
    assert torch.equal(buffers.anew(), second)


def test_the_stream_must_own_the_workspace(kernel: str, long_way: list[str], rng: torch.Generator) -> None:
    buffers = Buffers(rng, 40)
    first = warm(buffers, long_way)
    stream = torch.cuda.Stream()
    buffers.out.fill_(float("nan"))
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        with pytest.raises(ValueError, match=r"^workspace: must be used on one stream"):
            buffers.run()
        buffers.workspace.move_to_current_stream()
        torch.cuda._sleep(300_000_000)
        buffers.run()
    assert long_way == []
    assert bool(buffers.out.isnan().all()), "the launches did not wait for their stream"
    stream.synchronize()
    assert torch.equal(buffers.out, first)


def test_hooks_see_every_launch(kernel: str, long_way: list[str], rng: torch.Generator) -> None:
    buffers = Buffers(rng, 40)
    first = warm(buffers, long_way)
    seen: list[str] = []

    def hook(metadata: Any) -> None:
        seen.append(metadata.get()["name"])

    hooks: Any = triton.knobs.runtime.launch_enter_hook
    hooks.add(hook)
    try:
        assert torch.equal(buffers.computed(buffers.run), first)
    finally:
        hooks.remove(hook)
    assert seen == long_way == kernels(kernel, 40)
    long_way.clear()
    assert torch.equal(buffers.computed(buffers.run), first)
    assert long_way == []


def test_a_module_allocates_its_output_alone(kernel: str, long_way: list[str], rng: torch.Generator) -> None:
    """Whose memory comes again once the caller lets it go."""
    buffers = Buffers(rng, 40)
    given = buffers.given
    module = mx.MXFP8Experts(
        buffers.w13q,
        buffers.w2q,
        w13_bias=given.w13_bias,
        w2_bias=given.w2_bias,
        workspace=buffers.workspace,
        backend="triton",
    )
    for _ in range(4):
        module(given.x, given.ids, given.weights)
    long_way.clear()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    y = module(given.x, given.ids, given.weights)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] - before == 1
    assert long_way == []
    check(y, buffers)
