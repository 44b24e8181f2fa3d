"""Grouped GEMM for Hopper: e4m3 weights become bf16 in registers, on their way into wgmma.

Hopper's matrix units know no block scales. Decoding is bound by the bytes of the weights, so these must stay 8 bits
wide all the way to the registers; prefill is bound by wgmma, so the conversion must hide behind it. Hence:

- Tokens, few bytes, are expanded to bf16 by a kernel before (``expand_tokens``), which also lists the token tiles.
- One warp feeds a ring of stages in shared memory through TMA: raw weights, their scale tile, bf16 tokens.
- Two warpgroups multiply. Each turns its 64 weight rows into wgmma's register operand: 16 bytes a load, 5
  instructions for 2 elements, the scale included; while one half of a stage is converted, the other is multiplied.
- The grid is persistent, so the feeding warp runs ahead into the next tile while this one is stored.

Rows of the weights and columns of K are dealt to threads so that no element ever changes threads: a thread loads 16
neighbouring bytes of rows 2g and 2g+1, and holds neighbouring outputs in the end. ``expand_tokens`` says how the
tokens follow that order of K.

The product of code and scale is exact in bf16 from 2**-133 up; blocks with scale bytes 0 to 2 can hold smaller
elements, which are then off by at most 2**-134. Scale 255 and NaN codes give NaN.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from hybrid_mxfp8.formats import SCALE_TILE_BYTES, ceil_div
from hybrid_mxfp8.groups import GroupLayout
from hybrid_mxfp8.triton_kernels.expand_tokens import expand_tokens
from hybrid_mxfp8.triton_kernels.hopper_config import HopperGemmConfig, WorkspaceLayout
from hybrid_mxfp8.triton_kernels.launch import launch

_tma_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared  # its name before 3.7

# ---------------------------------------------------------------- who holds what
#
# 8 warps w of lanes 4g + c, 128 weight rows. Fragment row 64i + 16w + 8b + g of wgmma is weight row 16w' + 2g + b,
# with w' = 4i + w; fragment column 16s + 8h + 2c + j of 64 is the weights' column 16c + 4s + 2h + j.


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
    """(128, tokens) of y transposed: wgmma's accumulator by weight rows, neighbouring rows in one register pair."""
    columns = [1] + [8 << i for i in range((tokens // 8).bit_length() - 1)]
    return gl.DistributedLinearLayout(
        reg_bases=[[1, 0]] + [[0, c] for c in columns],
        lane_bases=[[0, 2], [0, 4], [2, 0], [4, 0], [8, 0]],
        warp_bases=[[16, 0], [32, 0], [64, 0]],
        block_bases=[],
        shape=[128, tokens],
    )


# ---------------------------------------------------------------- device functions


@gluon.jit
def _dequantize(codes, words, HALF: gl.constexpr, A_LAYOUT: gl.constexpr):
    """(128, 64) e4m3 bytes times their scales, bytes 2 HALF and 2 HALF + 1 of ``words`` (128,), as wgmma's A."""
    blocks_layout: gl.constexpr = _blocks_layout()
    blocks = gl.convert_layout(codes.reshape([128, 2, 32]), blocks_layout, assert_trivial=True)
    words = gl.convert_layout(words, gl.SliceLayout(1, gl.SliceLayout(2, blocks_layout)), assert_trivial=True)
    shift = 8 * (2 * HALF + gl.arange(0, 2, layout=gl.SliceLayout(0, gl.SliceLayout(2, blocks_layout))))
    b = (words[:, None] >> shift[None, :]) & 0xFF
    # 2**(b - 127) as bf16, twice in a word: b << 7, but 0x40, a subnormal, for 0 and NaN for 255.
    bits = gl.where(b == 255, 0x7FC0, gl.maximum(b << 7, 0x40))
    elements = gl.inline_asm_elementwise(
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
        [blocks, (bits | (bits << 16))[:, :, None]],
        dtype=gl.bfloat16,
        is_pure=True,
        pack=4,
    )
    fragment = elements.reshape([2, 4, 8, 2, 4, 4, 2, 2]).permute(0, 1, 3, 2, 5, 6, 4, 7).reshape([128, 64])
    return gl.convert_layout(fragment, A_LAYOUT, assert_trivial=True)


@gluon.jit
def _advance(stage, phase, STAGES: gl.constexpr):
    last = stage == STAGES - 1
    return gl.where(last, 0, stage + 1), gl.where(last, phase ^ 1, phase)


@gluon.jit
def _before(stage, STAGES: gl.constexpr):
    """The stage that came before. Computed, not kept in a variable: one that starts as an alias of ``stage`` is not
    carried through the loop (Triton 3.6 to 3.9 take it for unchanged), and every stage but the first is never freed."""
    return gl.where(stage == 0, STAGES - 1, stage - 1)


@gluon.jit
def _place(tile, num_n_tiles, GROUP_T: gl.constexpr):
    """(token tile, n tile): GROUP_T token tiles take turns, so that they share weights while these are in L2."""
    group = tile // (GROUP_T * num_n_tiles)
    within = tile - group * (GROUP_T * num_n_tiles)
    return group * GROUP_T + within % GROUP_T, within // GROUP_T


@gluon.jit
def _feed(
    w_desc, w_scales_desc, x_desc, w_ring, scale_ring, x_ring, full, empty, tiles_ptr, N, num_k_tiles,
    BLOCK_T: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, GROUP_T: gl.constexpr,
):  # fmt: skip
    """One warp: keep the ring full, tile after tile."""
    num_t_tiles = gl.load(tiles_ptr)
    num_n_tiles = (N + 127) // 128
    stage = 0
    phase = 1
    for tile in range(gl.program_id(0), gl.cdiv(num_t_tiles, GROUP_T) * GROUP_T * num_n_tiles, gl.num_programs(0)):
        t_tile, n_tile = _place(tile, num_n_tiles, GROUP_T)
        if t_tile < num_t_tiles:
            expert = gl.load(tiles_ptr + 4 + t_tile * 4)
            start = gl.load(tiles_ptr + 4 + t_tile * 4 + 1)
            w_row = expert * N + n_tile * 128
            scale_tile = (expert * num_n_tiles + n_tile) * num_k_tiles
            for k_tile in range(num_k_tiles):
                # One scale tile spans 128 columns, and comes with their first stage.
                for part in gl.static_range(128 // BLOCK_K):
                    bar = full.index(stage)
                    k = k_tile * 128 + part * BLOCK_K
                    mbarrier.wait(empty.index(stage), phase)
                    mbarrier.expect(bar, 128 * BLOCK_K + BLOCK_T * BLOCK_K * 2 + (512 if part == 0 else 0))
                    _tma_load(w_desc, [w_row, k], bar, w_ring.index(stage))
                    _tma_load(x_desc, [start, k], bar, x_ring.index(stage))
                    if part == 0:
                        scales = scale_ring.index(stage)
                        _tma_load(w_scales_desc, [scale_tile + k_tile, 0], bar, scales)
                    stage, phase = _advance(stage, phase, STAGES)


@gluon.jit
def _multiply_tile(
    y_ptr, w_ring, scale_ring, x_ring, full, empty, stage, phase, start, end, n_tile, N, num_k_tiles,
    TOKENS: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One tile of 128 weight rows by at most TOKENS tokens, stored; returns the ring's next stage and phase."""
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[8, 1], instr_shape=[16, TOKENS, 16])
    a_layout: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    store_layout: gl.constexpr = _store_layout(TOKENS)

    # wgmma reads a0 and a1 while it runs, so each is kept alive, and its stage held, until the next wait.
    acc = gl.zeros([128, TOKENS], gl.float32, mma)
    a1 = gl.zeros([128, 64], gl.bfloat16, a_layout)
    for k_tile in range(num_k_tiles):
        mbarrier.wait(full.index(stage), phase)
        words = scale_ring.index(stage).load(_words_layout()).reshape([32, 4]).permute(1, 0).reshape([128])
        codes = w_ring.index(stage).load(_codes_layout(BLOCK_K))
        x = x_ring.index(stage).slice(0, TOKENS, dim=0)
        if BLOCK_K == 128:
            codes, codes1 = codes.reshape([128, 2, 64]).permute(0, 2, 1).split()
            x1 = x.slice(64, 64, dim=1)
            x = x.slice(0, 64, dim=1)
        a0 = _dequantize(codes, words, 0, a_layout)
        acc = warpgroup_mma(a0, x.permute((1, 0)), acc, is_async=True)
        acc, a1 = warpgroup_mma_wait(1, deps=(acc, a1))
        mbarrier.arrive(empty.index(_before(stage, STAGES)), pred=k_tile > 0)
        if BLOCK_K == 64:
            stage, phase = _advance(stage, phase, STAGES)
            mbarrier.wait(full.index(stage), phase)
            codes1 = w_ring.index(stage).load(_codes_layout(BLOCK_K))
            x1 = x_ring.index(stage).slice(0, TOKENS, dim=0)
        a1 = _dequantize(codes1, words, 1, a_layout)
        acc = warpgroup_mma(a1, x1.permute((1, 0)), acc, is_async=True)
        acc, a0 = warpgroup_mma_wait(1, deps=(acc, a0))
        if BLOCK_K == 64:
            mbarrier.arrive(empty.index(_before(stage, STAGES)))
        stage, phase = _advance(stage, phase, STAGES)
    acc, a1 = warpgroup_mma_wait(0, deps=(acc, a1))
    mbarrier.arrive(empty.index(_before(stage, STAGES)))

    y = acc.to(y_ptr.dtype.element_ty).reshape([2, 4, 2, 8, TOKENS]).permute(0, 1, 3, 2, 4).reshape([128, TOKENS])
    y = gl.convert_layout(y, store_layout, assert_trivial=True)
    # Offsets in 32 bits from a row at most 255 before the tile's first: in 64 bits they spill, and from the first
    # itself they are the same for every tile, so that the compiler keeps them all, and spills more.
    near = start & 255
    n = n_tile * 128 + gl.arange(0, 128, layout=gl.SliceLayout(1, store_layout))
    t = near + gl.arange(0, TOKENS, layout=gl.SliceLayout(0, store_layout))
    y_rows = y_ptr + (start - near).to(gl.int64) * N
    gl.store(y_rows + (t[None, :] * N + n[:, None]), y, mask=(n < N)[:, None] & (t < near + end - start)[None, :])
    return stage, phase


@gluon.jit
def _multiply(
    y_ptr, w_ring, scale_ring, x_ring, full, empty, tiles_ptr, N, num_k_tiles,
    BLOCK_T: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, GROUP_T: gl.constexpr,
):  # fmt: skip
    """Two warpgroups: empty the ring, tile after tile; an expert's last tile may be short and then takes less."""
    num_t_tiles = gl.load(tiles_ptr)
    num_n_tiles = (N + 127) // 128
    stage = 0
    phase = 0
    for tile in range(gl.program_id(0), gl.cdiv(num_t_tiles, GROUP_T) * GROUP_T * num_n_tiles, gl.num_programs(0)):
        t_tile, n_tile = _place(tile, num_n_tiles, GROUP_T)
        if t_tile < num_t_tiles:
            start = gl.load(tiles_ptr + 4 + t_tile * 4 + 1)
            end = gl.load(tiles_ptr + 4 + t_tile * 4 + 2)
            if BLOCK_T > 64 and end - start <= 64:
                stage, phase = _multiply_tile(
                    y_ptr, w_ring, scale_ring, x_ring, full, empty, stage, phase, start, end, n_tile, N, num_k_tiles,
                    64, BLOCK_K, STAGES,
                )  # fmt: skip
            elif BLOCK_T > 128 and end - start <= 128:
                stage, phase = _multiply_tile(
                    y_ptr, w_ring, scale_ring, x_ring, full, empty, stage, phase, start, end, n_tile, N, num_k_tiles,
                    128, BLOCK_K, STAGES,
                )  # fmt: skip
            else:
                stage, phase = _multiply_tile(
                    y_ptr, w_ring, scale_ring, x_ring, full, empty, stage, phase, start, end, n_tile, N, num_k_tiles,
                    BLOCK_T, BLOCK_K, STAGES,
                )  # fmt: skip


@gluon.jit(do_not_specialize=["N", "num_k_tiles"])
def hopper_gemm_kernel(
    y_ptr,  # (T, N) bf16, fp16 or fp32
    workspace_ptr,  # bytes, as expand_tokens writes them: the list of token tiles first
    w_desc,  # (E*N, K) bytes of e4m3, blocks of (128, BLOCK_K)
    w_scales_desc,  # (scale tiles, 128) int32: one 128x4 tile a row
    x_desc,  # (T, roundup(K, 64)) bf16 as expand_tokens writes it, blocks of (BLOCK_T, BLOCK_K)
    N,
    num_k_tiles,  # cdiv(K, 128)
    BLOCK_T: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_T: gl.constexpr,
):
    """Grid (multiprocessors,), 8 warps that multiply; one more feeds them."""
    # An expert's last tile of weights reaches into the next expert's: rows that are multiplied, and not stored.
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
    # The multiplying warps are the default partition: ptxas serializes wgmma in any other (its message C7512).
    gl.warp_specialize(
        [
            (
                _multiply,
                (y_ptr, w_ring, scale_ring, x_ring, full, empty, tiles_ptr, N, num_k_tiles,
                 BLOCK_T, BLOCK_K, STAGES, GROUP_T),
            ),
            (
                _feed,
                (w_desc, w_scales_desc, x_desc, w_ring, scale_ring, x_ring, full, empty, tiles_ptr, N, num_k_tiles,
                 BLOCK_T, BLOCK_K, STAGES, GROUP_T),
            ),
        ],
        [1],
        [40],
    )  # fmt: skip


# ---------------------------------------------------------------- launcher


@dataclass(frozen=True)
class _Address:
    """Memory as a descriptor's base. A descriptor is made of numbers alone, so it can be kept without its tensor."""

    address: int
    dtype: torch.dtype

    def data_ptr(self) -> int:
        return self.address


@functools.lru_cache(maxsize=1024)
def _descriptor(
    address: int, rows: int, columns: int, dtype: torch.dtype, block_rows: int, block_columns: int
) -> TensorDescriptor:
    """TMA's view of a contiguous matrix. A scale tile lies in memory as it is, the others in swizzled lines."""
    swizzle = 0 if dtype == torch.int32 else min(block_columns * dtype.itemsize, 128)
    layout = gl.NVMMASharedLayout(swizzle_byte_width=swizzle, element_bitwidth=8 * dtype.itemsize, rank=2)
    return TensorDescriptor(
        _Address(address, dtype), [rows, columns], [columns, 1], [block_rows, block_columns], layout
    )


SCALE_WORDS = SCALE_TILE_BYTES // 4


class _Plan(NamedTuple):
    """All of the launches that their shapes decide."""

    layout: WorkspaceLayout
    tokens_at: int
    scale_tiles: int
    num_k_tiles: int
    programs: int
    constants: tuple[int, ...]
    key: tuple[Hashable, ...]


@functools.lru_cache(maxsize=4096)
def _plan(
    num_tokens: int,
    num_experts: int,
    n: int,
    k: int,
    config: HopperGemmConfig,
    num_multiprocessors: int,
    out_dtype: torch.dtype,
) -> _Plan:
    layout = WorkspaceLayout.of(num_tokens, num_experts, k, config)
    row_tiles, num_k_tiles = ceil_div(n, 128), ceil_div(k, 128)
    return _Plan(
        layout,
        layout.tokens_at,
        num_experts * row_tiles * num_k_tiles,
        num_k_tiles,
        min(num_multiprocessors, layout.max_tiles * row_tiles),
        (config.block_t, config.block_k, config.num_stages, config.group_t),
        ("hopper_gemm", out_dtype),
    )


def hopper_grouped_gemm(
    x_values: torch.Tensor,
    x_scales: torch.Tensor,
    groups: GroupLayout,
    w_values: torch.Tensor,
    w_scales: torch.Tensor,
    out: torch.Tensor,
    workspace: torch.Tensor,
    config: HopperGemmConfig,
    num_multiprocessors: int,
) -> None:
    """Write the product into ``out``: two launches on the current device, which is that of ``out``.

    Args:
        x_values: (T, K) float8_e4m3fn, contiguous.
        x_scales: (S, C) uint8, swizzled.
        groups: layout of the T rows.
        w_values: (E, N, K) float8_e4m3fn, contiguous, 16-byte aligned.
        w_scales: (E, roundup(N, 128), C) uint8, swizzled, 16-byte aligned.
        out: (T, N) bf16, fp16 or fp32, contiguous, 16-byte aligned.
        workspace: uint8, at least ``WorkspaceLayout.of(...).size`` bytes, 256-byte aligned.
        config: tile.
        num_multiprocessors: programs of the grid.
    """
    num_experts, n, k = w_values.shape
    plan = _plan(groups.num_tokens, num_experts, n, k, config, num_multiprocessors, out.dtype)
    layout = plan.layout
    expand_tokens(x_values, x_scales, groups, workspace, layout, config.block_t)
    block_t, block_k = config.block_t, config.block_k
    arguments = (
        out,
        workspace,
        _descriptor(w_values.data_ptr(), num_experts * n, k, torch.uint8, 128, block_k),
        _descriptor(w_scales.data_ptr(), plan.scale_tiles, SCALE_WORDS, torch.int32, 1, SCALE_WORDS),
        _descriptor(
            workspace.data_ptr() + plan.tokens_at, layout.num_tokens, layout.padded_k, torch.bfloat16, block_t, block_k
        ),
        n,
        plan.num_k_tiles,
    )
    launch(hopper_gemm_kernel, plan.programs, arguments, plan.constants, (("num_warps", 8),), plan.key)
