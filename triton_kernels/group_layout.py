"""Layouts of rows grouped by expert, on the device: from counts, from ends, or around given scale
positions.

A layout is one buffer (3E+2,) int32: tokens (E,), expert offsets (E+1,), scale offsets (E+1,). One
program scans all experts. Whatever the counts hold, the layout is one of T rows: negative ones act
as 0, rows beyond T are cut off.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hybrid_mxfp8.core.formats import next_power_of_2
from hybrid_mxfp8.dispatch.buffers import Buffer
from hybrid_mxfp8.dispatch.problem import split_layout
from hybrid_mxfp8.triton_kernels.dependent_launch import wait_for_predecessor
from hybrid_mxfp8.triton_kernels.launch import VARYING, KernelLaunch


@triton.jit
def store_layout(layout_ptr, ends, tokens, scale_ends, num_experts, EXPERTS: tl.constexpr):
    """Write tokens (E,), expert offsets (E+1,) and scale offsets (E+1,), one after another."""
    e = tl.arange(0, EXPERTS)
    mask = e < num_experts
    offsets_ptr = layout_ptr + num_experts
    scale_offsets_ptr = offsets_ptr + num_experts + 1
    tl.store(layout_ptr + e, tokens, mask=mask)
    tl.store(offsets_ptr + 1 + e, ends, mask=mask)
    tl.store(scale_offsets_ptr + 1 + e, scale_ends, mask=mask)
    tl.store(offsets_ptr + e, tl.zeros_like(ends), mask=e == 0)
    tl.store(scale_offsets_ptr + e, tl.zeros_like(ends), mask=e == 0)


@triton.jit
def scan_counts(counts_ptr, num_rows, num_experts, EXPERTS: tl.constexpr):
    """Each expert's end, tokens and scale end, in int32: for kernels in which every program scans.

    A count is cut to T first, so that the sum of E of them fits int32 where E * T does.
    """
    e = tl.arange(0, EXPERTS)
    given = tl.load(counts_ptr + e, mask=e < num_experts, other=0)
    counts = tl.minimum(tl.maximum(given, 0), num_rows).to(tl.int32)
    sums = tl.cumsum(counts, 0)
    ends = tl.minimum(sums, num_rows)
    tokens = ends - tl.minimum(sums - counts, num_rows)
    return ends, tokens, tl.cumsum((tokens + 127) // 128 * 128, 0)


@triton.jit
def _load_clamped(ptr, mask, limit):
    """int64 numbers from 0 to ``limit``: clamped before they are summed, E of them can't wrap."""
    given = tl.load(ptr, mask=mask, other=0).to(tl.int64)
    return tl.minimum(tl.maximum(given, 0), limit)


@triton.jit
def _scan_clamped(counts_ptr, e, mask, limit):
    """Each expert's first row and end, int64, from its count."""
    given = _load_clamped(counts_ptr + e, mask, limit)
    ends = tl.cumsum(given, 0)
    return tl.minimum(ends - given, limit), tl.minimum(ends, limit)


@triton.jit
def _max(a, b):
    return tl.maximum(a, b)


@triton.jit(do_not_specialize=VARYING)
def group_offsets_kernel(
    given_ptr,  # (E,) int32 or int64: counts, or inclusive ends
    layout_ptr,  # (3E+2,) int32
    num_tokens,
    num_experts,
    FROM_ENDS: tl.constexpr,
    BLOCK: tl.constexpr,  # power of two >= E
):
    """Prefix sums of counts, or differences of ends."""
    wait_for_predecessor()
    e = tl.arange(0, BLOCK)
    mask = e < num_experts
    limit = num_tokens.to(tl.int64)
    if FROM_ENDS:
        given = _load_clamped(given_ptr + e, mask, limit)
        before = _load_clamped(given_ptr + e - 1, mask & (e > 0), limit)
        ends = tl.associative_scan(given, 0, _max)
        starts = tl.associative_scan(before, 0, _max)
    else:
        starts, ends = _scan_clamped(given_ptr, e, mask, limit)
    tokens = tl.where(mask, ends - starts, 0).to(tl.int32)
    scale_ends = tl.cumsum((tokens + 127) // 128 * 128, 0)
    store_layout(layout_ptr, ends.to(tl.int32), tokens, scale_ends, num_experts, BLOCK)


@triton.jit(do_not_specialize=VARYING)
def caller_layout_kernel(
    tokens_ptr,  # (E,) int32
    scale_starts_ptr,  # (E,) int32
    out_tokens_ptr,  # (E,) int32
    out_offsets_ptr,  # (E+1,) int32
    out_scale_offsets_ptr,  # (E+1,) int32
    num_tokens,
    num_scale_rows,
    num_experts,
    BLOCK: tl.constexpr,  # power of two >= E
):
    """Expert offsets from counts, scale offsets as given, clamped to their buffers.

    The last scale offset is the largest end of the padded scales of an expert that has tokens.
    """
    wait_for_predecessor()
    e = tl.arange(0, BLOCK)
    mask = e < num_experts
    starts, ends = _scan_clamped(tokens_ptr, e, mask, num_tokens.to(tl.int64))
    tokens = tl.where(mask, ends - starts, 0).to(tl.int32)
    scale_starts = tl.load(scale_starts_ptr + e, mask=mask, other=0)
    scale_starts = tl.minimum(tl.maximum(scale_starts, 0), num_scale_rows)
    # In int64: a start near 2**31 plus its rows would wrap.
    scale_ends = scale_starts.to(tl.int64) + (tokens + 127) // 128 * 128
    scale_end = tl.minimum(tl.max(tl.where(tokens > 0, scale_ends, 0), 0), num_scale_rows.to(tl.int64))
    tl.store(out_tokens_ptr + e, tokens, mask=mask)
    tl.store(out_offsets_ptr + e, tl.zeros_like(tokens), mask=e == 0)
    tl.store(out_offsets_ptr + 1 + e, ends.to(tl.int32), mask=mask)
    tl.store(out_scale_offsets_ptr + e, scale_starts, mask=mask)
    tl.store(out_scale_offsets_ptr + num_experts + e, tl.zeros_like(tokens) + scale_end.to(tl.int32), mask=e == 0)


def _warps(block: int) -> int:
    return 1 if block <= 128 else 4


def group_offsets(given: Buffer, layout: Buffer, num_tokens: int, from_ends: bool) -> tuple[KernelLaunch, ...]:
    """The launch of ``core.layout.group_offsets``: (E,) int32 or int64, contiguous."""
    num_experts = given.shape[0]
    block = next_power_of_2(num_experts)
    return (KernelLaunch.of(
        group_offsets_kernel, 1, given_ptr=given, layout_ptr=layout, num_tokens=num_tokens, num_experts=num_experts,
        FROM_ENDS=from_ends, BLOCK=block, num_warps=_warps(block),
    ),)  # fmt: skip


def caller_layout(
    counts: Buffer, scale_starts: Buffer, layout: Buffer, num_tokens: int, num_scale_rows: int
) -> tuple[KernelLaunch, ...]:
    """A layout whose scales start where the caller says; counts and starts (E,) int32, E >= 1."""
    num_experts = counts.shape[0]
    block = next_power_of_2(num_experts)
    tokens, offsets, scale_offsets = split_layout(layout, num_experts)
    return (KernelLaunch.of(
        caller_layout_kernel, 1, tokens_ptr=counts, scale_starts_ptr=scale_starts,
        out_tokens_ptr=tokens, out_offsets_ptr=offsets, out_scale_offsets_ptr=scale_offsets,
        num_tokens=num_tokens, num_scale_rows=num_scale_rows, num_experts=num_experts,
        BLOCK=block, num_warps=_warps(block),
    ),)  # fmt: skip
