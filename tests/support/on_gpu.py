"""A layer on a GPU, with all that its calls read and write: for tests of what is around a call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import cases
import moe_truth
import torch

import hybrid_mxfp8 as mx


class Layer:
    """A layer with a workspace."""

    def __init__(
        self, rng: torch.Generator, tokens: int, device: str = "cuda", *, experts: int = 16, hidden: int = 256,
        intermediate: int = 128, top_k: int = 4, bias: bool = True, scale_group: int = 32,
    ) -> None:  # fmt: skip
        shape = {"experts": experts, "hidden": hidden, "intermediate": intermediate, "top_k": top_k}
        self.plain = moe_truth.make_layer(rng, tokens=tokens, **shape, bias=bias, dropped=True)
        given = moe_truth.to(self.plain, device)
        self.x, self.ids, self.weights = given.x, given.ids, given.weights
        self.bias = {"w13_bias": given.w13_bias, "w2_bias": given.w2_bias}
        self.w13q, self.w2q = (
            mx.quantize_weights(w, scale_group=scale_group, backend="triton") for w in (given.w13, given.w2)
        )
        self.workspace = self.new_workspace()
        self.out = torch.empty_like(self.x)

    def new_workspace(self) -> mx.MoEWorkspace:
        tokens, top_k = self.ids.shape
        return mx.MoEWorkspace(self.w13q, self.w2q, max_tokens=tokens, top_k=top_k, backend="triton")

    def forward(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, **options: Any) -> torch.Tensor:
        return mx.moe_forward(x, self.w13q, self.w2q, ids, weights, backend="triton", **self.bias, **options)

    def eager(self, **options: Any) -> torch.Tensor:
        """Of its own tokens."""
        return self.forward(self.x, self.ids, self.weights, **options)

    def run(self) -> None:
        self.eager(workspace=self.workspace, out=self.out)

    def computed(self, run: Callable[[], object]) -> torch.Tensor:
        """What a call leaves in ``out``."""
        self.out.fill_(float("nan"))
        run()
        torch.cuda.synchronize()
        return self.out.clone()

    def refill(self, rng: torch.Generator, spread: int) -> None:
        """Other tokens in the same memory, routed to the first ``spread`` experts, or nowhere."""
        shape = self.ids.shape
        self.x.copy_(torch.randn(self.x.shape, generator=rng))
        self.weights.copy_(torch.rand(shape, generator=rng))
        self.ids.copy_(torch.randint(0, spread, shape, generator=rng) if spread else torch.full(shape, -1))


class LayerAndProduct(Layer):
    """And a product with its first weights, of operand, output and workspace that are given."""

    def __init__(self, rng: torch.Generator, counts: Sequence[int]) -> None:
        super().__init__(rng, sum(counts), experts=len(counts), top_k=2, bias=False)
        self.groups = cases.layout(counts, device="cuda")
        self.xq = cases.poisoned_output(self.groups, self.w13q.k)
        self.y = cases.poisoned_product(sum(counts), self.w13q.n, torch.bfloat16, "cuda")
        size = mx.grouped_gemm_workspace_size(self.w13q, sum(counts), backend="triton")
        self.memory = torch.empty(size, dtype=torch.uint8, device="cuda")

    def quantize(self) -> None:
        mx.quantize_grouped(self.x, self.groups, out=self.xq, backend="triton")

    def multiply(self) -> None:
        mx.grouped_gemm(self.xq, self.w13q, out=self.y, workspace=self.memory, backend="triton")


def captured(run: Callable[[], Any], **options: Any) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of one call, which launches nothing yet, and what the call returned."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, **options):
        result = run()
    return graph, result


def allocations(run: Callable[[], object]) -> int:
    """How often a call asks PyTorch for memory on the GPU."""
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    run()
    return int(torch.cuda.memory_stats()["allocation.all.allocated"] - before)
