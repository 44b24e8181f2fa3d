"""The end of an MoE layer: each token's rows, weighted and summed in fp32, in the order of its
top-k. No atomics.

Compiled without fused multiply-adds, so that it rounds as its PyTorch counterpart does; memory is
its limit either way.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hybrid_mxfp8.core.formats import ceil_div, next_power_of_2
from hybrid_mxfp8.dispatch.buffers import Buffer
from hybrid_mxfp8.triton_kernels.dependent_launch import wait_for_predecessor
from hybrid_mxfp8.triton_kernels.launch import INTERPRETED, VARYING, KernelLaunch
from hybrid_mxfp8.triton_kernels.numerics import from_fp32, to_fp32

UNROLLED = tl.constexpr(16)  # choices whose loads overlap; each takes 0.1 s or more to compile


@triton.jit
def _add_choice(total, slot, col, y_ptr, rows_ptr, ids_ptr, weights_ptr, bias_ptr, num_rows, H, HAS_BIAS: tl.constexpr):
    """``total`` plus the weighted row of one slot; as it was for a dropped one."""
    row = tl.load(rows_ptr + slot)
    live = col < tl.where((row >= 0) & (row < num_rows), H, 0)
    value = to_fp32(tl.load(y_ptr + row.to(tl.int64) * H + col, mask=live, other=0.0))
    if HAS_BIAS:
        expert = tl.load(ids_ptr + slot).to(tl.int64)
        value += to_fp32(tl.load(bias_ptr + expert * H + col, mask=live, other=0.0))
    weight = to_fp32(tl.load(weights_ptr + slot))
    return tl.where(live, total + weight * value, total)


@triton.jit(do_not_specialize=VARYING)
def combine_kernel(
    y_ptr,  # (T, H) bf16, fp16 or fp32
    rows_ptr,  # (M, top_k) int32: the inverse permutation
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
    wait_for_predecessor()
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
                total, first + k, col, y_ptr, rows_ptr, ids_ptr, weights_ptr, bias_ptr, num_rows, H, HAS_BIAS
            )
    else:
        for k in range(0, TOP_K):
            total = _add_choice(
                total, first + k, col, y_ptr, rows_ptr, ids_ptr, weights_ptr, bias_ptr, num_rows, H, HAS_BIAS
            )
    tl.store(out_ptr + token * out_stride + col, from_fp32(total, out_ptr.dtype.element_ty), mask=inside)


def combine(
    y: Buffer,
    inverse_permutation: Buffer,
    topk_ids: Buffer,
    topk_weights: Buffer,
    bias: Buffer | None,
    out: Buffer,
    out_stride: int,
) -> tuple[KernelLaunch, ...]:
    """The launch of ``reference.combine``; ``out`` may have any stride between rows."""
    num_tokens, hidden = out.shape
    block = min(next_power_of_2(hidden), 2048 if INTERPRETED else 1024)
    programs = num_tokens * ceil_div(hidden, block)
    return (KernelLaunch.of(
        combine_kernel, programs,
        y_ptr=y, rows_ptr=inverse_permutation, ids_ptr=topk_ids, weights_ptr=topk_weights, bias_ptr=bias, out_ptr=out,
        num_rows=y.shape[0], out_stride=out_stride, H=hidden,
        HAS_BIAS=bias is not None, TOP_K=topk_ids.shape[1], BLOCK=block, num_warps=4, enable_fp_fusion=False,
    ),)  # fmt: skip
