"""Grouped GEMM through ``tl.dot_scaled``: y[t] = x[t] @ w[expert of t].T over ragged groups, one
launch.

The operands are swapped: 128 rows of weights fill the M side of the matrix unit and the tokens its
N side, which goes down to 16. So an expert with few tokens still gets the native block-scaled MMA.
A program finds its (expert, token tile) by scanning the groups: the host only knows a bound on the
number of token tiles, and programs beyond the real number leave at once.

Three formulations of one tile product, chosen by what the target has:

- ``scaled``: ``tl.dot_scaled`` (Blackwell; the interpreter from Triton 3.9 on)
- ``bf16``: operands times scales in bf16 registers, then a bf16 ``tl.dot``. An e4m3 value times a
  power of two is exact in bf16 while it stays above 2**-133; only blocks with scale bytes 0 to 2
  (amax below 2**-115) can hold smaller elements, which are then off by at most 2**-134.
- ``fp32``: the same in fp32, exact always; for older interpreters
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import triton
import triton.language as tl

from hybrid_mxfp8.core.formats import ceil_div, next_power_of_2, token_tiles_bound
from hybrid_mxfp8.dispatch.problem import GemmBuffers, Problem
from hybrid_mxfp8.triton_kernels.dependent_launch import wait_for_predecessor
from hybrid_mxfp8.triton_kernels.launch import INTERPRETED, VARYING, KernelLaunch, triton_version
from hybrid_mxfp8.triton_kernels.numerics import (
    INTERPRET,
    e4m3_codes_to_fp32,
    e8m0_to_bf16,
    e8m0_to_fp32,
    from_fp32,
    loop_bound,
)
from hybrid_mxfp8.triton_kernels.scale_layout import load_row_scales, load_scale_tile

Formulation = Literal["scaled", "bf16", "fp32"]


@triton.jit
def find_tile(tile, expert_offsets_ptr, num_experts, EXPERTS: tl.constexpr, BLOCK_T: tl.constexpr):
    """The expert of token tile ``tile``, the tile's place in it, and how many tiles there are."""
    e = tl.arange(0, EXPERTS)
    mask = e < num_experts
    starts = tl.load(expert_offsets_ptr + e, mask=mask, other=0)
    ends = tl.load(expert_offsets_ptr + e + 1, mask=mask, other=0)
    tile_ends = tl.cumsum((ends - starts + BLOCK_T - 1) // BLOCK_T, 0)
    before = mask & (tile_ends <= tile)
    expert = tl.sum(before.to(tl.int32), 0)
    first = tl.max(tl.where(before, tile_ends, 0), 0)
    return expert, tile - first, tl.max(tile_ends, 0)


@triton.jit
def _dequantize(values, scales, FORMULATION: tl.constexpr):
    """(R, 128) e4m3 times (R, 4) E8M0, in bf16 or fp32."""
    ROWS: tl.constexpr = values.shape[0]
    if FORMULATION == "bf16":
        elements = values.to(tl.bfloat16)
        factors = e8m0_to_bf16(scales)
    else:
        elements = e4m3_codes_to_fp32(values) if INTERPRET else values.to(tl.float32)
        factors = e8m0_to_fp32(scales)
    product = tl.reshape(elements, [ROWS, 4, 32]) * factors[:, :, None]
    return tl.reshape(product, [ROWS, 128])


@triton.jit(do_not_specialize=VARYING)
def grouped_gemm_kernel(
    x_ptr,  # (T, K) e4m3
    x_scales_ptr,  # (S, C) uint8, swizzled
    w_ptr,  # (E, N, K) e4m3
    w_scales_ptr,  # (E, roundup(N, 128), C) uint8, swizzled
    y_ptr,  # (T, N) bf16, fp16 or fp32
    expert_offsets_ptr,  # (E+1,) int32
    scale_offsets_ptr,  # (E+1,) int32
    num_tokens,  # T
    num_scale_rows,  # S
    num_experts,
    N,
    K,
    EXPERTS: tl.constexpr,  # power of two >= E
    BLOCK_T: tl.constexpr,
    FORMULATION: tl.constexpr,
):
    """Grid (bound on token tiles * cdiv(N, 128),); programs of one token tile are neighbours."""
    wait_for_predecessor()
    BLOCK_N: tl.constexpr = 128  # rows of one scale tile, and of the native MMA
    BLOCK_K: tl.constexpr = 128  # columns of one scale tile
    num_column_tiles = (K + 127) // 128
    num_n_tiles = (N + 127) // 128
    pid = tl.program_id(0)
    n_tile = pid % num_n_tiles
    expert, t_tile, num_tiles = find_tile(pid // num_n_tiles, expert_offsets_ptr, num_experts, EXPERTS, BLOCK_T)
    if pid // num_n_tiles >= num_tiles:
        return

    # Rows are clamped to the buffers, so that a layout put together by hand can't lead outside
    # them.
    start = tl.load(expert_offsets_ptr + expert)
    end = tl.minimum(tl.load(expert_offsets_ptr + expert + 1), num_tokens)
    t = start + t_tile * BLOCK_T + tl.arange(0, BLOCK_T)
    scale_row = tl.load(scale_offsets_ptr + expert) + t_tile * BLOCK_T + tl.arange(0, BLOCK_T)
    t_valid = (t >= 0) & (t < end)
    scale_valid = t_valid & (scale_row >= 0) & (scale_row < num_scale_rows)
    n = n_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    n_valid = n < N
    k = tl.arange(0, BLOCK_K)

    x_ptrs = x_ptr + t.to(tl.int64)[:, None] * K + k[None, :]
    w_ptrs = w_ptr + (expert.to(tl.int64) * N + n)[:, None] * K + k[None, :]
    w_tile = w_scales_ptr + (expert.to(tl.int64) * num_n_tiles + n_tile) * num_column_tiles * 512
    acc = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    for column_tile in range(0, loop_bound(num_column_tiles)):
        k_valid = k < K - column_tile * BLOCK_K
        w = tl.load(w_ptrs, mask=n_valid[:, None] & k_valid[None, :], other=0.0)
        x = tl.load(x_ptrs, mask=t_valid[:, None] & k_valid[None, :], other=0.0)
        w_scales = load_scale_tile(w_tile)
        x_scales = load_row_scales(x_scales_ptr, scale_row, scale_valid, column_tile, num_column_tiles)
        if FORMULATION == "scaled":
            acc = tl.dot_scaled(w, w_scales, "e4m3", tl.trans(x), x_scales, "e4m3", acc)
        else:
            acc = tl.dot(
                _dequantize(w, w_scales, FORMULATION),
                tl.trans(_dequantize(x, x_scales, FORMULATION)),
                acc,
                input_precision="ieee",
            )
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
        w_tile += 512
    y_ptrs = y_ptr + t.to(tl.int64)[None, :] * N + n[:, None]
    tl.store(y_ptrs, from_fp32(acc, y_ptr.dtype.element_ty), mask=n_valid[:, None] & t_valid[None, :])


@dataclass(frozen=True)
class TritonGemmConfig:
    """Token rows of one tile (weight rows are 128, K steps 128), and how it is compiled."""

    block_t: int
    formulation: Formulation
    num_warps: int
    num_stages: int


def select_formulation(capability: tuple[int, int] | None, triton: tuple[int, int]) -> Formulation:
    """The tile product of a target; ``capability`` is None in the interpreter. Pure."""
    if capability is None:
        return "scaled" if triton >= (3, 9) else "fp32"
    return "scaled" if capability[0] >= 10 else "bf16"


def select_gemm_config(
    num_tokens: int, num_experts: int, formulation: Formulation, interpreted: bool = False
) -> TritonGemmConfig:
    """Tile by the average number of tokens an expert gets, the only thing the host knows. Pure. 8
    warps but for the smallest tile: with 4, the bf16 formulation spills on sm_90 (at 16 tokens too,
    for some shapes), and ``scaled`` on sm_100 with Triton 3.6. 128x128 in bf16 is at the limit of
    registers: up to 16 bytes spill with 3.9."""
    average = num_tokens / max(num_experts, 1)
    if interpreted:
        return TritonGemmConfig(16 if average <= 16 else 64, formulation, 4, 1)
    for block_t in (16, 32, 64):
        if average <= block_t:
            return TritonGemmConfig(block_t, formulation, 4 if block_t == 16 and formulation == "scaled" else 8, 4)
    return TritonGemmConfig(128, formulation, 8, 3)


def config_for(problem: Problem) -> TritonGemmConfig:
    """The configuration that runs a problem."""
    capability = None if INTERPRETED else problem.capability
    formulation = select_formulation(capability, triton_version())
    return select_gemm_config(problem.num_tokens, problem.num_experts, formulation, INTERPRETED)


def plan(problem: Problem, buffers: GemmBuffers) -> tuple[KernelLaunch, ...]:
    """The launch of one product; operands at any address."""
    p, b = problem, buffers
    config = config_for(p)
    programs = token_tiles_bound(p.num_tokens, p.num_experts, config.block_t) * ceil_div(p.n, 128)
    return (KernelLaunch.of(
        grouped_gemm_kernel, programs,
        x_ptr=b.x_values, x_scales_ptr=b.x_scales, w_ptr=b.w_values, w_scales_ptr=b.w_scales, y_ptr=b.out,
        expert_offsets_ptr=b.expert_offsets, scale_offsets_ptr=b.scale_offsets,
        num_tokens=p.num_tokens, num_scale_rows=b.x_scales.shape[0], num_experts=p.num_experts, N=p.n, K=p.k,
        EXPERTS=next_power_of_2(p.num_experts), BLOCK_T=config.block_t, FORMULATION=config.formulation,
        num_warps=config.num_warps, num_stages=config.num_stages,
    ),)  # fmt: skip
