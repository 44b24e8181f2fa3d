"""The kernels, launched one by one on given tensors, where public functions do not reach.

The one place that knows how their launches are described.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

import hybrid_mxfp8 as mx
from hybrid_mxfp8.core.activation import SwiGLU
from hybrid_mxfp8.dispatch.backend import Steps
from hybrid_mxfp8.dispatch.plan import Operands
from hybrid_mxfp8.dispatch.problem import GemmBuffers, Problem, QuantizeBuffers, QuantizeProblem
from hybrid_mxfp8.triton_kernels import group_layout
from hybrid_mxfp8.triton_kernels import quantize as quantizer
from hybrid_mxfp8.triton_kernels.gemm import dequantize_tokens as dequantizer
from hybrid_mxfp8.triton_kernels.gemm.hopper_config import TILE_WORDS, WorkspaceLayout
from hybrid_mxfp8.triton_kernels.moe import combine as combiner
from hybrid_mxfp8.triton_kernels.moe import pack_tokens as packer
from hybrid_mxfp8.triton_kernels.moe import route as router
from hybrid_mxfp8.triton_kernels.moe.expert_bias import add_expert_bias as add_expert_bias_steps


def launch(steps: Callable[..., Steps], *tensors: torch.Tensor | None) -> None:
    """Run what ``steps`` makes of the tensors' buffers."""
    buffers, given = _buffers(tensors)
    for step in steps(*buffers):
        step.run(given, given[0].device)


def steps_of(steps: Callable[..., Steps], *tensors: torch.Tensor | None) -> Steps:
    """What ``steps`` makes of the tensors' buffers, not run."""
    return steps(*_buffers(tensors)[0])


def _buffers(tensors: Sequence[torch.Tensor | None]) -> tuple[list[Any], list[torch.Tensor]]:
    operands = Operands()
    buffers = [None if t is None else operands.add("tensor", t) for t in tensors]
    return buffers, [t for t in tensors if t is not None]


def quantize_steps(
    x: torch.Tensor, groups: mx.GroupLayout | torch.Tensor, values: torch.Tensor, scales: torch.Tensor,
    rounding: str = "rceil", row_index: torch.Tensor | None = None, swiglu: SwiGLU | None = None,
    scale_group: int = 32, x_scales: torch.Tensor | None = None,
    choices: tuple[torch.Tensor, torch.Tensor] = (None, None),
) -> tuple[Any, ...]:  # fmt: skip
    """(function of buffers, *tensors): of a layout; or of counts (E,), which the kernel scans
    itself. ``choices`` are the rows of tokens' choices, and their experts."""
    rows, k = values.shape
    counts = layout = expert_offsets = scale_offsets = None
    if isinstance(groups, mx.GroupLayout):
        expert_offsets, scale_offsets, experts = groups.expert_offsets, groups.scale_offsets, groups.num_experts
    else:
        counts, experts = groups, groups.shape[0]
        layout = torch.empty(3 * experts + 2, dtype=torch.int32, device=x.device)
    problem = QuantizeProblem(
        rows, experts, k, x.shape[0], x.stride(0), rounding, swiglu, "offsets" if counts is None else "counts",
        scale_group=scale_group, scale_stride=0 if x_scales is None else x_scales.stride(0),
    )  # fmt: skip
    tensors = (x, values, scales, row_index, expert_offsets, scale_offsets, counts, layout, *choices, x_scales)
    return lambda *buffers: quantizer.quantize(problem, QuantizeBuffers(*buffers)), *tensors


def pack_tokens(
    x: torch.Tensor, ids: torch.Tensor | None, weights: torch.Tensor | None, records: torch.Tensor, experts: int,
    scale_group: int = 32,
) -> None:  # fmt: skip
    def steps(x_: Any, ids_: Any, weights_: Any, records_: Any) -> Steps:
        return packer.pack_tokens(x_, x.stride(0), ids_, weights_, records_, experts, scale_group)

    launch(steps, x, ids, weights, records)


def quantize_weights_steps(
    w: torch.Tensor, values: torch.Tensor, scales: torch.Tensor, rounding: str = "rceil", scale_group: int = 32
) -> tuple[Any, ...]:
    experts, n, k = w.shape
    rows = experts * n
    sizes = (rows, experts, k, rows, w.stride(1))
    problem = QuantizeProblem(*sizes, rounding, None, "uniform", w.stride(0), scale_group)
    return lambda *buffers: quantizer.quantize(problem, QuantizeBuffers(*buffers)), w, values, scales


Layout = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Tokens (E,), their offsets (E+1,) and those of their scales (E+1,)."""


def group_offsets(given: torch.Tensor, num_tokens: int, from_ends: bool = False) -> Layout:
    return _layout(lambda a, b: group_layout.group_offsets(a, b, num_tokens, from_ends), given.contiguous())


def caller_layout(tokens: torch.Tensor, starts: torch.Tensor, num_tokens: int, rows: int) -> Layout:
    return _layout(lambda a, b, c: group_layout.caller_layout(a, b, c, num_tokens, rows), tokens, starts)


def _layout(steps: Callable[..., Steps], *given: torch.Tensor) -> Layout:
    experts = given[0].shape[0]
    layout = torch.empty(3 * experts + 2, dtype=torch.int32, device=given[0].device)
    launch(steps, *given, layout)
    tokens, offsets, scale_offsets = layout.split((experts, experts + 1, experts + 1))
    return tokens, offsets, scale_offsets


def product_steps(
    plan: Callable[..., Steps], x: mx.GroupedMXFP8, w: mx.ExpertWeights, out: torch.Tensor, *options: Any,
    workspace: torch.Tensor | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    experts, n, k = w.values.shape
    problem = Problem(experts, n, k, x.groups.num_tokens, out.dtype, out.device)
    g = x.groups
    layout = (g.tokens_per_expert, g.expert_offsets, g.scale_offsets)
    tensors = (x.values, x.scales, *layout, w.values, w.scales, out, workspace)
    return lambda *buffers: plan(problem, GemmBuffers(*buffers), *options), *tensors


def meta_operands(
    t: int, n: int, k: int, e: int, dtype: torch.dtype
) -> tuple[mx.GroupedMXFP8, mx.ExpertWeights, torch.Tensor]:
    """Operands and output of a product, without memory: for compiling."""
    with torch.device("meta"):
        x = mx.quantize_grouped(torch.empty(t, k), torch.empty(e, dtype=torch.int32))
        return x, mx.quantize_weights(torch.empty(e, n, k)), torch.empty(t, n, dtype=dtype)


def product(*arguments: Any, **options: Any) -> None:
    """As :func:`product_steps`, run."""
    launch(*product_steps(*arguments, **options))


def dequantize_tokens(x: mx.GroupedMXFP8, workspace: torch.Tensor, layout: Any, block_t: int, rows: int) -> None:
    offsets = x.groups.expert_offsets, x.groups.scale_offsets

    def steps(*buffers: Any) -> Steps:
        memory, experts = buffers[-1], x.groups.num_experts
        return (dequantizer.dequantize_tokens(GemmBuffers(*buffers), memory, layout, experts, block_t, rows),)

    launch(steps, x.values, x.scales, None, *offsets, None, None, None, workspace)


scratch_elements = router.scratch_elements


def route(
    ids: torch.Tensor, experts: int, inverse_permutation: torch.Tensor, layout: torch.Tensor, scratch: torch.Tensor
) -> None:
    launch(lambda *buffers: router.route(*buffers, experts), ids, inverse_permutation, layout, scratch)


def add_expert_bias(y: torch.Tensor, inverse_permutation: torch.Tensor, ids: torch.Tensor, bias: torch.Tensor) -> None:
    launch(add_expert_bias_steps, y, inverse_permutation, ids, bias)


def combine(
    y: torch.Tensor, inverse_permutation: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor,
    bias: torch.Tensor | None, out: torch.Tensor,
) -> None:  # fmt: skip
    launch(lambda *buffers: combiner.combine(*buffers, out.stride(0)), y, inverse_permutation, ids, weights, bias, out)


def hopper_workspace(layout: WorkspaceLayout, workspace: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The list of token tiles (1 + max_tiles, 4), and the expanded tokens (T, padded_k); views."""
    words = workspace[: (1 + layout.max_tiles) * TILE_WORDS * 4].view(torch.int32).view(-1, TILE_WORDS)
    expanded = workspace[layout.tokens_at : layout.size].view(torch.bfloat16).view(layout.num_tokens, layout.padded_k)
    return words, expanded
