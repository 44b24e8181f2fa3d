"""Adds each expert's bias to its rows, in place: what stands between the first product and its activation.

One program takes a slot of the routing and a stretch of columns: the slot knows its row and its expert, so no search
through the layout is needed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hybrid_mxfp8.core.formats import ceil_div, next_power_of_2
from hybrid_mxfp8.triton_kernels.launch import INTERPRETED, Launched, aligned, launch, on_device_of
from hybrid_mxfp8.triton_kernels.numerics import from_fp32, to_fp32


@triton.jit(do_not_specialize=["slot_row_ptr", "ids_ptr", "num_rows"])
def expert_bias_kernel(
    y_ptr,  # (T, N) bf16, fp16 or fp32
    slot_row_ptr,  # (S,) int32
    ids_ptr,  # (S,) int32 or int64
    bias_ptr,  # (E, N)
    num_rows,  # T
    N,
    BLOCK: tl.constexpr,
):
    """Grid (S * cdiv(N, BLOCK),)."""
    pid = tl.program_id(0)
    column_programs = (N + BLOCK - 1) // BLOCK
    slot = pid // column_programs
    row = tl.load(slot_row_ptr + slot)
    if (row < 0) | (row >= num_rows):
        return
    col = pid % column_programs * BLOCK + tl.arange(0, BLOCK)
    inside = col < N
    expert = tl.load(ids_ptr + slot).to(tl.int64)
    ptrs = y_ptr + row.to(tl.int64) * N + col
    total = to_fp32(tl.load(ptrs, mask=inside)) + to_fp32(tl.load(bias_ptr + expert * N + col, mask=inside))
    tl.store(ptrs, from_fp32(total, y_ptr.dtype.element_ty), mask=inside)


def add_expert_bias(
    y: torch.Tensor, inverse_permutation: torch.Tensor, topk_ids: torch.Tensor, bias: torch.Tensor
) -> Launched | None:
    """y[inverse_permutation[m, k]] += bias[topk_ids[m, k]], summed in fp32; what ``moe_reference.add_expert_bias`` computes.

    Args:
        y: (T, N) bf16, fp16 or fp32, contiguous; changed.
        inverse_permutation: (M, top_k) int32, contiguous; -1 is skipped.
        topk_ids: (M, top_k) int32 or int64, contiguous.
        bias: (E, N) bf16, fp16 or fp32, contiguous.

    Returns:
        The launch, to be repeated, or None.
    """
    n = y.shape[1]
    block = min(next_power_of_2(n), 2048 if INTERPRETED else 1024)
    programs = inverse_permutation.numel() * ceil_div(n, block)
    key = ("expert_bias", y.dtype, topk_ids.dtype, bias.dtype, n, aligned(y), aligned(bias))
    with on_device_of(y):
        arguments = (y, inverse_permutation, topk_ids, bias, y.shape[0], n)
        return launch(expert_bias_kernel, programs, arguments, (block,), (("num_warps", 4),), key)
