"""The end of an MoE layer: each token's rows, weighted and summed in fp32, in the order of its top-k. No atomics.

Compiled without fused multiply-adds, so that it rounds as its PyTorch twin does; memory is its limit either way.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hybrid_mxfp8.core.formats import ceil_div, next_power_of_2
from hybrid_mxfp8.triton_kernels.launch import INTERPRETED, Launched, aligned, launch, on_device_of
from hybrid_mxfp8.triton_kernels.numerics import from_fp32, to_fp32

UNROLLED = tl.constexpr(16)
"""Choices of a token that are unrolled, so that their loads overlap; each takes a tenth of a second to compile, or more."""


@triton.jit
def _add_choice(
    total, slot, col, y_ptr, slot_row_ptr, ids_ptr, weights_ptr, bias_ptr, num_rows, H, HAS_BIAS: tl.constexpr
):
    """``total`` plus the weighted row of one slot; as it was for a dropped one."""
    row = tl.load(slot_row_ptr + slot)
    live = col < tl.where((row >= 0) & (row < num_rows), H, 0)
    value = to_fp32(tl.load(y_ptr + row.to(tl.int64) * H + col, mask=live, other=0.0))
    if HAS_BIAS:
        expert = tl.load(ids_ptr + slot).to(tl.int64)
        value += to_fp32(tl.load(bias_ptr + expert * H + col, mask=live, other=0.0))
    weight = to_fp32(tl.load(weights_ptr + slot))
    return tl.where(live, total + weight * value, total)


@triton.jit(do_not_specialize=["slot_row_ptr", "ids_ptr", "weights_ptr", "num_rows"])
def combine_kernel(
    y_ptr,  # (T, H) bf16, fp16 or fp32
    slot_row_ptr,  # (M, top_k) int32
    ids_ptr,  # (M, top_k) int32 or int64, HAS_BIAS only
    weights_ptr,  # (M, top_k) bf16, fp16 or fp32
    bias_ptr,  # (E, H), HAS_BIAS only
    out_ptr,  # (M, H)
    num_rows,  # T
    out_stride,  # elements
    H,
    HAS_BIAS: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (M * cdiv(H, BLOCK),)."""
    pid = tl.program_id(0)
    column_programs = (H + BLOCK - 1) // BLOCK
    token = (pid // column_programs).to(tl.int64)
    col = pid % column_programs * BLOCK + tl.arange(0, BLOCK)
    inside = col < H
    total = tl.zeros([BLOCK], tl.float32)
    first = token * TOP_K
    if TOP_K <= UNROLLED:
        for k in tl.static_range(TOP_K):
            total = _add_choice(
                total, first + k, col, y_ptr, slot_row_ptr, ids_ptr, weights_ptr, bias_ptr, num_rows, H, HAS_BIAS
            )
    else:
        for k in range(0, TOP_K):
            total = _add_choice(
                total, first + k, col, y_ptr, slot_row_ptr, ids_ptr, weights_ptr, bias_ptr, num_rows, H, HAS_BIAS
            )
    tl.store(out_ptr + token * out_stride + col, from_fp32(total, out_ptr.dtype.element_ty), mask=inside)


def combine(
    y: torch.Tensor,
    inverse_permutation: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
) -> Launched | None:
    """out[m] = sum over k of topk_weights[m, k] * (y[inverse_permutation[m, k]] + bias[topk_ids[m, k]]); see ``moe_reference.combine``.

    Args:
        y: (T, H) bf16, fp16 or fp32, contiguous.
        inverse_permutation: (M, top_k) int32, contiguous; a slot whose row is -1 contributes nothing.
        topk_ids: (M, top_k) int32 or int64, contiguous.
        topk_weights: (M, top_k) bf16, fp16 or fp32, contiguous.
        bias: (E, H) bf16, fp16 or fp32, contiguous, or None.
        out: (M, H) bf16, fp16 or fp32, unit column stride, written.

    Returns:
        The launch, to be repeated, or None.
    """
    num_tokens, hidden = out.shape
    top_k = inverse_permutation.shape[1]
    block = min(next_power_of_2(hidden), 2048 if INTERPRETED else 1024)
    programs = num_tokens * ceil_div(hidden, block)
    arguments = (y, inverse_permutation, topk_ids, topk_weights, bias, out, y.shape[0], out.stride(0), hidden)
    constants = (bias is not None, top_k, block)
    options = (("num_warps", 4), ("enable_fp_fusion", False))
    key = (
        "combine",
        y.dtype,
        topk_ids.dtype,
        topk_weights.dtype,
        None if bias is None else (bias.dtype, aligned(bias)),
        out.dtype,
        out.stride(0),
        hidden,
        aligned(y),
        aligned(out),
    )
    with on_device_of(out):
        return launch(combine_kernel, programs, arguments, constants, options, key)
