"""Group offsets in one launch: counts or ends in, the three int32 tensors of a GroupLayout out.

One program scans all experts. The outputs share one allocation.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hybrid_mxfp8.core.formats import next_power_of_2
from hybrid_mxfp8.triton_kernels.launch import launch, on_device_of


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
def _max(a, b):
    return tl.maximum(a, b)


@triton.jit(do_not_specialize=["given_ptr", "layout_ptr", "num_tokens", "num_experts"])
def group_offsets_kernel(
    given_ptr,  # (E,) int32 or int64: counts, or inclusive ends
    layout_ptr,  # (3E+2,) int32: tokens (E,), expert offsets (E+1,), scale offsets (E+1,)
    num_tokens,
    num_experts,
    FROM_ENDS: tl.constexpr,
    BLOCK: tl.constexpr,  # power of two >= E
):
    """Prefix sums, clamped so that the layout is valid whatever ``given`` holds."""
    e = tl.arange(0, BLOCK)
    mask = e < num_experts
    limit = num_tokens.to(tl.int64)
    # Clamped before they are summed, in int64: the sum of E counts of at most T can't wrap.
    given = tl.load(given_ptr + e, mask=mask, other=0).to(tl.int64)
    given = tl.minimum(tl.maximum(given, 0), limit)
    if FROM_ENDS:
        before = tl.load(given_ptr + e - 1, mask=mask & (e > 0), other=0).to(tl.int64)
        before = tl.minimum(tl.maximum(before, 0), limit)
        ends = tl.associative_scan(given, 0, _max)
        starts = tl.associative_scan(before, 0, _max)
    else:
        ends = tl.cumsum(given, 0)
        starts = tl.minimum(ends - given, limit)
        ends = tl.minimum(ends, limit)
    tokens = tl.where(mask, ends - starts, 0).to(tl.int32)
    scale_ends = tl.cumsum((tokens + 127) // 128 * 128, 0)
    store_layout(layout_ptr, ends.to(tl.int32), tokens, scale_ends, num_experts, BLOCK)


def empty_layout(num_experts: int, device: torch.device) -> torch.Tensor:
    """The buffer of a layout, (3E+2,) int32: tokens (E,), expert offsets (E+1,), scale offsets (E+1,)."""
    return torch.empty(3 * num_experts + 2, dtype=torch.int32, device=device)


def split_layout(buffer: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The three tensors of a layout's buffer."""
    # Tensor.split comes here by way of Python.
    tokens, offsets, scale_offsets = torch.split_with_sizes(buffer, (num_experts, num_experts + 1, num_experts + 1))
    return tokens, offsets, scale_offsets


def group_offsets(
    counts_or_ends: torch.Tensor, num_tokens: int, from_ends: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What ``reference.group_offsets`` computes, in one launch.

    Args:
        counts_or_ends: (E,) int32 or int64.
        num_tokens: T.
        from_ends: whether the first argument holds inclusive ends instead of counts.

    Returns:
        tokens_per_expert (E,), expert_offsets (E+1,), scale_offsets (E+1,), int32, views of one buffer.
    """
    num_experts = counts_or_ends.shape[0]
    buffer = empty_layout(num_experts, counts_or_ends.device)
    block = next_power_of_2(num_experts)
    arguments = (counts_or_ends.contiguous(), buffer, num_tokens, num_experts)
    options = (("num_warps", 1 if block <= 128 else 4),)
    with on_device_of(buffer):
        key = ("group_offsets", counts_or_ends.dtype)
        launch(group_offsets_kernel, 1, arguments, (from_ends, block), options, key)
    return split_layout(buffer, num_experts)
