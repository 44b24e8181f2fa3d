"""A group layout around scale positions that a caller has chosen, in one launch.

:mod:`group_layout` places each expert's scales behind its predecessor's; here the caller says where they start, which
need not be there. Counts and positions in, the three int32 tensors of a GroupLayout out.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hybrid_mxfp8.core.formats import next_power_of_2
from hybrid_mxfp8.triton_kernels.group_layout import empty_layout, split_layout
from hybrid_mxfp8.triton_kernels.launch import launch, on_device_of


@triton.jit(
    do_not_specialize=[
        "tokens_ptr",
        "scale_starts_ptr",
        "out_tokens_ptr",
        "out_offsets_ptr",
        "out_scale_offsets_ptr",
        "num_tokens",
        "num_scale_rows",
        "num_experts",
    ]
)
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
    """Clamped, so that no position leads outside its buffer whatever the caller's tensors hold."""
    e = tl.arange(0, BLOCK)
    mask = e < num_experts
    limit = num_tokens.to(tl.int64)
    given = tl.load(tokens_ptr + e, mask=mask, other=0).to(tl.int64)
    given = tl.minimum(tl.maximum(given, 0), limit)
    ends = tl.cumsum(given, 0)
    starts = tl.minimum(ends - given, limit)
    ends = tl.minimum(ends, limit)
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


def caller_layout(
    tokens_per_expert: torch.Tensor, scale_starts: torch.Tensor, num_tokens: int, num_scale_rows: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Expert offsets from counts, scale offsets as given.

    Args:
        tokens_per_expert: (E,) int32, E >= 1; cut off at ``num_tokens`` rows in all, negative ones act as 0.
        scale_starts: (E,) int32, first scale row of each expert; cut to 0 .. num_scale_rows.
        num_tokens: T.
        num_scale_rows: rows of the scale buffer.

    Returns:
        tokens_per_expert (E,), expert_offsets (E+1,), scale_offsets (E+1,), int32, views of one buffer. The last scale
        offset is the largest end of the padded scales of an expert that has tokens.
    """
    num_experts = tokens_per_expert.shape[0]
    buffer = empty_layout(num_experts, tokens_per_expert.device)
    tokens, offsets, scale_offsets = split_layout(buffer, num_experts)
    block = next_power_of_2(num_experts)
    arguments = (
        tokens_per_expert,
        scale_starts,
        tokens,
        offsets,
        scale_offsets,
        num_tokens,
        num_scale_rows,
        num_experts,
    )
    options = (("num_warps", 1 if block <= 128 else 4),)
    with on_device_of(buffer):
        launch(caller_layout_kernel, 1, arguments, (block,), options, "caller_layout")
    return tokens, offsets, scale_offsets
