"""Grouped GEMM through ``tl.dot_scaled``: y[t] = x[t] @ w[expert of t].T over ragged groups, one launch.

The operands are swapped: 128 rows of weights fill the M side of the matrix unit and the tokens its N side,
which goes down to 16. So an expert with few tokens still gets the native block-scaled MMA, which falls back
to bf16 below 128 rows, and computes few columns in vain.

A program finds its (expert, token tile) by scanning the groups: the host only knows a bound on the number of
token tiles, and programs beyond the real number leave at once.

Three formulations of one tile product, chosen by what the target has:

- ``scaled``: ``tl.dot_scaled`` on the e4m3 operands and their scales (Blackwell; the interpreter from Triton 3.9 on)
- ``bf16``: operands times scales in bf16 registers, then a bf16 ``tl.dot``. An e4m3 value times a power of two is
  exact in bf16 while it stays above 2**-133; only blocks with scale bytes 0 to 2 (amax below 2**-115) can hold smaller
  elements, which are then off by at most 2**-134.
- ``fp32``: the same in fp32, exact always; for interpreters that lack ``tl.dot_scaled`` (3.7 and older) or round
  scale bytes 0 and 255 (3.8)
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

import torch
import triton
import triton.language as tl

from hybrid_mxfp8 import env
from hybrid_mxfp8.core.formats import MAX_INT32, ceil_div, next_power_of_2, token_tiles_bound
from hybrid_mxfp8.core.layout import GroupLayout
from hybrid_mxfp8.cutlass_kernels.config import CUTLASS_CAPABILITIES
from hybrid_mxfp8.dispatch.repeats import Together
from hybrid_mxfp8.triton_kernels.gemm.hopper_config import (
    HopperGemmConfig,
    WorkspaceLayout,
    hopper_takes,
    largest_batches,
    select_hopper_config,
)
from hybrid_mxfp8.triton_kernels.launch import INTERPRETED, Launched, aligned, launch, on_device_of, raw
from hybrid_mxfp8.triton_kernels.numerics import (
    INTERPRET,
    e4m3_codes_to_fp32,
    e8m0_to_bf16,
    e8m0_to_fp32,
    from_fp32,
    loop_bound,
)

Formulation = Literal["scaled", "bf16", "fp32"]


@triton.jit
def _find_tile(tile, expert_offsets_ptr, num_experts, EXPERTS: tl.constexpr, BLOCK_T: tl.constexpr):
    """The expert of token tile ``tile``, the tile's place among that expert's, and the number of all token tiles."""
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
def _load_scale_tile(tile_ptr):
    """(128, 4) scales of one whole 128x4 tile."""
    tile = tl.load(tile_ptr + tl.arange(0, 512))
    return tl.reshape(tl.trans(tl.reshape(tile, [32, 4, 4]), 1, 0, 2), [128, 4])


@triton.jit
def _load_row_scales(scales_ptr, rows, valid, column_tile, num_column_tiles):
    """(rows, 4) scales of any rows, each from its place in the 128x4 tiles."""
    base = (rows.to(tl.int64) // 128 * num_column_tiles + column_tile) * 512 + rows % 32 * 16 + rows % 128 // 32 * 4
    return tl.load(scales_ptr + base[:, None] + tl.arange(0, 4)[None, :], mask=valid[:, None], other=0)


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


@triton.jit(
    do_not_specialize=["expert_offsets_ptr", "scale_offsets_ptr", "num_tokens", "num_scale_rows", "num_experts"]
)
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
    BLOCK_N: tl.constexpr = 128  # rows of one scale tile, and of the native MMA
    BLOCK_K: tl.constexpr = 128  # columns of one scale tile
    num_column_tiles = (K + 127) // 128
    num_n_tiles = (N + 127) // 128
    pid = tl.program_id(0)
    n_tile = pid % num_n_tiles
    expert, t_tile, num_tiles = _find_tile(pid // num_n_tiles, expert_offsets_ptr, num_experts, EXPERTS, BLOCK_T)
    if pid // num_n_tiles >= num_tiles:
        return

    # Rows are clamped to the buffers, so that a layout put together by hand can't lead outside them.
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
        w_scales = _load_scale_tile(w_tile)
        x_scales = _load_row_scales(x_scales_ptr, scale_row, scale_valid, column_tile, num_column_tiles)
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


def select_formulation(capability: tuple[int, int] | None, triton_version: tuple[int, int]) -> Formulation:
    """The tile product of a target; ``capability`` is None in the interpreter. Pure."""
    if capability is None:
        return "scaled" if triton_version >= (3, 9) else "fp32"
    return "scaled" if capability[0] >= 10 else "bf16"


@functools.lru_cache(maxsize=4096)
def select_gemm_config(
    num_tokens: int, num_experts: int, formulation: Formulation, interpreted: bool = False
) -> TritonGemmConfig:
    """Tile by the average number of tokens an expert gets, the only thing the host knows. Pure.

    8 warps but for the smallest tile: with 4, the bf16 formulation spills on sm_90 (at 16 tokens too, for some shapes),
    and ``scaled`` on sm_100 with Triton 3.6. 128x128 in bf16 is at the limit of registers: up to 16 bytes spill with 3.9.
    """
    average = num_tokens / max(num_experts, 1)
    if interpreted:
        return TritonGemmConfig(16 if average <= 16 else 64, formulation, 4, 1)
    for block_t in (16, 32, 64):
        if average <= block_t:
            return TritonGemmConfig(block_t, formulation, 4 if block_t == 16 and formulation == "scaled" else 8, 4)
    return TritonGemmConfig(128, formulation, 8, 3)


def _triton_version() -> tuple[int, int]:
    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)


@functools.cache
def formulation_for(device: torch.device) -> Formulation:
    """The tile product that kernels on ``device`` use."""
    return select_formulation(_capability(device), _triton_version())


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.cache
def _capability(device: torch.device) -> tuple[int, int] | None:
    """None where kernels are interpreted."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" and not INTERPRETED else None


def hopper_config_for(
    num_tokens: int, num_experts: int, n: int, k: int, device: torch.device
) -> HopperGemmConfig | None:
    """The tile of the Hopper kernel for this problem; None where the kernel above runs."""
    if _capability(device) != (9, 0) or not env.hopper_gemm():
        return None
    return _hopper_config(num_tokens, num_experts, n, k)


@functools.lru_cache(maxsize=4096)
def _hopper_config(num_tokens: int, num_experts: int, n: int, k: int) -> HopperGemmConfig | None:
    return select_hopper_config(num_tokens, num_experts) if hopper_takes(num_tokens, num_experts, n, k) else None


def blackwell_takes(num_experts: int, n: int, k: int, device: torch.device) -> bool:
    """Whether ``grouped_gemm_blackwell`` runs this problem: TMA counts rows and scale tiles in 32 bits."""
    scale_tiles = num_experts * ceil_div(n, 128) * ceil_div(k, 128)
    return _capability(device) in CUTLASS_CAPABILITIES and max(num_experts * n + 128, scale_tiles) <= MAX_INT32


def config_for(num_tokens: int, num_experts: int, n: int, k: int, device: torch.device) -> object:
    """The configuration of whichever kernel takes this problem, to be printed."""
    hopper = hopper_config_for(num_tokens, num_experts, n, k, device)
    if hopper is not None:
        return hopper
    if blackwell_takes(num_experts, n, k, device):
        from hybrid_mxfp8.triton_kernels.gemm.blackwell import select_blackwell_config

        return select_blackwell_config(num_tokens, num_experts)
    return select_gemm_config(num_tokens, num_experts, formulation_for(device), INTERPRETED)


def workspace_size(num_tokens: int, num_experts: int, n: int, k: int, device: torch.device) -> int:
    """Bytes of device memory that :func:`grouped_gemm` needs beside its output."""
    config = hopper_config_for(num_tokens, num_experts, n, k, device)
    return 0 if config is None else WorkspaceLayout.size_of(num_tokens, num_experts, k, config)


def workspace_bound(num_tokens: int, num_experts: int, n: int, k: int, device: torch.device) -> int:
    """Bytes that suffice for every call of up to ``num_tokens`` rows: a smaller batch may take a tile that needs more."""
    return max(workspace_size(rows, num_experts, n, k, device) for rows in largest_batches(num_tokens, num_experts))


@functools.cache
def _hopper_kernels() -> ModuleType:
    """Imported where it can run alone: Gluon's names differ from one Triton to the next."""
    from hybrid_mxfp8.triton_kernels.gemm import hopper as grouped_gemm_hopper

    return grouped_gemm_hopper


def grouped_gemm(
    x_values: torch.Tensor,
    x_scales: torch.Tensor,
    groups: GroupLayout,
    w_values: torch.Tensor,
    w_scales: torch.Tensor,
    out: torch.Tensor,
    workspace: torch.Tensor | None = None,
) -> Launched | Together | None:
    """Write the product into ``out``; arguments as checked by ``ops.grouped_gemm``.

    Args:
        x_values: (T, K) float8_e4m3fn, contiguous.
        x_scales: (S, C) uint8, swizzled.
        groups: layout of the T rows.
        w_values: (E, N, K) float8_e4m3fn, contiguous.
        w_scales: (E, roundup(N, 128), C) uint8, swizzled.
        out: (T, N) bf16, fp16 or fp32, contiguous; rows that no expert owns keep what they hold.
        workspace: uint8, at least :func:`workspace_size` bytes, 256-byte aligned; allocated if None and needed.

    Returns:
        The launches, to be repeated, or None.
    """
    num_experts, n, k = w_values.shape
    num_tokens = groups.num_tokens
    if not (num_tokens and num_experts):
        return None
    hopper = hopper_config_for(num_tokens, num_experts, n, k, out.device)
    if hopper is not None and aligned(w_values, w_scales):  # TMA reads from 16-byte boundaries
        given = workspace
        if workspace is None:
            size = WorkspaceLayout.size_of(num_tokens, num_experts, k, hopper)
            workspace = torch.empty(size, dtype=torch.uint8, device=out.device)
        with on_device_of(out):
            launched: Together | None = _hopper_kernels().hopper_grouped_gemm(
                x_values, x_scales, groups, w_values, w_scales, out, workspace, hopper, _multiprocessors(out.device)
            )
        return None if given is None else launched  # memory allocated here is soon somebody else's
    if blackwell_takes(num_experts, n, k, out.device) and aligned(x_values, x_scales, w_values, w_scales):
        from hybrid_mxfp8.triton_kernels.gemm.blackwell import grouped_gemm_blackwell, select_blackwell_config

        blackwell = select_blackwell_config(num_tokens, num_experts)
        return grouped_gemm_blackwell(x_values, x_scales, groups, w_values, w_scales, out, blackwell)
    config = select_gemm_config(num_tokens, num_experts, formulation_for(out.device), INTERPRETED)
    programs = token_tiles_bound(num_tokens, num_experts, config.block_t) * ceil_div(n, 128)
    arguments = (
        raw(x_values),
        x_scales,
        raw(w_values),
        w_scales,
        out,
        groups.expert_offsets,
        groups.scale_offsets,
        num_tokens,
        x_scales.shape[0],
        num_experts,
        n,
        k,
    )
    constants = (next_power_of_2(num_experts), config.block_t, config.formulation)
    options = (("num_warps", config.num_warps), ("num_stages", config.num_stages))
    operands = (x_values, x_scales, w_values, w_scales, out)
    key = ("grouped_gemm", out.dtype, n, k, *(aligned(tensor) for tensor in operands))
    with on_device_of(out):
        return launch(grouped_gemm_kernel, programs, arguments, constants, options, key)
