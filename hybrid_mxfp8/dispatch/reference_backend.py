"""The reference as a backend and a quantizer, so that calls can be compared with it by name."""

from __future__ import annotations

import torch

from hybrid_mxfp8 import reference
from hybrid_mxfp8.core import layout as core_layout
from hybrid_mxfp8.core.activation import SwiGLU
from hybrid_mxfp8.dispatch.backend import Call, Quantizer, Steps
from hybrid_mxfp8.dispatch.buffers import Buffer
from hybrid_mxfp8.dispatch.problem import (
    GemmBuffers,
    Problem,
    QuantizeBuffers,
    QuantizeProblem,
    Support,
    split_layout,
)
from hybrid_mxfp8.reference import routing


class ReferenceBackend:
    """The product in PyTorch, float64."""

    name = "reference"
    about = "plain PyTorch in float64, any device; syncs"

    def made_for(self, device: torch.device) -> bool:
        """Every device."""
        return True

    def available(self, device: torch.device) -> Support:
        """Always."""
        return True, "always"

    def can_run(self, problem: Problem) -> Support:
        """Always."""
        return True, "always"

    def workspace_size(self, problem: Problem) -> int:
        """None: PyTorch allocates."""
        return 0

    def workspace_bound(self, problem: Problem) -> int:
        """None."""
        return 0

    def plan(self, problem: Problem, buffers: GemmBuffers) -> Steps:
        """One call."""
        b = buffers
        operands = (b.x_values, b.x_scales, b.expert_offsets, b.scale_offsets, b.w_values, b.w_scales, b.out)
        return (Call(reference.grouped_matmul, operands),)

    def explain(self, problem: Problem) -> str:
        """There is one way only."""
        return "one float64 matmul an expert"


def _quantize(problem: QuantizeProblem, buffers: QuantizeBuffers) -> Steps:
    p, b = problem, buffers
    if p.grouping == "uniform":
        return (Call(_quantize_weights, (b.x, b.values, b.scales, p.scale_rounding)),)
    steps: Steps = ()
    expert_offsets, scale_offsets = b.expert_offsets, b.scale_offsets
    if p.grouping == "counts":
        assert b.counts is not None
        assert b.layout is not None
        _, expert_offsets, scale_offsets = split_layout(b.layout, p.num_experts)
        steps = _group_offsets(b.counts, b.layout, p.num_rows, False, p.device)
    rows = (b.x, b.row_index, expert_offsets, scale_offsets)
    return *steps, Call(_quantize_rows, (*rows, b.values, b.scales, p.scale_rounding, p.activation))


def _quantize_rows(
    x: torch.Tensor,
    row_index: torch.Tensor | None,
    expert_offsets: torch.Tensor,
    scale_offsets: torch.Tensor,
    values: torch.Tensor,
    scales: torch.Tensor,
    scale_rounding: str,
    activation: SwiGLU | None,
) -> None:
    if row_index is not None:
        inside = (row_index >= 0) & (row_index < x.shape[0])
        rows = x[torch.where(inside, row_index, 0)] if x.shape[0] else x.new_zeros(row_index.shape[0], x.shape[1])
        x = torch.where(inside.unsqueeze(1), rows, 0)
    codes, linear = reference.quantize(x if activation is None else reference.swiglu(x, activation), scale_rounding)
    reference.write_grouped(codes, linear, expert_offsets, scale_offsets, values, scales)


def _quantize_weights(w: torch.Tensor, values: torch.Tensor, scales: torch.Tensor, scale_rounding: str) -> None:
    # One expert at a time: fp32 copies of all weights would be several times their size.
    for e in range(w.shape[0]):
        codes, linear = reference.quantize(w[e], scale_rounding)
        values[e].view(torch.uint8).copy_(codes.view(torch.uint8))
        scales[e] = reference.swizzle_scales(linear)


def _group_offsets(given: Buffer, layout: Buffer, num_tokens: int, from_ends: bool, device: torch.device) -> Steps:
    def write(given: torch.Tensor, layout: torch.Tensor) -> None:
        layout.copy_(torch.cat(core_layout.group_offsets(given, num_tokens, from_ends)))

    return (Call(write, (given, layout)),)


def _caller_layout(
    counts: Buffer,
    scale_starts: Buffer,
    layout: Buffer,
    num_tokens: int,
    num_scale_rows: int,
    device: torch.device,
) -> Steps:
    def write(counts: torch.Tensor, scale_starts: torch.Tensor, layout: torch.Tensor) -> None:
        layout.copy_(torch.cat(core_layout.caller_offsets(counts, scale_starts, num_tokens, num_scale_rows)))

    return (Call(write, (counts, scale_starts, layout)),)


def _route(
    topk_ids: Buffer,
    sorted_token_ids: Buffer,
    inverse_permutation: Buffer,
    layout: Buffer,
    scratch: Buffer,
    num_experts: int,
    device: torch.device,
) -> Steps:
    return (Call(routing.route, (topk_ids, num_experts, sorted_token_ids, inverse_permutation, layout)),)


def _add_expert_bias(
    y: Buffer, inverse_permutation: Buffer, topk_ids: Buffer, bias: Buffer, device: torch.device
) -> Steps:
    return (Call(routing.add_expert_bias, (y, inverse_permutation, topk_ids, bias)),)


def _combine(
    y: Buffer,
    inverse_permutation: Buffer,
    topk_ids: Buffer,
    topk_weights: Buffer,
    bias: Buffer | None,
    out: Buffer,
    out_stride: int,
    device: torch.device,
) -> Steps:
    return (Call(routing.combine, (y, inverse_permutation, topk_ids, topk_weights, bias, out)),)


BACKEND = ReferenceBackend()
QUANTIZER = Quantizer(
    name="reference",
    available=lambda device: (True, "always"),
    quantize=_quantize,
    group_offsets=_group_offsets,
    caller_layout=_caller_layout,
    route=_route,
    route_scratch=lambda num_slots, num_experts: 0,
    add_expert_bias=_add_expert_bias,
    combine=_combine,
)
