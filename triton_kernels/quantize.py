"""The grouped quantizer: rows to e4m3 values and E8M0 scales in 128x4 tiles, one launch.

A program takes a few rows by a stretch of columns, wherever the groups' boundaries are: each row
finds its expert by counting the ends at or before it, all experts at once, so the cost does not
depend on how tokens are spread over experts. After the row programs come the padding programs; each
writes zeros into some of the padding rows of one expert. Every other stored byte is written by the
row programs, so equal inputs give equal bytes.

In an MoE layer a row program takes tokens and writes each to the rows of its choices: of all, so
that a token is quantized once, or of one where tokens are few, so that more programs share them.

The groups come in one of three forms (``LAYOUT``): ``offsets`` of a GroupLayout; ``counts``, which
every program scans anew and one writes down as a layout, so that a decode step needs no launch for
it; ``uniform``, every expert N rows long, which is what expert weights are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import triton
import triton.language as tl

from hybrid_mxfp8.core.activation import PLAIN_SWIGLU
from hybrid_mxfp8.core.formats import (
    BLOCK_SIZE,
    SCALE_ROUNDING_BIAS,
    SCALE_TILE_COLS,
    ceil_div,
    next_power_of_2,
    scale_cols,
)
from hybrid_mxfp8.dispatch.problem import QuantizeBuffers, QuantizeProblem, split_layout
from hybrid_mxfp8.triton_kernels.dependent_launch import wait_for_predecessor
from hybrid_mxfp8.triton_kernels.group_layout import group_offsets, scan_counts, store_layout
from hybrid_mxfp8.triton_kernels.launch import INTERPRETED, VARYING, KernelLaunch
from hybrid_mxfp8.triton_kernels.numerics import INTERPRET, to_e4m3_codes, to_fp32
from hybrid_mxfp8.triton_kernels.scale_layout import column_offset, row_offset


@triton.jit
def _scale_rows(row, num_rows, num_experts, expert_offsets_ptr, scale_offsets_ptr, EXPERTS: tl.constexpr):
    """Whether each row has an expert, the number of ends at or before it; and its scale row."""
    CHUNK: tl.constexpr = min(EXPERTS, 1024)
    valid = row < tl.minimum(tl.load(expert_offsets_ptr + num_experts), num_rows)
    expert = tl.zeros_like(row)
    for first in tl.static_range(0, EXPERTS, CHUNK):
        e = first + tl.arange(0, CHUNK)
        ends = tl.load(expert_offsets_ptr + 1 + e, mask=e < num_experts, other=0)
        before = (ends[None, :] <= row[:, None]) & (e < num_experts)[None, :]
        expert += tl.sum(before.to(tl.int32), 1)
    start = tl.load(expert_offsets_ptr + expert, mask=valid, other=0)
    return valid, tl.load(scale_offsets_ptr + expert, mask=valid, other=0) + row - start


@triton.jit
def _scale_rows_from_counts(row, ends, scale_ends):
    """As ``_scale_rows``: offsets are the largest scanned ends at or before a row."""
    before = ends[None, :] <= row[:, None]
    start = tl.max(tl.where(before, ends[None, :], 0), 1)
    scale_start = tl.max(tl.where(before, scale_ends[None, :], 0), 1)
    return row < tl.max(ends, 0), scale_start + row - start


@triton.jit
def _rows_of_choices(
    rows_ptr, ids_ptr, token, first, num_tokens, num_experts, expert_offsets_ptr, scale_offsets_ptr,
    TOP_K: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """The row and the scale row of each token's choices from ``first`` on, (R, SLOTS); row -1 of
    none."""
    k = first + tl.arange(0, SLOTS)
    slot = token[:, None] * TOP_K + k[None, :]
    mask = (token < num_tokens)[:, None] & (k < TOP_K)[None, :]
    row = tl.load(rows_ptr + slot, mask=mask, other=-1)
    expert = tl.load(ids_ptr + slot, mask=mask, other=-1)  # at once with the rows, not after them
    known = (expert >= 0) & (expert < num_experts)
    start = tl.load(expert_offsets_ptr + expert, mask=known, other=0)
    return row, tl.load(scale_offsets_ptr + expert, mask=known, other=0) + row - start


@triton.jit
def quantize_groups(x, ROUNDING_BIAS: tl.constexpr):
    """x (R, G, SCALE_GROUP) fp32 to codes of its shape and scales (R, G), both uint8."""
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    amax = tl.max(bits, 2)  # as integers: a float maximum would drop NaN
    finite = amax < 0x7F800000
    scale = tl.where(finite, tl.maximum(((amax + ROUNDING_BIAS) >> 23) - 8, 0), 255)
    inverse = tl.where(finite, (254 - scale) << 23, 0x7FC00000).to(tl.float32, bitcast=True)
    # A group with NaN or Inf is multiplied by NaN; 0x7F, the code wanted, is e4m3's NaN without
    # sign.
    codes = to_e4m3_codes(x * inverse[:, :, None])
    return tl.where(finite[:, :, None], codes, 0x7F).to(tl.uint8), scale.to(tl.uint8)


@triton.jit
def _zero_padding_rows(scales_ptr, first_scale_row, used_rows, first_tile, num_column_tiles, TILES: tl.constexpr):
    """Zero rows ``used_rows`` .. 127 of the last 128x4 tiles of one expert, whose last tile row is
    ``first_scale_row``.

    In words of 4 bytes, the 4 columns of one row. Rows r, r + 32, r + 64 and r + 96 are neighbours
    in a tile, so where even r is padding, a mask that is the same for four words lets the compiler
    store 16 bytes at once.
    """
    word = tl.arange(0, 128)
    first_row = word // 4
    row = first_row + 32 * (word % 4)
    tile = first_tile + tl.arange(0, TILES)
    first_word = (first_scale_row.to(tl.int64) // 128 * num_column_tiles + tile) * 128
    words = scales_ptr.to(tl.pointer_type(tl.int32)) + first_word[:, None] + word[None, :]
    in_tiles = (tile < num_column_tiles)[:, None]
    zeros = tl.zeros([TILES, 128], tl.int32)
    tl.store(words, zeros, mask=in_tiles & (first_row >= used_rows)[None, :])
    tl.store(words, zeros, mask=in_tiles & ((first_row < used_rows) & (row >= used_rows))[None, :])


@triton.jit
def _store(values_ptr, scales_ptr, codes, scale, row, scale_row, owned, column_program, num_scale_rows, K):
    """(R, BLOCK_COLS) codes to rows of values, (R, BLOCK_COLS / 32) scales to their places."""
    col = column_program * codes.shape[1] + tl.arange(0, codes.shape[1])
    value_ptrs = values_ptr + row.to(tl.int64)[:, None] * K + col[None, :]
    stored = codes if INTERPRET else codes.to(tl.float8e4nv, bitcast=True)
    tl.store(value_ptrs, stored, mask=owned[:, None] & (col < K)[None, :])
    c = column_program * scale.shape[1] + tl.arange(0, scale.shape[1])
    num_column_tiles = (K + 127) // 128
    offset = row_offset(scale_row, num_column_tiles)[:, None] + column_offset(c)[None, :]
    in_scales = owned & (scale_row >= 0) & (scale_row < num_scale_rows)
    tl.store(scales_ptr + offset, scale, mask=in_scales[:, None] & (c < num_column_tiles * 4)[None, :])


@triton.jit(do_not_specialize=VARYING)
def quantize_kernel(
    x_ptr,  # rows of K elements, or of 2K with SWIGLU; bf16, fp16 or fp32
    row_stride,  # elements
    expert_stride,  # elements, LAYOUT uniform
    row_index_ptr,  # (T,) int32, GATHER only
    rows_ptr,  # (R, TOP_K) int32: where the choices of each row of x go, -1 for nowhere
    ids_ptr,  # (R, TOP_K) int32 or int64: their experts
    num_source_rows,  # R, GATHER or TOP_K only
    values_ptr,  # (T, K) e4m3, contiguous
    scales_ptr,  # (S, C) uint8, swizzled
    num_scale_rows,  # S
    counts_ptr,  # (E,) int32 or int64, LAYOUT counts
    layout_ptr,  # (3E+2,) int32: written with LAYOUT counts
    expert_offsets_ptr,  # (E+1,) int32, LAYOUT offsets
    scale_offsets_ptr,  # (E+1,) int32, LAYOUT offsets
    num_rows,  # T, or E*N
    num_experts,
    rows_per_expert,  # N, LAYOUT uniform
    K,
    row_programs,
    column_programs,
    x_scales_ptr,  # (R, K/32) uint8, row-major: x is e4m3 and copied, TOP_K only; or None
    scale_stride,  # bytes
    ROUNDING_BIAS: tl.constexpr,
    SCALE_GROUP: tl.constexpr,  # elements that share one scale: 32 or 128
    LAYOUT: tl.constexpr,
    GATHER: tl.constexpr,
    TOP_K: tl.constexpr,  # 0 unless rows are tokens that go to the rows of their choices
    CHOICES: tl.constexpr,  # that a row program writes: 1 or TOP_K
    SLOTS: tl.constexpr,  # power of two >= CHOICES
    SWIGLU: tl.constexpr,  # whether rows are gate and up; then the three numbers below
    ALPHA: tl.constexpr,
    BETA: tl.constexpr,
    LIMIT: tl.constexpr,  # None where nothing is cut
    EXPERTS: tl.constexpr,  # power of two >= E
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,  # multiple of 128
    PADDING_TILES: tl.constexpr,  # scale tiles that one padding program zeroes, side by side
    SKIP_UNOWNED: tl.constexpr,  # row programs beyond the groups leave at once, LAYOUT offsets
):
    """Grid (row_programs + E * cdiv(C / 4, PADDING_TILES),), one more with LAYOUT counts."""
    wait_for_predecessor()
    pid = tl.program_id(0)
    SCALE_COLS: tl.constexpr = BLOCK_COLS // 32
    num_column_tiles = (K + 127) // 128

    if LAYOUT == "counts":
        ends, all_tokens, scale_ends = scan_counts(counts_ptr, num_rows, num_experts, EXPERTS)

    if pid >= row_programs:
        programs_per_expert = (num_column_tiles + PADDING_TILES - 1) // PADDING_TILES
        e = (pid - row_programs) // programs_per_expert
        first_tile = (pid - row_programs) % programs_per_expert * PADDING_TILES
        if LAYOUT == "counts":
            if e == num_experts:
                store_layout(layout_ptr, ends, all_tokens, scale_ends, num_experts, EXPERTS)
            tokens = tl.sum(tl.where(tl.arange(0, EXPERTS) == e, all_tokens, 0), 0)
            padded_end = tl.sum(tl.where(tl.arange(0, EXPERTS) == e, scale_ends, 0), 0)
            scale_start = padded_end - (tokens + 127) // 128 * 128
        elif LAYOUT == "uniform":
            tokens = rows_per_expert
            scale_start = e * ((rows_per_expert + 127) // 128 * 128)
        else:
            tokens = tl.load(expert_offsets_ptr + e + 1) - tl.load(expert_offsets_ptr + e)
            scale_start = tl.load(scale_offsets_ptr + e)
        # In int64: of a layout put together by hand the sum can wrap.
        inside = (scale_start >= 0) & (scale_start.to(tl.int64) + tokens < num_scale_rows)
        if (tokens > 0) & (tokens % 128 != 0) & inside:
            _zero_padding_rows(
                scales_ptr, scale_start + tokens // 128 * 128, tokens % 128, first_tile, num_column_tiles, PADDING_TILES
            )
        return

    column_program = pid % column_programs
    block = pid // column_programs
    if TOP_K > CHOICES:
        choice = block % TOP_K
        block //= TOP_K
    else:
        choice = 0
    first_row = block * BLOCK_ROWS
    if SKIP_UNOWNED and first_row >= tl.load(expert_offsets_ptr + num_experts):
        return
    row = first_row + tl.arange(0, BLOCK_ROWS)
    source = row.to(tl.int64) * row_stride
    if TOP_K > 0:
        valid = row < num_source_rows
        rows, scale_rows = _rows_of_choices(
            rows_ptr,
            ids_ptr,
            row,
            choice,
            num_source_rows,
            num_experts,
            expert_offsets_ptr,
            scale_offsets_ptr,
            TOP_K,
            SLOTS,
        )
    elif LAYOUT == "counts":
        valid, scale_row = _scale_rows_from_counts(row, ends, scale_ends)
    elif LAYOUT == "offsets":
        valid, scale_row = _scale_rows(row, num_rows, num_experts, expert_offsets_ptr, scale_offsets_ptr, EXPERTS)
    else:
        expert = row // rows_per_expert
        row_in_expert = row - expert * rows_per_expert
        valid = row < num_rows
        scale_row = expert * ((rows_per_expert + 127) // 128 * 128) + row_in_expert
        source = expert.to(tl.int64) * expert_stride + row_in_expert.to(tl.int64) * row_stride
    readable = valid
    if GATHER:
        index = tl.load(row_index_ptr + row, mask=valid, other=0)
        readable = valid & (index >= 0) & (index < num_source_rows)
        source = index.to(tl.int64) * row_stride

    col = column_program * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    x_ptrs = x_ptr + source[:, None] + col[None, :]
    mask = readable[:, None] & (col < K)[None, :]
    c = column_program * SCALE_COLS + tl.arange(0, SCALE_COLS)
    if x_scales_ptr is not None:
        codes = tl.where(mask, tl.load(x_ptrs, mask=mask).to(tl.uint8, bitcast=True), 0)
        scale_ptrs = x_scales_ptr + row.to(tl.int64)[:, None] * scale_stride + c[None, :]
        scale = tl.load(scale_ptrs, mask=readable[:, None] & (c < K // 32)[None, :], other=0)
    else:
        x = to_fp32(tl.load(x_ptrs, mask=mask, other=0.0))
        if SWIGLU:
            up = to_fp32(tl.load(x_ptrs + K, mask=mask, other=0.0))
            if LIMIT is not None:  # comparisons, not minima: they leave NaN as it is
                x = tl.where(x > LIMIT, LIMIT, x)
                up = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
            if BETA != 0.0:  # adding 0 would lose the sign of -0
                up += BETA
            x = x / (1.0 + tl.exp(-ALPHA * x)) * up
        GROUPS: tl.constexpr = BLOCK_COLS // SCALE_GROUP
        codes, scale = quantize_groups(tl.reshape(x, [BLOCK_ROWS, GROUPS, SCALE_GROUP]), ROUNDING_BIAS)
        codes = tl.reshape(codes, [BLOCK_ROWS, BLOCK_COLS])
        # Columns K/32 .. C-1 are blocks of masked zeros, whose scale is the 0 that padding wants;
        # but not where they share that of a group.
        if SCALE_GROUP > 32:
            scale = tl.broadcast_to(scale[:, :, None], [BLOCK_ROWS, GROUPS, SCALE_GROUP // 32])
            scale = tl.where((c < K // 32)[None, :], tl.reshape(scale, [BLOCK_ROWS, SCALE_COLS]), 0)
    if TOP_K > 0:
        for k in tl.range(0, CHOICES, loop_unroll_factor=8):
            this = (tl.arange(0, SLOTS) == k)[None, :]
            row = tl.sum(tl.where(this, rows, 0), 1)
            scale_row = tl.sum(tl.where(this, scale_rows, 0), 1)
            owned = (row >= 0) & (row < num_rows)
            _store(values_ptr, scales_ptr, codes, scale, row, scale_row, owned, column_program, num_scale_rows, K)
    else:
        _store(values_ptr, scales_ptr, codes, scale, row, scale_row, valid, column_program, num_scale_rows, K)


@dataclass(frozen=True)
class QuantizeConfig:
    """Rows and columns of a row program, scale tiles of a padding program, and the warps of both.

    With ``skip_unowned`` row programs beyond the groups return at once: they are most where experts
    are spread over GPUs or a batch is padded. But each then waits for a load, which slows decoding.
    """

    block_rows: int
    block_cols: int
    padding_tiles: int
    num_warps: int
    skip_unowned: bool = False


def select_quantize_config(
    num_rows: int, k: int, num_experts: int, interpreted: bool = False, choices: int = 1
) -> QuantizeConfig:
    """Tile of the quantizer for rows that are read, each written ``choices`` times; pure.

    Measured on an H100. Few rows are a matter of latency: one row a program (8 x 4096, E 128: 1.8
    us; 2.0 with 8). Then four, so that a program's scan of all experts is shared (256 x 7168, E
    256, counts scanned: 5.5 us; 7.4 with 1). Many rows: wide programs while the search over experts
    is cheap (131072 x 7168, E 8: 937 us; 943 with 8 x 512), else tall ones that share it (16384 x
    7168, E 256: 125 us; 146 with 2 x 2048). These skip rows that no expert owns (8192 of 65536 x
    7168 owned, E 32: 131 us; 427 without; all owned: less than 0.4 us either way). Tokens of a
    layer, on an H200 (Qwen3-30B-A3B's with 256, 512, 4096 tokens: 2 x 1024 174.8, 192.9, 534 us; 8
    x 512 174.5, 193.6, 492; 1 x 1024 177.0, 195.4, 530). In the interpreter a program costs
    milliseconds: few, large ones.
    """
    width = next_power_of_2(BLOCK_SIZE * scale_cols(k))
    if interpreted:
        return QuantizeConfig(min(next_power_of_2(num_rows), 128), min(width, 1024), 8, 4, skip_unowned=True)
    if choices > 1:
        return _tile(2, min(width, 1024), 16, 4) if num_rows * k <= 2**21 else _tile(8, min(width, 512), 4, 4)
    if num_rows * k <= 2**20:
        return _tile(1, min(width, 1024), 16, 4)
    if num_rows * k <= 2**21:
        return _tile(4, min(width, 1024), 16, 4)
    if num_experts <= 64:
        return _tile(2, min(width, 2048), 16, 8, skip_unowned=True)
    return _tile(8, min(width, 512), 4, 4, skip_unowned=True)


def _tile(
    block_rows: int, block_cols: int, padding_tiles: int, max_warps: int, skip_unowned: bool = False
) -> QuantizeConfig:
    """With as many warps as leave each thread 8 elements, 16 bytes of a 16-bit input."""
    warps = min(max(block_rows * block_cols // (8 * 32), 1), max_warps)
    return QuantizeConfig(block_rows, block_cols, padding_tiles, warps, skip_unowned)


def choices_of_a_program(num_rows: int, k: int, top_k: int, interpreted: bool = False) -> int:
    """How many of a token's ``top_k`` choices (0: rows of no layer) a row program writes. Pure.

    Measured on an H200, a layer of Qwen3-30B-A3B (H 2048, top 8): all in a program takes 0.5 us
    more for one token, 0.2 to 1 less for 4 to 64, and 4 % of the layer less for 1024.
    """
    return 1 if num_rows * k <= (2**12 if interpreted else 2**17) else max(top_k, 1)


FUSED_COUNTS_MAX_EXPERTS = 1024
FUSED_COUNTS_MAX_ELEMENTS = 2**21


def can_fuse_counts(num_rows: int, k: int, num_experts: int) -> bool:
    """Whether the quantizer should scan counts itself: only few programs repeat that. Pure."""
    return num_experts <= FUSED_COUNTS_MAX_EXPERTS and num_rows * k <= FUSED_COUNTS_MAX_ELEMENTS


def quantize(problem: QuantizeProblem, buffers: QuantizeBuffers) -> tuple[KernelLaunch, ...]:
    """The launch of one quantization, after one that scans counts unless they can be fused."""
    p, b = problem, buffers
    if p.grouping == "counts" and not can_fuse_counts(p.num_rows, p.k, p.num_experts):
        assert b.counts is not None
        assert b.layout is not None
        _, expert_offsets, scale_offsets = split_layout(b.layout, p.num_experts)
        scanned = b._replace(counts=None, layout=None, expert_offsets=expert_offsets, scale_offsets=scale_offsets)
        first = group_offsets(b.counts, b.layout, p.num_rows, False)
        return *first, *quantize(p._replace(grouping="offsets"), scanned)

    top_k = 0 if b.rows is None else b.rows.shape[1]
    choices = choices_of_a_program(p.num_rows, p.k, top_k, INTERPRETED)
    searched = 1 if top_k else p.num_experts
    config = select_quantize_config(p.num_rows // choices, p.k, searched, INTERPRETED, choices)
    cols = scale_cols(p.k)
    column_programs = ceil_div(BLOCK_SIZE * cols, config.block_cols)
    blocks = ceil_div(p.num_source_rows if top_k else p.num_rows, config.block_rows)
    row_programs = blocks * (max(top_k, 1) // choices) * column_programs
    padding_programs = p.num_experts * ceil_div(cols // SCALE_TILE_COLS, config.padding_tiles)
    programs = row_programs + padding_programs + (p.grouping == "counts")  # one more writes the layout
    swiglu = p.activation or PLAIN_SWIGLU
    return (KernelLaunch.of(
        quantize_kernel, programs,
        x_ptr=b.x, row_stride=p.row_stride, expert_stride=p.expert_stride, num_source_rows=p.num_source_rows,
        row_index_ptr=b.row_index, rows_ptr=b.rows, ids_ptr=b.ids,
        values_ptr=b.values, scales_ptr=b.scales, num_scale_rows=math.prod(b.scales.shape) // cols,
        counts_ptr=b.counts, layout_ptr=b.layout, expert_offsets_ptr=b.expert_offsets, scale_offsets_ptr=b.scale_offsets,
        num_rows=p.num_rows, num_experts=p.num_experts, K=p.k,
        row_programs=row_programs, column_programs=column_programs, x_scales_ptr=b.x_scales,
        # Triton specializes the kernel on these two, which are 1 where they are not used.
        rows_per_expert=p.num_rows // p.num_experts if p.grouping == "uniform" else 1,
        scale_stride=1 if b.x_scales is None else p.scale_stride,
        ROUNDING_BIAS=SCALE_ROUNDING_BIAS[p.scale_rounding], SCALE_GROUP=p.scale_group, LAYOUT=p.grouping,
        GATHER=b.row_index is not None, TOP_K=top_k, CHOICES=choices, SLOTS=next_power_of_2(choices),
        SWIGLU=p.activation is not None, ALPHA=swiglu.alpha, BETA=swiglu.beta, LIMIT=swiglu.limit,
        EXPERTS=next_power_of_2(p.num_experts), BLOCK_ROWS=config.block_rows, BLOCK_COLS=config.block_cols,
        PADDING_TILES=config.padding_tiles, SKIP_UNOWNED=config.skip_unowned and p.grouping == "offsets" and not top_k,
        num_warps=config.num_warps,
    ),)  # fmt: skip
