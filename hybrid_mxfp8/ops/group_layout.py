"""Layouts of ``GroupLayout.from_counts`` and ``from_ends`` on a GPU: one launch."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from hybrid_mxfp8.core import layout
from hybrid_mxfp8.dispatch.backend import Steps
from hybrid_mxfp8.dispatch.buffers import metadata
from hybrid_mxfp8.dispatch.plan import PLANS, Operands, Plan, describe
from hybrid_mxfp8.dispatch.registry import choose_quantizer


def build(given: torch.Tensor, num_tokens: int, from_ends: bool) -> torch.Tensor:
    """The layout (3E+2,) int32 of checked counts or ends (E,), on their device."""
    return _run(
        {"counts": given.contiguous()},
        ("group_offsets", from_ends),
        (num_tokens,),
        lambda quantizer, target, source, t: quantizer.group_offsets(source, target, t, from_ends),
    )


def build_around(
    counts: torch.Tensor, scale_starts: torch.Tensor, num_tokens: int, num_scale_rows: int
) -> torch.Tensor:
    """The layout (3E+2,) int32 of counts (E,) whose scales start where given, of S rows."""
    return _run(
        {"tokens_per_expert": counts, "blockscale_offsets": scale_starts},
        ("caller_layout",),
        (num_tokens, num_scale_rows),
        lambda quantizer, target, counts, starts, *sizes: quantizer.caller_layout(counts, starts, target, *sizes),
    )


def _run(
    read: dict[str, torch.Tensor], key: tuple[object, ...], sizes: tuple[int, ...], steps: Callable[..., Steps]
) -> torch.Tensor:
    first = next(iter(read.values()))
    buffer = torch.empty(3 * first.shape[0] + 2, dtype=torch.int32, device=first.device)
    signature = (*key, *map(describe, read.values()))
    plan = PLANS.get(signature, sizes)
    if plan is None:
        without_memory = {name: metadata(tensor) for name, tensor in read.items()}
        plan = PLANS.make(signature, sizes, functools.partial(_plan, without_memory, steps))
    plan.run(buffer, *read.values())
    return buffer


def _plan(read: dict[str, torch.Tensor], steps: Callable[..., Steps], *sizes: int) -> Plan:
    first, operands = next(iter(read.values())), Operands()
    target = operands.buffer("layout", torch.int32, (3 * first.shape[0] + 2,))
    source = [operands.add(name, tensor) for name, tensor in read.items()]
    return Plan(first.device, operands, steps(choose_quantizer(first.device, "auto"), target, *source, *sizes))


layout.launch = build
