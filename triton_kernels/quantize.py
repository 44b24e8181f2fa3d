"""The grouped quantizer: rows to e4m3 values and E8M0 scales in 128x4 tiles, one launch.

A program takes a few rows by a stretch of columns, wherever the groups' boundaries are: each row finds
its expert by counting the ends at or before it, all experts at once, so the cost does not depend on how
tokens are spread over experts. After the row programs come the padding programs; each writes zeros into
some of the padding rows of one expert. Every other stored byte is written by the row programs, so equal
inputs give equal bytes.

Expert weights are the same problem with every expert N rows long (``UNIFORM``), their offsets computed
instead of loaded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from hybrid_mxfp8.formats import BLOCK_SIZE, SCALE_ROUNDING_BIAS, SCALE_TILE_COLS, scale_cols
from hybrid_mxfp8.groups import GroupLayout
from hybrid_mxfp8.triton_kernels.launch import INTERPRETED, on_device_of, raw
from hybrid_mxfp8.triton_kernels.numerics import INTERPRET, to_e4m3_codes, to_fp32


@triton.jit
def _find_experts(rows, expert_offsets_ptr, num_experts, EXPERTS: tl.constexpr, CHUNK: tl.constexpr):
    """For each row, how many experts end at or before it."""
    expert = tl.zeros_like(rows)
    for first in tl.static_range(0, EXPERTS, CHUNK):
        e = first + tl.arange(0, CHUNK)
        ends = tl.load(expert_offsets_ptr + 1 + e, mask=e < num_experts, other=0)
        before = (ends[None, :] <= rows[:, None]) & (e < num_experts)[None, :]
        expert += tl.sum(before.to(tl.int32), 1)
    return expert


@triton.jit
def _quantize_blocks(x, ROUNDING_BIAS: tl.constexpr):
    """x (R, B, 32) fp32 to codes (R, B, 32) and scales (R, B), both uint8."""
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    amax = tl.max(bits, 2)  # as integers: a float maximum would drop NaN
    finite = amax < 0x7F800000
    scale = tl.where(finite, tl.maximum(((amax + ROUNDING_BIAS) >> 23) - 8, 0), 255)
    inverse = tl.where(finite, (254 - scale) << 23, 0x7FC00000).to(tl.float32, bitcast=True)
    # A block with NaN or Inf is multiplied by NaN; 0x7F, the code wanted, is e4m3's NaN without sign.
    codes = to_e4m3_codes(x * inverse[:, :, None])
    return tl.where(finite[:, :, None], codes, 0x7F).to(tl.uint8), scale.to(tl.uint8)


@triton.jit
def _zero_padding_rows(scales_ptr, first_scale_row, used_rows, first_tile, num_column_tiles, TILES: tl.constexpr):
    """Zero rows ``used_rows`` .. 127 of the last 128x4 tiles of one expert, whose last tile row is ``first_scale_row``.

    In words of 4 bytes: the 4 columns of one row are neighbours in a tile.
    """
    word = tl.arange(0, 128)
    row = word // 4 + 32 * (word % 4)
    tile = first_tile + tl.arange(0, TILES)
    first_word = (first_scale_row.to(tl.int64) // 128 * num_column_tiles + tile) * 128
    words = scales_ptr.to(tl.pointer_type(tl.int32)) + first_word[:, None] + word[None, :]
    wanted = (tile < num_column_tiles)[:, None] & (row >= used_rows)[None, :]
    tl.store(words, tl.zeros([TILES, 128], tl.int32), mask=wanted)


@triton.jit(do_not_specialize=["num_rows", "num_experts", "num_source_rows", "num_scale_rows", "row_programs"])
def quantize_kernel(
    x_ptr,  # rows of K elements, or of 2K with SWIGLU; bf16, fp16 or fp32
    row_stride,  # elements
    expert_stride,  # elements, UNIFORM only
    row_index_ptr,  # (T,) int32, GATHER only
    num_source_rows,  # rows of x, GATHER only
    values_ptr,  # (T, K) e4m3, contiguous
    scales_ptr,  # (S, C) uint8, swizzled
    num_scale_rows,  # S
    expert_offsets_ptr,  # (E+1,) int32, not UNIFORM
    scale_offsets_ptr,  # (E+1,) int32, not UNIFORM
    num_rows,  # T, or E*N
    num_experts,
    rows_per_expert,  # N, UNIFORM only
    K,
    row_programs,
    column_programs,
    ROUNDING_BIAS: tl.constexpr,
    UNIFORM: tl.constexpr,
    GATHER: tl.constexpr,
    SWIGLU: tl.constexpr,
    EXPERTS: tl.constexpr,  # power of two >= E
    EXPERT_CHUNK: tl.constexpr,  # experts searched at once
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,  # multiple of 128
    PADDING_TILES: tl.constexpr,  # scale tiles that one padding program zeroes, side by side
):
    """Grid (row_programs + E * cdiv(C / 4, PADDING_TILES),); row_programs = cdiv(T, BLOCK_ROWS) * column_programs."""
    pid = tl.program_id(0)
    SCALE_COLS: tl.constexpr = BLOCK_COLS // 32
    num_column_tiles = (K + 127) // 128

    if pid >= row_programs:
        programs_per_expert = (num_column_tiles + PADDING_TILES - 1) // PADDING_TILES
        e = (pid - row_programs) // programs_per_expert
        first_tile = (pid - row_programs) % programs_per_expert * PADDING_TILES
        if UNIFORM:
            tokens = rows_per_expert
            scale_start = e * ((rows_per_expert + 127) // 128 * 128)
        else:
            tokens = tl.load(expert_offsets_ptr + e + 1) - tl.load(expert_offsets_ptr + e)
            scale_start = tl.load(scale_offsets_ptr + e)
        if (tokens > 0) & (tokens % 128 != 0) & (scale_start >= 0) & (scale_start + tokens < num_scale_rows):
            _zero_padding_rows(
                scales_ptr,
                scale_start + tokens // 128 * 128,
                tokens % 128,
                first_tile,
                num_column_tiles,
                PADDING_TILES,
            )
        return

    column_program = pid % column_programs
    row = pid // column_programs * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    if UNIFORM:
        expert = row // rows_per_expert
        row_in_expert = row - expert * rows_per_expert
        valid = row < num_rows
        scale_row = expert * ((rows_per_expert + 127) // 128 * 128) + row_in_expert
        source = expert.to(tl.int64) * expert_stride + row_in_expert.to(tl.int64) * row_stride
    else:
        valid = row < tl.minimum(tl.load(expert_offsets_ptr + num_experts), num_rows)
        expert = _find_experts(row, expert_offsets_ptr, num_experts, EXPERTS, EXPERT_CHUNK)
        start = tl.load(expert_offsets_ptr + expert, mask=valid, other=0)
        scale_row = tl.load(scale_offsets_ptr + expert, mask=valid, other=0) + row - start
        source = row.to(tl.int64) * row_stride
    readable = valid
    if GATHER:
        index = tl.load(row_index_ptr + row, mask=valid, other=0)
        readable = valid & (index >= 0) & (index < num_source_rows)
        source = index.to(tl.int64) * row_stride

    col = column_program * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    x_ptrs = x_ptr + source[:, None] + col[None, :]
    mask = readable[:, None] & (col < K)[None, :]
    x = to_fp32(tl.load(x_ptrs, mask=mask, other=0.0))
    if SWIGLU:
        up = to_fp32(tl.load(x_ptrs + K, mask=mask, other=0.0))
        x = x / (1.0 + tl.exp(-x)) * up

    codes, scale = _quantize_blocks(tl.reshape(x, [BLOCK_ROWS, SCALE_COLS, 32]), ROUNDING_BIAS)

    codes = tl.reshape(codes, [BLOCK_ROWS, BLOCK_COLS])
    value_ptrs = values_ptr + row.to(tl.int64)[:, None] * K + col[None, :]
    stored = codes if INTERPRET else codes.to(tl.float8e4nv, bitcast=True)
    tl.store(value_ptrs, stored, mask=valid[:, None] & (col < K)[None, :])

    # Columns K/32 .. C-1 are blocks of masked zeros, whose scale is the 0 that padding wants.
    c = column_program * SCALE_COLS + tl.arange(0, SCALE_COLS)
    tile = (scale_row.to(tl.int64) // 128 * num_column_tiles)[:, None] + (c // 4)[None, :]
    within = (scale_row % 32 * 16 + scale_row % 128 // 32 * 4)[:, None] + (c % 4)[None, :]
    in_scales = valid & (scale_row < num_scale_rows)
    tl.store(scales_ptr + tile * 512 + within, scale, mask=in_scales[:, None] & (c < num_column_tiles * 4)[None, :])


@dataclass(frozen=True)
class QuantizeConfig:
    """Rows and columns of a row program, scale tiles of a padding program, and the warps of both."""

    block_rows: int
    block_cols: int
    padding_tiles: int
    num_warps: int


def select_quantize_config(num_rows: int, k: int, interpreted: bool = False) -> QuantizeConfig:
    """Tile of the quantizer; pure.

    Few rows: one row a program, so that a decode batch still fills the GPU. Many: more rows a program, so that
    the expert search is paid once for several. In the interpreter a program costs milliseconds: few, large ones.
    """
    width = triton.next_power_of_2(32 * scale_cols(k))
    if interpreted:
        return QuantizeConfig(min(triton.next_power_of_2(max(num_rows, 1)), 128), min(width, 1024), 8, 4)
    if num_rows * k <= 2**21:
        return QuantizeConfig(1, min(width, 512), 4, 2)
    return QuantizeConfig(4, min(width, 1024), 8, 4)


def _launch(
    x: torch.Tensor,
    row_stride: int,
    expert_stride: int,
    row_index: torch.Tensor | None,
    swiglu: bool,
    scale_rounding: str,
    values: torch.Tensor,
    scales: torch.Tensor,
    groups: GroupLayout | None,
    num_rows: int,
    num_experts: int,
    k: int,
) -> None:
    config = select_quantize_config(num_rows, k, INTERPRETED)
    column_programs = triton.cdiv(32 * scale_cols(k), config.block_cols)
    row_programs = triton.cdiv(num_rows, config.block_rows) * column_programs
    padding_programs = num_experts * triton.cdiv(scale_cols(k) // SCALE_TILE_COLS, config.padding_tiles)
    experts = triton.next_power_of_2(num_experts)
    grid = (row_programs + padding_programs,)
    with on_device_of(x):
        quantize_kernel[grid](
            x,
            row_stride,
            expert_stride,
            row_index,
            x.shape[0],
            raw(values),
            scales,
            scales.numel() // scale_cols(k),
            groups.expert_offsets if groups else None,
            groups.scale_offsets if groups else None,
            num_rows,
            num_experts,
            num_rows // num_experts,
            k,
            row_programs,
            column_programs,
            ROUNDING_BIAS=SCALE_ROUNDING_BIAS[scale_rounding],
            UNIFORM=groups is None,
            GATHER=row_index is not None,
            SWIGLU=swiglu,
            EXPERTS=experts,
            EXPERT_CHUNK=min(experts, 1024),
            BLOCK_ROWS=config.block_rows,
            BLOCK_COLS=config.block_cols,
            PADDING_TILES=config.padding_tiles,
            num_warps=config.num_warps,
        )


def quantize_grouped(
    x: torch.Tensor,
    groups: GroupLayout,
    values: torch.Tensor,
    scales: torch.Tensor,
    *,
    scale_rounding: str,
    row_index: torch.Tensor | None,
    swiglu: bool,
) -> None:
    """Quantize token rows into ``values`` and ``scales``; arguments as checked by ``ops.quantize_grouped``.

    Args:
        x: (R, K) or, with ``swiglu``, (R, 2K); bf16, fp16 or fp32; unit stride along columns.
        groups: layout of the T output rows.
        values: (T, K) float8_e4m3fn, contiguous.
        scales: (S, C) uint8, contiguous.
        scale_rounding: ``rceil``, ``floor`` or ``even``.
        row_index: (T,) int32, the source row of each output row; one outside 0 .. R-1 reads as zeros.
        swiglu: quantize ``silu(x[:, :K]) * x[:, K:]``.
    """
    if groups.num_tokens and groups.num_experts:
        _launch(
            x,
            x.stride(0),
            0,
            row_index,
            swiglu,
            scale_rounding,
            values,
            scales,
            groups,
            groups.num_tokens,
            groups.num_experts,
            values.shape[1],
        )


def quantize_weights(w: torch.Tensor, values: torch.Tensor, scales: torch.Tensor, *, scale_rounding: str) -> None:
    """Quantize w (E, N, K), unit stride along K, into ``values`` (E, N, K) and ``scales`` (E, roundup(N, 128), C)."""
    num_experts, n, k = w.shape
    if num_experts and n:
        assert k % BLOCK_SIZE == 0
        _launch(
            w,
            w.stride(1),
            w.stride(0),
            None,
            False,
            scale_rounding,
            values,
            scales,
            None,
            num_experts * n,
            num_experts,
            k,
        )
