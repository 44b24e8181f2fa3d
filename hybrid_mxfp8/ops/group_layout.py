"""Layouts of ``GroupLayout.from_counts`` and ``from_ends`` on a GPU: one launch."""

from __future__ import annotations

import functools

import torch

from hybrid_mxfp8.core import layout
from hybrid_mxfp8.dispatch.buffers import metadata
from hybrid_mxfp8.dispatch.plan import PLANS, Operands, Plan, describe
from hybrid_mxfp8.dispatch.registry import choose_quantizer


def build(given: torch.Tensor, num_tokens: int, from_ends: bool) -> torch.Tensor:
    """The layout (3E+2,) int32 of checked counts or ends (E,), on their device."""
    return _run("group_offsets", {"counts": given.contiguous()}, (num_tokens,), from_ends)


def build_around(
    counts: torch.Tensor, scale_starts: torch.Tensor, num_tokens: int, num_scale_rows: int
) -> torch.Tensor:
    """The layout (3E+2,) int32 of counts (E,) whose scales start where given, of S rows."""
    read = {"tokens_per_expert": counts, "blockscale_offsets": scale_starts}
    return _run("caller_layout", read, (num_tokens, num_scale_rows))


def _run(function: str, read: dict[str, torch.Tensor], sizes: tuple[int, ...], *options: bool) -> torch.Tensor:
    """The layout that the quantizer's ``function`` writes, of (*read, layout, *sizes, *options)."""
    first = next(iter(read.values()))
    buffer = torch.empty(3 * first.shape[0] + 2, dtype=torch.int32, device=first.device)
    signature = (function, *options, *map(describe, read.values()))
    plan = PLANS.get(signature, sizes)
    if plan is None:
        without_memory = {name: metadata(tensor) for name, tensor in read.items()}
        plan = PLANS.make(signature, sizes, functools.partial(_plan, function, without_memory, options))
    plan.run(buffer, *read.values())
    return buffer


def _plan(function: str, read: dict[str, torch.Tensor], options: tuple[bool, ...], *sizes: int) -> Plan:
    first, operands = next(iter(read.values())), Operands()
    target = operands.buffer("layout", torch.int32, (3 * first.shape[0] + 2,))
    source = [operands.add(name, tensor) for name, tensor in read.items()]
    steps = getattr(choose_quantizer(first.device, "auto"), function)(*source, target, *sizes, *options)
    return Plan(first.device, operands, steps)


layout.launch = build
