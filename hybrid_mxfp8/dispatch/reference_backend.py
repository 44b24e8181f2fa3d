"""The reference as a backend and a quantizer, so that calls can be compared with it by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from hybrid_mxfp8 import reference
from hybrid_mxfp8.core.layout import caller_offsets, group_offsets
from hybrid_mxfp8.dispatch.backend import Backend, Call, Quantizer, Steps
from hybrid_mxfp8.dispatch.buffers import Buffer
from hybrid_mxfp8.dispatch.problem import GemmBuffers, Problem, QuantizeBuffers, QuantizeProblem, split_layout


def _step(function: Callable[..., None], *arguments: Any) -> Steps:
    return (Call(function, arguments),)


def _plan(problem: Problem, buffers: GemmBuffers) -> Steps:
    b = buffers
    operands = (b.x_values, b.x_scales, b.expert_offsets, b.scale_offsets, b.w_values, b.w_scales, b.out)
    return _step(reference.grouped_matmul, *operands)


def _quantize(problem: QuantizeProblem, buffers: QuantizeBuffers) -> Steps:
    p, b = problem, buffers
    if p.grouping == "uniform":
        return _step(reference.quantize_weights, b.x, b.values, b.scales, p.scale_rounding, p.scale_group)
    steps: Steps = ()
    expert_offsets, scale_offsets = b.expert_offsets, b.scale_offsets
    if p.grouping == "counts":
        assert b.counts is not None
        assert b.layout is not None
        _, expert_offsets, scale_offsets = split_layout(b.layout, p.num_experts)
        steps = _write_layout(group_offsets, b.layout, b.counts, p.num_rows, False)
    target = (expert_offsets, scale_offsets, b.values, b.scales)
    if b.rows is not None:
        return _step(reference.spread_tokens, b.x, b.x_scales, b.rows, p.scale_rounding, p.scale_group, *target)
    source = (b.x, b.row_index, p.scale_rounding, p.scale_group, p.activation)
    return steps + _step(reference.quantize_rows, *source, *target)


def _write_layout(offsets: Callable[..., Iterable[torch.Tensor]], layout: Buffer, *given: Any) -> Steps:
    def write(layout: torch.Tensor, *given: Any) -> None:
        layout.copy_(torch.cat([*offsets(*given)]))

    return _step(write, layout, *given)


BACKEND = Backend(
    name="reference",
    made_for=lambda device: True,
    available=lambda device: (True, "always"),
    can_run=lambda problem: (True, "always"),
    workspace_size=lambda problem: 0,
    workspace_bound=lambda problem: 0,
    plan=_plan,
    explain=lambda problem: "one float64 matmul an expert",
)
QUANTIZER = Quantizer(
    name="reference",
    quantize=_quantize,
    group_offsets=lambda given, layout, *rest: _write_layout(group_offsets, layout, given, *rest),
    caller_layout=lambda counts, starts, layout, *rest: _write_layout(caller_offsets, layout, counts, starts, *rest),
    pack_tokens=lambda x, stride, *given: _step(reference.pack_tokens, x, *given),
    route=lambda ids, inverse, layout, scratch, experts: _step(reference.route, ids, experts, inverse, layout),
    route_scratch=lambda choices, experts: 0,
    add_expert_bias=lambda *given: _step(reference.add_expert_bias, *given),
    combine=lambda *given: _step(reference.combine, *given[:-1]),  # all but the stride of ``out``
)
