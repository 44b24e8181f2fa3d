"""Tokens back to bf16 for tensor cores without block scales, and the list of token tiles, in one
launch.

An e4m3 value times a power of two is exact in bf16 while it stays above 2**-133; only blocks with
scale bytes 0 to 2 can hold smaller elements, which are then off by at most 2**-134.

Columns are written in the order in which wgmma's register operand wants them. A thread of a
warpgroup holds 16 neighbouring bytes of a weight row's 64, one load; as operand these are elements
2c, 2c+1, 2c+8, 2c+9 of four instructions 16 columns wide, c the thread's place in its quad. A
product does not care about the order of K, so tokens follow the weights: column 16c + 4s + 2h + j
of each 64 goes to place 16s + 8h + 2c + j.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from hybrid_mxfp8.core.formats import ceil_div, next_power_of_2, round_up
from hybrid_mxfp8.dispatch.buffers import Buffer
from hybrid_mxfp8.dispatch.problem import GemmBuffers
from hybrid_mxfp8.triton_kernels.dependent_launch import wait_for_predecessor
from hybrid_mxfp8.triton_kernels.gemm.hopper_config import COLUMN_GROUP, WorkspaceLayout
from hybrid_mxfp8.triton_kernels.launch import INTERPRETED, VARYING, KernelLaunch
from hybrid_mxfp8.triton_kernels.numerics import INTERPRET, e4m3_codes_to_fp32, e8m0_to_fp32, from_fp32, loop_bound
from hybrid_mxfp8.triton_kernels.scale_layout import column_offset, row_offset


@triton.jit
def _list_tiles(
    tiles_ptr, max_tiles, expert, expert_offsets_ptr, num_experts, num_tokens, EXPERTS: tl.constexpr, BLOCK_T: tl.constexpr
):  # fmt: skip
    """Write the token tiles of one expert, after those of the experts before it."""
    BATCH: tl.constexpr = 128
    e = tl.arange(0, EXPERTS)
    # Clamped to the buffers, so that a layout put together by hand can't lead outside them.
    starts = tl.load(expert_offsets_ptr + e, mask=e < num_experts, other=0)
    ends = tl.load(expert_offsets_ptr + e + 1, mask=e < num_experts, other=0)
    starts = tl.minimum(tl.maximum(starts, 0), num_tokens)
    ends = tl.minimum(tl.maximum(ends, starts), num_tokens)
    # In int64: of experts that overlap, as no layout built here has them, the tiles' sum can wrap.
    counts = (ends - starts).to(tl.int64)
    counts = (counts + BLOCK_T - 1) // BLOCK_T
    first = tl.sum(tl.where(e < expert, counts, 0), 0)
    count = tl.sum(tl.where(e == expert, counts, 0), 0)
    start = tl.sum(tl.where(e == expert, starts, 0), 0)
    end = tl.sum(tl.where(e == expert, ends, 0), 0)
    if expert == 0:
        tl.store(tiles_ptr, tl.minimum(tl.sum(counts, 0), max_tiles).to(tl.int32))
        tl.store(tiles_ptr + 1, 0)
    for done in range(0, loop_bound(tl.minimum(count, max_tiles).to(tl.int32)), BATCH):
        i = done + tl.arange(0, BATCH)
        entry = tiles_ptr + (1 + first + i) * 4
        wanted = (i < count) & (first + i < max_tiles)
        tl.store(entry, tl.zeros_like(i) + expert, mask=wanted)
        tl.store(entry + 1, start + i * BLOCK_T, mask=wanted)
        tl.store(entry + 2, tl.zeros_like(i) + end, mask=wanted)
        tl.store(entry + 3, tl.zeros_like(i), mask=wanted)


@triton.jit(do_not_specialize=VARYING)
def dequantize_tokens_kernel(
    values_ptr,  # (T, K) e4m3
    scales_ptr,  # (S, C) uint8, swizzled
    workspace_ptr,  # bytes: (1 + max_tiles, 4) int32, then (T, roundup(K, 64)) bf16
    expert_offsets_ptr,  # (E+1,) int32
    scale_offsets_ptr,  # (E+1,) int32
    num_tokens,  # T
    num_scale_rows,  # S
    num_experts,
    K,
    row_programs,
    max_tiles,
    tokens_at,  # where the bf16 part starts, in units of 256 bytes
    EXPERTS: tl.constexpr,  # power of two >= E
    EXPERT_CHUNK: tl.constexpr,  # experts searched at once
    BLOCK_T: tl.constexpr,  # rows of a token tile
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,  # multiple of 128
):
    """Grid ((row_programs + E) * column programs,).

    Rows that no expert owns stay unwritten, except the first BLOCK_T, zeroed where programs reach:
    the last tile may reach into them.
    """
    wait_for_predecessor()
    padded_k = (K + 63) // 64 * 64
    column_programs = (padded_k + BLOCK_COLS - 1) // BLOCK_COLS
    pid = tl.program_id(0) // column_programs
    column_program = tl.program_id(0) % column_programs
    if pid >= row_programs:
        if column_program == 0:
            tiles_ptr = workspace_ptr.to(tl.pointer_type(tl.int32))
            _list_tiles(
                tiles_ptr, max_tiles, pid - row_programs, expert_offsets_ptr, num_experts, num_tokens, EXPERTS, BLOCK_T
            )
        return

    used = tl.minimum(tl.load(expert_offsets_ptr + num_experts), num_tokens)
    # Of many programs most may have nothing to do; a decode batch, with one row a program, would
    # feel the wait.
    if BLOCK_ROWS > 1 and pid * BLOCK_ROWS >= used + BLOCK_T:
        return
    # A scalar search for each row: Triton 3.6 sums a (rows, experts) comparison over the wrong
    # lanes when it recomputes it in the layout of the scales (seen with E = 4).
    lane = tl.arange(0, BLOCK_ROWS)
    row = pid * BLOCK_ROWS + lane
    owned_rows = tl.zeros_like(row)
    scale_row = tl.zeros_like(row)
    for r in tl.static_range(BLOCK_ROWS):
        this_row = pid * BLOCK_ROWS + r
        expert = 0
        for first in tl.static_range(0, EXPERTS, EXPERT_CHUNK):
            e = first + tl.arange(0, EXPERT_CHUNK)
            ends = tl.load(expert_offsets_ptr + 1 + e, mask=e < num_experts, other=0)
            expert += tl.sum(((ends <= this_row) & (e < num_experts)).to(tl.int32), 0)
        owned = (this_row < num_tokens) & (expert < num_experts)
        start = tl.load(expert_offsets_ptr + expert, mask=owned, other=0)
        scale_start = tl.load(scale_offsets_ptr + expert, mask=owned, other=0)
        owned_rows = tl.where(lane == r, owned.to(tl.int32), owned_rows)
        scale_row = tl.where(lane == r, scale_start + this_row - start, scale_row)
    valid = owned_rows != 0
    scale_valid = valid & (scale_row >= 0) & (scale_row < num_scale_rows)

    GROUPS: tl.constexpr = BLOCK_COLS // 64
    col = column_program * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    codes = tl.load(
        values_ptr + row.to(tl.int64)[:, None] * K + col[None, :], mask=valid[:, None] & (col < K)[None, :], other=0.0
    )
    c = column_program * (BLOCK_COLS // 32) + tl.arange(0, BLOCK_COLS // 32)
    offset = row_offset(scale_row, (K + 127) // 128)[:, None] + column_offset(c)[None, :]
    scales = tl.load(scales_ptr + offset, mask=scale_valid[:, None] & (c < K // 32)[None, :], other=0)

    elements = e4m3_codes_to_fp32(codes) if INTERPRET else codes.to(tl.float32)
    product = tl.reshape(elements, [BLOCK_ROWS, BLOCK_COLS // 32, 32]) * e8m0_to_fp32(scales)[:, :, None]
    expanded = from_fp32(tl.reshape(product, [BLOCK_ROWS, GROUPS, 4, 4, 2, 2]), tl.bfloat16)
    expanded = tl.reshape(tl.permute(expanded, 0, 1, 3, 4, 2, 5), [BLOCK_ROWS, BLOCK_COLS])
    dequantized_ptr = (workspace_ptr + tokens_at.to(tl.int64) * 256).to(tl.pointer_type(tl.bfloat16))
    out_ptrs = dequantized_ptr + row.to(tl.int64)[:, None] * padded_k + col[None, :]
    written = valid | ((row >= used) & (row < tl.minimum(used + BLOCK_T, num_tokens)))
    tl.store(out_ptrs, expanded, mask=written[:, None] & (col < padded_k)[None, :])


@dataclass(frozen=True)
class DequantizeConfig:
    """Rows and columns of one program, and its warps."""

    block_rows: int
    block_cols: int
    num_warps: int


def select_dequantize_config(num_tokens: int, k: int, interpreted: bool = False) -> DequantizeConfig:
    """Tile of the kernel; pure. Few rows: small programs, so that a decode batch fills the GPU.
    Seen on an H100 in µs: T 32, K 7168 2.4; T 2048 17.7, 8192 66, and T 16384, K 2048 37.9 with
    4x1024, the best of ten."""
    columns = next_power_of_2(max(round_up(k, COLUMN_GROUP), 128))
    if interpreted:
        return DequantizeConfig(min(next_power_of_2(max(num_tokens, 1)), 64), min(columns, 1024), 4)
    if num_tokens * k <= 2**21:
        return DequantizeConfig(1, min(columns, 512), 2)
    return DequantizeConfig(4, min(columns, 1024), 4)


def dequantize_tokens(
    buffers: GemmBuffers, workspace: Buffer, layout: WorkspaceLayout, num_experts: int, block_t: int, rows: int
) -> KernelLaunch:
    """The launch that writes the list of token tiles, of ``block_t`` rows of one expert each, and
    the first ``rows`` rows in bf16 into ``workspace``: ``layout.size`` bytes, 256-byte aligned."""
    b, (num_tokens, k) = buffers, buffers.x_values.shape
    config = select_dequantize_config(rows, k, INTERPRETED)
    row_programs = ceil_div(rows, config.block_rows)
    experts = next_power_of_2(num_experts)
    programs = (row_programs + num_experts) * ceil_div(layout.padded_k, config.block_cols)
    return KernelLaunch.of(
        dequantize_tokens_kernel, programs,
        values_ptr=b.x_values, scales_ptr=b.x_scales, workspace_ptr=workspace,
        expert_offsets_ptr=b.expert_offsets, scale_offsets_ptr=b.scale_offsets,
        num_tokens=num_tokens, num_scale_rows=b.x_scales.shape[0], num_experts=num_experts, K=k,
        row_programs=row_programs, max_tiles=layout.max_tiles, tokens_at=layout.tokens_at // 256,
        EXPERTS=experts, EXPERT_CHUNK=min(experts, 1024), BLOCK_T=block_t,
        BLOCK_ROWS=config.block_rows, BLOCK_COLS=config.block_cols, num_warps=config.num_warps,
    )  # fmt: skip
