"""Adds each expert's bias to its rows, in place: what stands between the first product and its
activation.

One program takes a slot of the routing and a stretch of columns: the slot knows its row and its
expert, so no search through the layout is needed.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from hybrid_mxfp8.core.formats import ceil_div, next_power_of_2
from hybrid_mxfp8.dispatch.buffers import Buffer
from hybrid_mxfp8.triton_kernels.dependent_launch import wait_for_predecessor
from hybrid_mxfp8.triton_kernels.launch import INTERPRETED, VARYING, KernelLaunch
from hybrid_mxfp8.triton_kernels.numerics import from_fp32, to_fp32


@triton.jit(do_not_specialize=VARYING)
def expert_bias_kernel(
    y_ptr,  # (T, N) bf16, fp16 or fp32
    inverse_permutation_ptr,  # (S,) int32
    ids_ptr,  # (S,) int32 or int64
    bias_ptr,  # (E, N)
    num_rows,  # T
    N,
    BLOCK: tl.constexpr,
):
    """Grid (S * cdiv(N, BLOCK),)."""
    wait_for_predecessor()
    pid = tl.program_id(0)
    column_programs = (N + BLOCK - 1) // BLOCK
    slot = pid // column_programs
    row = tl.load(inverse_permutation_ptr + slot)
    if (row < 0) | (row >= num_rows):
        return
    col = pid % column_programs * BLOCK + tl.arange(0, BLOCK)
    inside = col < N
    expert = tl.load(ids_ptr + slot).to(tl.int64)
    ptrs = y_ptr + row.to(tl.int64) * N + col
    total = to_fp32(tl.load(ptrs, mask=inside)) + to_fp32(tl.load(bias_ptr + expert * N + col, mask=inside))
    tl.store(ptrs, from_fp32(total, y_ptr.dtype.element_ty), mask=inside)


def add_expert_bias(y: Buffer, inverse_permutation: Buffer, topk_ids: Buffer, bias: Buffer) -> tuple[KernelLaunch, ...]:
    """The launch of ``reference.add_expert_bias``."""
    num_rows, n = y.shape
    block = min(next_power_of_2(n), 2048 if INTERPRETED else 1024)
    programs = math.prod(topk_ids.shape) * ceil_div(n, block)
    return (KernelLaunch.of(
        expert_bias_kernel, programs, y_ptr=y, inverse_permutation_ptr=inverse_permutation, ids_ptr=topk_ids,
        bias_ptr=bias, num_rows=num_rows, N=n, BLOCK=block, num_warps=4,
    ),)  # fmt: skip
