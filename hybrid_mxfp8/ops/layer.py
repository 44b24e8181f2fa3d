"""The plan of an MoE layer: its steps one after another, with all intermediates in one arena.

    topk_ids ──route──► inverse_permutation, the rows' layout
    x ──quantize (each token once)──► xq ──grouped GEMM, w13──► h = [gate | up]   (+ w13_bias)
    h ──quantize (swiglu)──► hq ──grouped GEMM, w2───► y
    y, topk_weights, w2_bias ──combine──► out

Tokens that come in MXFP8 are copied, not quantized. Intermediates are offsets in the arena, never
tensors: making a view costs the host more than an allocation.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from hybrid_mxfp8.core.activation import SwiGLU
from hybrid_mxfp8.core.checks import check_n, fail
from hybrid_mxfp8.core.formats import BLOCK_SIZE, MAX_INT32, grouped_scale_rows, round_up, scale_cols
from hybrid_mxfp8.core.operands import ExpertWeights, MXFP8Tokens, check_weights
from hybrid_mxfp8.dispatch.backend import Quantizer
from hybrid_mxfp8.dispatch.buffers import Buffer, with_rows
from hybrid_mxfp8.dispatch.plan import ALIGNMENT, Operands, Plan
from hybrid_mxfp8.dispatch.problem import GemmBuffers, Problem, QuantizeBuffers, QuantizeProblem, split_layout
from hybrid_mxfp8.dispatch.registry import Ready, choose_quantizer, choose_ready


class MoEShape(NamedTuple):
    """What an MoE layer's intermediates depend on, except the number of tokens: tokens are (M, H),
    the weights (E, 2I, H) and (E, H, I)."""

    experts: int
    hidden: int  # H
    intermediate: int  # I
    top_k: int
    dtype: torch.dtype  # of the tokens
    device: torch.device
    scale_groups: tuple[int, int] = (BLOCK_SIZE, BLOCK_SIZE)  # of x and w13; of the activation and w2
    squares: tuple[bool, bool] = (False, False)  # whether w13, and w2, have one scale for 128x128

    def problems(self, num_tokens: int) -> tuple[Problem, Problem]:
        """The two products for M = ``num_tokens``."""

        def product(n: int, k: int, i: int) -> Problem:
            rows, scaling = num_tokens * self.top_k, (self.scale_groups[i], self.squares[i])
            return Problem(self.experts, n, k, rows, self.dtype, self.device, *scaling)

        return product(2 * self.intermediate, self.hidden, 0), product(self.hidden, self.intermediate, 1)


def shape_of(w13q: ExpertWeights, w2q: ExpertWeights, top_k: int, dtype: torch.dtype) -> MoEShape:
    """The shape of a layer, whose weights must fit together, on one device, with E >= 1."""
    for name, w in (("w13q", w13q), ("w2q", w2q)):
        if not isinstance(w, ExpertWeights):
            raise TypeError(f"{name}: must be an ExpertWeights (from quantize_weights), got {type(w).__name__}")
        check_weights(w.values, w.scales, f"{name}.")  # buffers of a module may have been replaced
    experts, hidden, intermediate = w2q.values.shape
    if not experts:
        fail("w13q", "must have at least 1 expert", 0)
    if w13q.values.shape != (experts, 2 * intermediate, hidden):
        given = tuple(w13q.values.shape)
        if given == (experts, 2 * hidden, intermediate):
            expected = (experts, intermediate, hidden)
            fail("w2q", f"must be (E, H, I) = {expected}, as w13q is (E, 2I, H) (transposed?)", tuple(w2q.values.shape))
        one, both = (experts, hidden, 2 * intermediate), (experts, intermediate, 2 * hidden)
        hint = " (transposed?)" if given in (one, both) else ""
        expected = (experts, 2 * intermediate, hidden)
        fail("w13q", f"must be (E, 2I, H) = {expected}, as w2q is (E, H, I){hint}", given)
    check_n("w13q", 2 * intermediate)
    check_n("w2q", hidden)
    if w2q.values.device != w13q.values.device:
        fail("w2q", f"must be on {w13q.values.device}, as w13q", w2q.values.device)
    scaling = (w13q.scale_group, w2q.scale_group), (w13q.squares, w2q.squares)
    return MoEShape(experts, hidden, intermediate, top_k, dtype, w2q.values.device, *scaling)


def check_rows(name: str, shape: MoEShape, num_tokens: int) -> None:
    """Check that the rows of M = ``num_tokens``, padded to scale tiles, fit int32."""
    rows = num_tokens * shape.top_k
    if grouped_scale_rows(rows, shape.experts) > MAX_INT32:
        fail(name, "M * top_k, and each expert's padding, must fit int32", rows)


def choose_backends(shape: MoEShape, num_tokens: int, backend: str | None) -> tuple[Quantizer, Ready, Ready]:
    """The quantizer, and the backends of both products; raises as ``registry.choose``."""
    up, down = (choose_ready(problem, backend) for problem in shape.problems(num_tokens))
    return choose_quantizer(shape.device, backend), up, down


class Arena(NamedTuple):
    """Where the intermediates of M tokens lie; T = M * top_k rows, sorted by expert."""

    inverse_permutation: Buffer  # (M, top_k) int32, the row of each choice of each token
    layout: Buffer  # (3E+2,) int32, the rows' layout
    scratch: Buffer  # int32, of the routing kernels
    xq: tuple[Buffer, Buffer]  # tokens in MXFP8: values (T, H), scales (S, H/32)
    h: Buffer  # (T, 2I), gate and up
    hq: tuple[Buffer, Buffer]  # the activation in MXFP8: values (T, I), scales (S, I/32)
    y: Buffer  # (T, H), the experts' outputs
    workspace: Buffer | None  # uint8, of both products
    size: int  # bytes


def arena(shape: MoEShape, num_tokens: int, quantizer: Quantizer, up: Ready, down: Ready) -> Arena:
    """The places of the intermediates of M = ``num_tokens`` >= 1 in a plan's first operand."""
    rows = num_tokens * shape.top_k
    scale_rows = grouped_scale_rows(rows, shape.experts)
    size = 0

    def place(dtype: torch.dtype, *extents: int) -> Buffer:
        nonlocal size
        buffer = Buffer(0, size, dtype, extents)
        size = round_up(size + math.prod(extents) * dtype.itemsize, ALIGNMENT)
        return buffer

    def operand(k: int) -> tuple[Buffer, Buffer]:
        return place(torch.float8_e4m3fn, rows, k), place(torch.uint8, scale_rows, scale_cols(k))

    int32 = torch.int32
    gemm_bytes = max(up.workspace_bytes, down.workspace_bytes)
    return Arena(
        inverse_permutation=place(int32, num_tokens, shape.top_k),
        layout=place(int32, 3 * shape.experts + 2),
        scratch=place(int32, quantizer.route_scratch(rows, shape.experts)),
        xq=operand(shape.hidden),
        h=place(shape.dtype, rows, 2 * shape.intermediate),
        hq=operand(shape.intermediate),
        y=place(shape.dtype, rows, shape.hidden),
        workspace=place(torch.uint8, gemm_bytes) if gemm_bytes else None,
        size=size,
    )


class LayerInputs(NamedTuple):
    """What a layer reads, by the names that users know."""

    x: torch.Tensor | MXFP8Tokens
    w13q: ExpertWeights
    w2q: ExpertWeights
    topk_ids: torch.Tensor
    topk_weights: torch.Tensor
    w13_bias: torch.Tensor | None
    w2_bias: torch.Tensor | None


def rows_and_scales(x: torch.Tensor | MXFP8Tokens) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The rows of tokens, and the scales of those in MXFP8."""
    return (x.values, x.scales) if isinstance(x, MXFP8Tokens) else (x, None)


def tensors_of(inputs: LayerInputs) -> list[torch.Tensor]:
    """All that a layer reads, in the order of :func:`plan_layer`'s operands."""
    x, w13q, w2q, topk_ids, topk_weights, w13_bias, w2_bias = inputs
    rows, x_scales = rows_and_scales(x)
    tensors = [rows, w13q.values, w13q.scales, w2q.values, w2q.scales, topk_ids, topk_weights]
    if w13_bias is not None:
        tensors.append(w13_bias)
    if w2_bias is not None:
        tensors.append(w2_bias)
    if x_scales is not None:
        tensors.append(x_scales)
    return tensors


def plan_layer(
    inputs: LayerInputs, shape: MoEShape, activation: SwiGLU, out: Any, backend: str | None, num_tokens: int
) -> Plan:
    """Plan one layer for M = ``num_tokens`` in place of the M of ``inputs`` and ``out``, which are
    Metadata. It runs with the arena, the output, and :func:`tensors_of` its inputs."""
    check_rows("x", shape, num_tokens)
    quantizer, up_ready, down_ready = choose_backends(shape, num_tokens, backend)
    a = arena(shape, num_tokens, quantizer, up_ready, down_ready)
    operands = Operands()
    operands.buffer("workspace", torch.uint8, (a.size,))
    rows, linear_scales = rows_and_scales(with_rows(inputs.x, num_tokens))
    # ``out`` may be x itself, operand 2, which is read before anything is written; no part of it.
    same_rows = linear_scales is None and rows.stride() == out.stride()
    y = operands.add("out", with_rows(out, num_tokens), written=True, may_equal=2 if same_rows else -1)
    x = operands.add("x", rows)
    w13 = operands.add("w13q.values", inputs.w13q.values), operands.add("w13q.scales", inputs.w13q.scales)
    w2 = operands.add("w2q.values", inputs.w2q.values), operands.add("w2q.scales", inputs.w2q.scales)
    ids = operands.add("topk_ids", with_rows(inputs.topk_ids, num_tokens))
    weights = operands.add("topk_weights", with_rows(inputs.topk_weights, num_tokens))
    up_bias = None if inputs.w13_bias is None else operands.add("w13_bias", inputs.w13_bias)
    down_bias = None if inputs.w2_bias is None else operands.add("w2_bias", inputs.w2_bias)
    x_scales = None if linear_scales is None else operands.add("x.scales", linear_scales)

    up, down = shape.problems(num_tokens)
    layout = split_layout(a.layout, shape.experts)
    offsets, sizes = layout[1:], (up.num_tokens, shape.experts)
    spread = QuantizeProblem(*sizes, up.k, num_tokens, rows.stride(0), "rceil", scale_group=up.scale_group)
    if linear_scales is not None:
        spread = spread._replace(scale_stride=linear_scales.stride(0))
    activate = QuantizeProblem(*sizes, down.k, up.num_tokens, up.n, "rceil", activation, scale_group=down.scale_group)
    tokens = QuantizeBuffers(x, *a.xq, None, *offsets, rows=a.inverse_permutation, ids=ids, x_scales=x_scales)
    steps = (
        *quantizer.route(ids, a.inverse_permutation, a.layout, a.scratch, shape.experts),
        *quantizer.quantize(spread, tokens),
        *up_ready.backend.plan(up, GemmBuffers(*a.xq, *layout, *w13, a.h, a.workspace)),
        *(quantizer.add_expert_bias(a.h, a.inverse_permutation, ids, up_bias) if up_bias else ()),
        *quantizer.quantize(activate, QuantizeBuffers(a.h, *a.hq, None, *offsets)),
        *down_ready.backend.plan(down, GemmBuffers(*a.hq, *layout, *w2, a.y, a.workspace)),
        *quantizer.combine(a.y, a.inverse_permutation, ids, weights, down_bias, y, out.stride(0)),
    )
    cacheable = up_ready.cacheable and down_ready.cacheable
    return Plan(shape.device, operands, steps, result=(a.size,), cacheable=cacheable)
