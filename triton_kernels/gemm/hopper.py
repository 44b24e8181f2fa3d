"""Grouped GEMM for Hopper: e4m3 weights become bf16 in registers, on their way into wgmma.

Hopper's matrix units know no block scales. Decoding is bound by the bytes of the weights, so these
must stay 8 bits wide all the way to the registers; prefill is bound by wgmma, so the conversion
must hide behind it. Hence:

- Tokens, few bytes, are dequantized to bf16 by a kernel before (``dequantize_tokens``), which also
  lists the token tiles. With the widest tile that kernel dequantizes the first tiles' tokens alone;
  three spare warps of this one do the others, just ahead of their use.
- One warp feeds a ring of stages in shared memory through TMA: raw weights, their scale tile, bf16
  tokens.
- Two warpgroups multiply. Each turns its 64 weight rows into wgmma's register operand: 16 bytes a
  load, 5 instructions for 2 elements, the scale included; while one half of a stage is converted,
  the other is multiplied.
- The grid is persistent, so the feeding warp runs ahead into the next tile while this one is
  stored. Tiles of few tokens load and multiply less; those of the last wave are cut, so that no
  program waits for another's whole tile.

Rows of the weights and columns of K go to threads so that no element ever changes threads: a
thread loads 16 neighbouring bytes of rows 2g and 2g+1, and holds neighbouring outputs in the end.
``dequantize_tokens`` says how the tokens follow that order of K.

The product of code and scale is exact in bf16 from 2**-133 up; blocks with scale bytes 0 to 2 can
hold smaller elements, which are then off by at most 2**-134. Scale 255 and NaN codes give NaN.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from hybrid_mxfp8.core.formats import ceil_div
from hybrid_mxfp8.dispatch.buffers import Buffer
from hybrid_mxfp8.dispatch.device import multiprocessors
from hybrid_mxfp8.dispatch.problem import GemmBuffers, Problem
from hybrid_mxfp8.triton_kernels.dependent_launch import wait_for_predecessor
from hybrid_mxfp8.triton_kernels.gemm.dequantize_tokens import dequantize_tokens
from hybrid_mxfp8.triton_kernels.gemm.hopper_config import HopperGemmConfig, WorkspaceLayout, tiles_at_once
from hybrid_mxfp8.triton_kernels.gemm.hopper_tiles import (
    SCALE_WORDS,
    advance,
    split_last_wave,
    tensor_map,
    tile_coordinates,
    tma_load,
)
from hybrid_mxfp8.triton_kernels.launch import KernelLaunch, triton_version

SLICE = gl.constexpr(4)  # rows that a warp dequantizes at a time
_reinterpret = getattr(gl.shared_memory_descriptor, "reinterpret", None) or gl.shared_memory_descriptor._reinterpret
"""The second name is Triton's before 3.7."""

# ---------------------------------------------------------------- who holds what
#
# 8 warps w of lanes 4g + c, 128 weight rows. Fragment row 64i + 16w + 8b + g of wgmma is weight row
# 16w' + 2g + b, with w' = 4i + w; fragment column 16s + 8h + 2c + j of 64 is the weights' column
# 16c + 4s + 2h + j.


@gluon.constexpr_function
def _codes_layout(columns):
    """(128, 64 or 128) weight bytes as loaded: 16 neighbours a thread and row."""
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], [0, 8]] + ([[0, 64]] if columns == 128 else []) + [[1, 0]],
        lane_bases=[[0, 16], [0, 32], [2, 0], [4, 0], [8, 0]],
        warp_bases=[[16, 0], [32, 0], [64, 0]],
        block_bases=[],
        shape=[128, columns],
    )


@gluon.constexpr_function
def _blocks_layout():
    """(128, 2, 32): the same 64 columns as two blocks of one scale each."""
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 0, 1], [0, 0, 2], [0, 0, 4], [0, 0, 8], [1, 0, 0]],
        lane_bases=[[0, 0, 16], [0, 1, 0], [2, 0, 0], [4, 0, 0], [8, 0, 0]],
        warp_bases=[[16, 0, 0], [32, 0, 0], [64, 0, 0]],
        block_bases=[],
        shape=[128, 2, 32],
    )


@gluon.constexpr_function
def _words_layout():
    """(1, 128) words of a scale tile: word 4r + q holds the 4 scales of row 32q + r."""
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 4]],
        lane_bases=[[0, 0], [0, 0], [0, 8], [0, 16], [0, 32]],
        warp_bases=[[0, 64], [0, 1], [0, 2]],
        block_bases=[],
        shape=[1, 128],
    )


@gluon.constexpr_function
def _store_layout(tokens):
    """(128, tokens) of y transposed: wgmma's accumulator, neighbouring rows in a register pair."""
    columns = [1] + [8 << i for i in range((tokens // 8).bit_length() - 1)]
    return gl.DistributedLinearLayout(
        reg_bases=[[1, 0]] + [[0, c] for c in columns],
        lane_bases=[[0, 2], [0, 4], [2, 0], [4, 0], [8, 0]],
        warp_bases=[[16, 0], [32, 0], [64, 0]],
        block_bases=[],
        shape=[128, tokens],
    )


@gluon.constexpr_function
def _token_blocks_layout():
    """(32, 32): 1024 columns of a token as 32 blocks, by one warp. A lane holds 4 neighbours of
    each 16 columns, which lie side by side in the order that ``dequantize_tokens`` writes."""
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 16], [1, 0], [16, 0]],
        lane_bases=[[0, 4], [0, 8], [2, 0], [4, 0], [8, 0]],
        warp_bases=[],
        block_bases=[],
        shape=[32, 32],
    )


@gluon.constexpr_function
def _expanded_layout():
    """(1024,): the same elements where they are written, 16 side by side a lane."""
    return gl.DistributedLinearLayout(
        reg_bases=[[1], [2], [4], [8], [512]],
        lane_bases=[[16], [32], [64], [128], [256]],
        warp_bases=[],
        block_bases=[],
        shape=[1024],
    )


@gluon.jit
def _times_scale(codes, b):
    """e4m3 bytes times 2**(b - 127), as bf16; b int32, may broadcast along the last axis."""
    # The factor as bf16, twice in a word: b << 7, but 0x40, a subnormal, for 0 and NaN for 255.
    bits = gl.where(b == 255, 0x7FC0, gl.maximum(b << 7, 0x40))
    return gl.inline_asm_elementwise(
        """{
        .reg .b16 lo, hi;
        .reg .b32 p, q;
        .reg .f16 h0, h1, h2, h3;
        .reg .f32 f0, f1, f2, f3;
        mov.b32 {lo, hi}, $2;
        cvt.rn.f16x2.e4m3x2 p, lo;
        cvt.rn.f16x2.e4m3x2 q, hi;
        mov.b32 {h0, h1}, p;
        mov.b32 {h2, h3}, q;
        cvt.f32.f16 f0, h0;
        cvt.f32.f16 f1, h1;
        cvt.f32.f16 f2, h2;
        cvt.f32.f16 f3, h3;
        cvt.rn.bf16x2.f32 p, f1, f0;
        cvt.rn.bf16x2.f32 q, f3, f2;
        mul.rn.bf16x2 $0, p, $3;
        mul.rn.bf16x2 $1, q, $3;
        }""",
        "=r,=r,r,r,r,r,r",  # 4 bytes of codes; their factor comes 4 times, always the same
        [codes, bits | (bits << 16)],
        dtype=gl.bfloat16,
        is_pure=True,
        pack=4,
    )


@gluon.jit
def _dequantize(codes, words, HALF: gl.constexpr, A_LAYOUT: gl.constexpr):
    """(128, 64) e4m3 times their scales, bytes 2 HALF (+ 1) of ``words`` (128,), as wgmma's A."""
    blocks_layout: gl.constexpr = _blocks_layout()
    blocks = gl.convert_layout(codes.reshape([128, 2, 32]), blocks_layout, assert_trivial=True)
    words = gl.convert_layout(words, gl.SliceLayout(1, gl.SliceLayout(2, blocks_layout)), assert_trivial=True)
    shift = 8 * (2 * HALF + gl.arange(0, 2, layout=gl.SliceLayout(0, gl.SliceLayout(2, blocks_layout))))
    b = (words[:, None] >> shift[None, :]) & 0xFF
    elements = _times_scale(blocks, b[:, :, None])
    fragment = elements.reshape([2, 4, 8, 2, 4, 4, 2, 2]).permute(0, 1, 3, 2, 5, 6, 4, 7).reshape([128, 64])
    return gl.convert_layout(fragment, A_LAYOUT, assert_trivial=True)


@gluon.jit
def _before(stage, STAGES: gl.constexpr):
    """The stage that came before. Computed, not kept in a variable: one that starts as an alias of
    ``stage`` is not carried through the loop (Triton 3.6 to 3.9 take it for unchanged), and every
    stage but the first is never freed."""
    return gl.where(stage == 0, STAGES - 1, stage - 1)


@gluon.jit
def _tile(tiles_ptr, index, whole, parts, num_n_tiles, BLOCK_T: gl.constexpr):
    """(token tile, n tile, first row, end) of a tile or its part; may end before it starts."""
    t_tile, n_tile, part = tile_coordinates(index, whole, parts, num_n_tiles)
    start = gl.load(tiles_ptr + 4 + t_tile * 4 + 1)
    end = gl.load(tiles_ptr + 4 + t_tile * 4 + 2)
    rows = gl.where(index < whole, BLOCK_T, BLOCK_T // parts)
    start += part * rows
    return t_tile, n_tile, start, gl.minimum(end, start + rows)


@gluon.jit
def _tokens_of(x_ring, stage, TOKENS: gl.constexpr, BLOCK_K: gl.constexpr):
    """A stage's tokens, as a box of so many rows lies there."""
    return _reinterpret(x_ring.index(stage), gl.bfloat16, [TOKENS, BLOCK_K], x_ring.layout)


@gluon.jit
def _lanes():
    """(32,), one a lane."""
    return gl.arange(0, 32, layout=gl.BlockedLayout([1], [32], [1], [0]))


@gluon.jit
def _take_slice(counter_ptr):
    """The number of the next slice of rows that no warp of the grid has taken, to every lane."""
    lane = _lanes()
    taken = gl.atomic_add(counter_ptr + lane * 0, lane * 0 + 1, mask=lane == 0, sem="relaxed", scope="gpu")
    return gl.sum(gl.where(lane == 0, taken, 0), 0)


@gluon.jit
def _report_slice(done_ptr):
    """Count a slice as written by all lanes, for TMA units on other multiprocessors to read."""
    lane = _lanes()
    one = gl.inline_asm_elementwise(
        "fence.proxy.async; fence.acq_rel.gpu; bar.warp.sync 0xffffffff; mov.b32 $0, $1;",
        "=r,r,~{memory}",
        [lane * 0 + 1],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )
    gl.atomic_add(done_ptr + lane * 0, one, mask=lane == 0, sem="release", scope="gpu")


@gluon.jit
def _wait_for_slices(done_ptr, wanted):
    """Until that many slices of a tile are written; then this warp's TMA loads see them."""
    address = done_ptr.to(gl.int64, bitcast=True) + _lanes().to(gl.int64) * 0
    done = 0
    while done < wanted:
        seen = gl.inline_asm_elementwise(
            "ld.acquire.gpu.global.b32 $0, [$1]; fence.proxy.async;",
            "=r,l,~{memory}",
            [address],
            dtype=gl.int32,
            is_pure=False,
            pack=1,
        )
        done = gl.min(seen, 0)


@gluon.jit
def _dequantize_slices(operands, tiles_ptr, num_scale_rows, K, first_tile, BLOCK_T: gl.constexpr):
    """One warp: tokens to bf16, as ``dequantize_tokens`` writes them, a slice of a tile after the
    other, until none is left.

    It waits for no other warp, and writes each slice that it takes. So warps that wait for a slice
    get it, however many programs of the grid are running. No warp waits for rows past a tile's end:
    they are multiplied as they are, and give columns that are not stored.
    """
    values_ptr, scales_ptr, dequantized_ptr, expert_offsets_ptr, scale_offsets_ptr = operands
    num_t_tiles = gl.load(tiles_ptr)
    K = K // 32 * 32  # K % 32 == 0, said so that the compiler reads words
    padded_k = (K + 63) // 64 * 64
    row_tiles = (K + 127) // 128
    codes_ptr = values_ptr.to(gl.pointer_type(gl.uint8), bitcast=True)
    blocks_layout: gl.constexpr = _token_blocks_layout()
    out_layout: gl.constexpr = _expanded_layout()
    block = gl.arange(0, 32, layout=gl.SliceLayout(1, blocks_layout))
    within = gl.arange(0, 32, layout=gl.SliceLayout(0, blocks_layout))
    place = gl.arange(0, 1024, layout=out_layout)

    taken = _take_slice(tiles_ptr + 1)
    while taken < (num_t_tiles - first_tile) * (BLOCK_T // SLICE):
        tile = first_tile + taken // (BLOCK_T // SLICE)
        entry = tiles_ptr + 4 + tile * 4
        expert = gl.load(entry)
        row = gl.load(entry + 1) + taken % (BLOCK_T // SLICE) * SLICE
        end = gl.minimum(gl.load(entry + 2), row + SLICE)
        first_scale_row = gl.load(scale_offsets_ptr + expert).to(gl.int64) - gl.load(expert_offsets_ptr + expert)
        while row < end:
            scale_row = first_scale_row + row
            owned = (scale_row >= 0) & (scale_row < num_scale_rows)
            row_scales = scales_ptr + (
                scale_row // 128 * row_tiles * 512 + scale_row % 32 * 16 + scale_row % 128 // 32 * 4
            )
            codes_row = codes_ptr + row.to(gl.int64) * K
            dequantized_row = dequantized_ptr + row.to(gl.int64) * padded_k
            for k in range(0, padded_k, 1024):
                b = block + k // 32
                col = (b * 32)[:, None] + within[None, :]
                codes = gl.load(codes_row + col, mask=col < K, other=0)
                scales = gl.load(row_scales + (b // 4 * 512 + b % 4), mask=(b < K // 32) & owned, other=0)
                elements = _times_scale(codes, scales.to(gl.int32)[:, None])
                elements = elements.reshape([16, 2, 2, 4, 2, 2]).permute(0, 3, 4, 1, 2, 5).reshape([1024])
                elements = gl.convert_layout(elements, out_layout)
                gl.store(dequantized_row + (k + place), elements, mask=k + place < padded_k)
            row += 1
        _report_slice(entry + 3)
        taken = _take_slice(tiles_ptr + 1)


@gluon.jit
def _produce_tile(w_descs, x_desc, ring, stage, phase, w_row, scale_tile, start, num_k_tiles, TOKENS: gl.constexpr):
    """All stages of one tile; returns the ring's next stage and phase."""
    w_desc, w_scales_desc = w_descs
    w_ring, scale_ring, x_ring, full, empty = ring
    STAGES: gl.constexpr = w_ring.shape[0]
    BLOCK_K: gl.constexpr = w_ring.shape[2]
    for k_tile in range(num_k_tiles):
        # One scale tile spans 128 columns, and comes with their first stage.
        for part in gl.static_range(128 // BLOCK_K):
            bar = full.index(stage)
            k = k_tile * 128 + part * BLOCK_K
            mbarrier.wait(empty.index(stage), phase)
            mbarrier.expect(bar, 128 * BLOCK_K + TOKENS * BLOCK_K * 2 + (512 if part == 0 else 0))
            tma_load(w_desc, [w_row, k], bar, w_ring.index(stage))
            tma_load(x_desc, [start, k], bar, _tokens_of(x_ring, stage, TOKENS, BLOCK_K))
            if part == 0:
                scales = scale_ring.index(stage)
                tma_load(w_scales_desc, [scale_tile + k_tile, 0], bar, scales)
            stage, phase = advance(stage, phase, STAGES)
    return stage, phase


@gluon.jit
def _producer(
    descs, ring, tiles_ptr, N, num_k_tiles, first_tile,
    BLOCK_T: gl.constexpr, SMALL_BLOCK_T: gl.constexpr, FUSED_DEQUANTIZE: gl.constexpr,
):  # fmt: skip
    """One warp: keep the ring full, tile after tile."""
    w_descs, x_desc, small_x_desc = descs
    num_t_tiles = gl.load(tiles_ptr)
    num_n_tiles = (N + 127) // 128
    stage = 0
    phase = 1
    whole, parts, count = split_last_wave(num_t_tiles, num_n_tiles, BLOCK_T)
    for index in range(gl.program_id(0), count, gl.num_programs(0)):
        t_tile, n_tile, start, end = _tile(tiles_ptr, index, whole, parts, num_n_tiles, BLOCK_T)
        if start < end:
            expert = gl.load(tiles_ptr + 4 + t_tile * 4)
            w_row = expert * N + n_tile * 128
            scale_tile = (expert * num_n_tiles + n_tile) * num_k_tiles
            if FUSED_DEQUANTIZE and t_tile >= first_tile:
                _wait_for_slices(tiles_ptr + 4 + t_tile * 4 + 3, BLOCK_T // SLICE)
            if SMALL_BLOCK_T < BLOCK_T and end - start <= SMALL_BLOCK_T:
                stage, phase = _produce_tile(
                    w_descs, small_x_desc, ring, stage, phase, w_row, scale_tile, start, num_k_tiles, SMALL_BLOCK_T
                )
            else:
                stage, phase = _produce_tile(
                    w_descs, x_desc, ring, stage, phase, w_row, scale_tile, start, num_k_tiles, BLOCK_T
                )


@gluon.jit
def _consume_tile(
    y_ptr, ring, stage, phase, start, end, n_tile, N, num_k_tiles, TOKENS: gl.constexpr, BOX: gl.constexpr
):
    """One tile of 128 weight rows by at most TOKENS of the BOX tokens of a stage, stored; returns
    the ring's next stage and phase."""
    w_ring, scale_ring, x_ring, full, empty = ring
    STAGES: gl.constexpr = w_ring.shape[0]
    BLOCK_K: gl.constexpr = w_ring.shape[2]
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[8, 1], instr_shape=[16, TOKENS, 16])
    a_layout: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    store_layout: gl.constexpr = _store_layout(TOKENS)

    # wgmma reads a0 and a1 while it runs, so each is kept alive, and its stage held, until the next
    # wait.
    acc = gl.zeros([128, TOKENS], gl.float32, mma)
    a1 = gl.zeros([128, 64], gl.bfloat16, a_layout)
    for k_tile in range(num_k_tiles):
        mbarrier.wait(full.index(stage), phase)
        words = scale_ring.index(stage).load(_words_layout()).reshape([32, 4]).permute(1, 0).reshape([128])
        codes = w_ring.index(stage).load(_codes_layout(BLOCK_K))
        x = _tokens_of(x_ring, stage, BOX, BLOCK_K).slice(0, TOKENS, dim=0)
        if BLOCK_K == 128:
            codes, codes1 = codes.reshape([128, 2, 64]).permute(0, 2, 1).split()
            x1 = x.slice(64, 64, dim=1)
            x = x.slice(0, 64, dim=1)
        a0 = _dequantize(codes, words, 0, a_layout)
        acc = warpgroup_mma(a0, x.permute((1, 0)), acc, is_async=True)
        acc, a1 = warpgroup_mma_wait(1, deps=(acc, a1))
        mbarrier.arrive(empty.index(_before(stage, STAGES)), pred=k_tile > 0)
        if BLOCK_K == 64:
            stage, phase = advance(stage, phase, STAGES)
            mbarrier.wait(full.index(stage), phase)
            codes1 = w_ring.index(stage).load(_codes_layout(BLOCK_K))
            x1 = _tokens_of(x_ring, stage, BOX, BLOCK_K).slice(0, TOKENS, dim=0)
        a1 = _dequantize(codes1, words, 1, a_layout)
        acc = warpgroup_mma(a1, x1.permute((1, 0)), acc, is_async=True)
        acc, a0 = warpgroup_mma_wait(1, deps=(acc, a0))
        if BLOCK_K == 64:
            mbarrier.arrive(empty.index(_before(stage, STAGES)))
        stage, phase = advance(stage, phase, STAGES)
    acc, a1 = warpgroup_mma_wait(0, deps=(acc, a1))
    mbarrier.arrive(empty.index(_before(stage, STAGES)))

    y = acc.to(y_ptr.dtype.element_ty).reshape([2, 4, 2, 8, TOKENS]).permute(0, 1, 3, 2, 4).reshape([128, TOKENS])
    y = gl.convert_layout(y, store_layout, assert_trivial=True)
    # Offsets in 32 bits from the tile's first row: in 64 bits they spill. They are the same for
    # every tile, so the stride is hidden from the compiler, which would keep all products t N, and
    # spill more.
    stride = gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [N], dtype=gl.int32, is_pure=False, pack=1) // 8 * 8
    n = n_tile * 128 + gl.arange(0, 128, layout=gl.SliceLayout(1, store_layout))
    t = gl.arange(0, TOKENS, layout=gl.SliceLayout(0, store_layout))
    y_rows = y_ptr + start.to(gl.int64) * N
    gl.store(y_rows + (t[None, :] * stride + n[:, None]), y, mask=(n < N)[:, None] & (t < end - start)[None, :])
    return stage, phase


@gluon.jit
def _consumer(y_ptr, ring, tiles_ptr, N, num_k_tiles, BLOCK_T: gl.constexpr, SMALL_BLOCK_T: gl.constexpr):
    """Two warpgroups: empty the ring, tile after tile; an expert's last may take less."""
    num_t_tiles = gl.load(tiles_ptr)
    num_n_tiles = (N + 127) // 128
    stage = 0
    phase = 0
    whole, parts, count = split_last_wave(num_t_tiles, num_n_tiles, BLOCK_T)
    for index in range(gl.program_id(0), count, gl.num_programs(0)):
        _, n_tile, start, end = _tile(tiles_ptr, index, whole, parts, num_n_tiles, BLOCK_T)
        if start < end:
            if SMALL_BLOCK_T < BLOCK_T and end - start <= SMALL_BLOCK_T:
                stage, phase = _consume_tile(
                    y_ptr, ring, stage, phase, start, end, n_tile, N, num_k_tiles, SMALL_BLOCK_T, SMALL_BLOCK_T
                )
            elif BLOCK_T > 128 and end - start <= 128:
                stage, phase = _consume_tile(
                    y_ptr, ring, stage, phase, start, end, n_tile, N, num_k_tiles, 128, BLOCK_T
                )
            else:
                stage, phase = _consume_tile(
                    y_ptr, ring, stage, phase, start, end, n_tile, N, num_k_tiles, BLOCK_T, BLOCK_T
                )


@gluon.jit(
    do_not_specialize=[
        "expert_offsets_ptr", "scale_offsets_ptr", "num_scale_rows", "tokens_at", "first_tile", "K", "N", "num_k_tiles"
    ]
)  # fmt: skip
def hopper_gemm_kernel(
    y_ptr,  # (T, N) bf16, fp16 or fp32
    workspace_ptr,  # bytes, as dequantize_tokens writes them: the list of token tiles, then bf16 tokens
    w_desc,  # (E*N, K) bytes of e4m3, blocks of (128, BLOCK_K)
    w_scales_desc,  # (scale tiles, 128) int32: one 128x4 tile a row
    x_desc,  # (T, roundup(K, 64)) bf16 as dequantize_tokens writes it, blocks of (BLOCK_T, BLOCK_K)
    small_x_desc,  # the same in blocks of (SMALL_BLOCK_T, BLOCK_K), for tiles of few tokens
    values_ptr,  # (T, K) bytes of e4m3, FUSED_DEQUANTIZE only, as all to tokens_at
    scales_ptr,  # (S, C) uint8, swizzled
    expert_offsets_ptr,  # (E+1,) int32
    scale_offsets_ptr,  # (E+1,) int32
    num_scale_rows,  # S
    tokens_at,  # where the bf16 tokens start in the workspace, in units of 256 bytes
    first_tile,  # token tiles from this one on are dequantized here
    K,
    N,
    num_k_tiles,  # cdiv(K, 128)
    BLOCK_T: gl.constexpr,
    SMALL_BLOCK_T: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    FUSED_DEQUANTIZE: gl.constexpr,
):
    """Grid (multiprocessors,), 8 warps multiply, one feeds; FUSED_DEQUANTIZE: 3 more dequantize."""
    # An expert's last tile of weights reaches into the next expert's: rows that are multiplied, and
    # not stored.
    N = N // 8 * 8  # N % 8 == 0, said so that the compiler pairs the stores
    tiles_ptr = workspace_ptr.to(gl.pointer_type(gl.int32), bitcast=True)
    w_ring = gl.allocate_shared_memory(gl.uint8, [STAGES, 128, BLOCK_K], w_desc.layout)
    scale_ring = gl.allocate_shared_memory(gl.int32, [STAGES, 1, 128], w_scales_desc.layout)
    x_ring = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK_T, BLOCK_K], x_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    # Before the other warps start, so that it holds for them, too.
    wait_for_predecessor()
    # The multiplying warps are the default partition: ptxas serializes wgmma in any other (its
    # message C7512). Constants are written where they are used: in a tuple that is kept in a
    # variable they become tensors.
    descs = ((w_desc, w_scales_desc), x_desc, small_x_desc)
    ring = (w_ring, scale_ring, x_ring, full, empty)
    if FUSED_DEQUANTIZE:
        dequantized_ptr = (workspace_ptr + tokens_at.to(gl.int64) * 256).to(gl.pointer_type(gl.bfloat16), bitcast=True)
        operands = (values_ptr, scales_ptr, dequantized_ptr, expert_offsets_ptr, scale_offsets_ptr)
        gl.warp_specialize(
            [
                (_consumer, (y_ptr, ring, tiles_ptr, N, num_k_tiles, BLOCK_T, SMALL_BLOCK_T)),
                (_producer, (descs, ring, tiles_ptr, N, num_k_tiles, first_tile, BLOCK_T, SMALL_BLOCK_T, True)),
                (_dequantize_slices, (operands, tiles_ptr, num_scale_rows, K, first_tile, BLOCK_T)),
                (_dequantize_slices, (operands, tiles_ptr, num_scale_rows, K, first_tile, BLOCK_T)),
                (_dequantize_slices, (operands, tiles_ptr, num_scale_rows, K, first_tile, BLOCK_T)),
            ],
            [1, 1, 1, 1],
            [48, 48, 48, 48],
        )
    else:
        gl.warp_specialize(
            [
                (_consumer, (y_ptr, ring, tiles_ptr, N, num_k_tiles, BLOCK_T, SMALL_BLOCK_T)),
                (_producer, (descs, ring, tiles_ptr, N, num_k_tiles, 0, BLOCK_T, SMALL_BLOCK_T, False)),
            ],
            [1],
            [40],
        )


def plan(problem: Problem, buffers: GemmBuffers, config: HopperGemmConfig) -> tuple[KernelLaunch, ...]:
    """The two launches of one product: tokens to bf16, then the product. Weights and their scales
    are 16-byte aligned, and ``buffers.workspace`` has the bytes of the WorkspaceLayout."""
    assert config.is_valid(), config
    assert buffers.workspace is not None
    if triton_version() == (3, 8):
        # Triton 3.8 can't view a stage as a smaller box, so a tile of few tokens loads a whole one.
        config = replace(config, small_block_t=config.block_t)
    p, b, workspace, block_k = problem, buffers, buffers.workspace, config.block_k
    layout = WorkspaceLayout.of(p.num_tokens, p.num_experts, p.k, config)
    row_tiles, num_k_tiles = ceil_div(p.n, 128), ceil_div(p.k, 128)
    programs = min(multiprocessors(p.device) or 1, layout.max_tiles * row_tiles)
    first_tile = tiles_at_once(programs, row_tiles)
    rows_before = min(first_tile * config.block_t, p.num_tokens) if config.fused_dequantize else p.num_tokens
    dequantization = dequantize_tokens(b, workspace, layout, p.num_experts, config.block_t, rows_before)
    w_bytes = b.w_values._replace(dtype=torch.uint8)
    w_scale_words = b.w_scales._replace(dtype=torch.int32)
    tokens = Buffer(
        workspace.operand, workspace.offset + layout.tokens_at, torch.bfloat16, (p.num_tokens, layout.padded_k)
    )
    scale_tiles = p.num_experts * row_tiles * num_k_tiles
    product = KernelLaunch.of(
        hopper_gemm_kernel, programs,
        y_ptr=b.out, workspace_ptr=workspace,
        w_desc=tensor_map(w_bytes, p.num_experts * p.n, p.k, 128, block_k),
        w_scales_desc=tensor_map(w_scale_words, scale_tiles, SCALE_WORDS, 1, SCALE_WORDS),
        x_desc=tensor_map(tokens, p.num_tokens, layout.padded_k, config.block_t, block_k),
        small_x_desc=tensor_map(tokens, p.num_tokens, layout.padded_k, config.small_block_t, block_k),
        values_ptr=b.x_values, scales_ptr=b.x_scales, num_scale_rows=b.x_scales.shape[0],
        expert_offsets_ptr=b.expert_offsets, scale_offsets_ptr=b.scale_offsets,
        tokens_at=layout.tokens_at // 256, first_tile=first_tile, K=p.k, N=p.n, num_k_tiles=num_k_tiles,
        BLOCK_T=config.block_t, SMALL_BLOCK_T=config.small_block_t, BLOCK_K=block_k, STAGES=config.num_stages,
        FUSED_DEQUANTIZE=config.fused_dequantize, num_warps=8,
    )  # fmt: skip
    return dequantization, product
