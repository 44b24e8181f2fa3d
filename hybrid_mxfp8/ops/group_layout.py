"""Layouts built on a GPU, in one launch: what ``GroupLayout.from_counts`` and ``from_ends`` do there."""

from __future__ import annotations

import torch

from hybrid_mxfp8.core import layout
from hybrid_mxfp8.dispatch.plan import PLANS, Operands, Plan, describe
from hybrid_mxfp8.dispatch.registry import choose_quantizer

_BUILD = object()


def build(given: torch.Tensor, num_tokens: int, from_ends: bool) -> torch.Tensor:
    """The layout (3E+2,) int32 of checked counts or ends (E,), on their device."""
    given = given.contiguous()
    num_experts = given.shape[0]
    buffer = torch.empty(3 * num_experts + 2, dtype=torch.int32, device=given.device)
    signature = (_BUILD, describe(given), num_tokens, from_ends)
    plan = PLANS.get(signature)
    if plan is None:
        operands = Operands()
        source = operands.add("counts", given)
        target = operands.add("layout", buffer, written=True)
        quantizer = choose_quantizer(given.device, "auto")
        steps = quantizer.group_offsets(source, target, num_tokens, from_ends, given.device)
        plan = Plan(given.device, operands, steps)
        PLANS.add(signature, plan)
    plan.run(given, buffer)
    return buffer


layout.launch_with(build)
