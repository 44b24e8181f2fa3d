"""Tokens to the records in which they travel: elements, row-major scales, the router's choices, one
launch."""

from __future__ import annotations

import triton
import triton.language as tl

from hybrid_mxfp8.core.formats import SCALE_ROUNDING_BIAS, ceil_div, next_power_of_2
from hybrid_mxfp8.core.token_record import TokenRecord
from hybrid_mxfp8.dispatch.buffers import Buffer
from hybrid_mxfp8.triton_kernels.dependent_launch import wait_for_predecessor
from hybrid_mxfp8.triton_kernels.launch import INTERPRETED, VARYING, KernelLaunch
from hybrid_mxfp8.triton_kernels.numerics import to_fp32
from hybrid_mxfp8.triton_kernels.quantize import quantize_groups, select_quantize_config


@triton.jit(do_not_specialize=VARYING)
def pack_tokens_kernel(
    x_ptr,  # (M, K) bf16, fp16 or fp32
    row_stride,  # elements
    ids_ptr,  # (M, top_k) int32 or int64, TOP_K only
    weights_ptr,  # (M, top_k) bf16, fp16 or fp32, TOP_K only
    records_ptr,  # (R, record_size) uint8
    num_tokens,  # M
    num_records,  # R
    num_experts,
    K,
    record_size,
    ids_at,
    ROUNDING_BIAS: tl.constexpr,
    SCALE_GROUP: tl.constexpr,  # elements that share one scale: 32 or 128
    TOP_K: tl.constexpr,
    SLOTS: tl.constexpr,  # power of two >= TOP_K
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,  # multiple of 128
):
    """Grid (cdiv(R, BLOCK_ROWS) * cdiv(K, BLOCK_COLS),)."""
    wait_for_predecessor()
    column_programs = (K + BLOCK_COLS - 1) // BLOCK_COLS
    pid = tl.program_id(0)
    column_program = pid % column_programs
    row = pid // column_programs * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    token = row < num_tokens
    record_ptrs = records_ptr + row.to(tl.int64) * record_size

    col = column_program * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    mask = token[:, None] & (col < K)[None, :]
    x = to_fp32(tl.load(x_ptr + row.to(tl.int64)[:, None] * row_stride + col[None, :], mask=mask, other=0.0))
    GROUPS: tl.constexpr = BLOCK_COLS // SCALE_GROUP
    codes, scale = quantize_groups(tl.reshape(x, [BLOCK_ROWS, GROUPS, SCALE_GROUP]), ROUNDING_BIAS)
    if SCALE_GROUP > 32:
        scale = tl.broadcast_to(scale[:, :, None], [BLOCK_ROWS, GROUPS, SCALE_GROUP // 32])
        scale = tl.reshape(scale, [BLOCK_ROWS, BLOCK_COLS // 32])
    tl.store(record_ptrs[:, None] + col[None, :], tl.reshape(codes, [BLOCK_ROWS, BLOCK_COLS]), mask=mask)
    c = column_program * (BLOCK_COLS // 32) + tl.arange(0, BLOCK_COLS // 32)
    tl.store(record_ptrs[:, None] + K + c[None, :], scale, mask=token[:, None] & (c < K // 32)[None, :])

    if TOP_K > 0:
        slot = tl.arange(0, SLOTS)
        # One of the programs that share a row writes its choices.
        stored = (row < num_records)[:, None] & (slot < tl.where(column_program == 0, TOP_K, 0))[None, :]
        chosen = stored & token[:, None]
        source = row[:, None] * TOP_K + slot[None, :]
        ids = tl.load(ids_ptr + source, mask=chosen, other=-1)
        # Before they are cut to 32 bits; a record that holds no token chooses no expert.
        ids = tl.where((ids >= 0) & (ids < num_experts), ids, -1).to(tl.int32)
        weights = to_fp32(tl.load(weights_ptr + source, mask=chosen, other=0.0))
        first_ids_ptr = (records_ptr + ids_at).to(tl.pointer_type(tl.int32))
        ids_ptrs = first_ids_ptr + (row.to(tl.int64) * (record_size // 4))[:, None] + slot[None, :]
        tl.store(ids_ptrs, ids, mask=stored)
        tl.store(ids_ptrs + TOP_K, weights.to(tl.int32, bitcast=True), mask=stored)


def pack_tokens(
    x: Buffer,
    row_stride: int,
    topk_ids: Buffer | None,
    topk_weights: Buffer | None,
    records: Buffer,
    num_experts: int,
    scale_group: int,
) -> tuple[KernelLaunch, ...]:
    """The launch of ``reference.pack_tokens``; x has any stride between rows, and R >= 1."""
    num_tokens, hidden = x.shape
    num_records, record_size = records.shape
    top_k = 0 if topk_ids is None else topk_ids.shape[1]
    config = select_quantize_config(num_records, hidden, 1, INTERPRETED)
    programs = ceil_div(num_records, config.block_rows) * ceil_div(hidden, config.block_cols)
    return (KernelLaunch.of(
        pack_tokens_kernel, programs,
        x_ptr=x, row_stride=row_stride, ids_ptr=topk_ids, weights_ptr=topk_weights, records_ptr=records,
        num_tokens=num_tokens, num_records=num_records, num_experts=num_experts, K=hidden,
        record_size=record_size, ids_at=TokenRecord(hidden, top_k).ids_at,
        ROUNDING_BIAS=SCALE_ROUNDING_BIAS["rceil"], SCALE_GROUP=scale_group, TOP_K=top_k, SLOTS=next_power_of_2(top_k),
        BLOCK_ROWS=config.block_rows, BLOCK_COLS=config.block_cols, num_warps=config.num_warps,
    ),)  # fmt: skip
