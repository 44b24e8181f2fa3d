"""The ``scaled`` grouped GEMM for compute capability 10, with tensor descriptors: compiled,
checked and run in an emulator of its PTX, not yet on hardware.

The tile product is that of ``grouped_gemm``, 128 weight rows by BLOCK_T tokens, but operands and
weight scales come by TMA, so no thread computes addresses in the loop:

- weights (E*N, K) and tokens (T, K) as 2-D tiles. A tile that reaches past its expert loads its
  neighbour's rows; what they compute lands in rows or columns of the tile that are not stored. Past
  the tensor or past K, TMA loads zeros.
- scales in whole 128x4 tiles, as 2 x 256 bytes of a 5-D descriptor (a box of TMA is at most 256
  wide), which go to tensor memory as they lie. Tokens' scales do so from 128 tokens a tile on;
  narrower tiles start amid a 128x4 tile and load each row's 4 bytes from its place.

Large tiles split the loop between a loading warp and an issuing warp (``warp_specialize``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import triton
import triton.language as tl

from hybrid_mxfp8.core.formats import (
    MAX_INT32,
    SCALE_TILE_COLS,
    SCALE_TILE_ROWS,
    ceil_div,
    next_power_of_2,
    token_tiles_bound,
)
from hybrid_mxfp8.dispatch.buffers import Buffer, TensorMap
from hybrid_mxfp8.dispatch.device import SM100_CAPABILITIES
from hybrid_mxfp8.dispatch.problem import GemmBuffers, Problem
from hybrid_mxfp8.triton_kernels.dependent_launch import wait_for_predecessor
from hybrid_mxfp8.triton_kernels.gemm.portable import find_tile
from hybrid_mxfp8.triton_kernels.launch import VARYING, KernelLaunch
from hybrid_mxfp8.triton_kernels.numerics import from_fp32
from hybrid_mxfp8.triton_kernels.scale_layout import load_row_scales


@triton.jit
def _scale_tiles(desc, row_tile, column_tile, ROW_TILES: tl.constexpr):
    """(128 * ROW_TILES, 4) scales of neighbouring 128x4 tiles."""
    tiles = desc.load([0, row_tile, column_tile, 0, 0]).reshape(ROW_TILES, 1, 32, 4, 4)
    return tiles.trans(0, 3, 2, 1, 4).reshape(ROW_TILES * 128, 4)


@triton.jit(do_not_specialize=VARYING)
def grouped_gemm_blackwell_kernel(
    y_ptr,  # (T, N) bf16, fp16 or fp32
    x_desc,  # (T, K) e4m3, blocks (BLOCK_T, 128)
    x_scales_desc,  # (1, S/128, C/4, 2, 256) uint8, blocks (1, max(BLOCK_T/128, 1), 1, 2, 256)
    x_scales_ptr,  # the same bytes
    w_desc,  # (E*N, K) e4m3, blocks (128, 128)
    w_scales_desc,  # (1, E*cdiv(N, 128), C/4, 2, 256) uint8, blocks (1, 1, 1, 2, 256)
    expert_offsets_ptr,  # (E+1,) int32
    scale_offsets_ptr,  # (E+1,) int32
    num_tokens,  # T
    num_scale_rows,  # S
    num_experts,
    N,
    K,
    EXPERTS: tl.constexpr,  # power of two >= E
    BLOCK_T: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid (bound on token tiles * cdiv(N, 128),); programs of one token tile are neighbours."""
    wait_for_predecessor()
    BLOCK_N: tl.constexpr = 128
    BLOCK_K: tl.constexpr = 128
    num_column_tiles = (K + 127) // 128
    num_n_tiles = (N + 127) // 128
    pid = tl.program_id(0)
    n_tile = pid % num_n_tiles
    expert, t_tile, num_tiles = find_tile(pid // num_n_tiles, expert_offsets_ptr, num_experts, EXPERTS, BLOCK_T)
    if pid // num_n_tiles >= num_tiles:
        return

    first_t = tl.load(expert_offsets_ptr + expert) + t_tile * BLOCK_T
    end = tl.minimum(tl.load(expert_offsets_ptr + expert + 1), num_tokens)
    first_scale_row = tl.load(scale_offsets_ptr + expert) + t_tile * BLOCK_T
    scale_row = first_scale_row + tl.arange(0, BLOCK_T)
    scale_valid = (scale_row >= 0) & (scale_row < num_scale_rows)
    acc = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    for column_tile in tl.range(0, num_column_tiles, num_stages=STAGES, warp_specialize=WARP_SPECIALIZE):
        w = w_desc.load([expert * N + n_tile * BLOCK_N, column_tile * BLOCK_K])
        x = x_desc.load([first_t, column_tile * BLOCK_K])
        w_scales = _scale_tiles(w_scales_desc, expert * num_n_tiles + n_tile, column_tile, 1)
        if BLOCK_T >= 128:
            x_scales = _scale_tiles(x_scales_desc, first_scale_row // 128, column_tile, BLOCK_T // 128)
        else:
            x_scales = load_row_scales(x_scales_ptr, scale_row, scale_valid, column_tile, num_column_tiles)
        acc = tl.dot_scaled(w, w_scales, "e4m3", tl.trans(x), x_scales, "e4m3", acc)
    t = first_t + tl.arange(0, BLOCK_T)
    n = n_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    y_ptrs = y_ptr + t.to(tl.int64)[None, :] * N + n[:, None]
    tl.store(y_ptrs, from_fp32(acc, y_ptr.dtype.element_ty), mask=(n < N)[:, None] & ((t >= 0) & (t < end))[None, :])


@dataclass(frozen=True)
class BlackwellConfig:
    """Token rows of one tile (weight rows and K steps are 128), and how its loop is compiled."""

    block_t: int
    warp_specialize: bool
    num_warps: int
    num_stages: int


def select_blackwell_config(num_tokens: int, num_experts: int) -> BlackwellConfig:
    """Tile by the average number of tokens of an expert; pure, and modelled: nothing here has run.

    Tiles of 128 tokens and more take the tokens' scales by TMA, too, so nothing stands in the loop
    that an MMA would have to wait for. Narrower ones load each row's scales, an L2 latency a step:
    only 16 tokens, where the weights' bytes are the limit, are worth that. From 17 tokens on
    128x128x128 takes about 256 cycles a step where memory allows 640. Stages fill the shared memory
    that a tile leaves, for weight streaming is a matter of bytes in flight: 95 KB at 16 tokens lets
    two programs share an SM of 228 KB; 203 KB at 256 leaves it one. Warp specialization needs
    scales by TMA. 128x256 fills the 512 columns of tensor memory.
    """
    average = num_tokens / max(num_experts, 1)
    if average <= 16:
        return BlackwellConfig(16, False, 4, 6)
    return BlackwellConfig(128 if average <= 128 else 256, True, 8, 4)


def takes(problem: Problem) -> bool:
    """Whether the kernel runs a problem: TMA counts rows and scale tiles in 32 bits."""
    p = problem
    scale_tiles = p.num_experts * ceil_div(p.n, 128) * ceil_div(p.k, 128)
    return p.capability in SM100_CAPABILITIES and max(p.num_experts * p.n + 128, scale_tiles) <= MAX_INT32


def _scale_tile_map(scales: Buffer, row_tiles: int) -> TensorMap:
    """Swizzled scales of any shape (..., C) as 128x4 tiles, ``row_tiles`` of them a load."""
    *rows, cols = scales.shape
    shape = (1, math.prod(rows) // SCALE_TILE_ROWS, cols // SCALE_TILE_COLS, 2, 256)
    return TensorMap(scales, shape, (1, row_tiles, 1, 2, 256))


def plan(problem: Problem, buffers: GemmBuffers, config: BlackwellConfig) -> tuple[KernelLaunch, ...]:
    """The launch of one product; operands are 16-byte aligned."""
    p, b = problem, buffers
    programs = token_tiles_bound(p.num_tokens, p.num_experts, config.block_t) * ceil_div(p.n, 128)
    return (KernelLaunch.of(
        grouped_gemm_blackwell_kernel, programs,
        y_ptr=b.out,
        x_desc=TensorMap(b.x_values, (p.num_tokens, p.k), (config.block_t, 128)),
        x_scales_desc=_scale_tile_map(b.x_scales, max(config.block_t // SCALE_TILE_ROWS, 1)), x_scales_ptr=b.x_scales,
        w_desc=TensorMap(b.w_values, (p.num_experts * p.n, p.k), (128, 128)),
        w_scales_desc=_scale_tile_map(b.w_scales, 1),
        expert_offsets_ptr=b.expert_offsets, scale_offsets_ptr=b.scale_offsets,
        num_tokens=p.num_tokens, num_scale_rows=b.x_scales.shape[0], num_experts=p.num_experts, N=p.n, K=p.k,
        EXPERTS=next_power_of_2(p.num_experts), BLOCK_T=config.block_t, WARP_SPECIALIZE=config.warp_specialize,
        STAGES=config.num_stages, num_warps=config.num_warps, num_stages=config.num_stages,
    ),)  # fmt: skip
