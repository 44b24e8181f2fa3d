"""Grouped GEMM for Hopper on its FP8 units, for operands whose scales are the same over 128 of K.

Where four neighbouring blocks of 32 share their scale (``Problem.scale_group == 128``), e4m3 times
e4m3 is summed over 128 elements before a scale is needed. Both operands go to shared memory by TMA
as they are, and each partial sum, times the scale of its row and of its column, is added in fp32.

- Two warps feed a ring of stages, one weights, one tokens, each with a 128x4 tile of scales. The
  second says in a tile's first stage which tile it is.
- Another warp turns the scales of a stage into fp32, in the order of rows.
- Two warpgroups multiply, 64 rows each, one stage at a time: while one adds its partial sum, the
  other's product runs.
- Rows of the product are weights and its columns tokens: half a tile of tokens then costs less.
  Where weights have one scale for a square of 128x128 (``config.squares``), whole tiles of 128
  tokens are the rows instead: then a thread needs two scales a stage, one for each of its rows, and
  adds a partial sum by one instruction. Scales of rows and columns take two, and many reads.
- The grid is persistent. An expert's tokens beyond its last whole tile take a narrower one.

The units align 32 products and the sum so far to the largest, and truncate below some 13 bits:
docs/numerics.md says what that does to a result.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier, warpgroup_mma, warpgroup_mma_wait

from hybrid_mxfp8.core.formats import ceil_div, next_power_of_2
from hybrid_mxfp8.dispatch.device import multiprocessors
from hybrid_mxfp8.dispatch.problem import GemmBuffers, Problem
from hybrid_mxfp8.triton_kernels.dependent_launch import empty_l1, wait_for_predecessor
from hybrid_mxfp8.triton_kernels.gemm.hopper_fp8_config import HopperFp8Config
from hybrid_mxfp8.triton_kernels.gemm.hopper_tiles import (
    SCALE_WORDS,
    advance,
    split_last_wave,
    tensor_map,
    tile_coordinates,
    tma_load,
)
from hybrid_mxfp8.triton_kernels.launch import KernelLaunch


@gluon.constexpr_function
def _accumulator(columns):
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 32])


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _scale_to_fp32(word):
    """2**(b - 127) of the lowest byte b of each word: subnormal for 0, NaN for 255."""
    b = word & 0xFF
    bits = gl.where(b == 0, 0x00400000, b << 23)
    return gl.where(b == 255, 0x7FC00000, bits).to(gl.float32, bitcast=True)


@gluon.jit
def _experts(groups, EXPERTS: gl.constexpr, BLOCK_T: gl.constexpr):
    """(numbers, first rows, ends, token tiles) of all experts, (EXPERTS,) each."""
    expert_offsets_ptr, _, num_experts, num_tokens = groups
    layout: gl.constexpr = gl.BlockedLayout([EXPERTS // 32], [32], [1], [0])
    e = gl.arange(0, EXPERTS, layout=layout)
    starts = gl.load(expert_offsets_ptr + e, mask=e < num_experts, other=0)
    ends = gl.load(expert_offsets_ptr + e + 1, mask=e < num_experts, other=0)
    # Clamped to the buffers, so that a layout put together by hand can't lead outside them.
    starts = gl.minimum(gl.maximum(starts, 0), num_tokens)
    ends = gl.minimum(gl.maximum(ends, starts), num_tokens)
    return e, starts, ends, (ends - starts + BLOCK_T - 1) // BLOCK_T


@gluon.jit
def _announce(info, start, rows, n_tile, piece):
    """Write what the tile is that begins with this stage: four words. A thread writes one, and the
    others fill the line, since racecheck reports words that all 32 of a warp write."""
    i = gl.arange(0, 32, layout=gl.BlockedLayout([1], [32], [1], [0]))
    info.store(gl.where(i == 0, start, gl.where(i == 1, rows, gl.where(i == 2, n_tile, piece))))


@gluon.jit
def _announced(info, WARPS: gl.constexpr):
    """(first row, rows, n tile, first 32 scales); no rows after the last tile."""
    layout: gl.constexpr = gl.BlockedLayout([4], [32], [WARPS], [0])
    words = info.slice(0, 4).load(layout)
    i = gl.arange(0, 4, layout=layout)
    start = gl.sum(gl.where(i == 0, words, 0), 0)
    rows = gl.sum(gl.where(i == 1, words, 0), 0)
    n_tile = gl.sum(gl.where(i == 2, words, 0), 0)
    piece = gl.sum(gl.where(i == 3, words, 0), 0)
    return start, rows, n_tile, piece


@gluon.jit
def _count_tiles(groups, num_n_tiles, EXPERTS: gl.constexpr, BLOCK_T: gl.constexpr):
    """What split_last_wave returns for the tiles of all experts."""
    _, _, _, tiles = _experts(groups, EXPERTS, BLOCK_T)
    return split_last_wave(gl.sum(tiles, 0), num_n_tiles, BLOCK_T)


@gluon.jit
def _tile(index, waves, num_n_tiles, groups, EXPERTS: gl.constexpr, BLOCK_T: gl.constexpr):
    """(expert, n tile, the expert's first token, which of its tokens is the tile's first, how many
    the tile has)."""
    whole, parts, _ = waves
    t_tile, n_tile, part = tile_coordinates(index, whole, parts, num_n_tiles)
    e, starts, ends, tiles = _experts(groups, EXPERTS, BLOCK_T)
    upto = gl.associative_scan(tiles, 0, _add)
    expert = gl.sum((upto <= t_tile).to(gl.int32), 0)
    own = e == expert
    first = gl.sum(gl.where(own, starts, 0), 0)
    end = gl.sum(gl.where(own, ends, 0), 0)
    tile = t_tile - gl.sum(gl.where(own, upto - tiles, 0), 0)
    width = gl.where(index < whole, BLOCK_T, BLOCK_T // parts)
    within = tile * BLOCK_T + part * width
    return expert, n_tile, first, within, gl.minimum(end - first - within, width)


@gluon.jit
def _load_weights(descs, ring, groups, N, num_k_tiles, EXPERTS: gl.constexpr):
    """One warp: weights and their scales of tile after tile.

    It does not wait for the kernel before, which writes tokens: weights and expert offsets are
    older.
    """
    empty_l1()
    w_desc, w_scales_desc = descs
    w_ring, x_ring, raw_w_ring, _, _, _, _, full, _, empty = ring
    STAGES: gl.constexpr = w_ring.shape[0]
    BLOCK_T: gl.constexpr = x_ring.shape[1]
    num_n_tiles = (N + 127) // 128
    stage = 0
    phase = 1
    waves = _count_tiles(groups, num_n_tiles, EXPERTS, BLOCK_T)
    for index in range(gl.program_id(0), waves[2], gl.num_programs(0)):
        expert, n_tile, _first, _within, rows = _tile(index, waves, num_n_tiles, groups, EXPERTS, BLOCK_T)
        if rows > 0:
            row = expert * N + n_tile * 128
            scale_tile = (expert * num_n_tiles + n_tile) * num_k_tiles
            for k_tile in range(num_k_tiles):
                bar = full.index(stage)
                mbarrier.wait(empty.index(stage), phase)
                mbarrier.expect(bar, 128 * 128 + 4 * raw_w_ring.shape[2])
                tma_load(w_desc, [row, k_tile * 128], bar, w_ring.index(stage))
                tma_load(w_scales_desc, [scale_tile + k_tile, 0], bar, raw_w_ring.index(stage))
                stage, phase = advance(stage, phase, STAGES)
    mbarrier.wait(empty.index(stage), phase)
    mbarrier.arrive(full.index(stage), count=1)


@gluon.jit
def _load_tokens(descs, ring, groups, N, num_k_tiles, EXPERTS: gl.constexpr):
    """One warp: tokens and their scales of tile after tile; in its first stage, which tile it is.

    It waits for the kernel before; y is stored only after tokens have come, so after that.
    """
    wait_for_predecessor()
    x_desc, x_scales_desc = descs
    w_ring, x_ring, _, raw_x_ring, _, _, info_ring, full, _, empty = ring
    scale_offsets_ptr = groups[1]
    STAGES: gl.constexpr = w_ring.shape[0]
    BLOCK_T: gl.constexpr = x_ring.shape[1]
    BOX: gl.constexpr = BLOCK_T // 2
    num_n_tiles = (N + 127) // 128
    stage = 0
    phase = 1
    waves = _count_tiles(groups, num_n_tiles, EXPERTS, BLOCK_T)
    for index in range(gl.program_id(0), waves[2], gl.num_programs(0)):
        expert, n_tile, first, within, rows = _tile(index, waves, num_n_tiles, groups, EXPERTS, BLOCK_T)
        if rows > 0:
            scale_row = gl.load(scale_offsets_ptr + expert) + within
            scale_tile = scale_row // 128 * num_k_tiles
            boxes = (rows + BOX - 1) // BOX
            mbarrier.wait(empty.index(stage), phase)
            _announce(info_ring.index(stage), first + within, rows, n_tile, scale_row % 128 // 32)
            for k_tile in range(num_k_tiles):
                bar = full.index(stage)
                mbarrier.wait(empty.index(stage), phase)
                # The last box may hold tokens of the next expert, which no result depends on.
                for i in gl.static_range(BLOCK_T // BOX):
                    mbarrier.expect(bar, (i + 1) * BOX * 128 + 512, pred=boxes == i + 1)
                for i in gl.static_range(BLOCK_T // BOX):
                    x = x_ring.index(stage).slice(i * BOX, BOX, dim=0)
                    tma_load(x_desc, [first + within + i * BOX, k_tile * 128], bar, x, pred=i < boxes)
                tma_load(x_scales_desc, [scale_tile + k_tile, 0], bar, raw_x_ring.index(stage))
                stage, phase = advance(stage, phase, STAGES)
    mbarrier.wait(empty.index(stage), phase)
    _announce(info_ring.index(stage), 0, 0, 0, 0)
    mbarrier.arrive(full.index(stage), count=1)


@gluon.jit
def _scaler(ring, num_k_tiles, SQUARES: gl.constexpr):
    """One warp: the scales of each stage to fp32; with SQUARES tokens' ones times the weights'."""
    w_ring, x_ring, raw_w_ring, raw_x_ring, w_scale_ring, x_scale_ring, info_ring, full, ready, _ = ring
    STAGES: gl.constexpr = w_ring.shape[0]
    stage = 0
    phase = 0
    mbarrier.wait(full.index(stage), phase)
    _, rows, _, piece = _announced(info_ring.index(stage), 1)
    while rows > 0:
        for _ in range(num_k_tiles):
            mbarrier.wait(full.index(stage), phase)
            if SQUARES:
                square = _first_scale(raw_w_ring.index(stage))
            else:
                w = _scale_pieces(raw_w_ring.index(stage))
                out = w_scale_ring.index(stage)
                for i in gl.static_range(4):
                    _put(out, i, w[i])
            out = x_scale_ring.index(stage)
            x = _scale_pieces(raw_x_ring.index(stage))
            for i in gl.static_range(x_ring.shape[1] // 32):
                values = x[i]
                # A tile that starts within a block of 128 rows ends in it.
                for by in gl.static_range(1, 4 - i):
                    values = gl.where(piece == by, x[i + by], values)
                if SQUARES:
                    values *= square
                _put(out, i, values)
            mbarrier.arrive(ready.index(stage), count=1)
            stage, phase = advance(stage, phase, STAGES)
        mbarrier.wait(full.index(stage), phase)
        _, rows, _, piece = _announced(info_ring.index(stage), 1)


@gluon.jit
def _first_scale(raw):
    """That of row 0, from the first words of a scale tile."""
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [1, 1], [1, 0])
    words = raw.slice(0, 4, dim=1).load(layout)
    i = gl.arange(0, 4, layout=gl.SliceLayout(0, layout))[None, :]
    return gl.sum(gl.sum(gl.where(i == 0, _scale_to_fp32(words), 0.0), 1), 0)


@gluon.jit
def _scale_pieces(raw):
    """The 128 words of a scale tile as fp32: rows 0 to 31, 32 to 63, and so on."""
    words = raw.load(gl.BlockedLayout([1, 4], [1, 32], [1, 1], [1, 0]))
    even, odd = _scale_to_fp32(words).reshape([32, 2, 2]).split()
    s0, s2 = even.split()
    s1, s3 = odd.split()
    return s0, s1, s2, s3


@gluon.jit
def _put(out, i: gl.constexpr, values):
    """32 scales as piece i."""
    out.slice(32 * i, 32).store(gl.convert_layout(values, gl.BlockedLayout([1], [32], [1], [0]), assert_trivial=True))


@gluon.jit
def _store(
    y_ptr, acc, tile, N, FIRST: gl.constexpr, TOKEN_ROWS: gl.constexpr, HALF: gl.constexpr, STORE_COLUMNS: gl.constexpr
):
    """64 rows of a tile, its columns from FIRST on, STORE_COLUMNS at a time through shared
    memory."""
    COLUMNS: gl.constexpr = acc.shape[1]
    if COLUMNS > STORE_COLUMNS:
        left, right = acc.reshape([64, 2, COLUMNS // 2]).permute(0, 2, 1).split()
        half: gl.constexpr = _accumulator(COLUMNS // 2)
        left = gl.convert_layout(left, half, assert_trivial=True)
        right = gl.convert_layout(right, half, assert_trivial=True)
        _store(y_ptr, left, tile, N, FIRST, TOKEN_ROWS, HALF, STORE_COLUMNS)
        _store(y_ptr, right, tile, N, FIRST + COLUMNS // 2, TOKEN_ROWS, HALF, STORE_COLUMNS)
    else:
        start, rows, n_tile = tile
        y = acc.to(y_ptr.dtype.element_ty)
        if TOKEN_ROWS:
            by_rows: gl.constexpr = gl.BlockedLayout([1, 8], [256 // COLUMNS, COLUMNS // 8], [4, 1], [1, 0])
            t = 64 * HALF + gl.arange(0, 64, layout=gl.SliceLayout(1, by_rows))[:, None]
            n = FIRST + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, by_rows))[None, :]
            y = gl.convert_layout(y, by_rows)
        else:
            by_columns: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [1, 4], [0, 1])
            n = 64 * HALF + gl.arange(0, 64, layout=gl.SliceLayout(1, by_columns))[:, None]
            t = FIRST + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, by_columns))[None, :]
            y = gl.convert_layout(y, by_columns)
        y_rows = y_ptr + start.to(gl.int64) * N + n_tile * 128
        gl.store(y_rows + (t * N + n), y, mask=(n < N - n_tile * 128) & (t < rows))


@gluon.jit
def _consume_tile(
    y_ptr, ring, stage, phase, tile, N, num_k_tiles,
    COLUMNS: gl.constexpr, TOKEN_ROWS: gl.constexpr, SQUARES: gl.constexpr, HALF: gl.constexpr,
    STORE_COLUMNS: gl.constexpr,
):  # fmt: skip
    """64 rows of one tile, stored; returns the ring's next stage and phase. COLUMNS are tokens, or
    with TOKEN_ROWS weights."""
    w_ring, x_ring, _, _, w_scale_ring, x_scale_ring, _, full, ready, empty = ring
    acc = gl.zeros([64, COLUMNS], gl.float32, _accumulator(COLUMNS))
    p = acc
    for _ in range(num_k_tiles):
        if TOKEN_ROWS:
            a = x_ring.index(stage).slice(64 * HALF, 64, dim=0)
            b = w_ring.index(stage)
        else:
            a = w_ring.index(stage).slice(64 * HALF, 64, dim=0)
            b = x_ring.index(stage).slice(0, COLUMNS, dim=0)
        p = warpgroup_mma(a, b.permute((1, 0)), p, use_acc=False, is_async=True)
        # Triton puts a barrier of these warps before a wait. It costs nothing while the product
        # runs, so the next stage is waited for here, too.
        mbarrier.wait(ready.index(stage), phase)
        next_stage, phase = advance(stage, phase, w_ring.shape[0])
        mbarrier.wait(full.index(next_stage), phase)
        p = warpgroup_mma_wait(0, deps=(p,))
        if TOKEN_ROWS:
            rows = x_scale_ring.index(stage).slice(64 * HALF, 64).load(gl.SliceLayout(1, acc.type.layout))
            acc += p * rows[:, None]
        else:
            if not SQUARES:
                rows = w_scale_ring.index(stage).slice(64 * HALF, 64).load(gl.SliceLayout(1, acc.type.layout))
                p *= rows[:, None]
            columns = x_scale_ring.index(stage).slice(0, COLUMNS).load(gl.SliceLayout(0, acc.type.layout))
            acc += p * columns[None, :]
        # So that the next product starts after these sums: its registers are those of p.
        acc, p = warpgroup_mma_wait(0, deps=(acc, p))
        # Each thread by itself: nobody waits for the others.
        async_copy.mbarrier_arrive(empty.index(stage), increment_count=False)
        stage = next_stage
    _store(y_ptr, acc, tile, N, 0, TOKEN_ROWS, HALF, STORE_COLUMNS)
    return stage, phase


@gluon.jit
def _consumer(y_ptr, ring, N, num_k_tiles, SQUARES: gl.constexpr, HALF: gl.constexpr, STORE_COLUMNS: gl.constexpr):
    """Four warps: 64 rows of tile after tile."""
    _, x_ring, _, _, _, _, info_ring, full, _, _ = ring
    BLOCK_T: gl.constexpr = x_ring.shape[1]
    SMALL_T: gl.constexpr = BLOCK_T // 2
    TOKEN_ROWS: gl.constexpr = SQUARES and BLOCK_T == 128
    stage = 0
    phase = 0
    mbarrier.wait(full.index(stage), phase)
    start, rows, n_tile, _ = _announced(info_ring.index(stage), 4)
    while rows > 0:
        tile = (start, rows, n_tile)
        if rows <= SMALL_T:
            stage, phase = _consume_tile(
                y_ptr, ring, stage, phase, tile, N, num_k_tiles, SMALL_T, False, SQUARES, HALF, STORE_COLUMNS
            )
        else:
            stage, phase = _consume_tile(
                y_ptr, ring, stage, phase, tile, N, num_k_tiles, BLOCK_T, TOKEN_ROWS, SQUARES, HALF, STORE_COLUMNS
            )
        start, rows, n_tile, _ = _announced(info_ring.index(stage), 4)


@gluon.jit(
    do_not_specialize=["expert_offsets_ptr", "scale_offsets_ptr", "num_experts", "num_tokens", "N", "num_k_tiles"]
)
def hopper_fp8_gemm_kernel(
    y_ptr,  # (T, N) bf16, fp16 or fp32
    w_desc,  # (E*N, K) e4m3, boxes of (128, 128)
    w_scales_desc,  # (scale tiles, 128) int32: one 128x4 tile a row; boxes of (1, W_WORDS)
    x_desc,  # (T, K) e4m3, boxes of (BLOCK_T / 2, 128)
    x_scales_desc,  # (scale tiles, 128) int32, boxes of (1, 128)
    expert_offsets_ptr,  # (E+1,) int32
    scale_offsets_ptr,  # (E+1,) int32
    num_experts,  # E
    num_tokens,  # T
    N,
    num_k_tiles,  # cdiv(K, 128)
    EXPERTS: gl.constexpr,
    BLOCK_T: gl.constexpr,
    SQUARES: gl.constexpr,
    W_WORDS: gl.constexpr,  # 128, or of squares as few as TMA aligns
    STORE_COLUMNS: gl.constexpr,
    STAGES: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,  # of a thread that multiplies
):
    """Grid (at most multiprocessors,); twice 4 warps multiply, two feed, one converts scales."""
    N = N // 8 * 8  # N % 8 == 0, said so that the compiler stores 16 bytes at once
    words: gl.constexpr = w_scales_desc.layout
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    w_ring = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, 128, 128], w_desc.layout)
    x_ring = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, BLOCK_T, 128], x_desc.layout)
    raw_w_ring = gl.allocate_shared_memory(gl.int32, [STAGES, 1, W_WORDS], words)
    raw_x_ring = gl.allocate_shared_memory(gl.int32, [STAGES, 1, 128], words)
    w_scale_ring = gl.allocate_shared_memory(gl.float32, [STAGES, 128], plain)
    x_scale_ring = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_T], plain)
    info_ring = gl.allocate_shared_memory(gl.int32, [STAGES, 32], plain)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=2)
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(empty.index(i), count=256)
    ring = (w_ring, x_ring, raw_w_ring, raw_x_ring, w_scale_ring, x_scale_ring, info_ring, full, ready, empty)
    groups = (expert_offsets_ptr, scale_offsets_ptr, num_experts, num_tokens)
    gl.warp_specialize(
        [
            (_consumer, (y_ptr, ring, N, num_k_tiles, SQUARES, 0, STORE_COLUMNS)),
            (_consumer, (y_ptr, ring, N, num_k_tiles, SQUARES, 1, STORE_COLUMNS)),
            (_load_weights, ((w_desc, w_scales_desc), ring, groups, N, num_k_tiles, EXPERTS)),
            (_load_tokens, ((x_desc, x_scales_desc), ring, groups, N, num_k_tiles, EXPERTS)),
            (_scaler, (ring, num_k_tiles, SQUARES)),
        ],
        [4, 1, 1, 1],
        [CONSUMER_REGISTERS, 48, 48, 48],
    )


def plan(problem: Problem, buffers: GemmBuffers, config: HopperFp8Config) -> tuple[KernelLaunch, ...]:
    """The launch of one product."""
    assert config.is_valid(), config
    p, b = problem, buffers
    row_tiles, num_k_tiles = ceil_div(p.n, 128), ceil_div(p.k, 128)
    tiles = min(ceil_div(p.num_tokens, config.block_t) + p.num_experts, p.num_tokens) * row_tiles
    programs = min(multiprocessors(p.device) or 1, tiles)
    w_words, x_words = (scales._replace(dtype=torch.int32) for scales in (b.w_scales, b.x_scales))
    w_tiles, x_tiles = p.num_experts * row_tiles * num_k_tiles, b.x_scales.shape[0] // 128 * num_k_tiles
    registers, consumer_registers = config.registers
    return (KernelLaunch.of(
        hopper_fp8_gemm_kernel, programs,
        y_ptr=b.out,
        w_desc=tensor_map(b.w_values, p.num_experts * p.n, p.k, 128, 128),
        w_scales_desc=tensor_map(w_words, w_tiles, SCALE_WORDS, 1, config.w_words),
        x_desc=tensor_map(b.x_values, p.num_tokens, p.k, config.block_t // 2, 128),
        x_scales_desc=tensor_map(x_words, x_tiles, SCALE_WORDS, 1, SCALE_WORDS),
        expert_offsets_ptr=b.expert_offsets, scale_offsets_ptr=b.scale_offsets,
        num_experts=p.num_experts, num_tokens=p.num_tokens, N=p.n, num_k_tiles=num_k_tiles,
        EXPERTS=max(next_power_of_2(p.num_experts), 32), BLOCK_T=config.block_t,
        SQUARES=config.squares, W_WORDS=config.w_words, STORE_COLUMNS=64 * 2 // p.out_dtype.itemsize,
        STAGES=config.num_stages, CONSUMER_REGISTERS=consumer_registers,
        # 12 warps, of which those that multiply get more registers and the others fewer.
        num_warps=4, maxnreg=registers,
    ),)  # fmt: skip
