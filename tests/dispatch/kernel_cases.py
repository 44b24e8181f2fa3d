"""Every kernel of the product with arguments of a small problem, as its launcher gives them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from hybrid_mxfp8.core.token_record import TokenRecord
from hybrid_mxfp8.dispatch.buffers import Buffer, TensorMap
from hybrid_mxfp8.dispatch.problem import GemmBuffers, Problem
from hybrid_mxfp8.triton_kernels.abi import Argument

T, E, N, K = 96, 8, 256, 512
S = 1120  # rows of scales
BF16, U8, I32, FP8 = torch.bfloat16, torch.uint8, torch.int32, torch.float8_e4m3fn


class Case(NamedTuple):
    """A launch; buffers are numbered in the order of ``arguments``."""

    arch: int
    module: str
    kernel: str
    grid: int
    arguments: tuple[Argument, ...]
    constants: tuple[object, ...]
    options: dict[str, Any]

    def load(self) -> Any:
        """The kernel itself."""
        return getattr(importlib.import_module(f"hybrid_mxfp8.triton_kernels.{self.module}"), self.kernel)


def _numbering() -> Callable[..., Buffer]:
    count = iter(range(100))

    def buffer(dtype: torch.dtype, *shape: int, offset: int = 0, aligned: bool = True) -> Buffer:
        return Buffer(next(count), offset, dtype, shape, aligned)

    return buffer


def quantize(
    dtype: torch.dtype = BF16, aligned: bool = True, row_stride: int = K, swiglu: bool = False, copied: bool = False
) -> Case:
    b = _numbering()
    gather = swiglu or copied
    x = b(dtype, T, K, aligned=aligned, offset=0 if aligned else 2)
    arguments = (
        *(x, row_stride, 0, b(I32, T) if gather else None, T, b(FP8, T, K), b(U8, S, 16, offset=256), S),
        *(None, None, b(I32, E + 1), b(I32, E + 1, offset=36), T, E, 1, K, T, 1),
        *((b(U8, T, K // 32, offset=K), row_stride) if copied else (None, 1)),
    )
    constants = (0x1FFFFF, 32, "offsets", gather, swiglu, 1.702 if swiglu else 1.0, 0.0, 7.0 if swiglu else None)
    return Case(90, "quantize", "quantize_kernel", T + E, arguments, (*constants, E, 1, K, 16, False), {"num_warps": 2})


def quantize_counts() -> Case:
    b = _numbering()
    arguments = (
        *(b(torch.float32, T, K), K, 0, None, T, b(FP8, T, K), b(U8, S, 16), S, b(torch.int64, E), b(I32, 3 * E + 2)),
        *(None, None, T, E, 1, K, T, 1, None, 1),
    )
    constants = (0x1FFFFF, 128, "counts", False, False, 1.0, 0.0, None, E, 1, K, 16, False)
    return Case(90, "quantize", "quantize_kernel", T + E + 1, arguments, constants, {"num_warps": 2})


def pack_tokens() -> Case:
    b = _numbering()
    size = TokenRecord(K, 4).size
    arguments = (b(BF16, T, K), K, b(torch.int64, T, 4), b(BF16, T, 4), b(U8, T, size), T - 9, T, E, K, size, K + 16)
    return Case(90, "moe.pack_tokens", "pack_tokens_kernel", T, arguments, (0x1FFFFF, 32, 4, 4, 1, K), {"num_warps": 2})


def group_offsets() -> Case:
    b = _numbering()
    arguments = (b(torch.int64, E), b(I32, 3 * E + 2), T, E)
    return Case(90, "group_layout", "group_offsets_kernel", 1, arguments, (False, E), {"num_warps": 1})


def rank() -> Case:
    b = _numbering()
    arguments = (b(I32, T, 4), b(I32, 4 * T), b(I32, T, 4), b(I32, 3 * E + 2), 4 * T, 4, E)
    return Case(90, "moe.route", "rank_kernel", 4, arguments, (16, 128, 128), {"num_warps": 4})


def combine(bias: bool = False) -> Case:
    b = _numbering()
    arguments = (
        *(b(BF16, 4 * T, N), b(I32, T, 4), b(I32, T, 4), b(torch.float32, T, 4)),
        *(b(BF16, E, N, aligned=False, offset=2) if bias else None, b(BF16, T, N), 4 * T, N, N),
    )
    options = {"num_warps": 4, "enable_fp_fusion": False}
    return Case(90, "moe.combine", "combine_kernel", T, arguments, (bias, 4, 256), options)


def expert_bias() -> Case:
    b = _numbering()
    arguments = (b(BF16, 4 * T, N), b(I32, T, 4), b(torch.int64, T, 4), b(BF16, E, N), 4 * T, N)
    return Case(90, "moe.expert_bias", "expert_bias_kernel", 4 * T, arguments, (256,), {"num_warps": 4})


def dequantize_tokens() -> Case:
    b = _numbering()
    arguments = (
        *(b(FP8, T, K), b(U8, S, 16), b(U8, 2**20), b(I32, E + 1), b(I32, E + 1, offset=36), T, S, E, K, T // 4, 20, 2),
    )
    constants = (E, E, 16, 4, 512)
    return Case(90, "gemm.dequantize_tokens", "dequantize_tokens_kernel", 64, arguments, constants, {"num_warps": 4})


def hopper_gemm(fused: bool = False) -> Case:
    from triton.experimental.gluon import language as gl

    def tensor_map(buffer: Buffer, shape: tuple[int, int], box: tuple[int, int], swizzle: int) -> TensorMap:
        bits = 8 * buffer.dtype.itemsize
        return TensorMap(buffer, shape, box, gl.NVMMASharedLayout(swizzle, element_bitwidth=bits, rank=2))

    b = _numbering()
    block_t, small = (256, 64) if fused else (16, 16)
    y, workspace = b(BF16, T, N), b(U8, 2**20)
    tokens = Buffer(workspace.operand, 512, BF16, (T, K))
    arguments = (
        *(y, workspace),
        tensor_map(b(U8, E, N, K), (E * N, K), (128, 64), 64),
        tensor_map(b(I32, E * N * 16 // 512, 128), (E * N * 16 // 512, 128), (1, 128), 0),
        tensor_map(tokens, (T, K), (block_t, 64), 128),
        tensor_map(tokens, (T, K), (small, 64), 128),
        *(b(FP8, T, K), b(U8, S, 16), b(I32, E + 1), b(I32, E + 1, offset=36), S, 2, 9, K, N, K // 128),
    )
    constants = (block_t, small, 64, 4, fused)
    return Case(90, "gemm.hopper", "hopper_gemm_kernel", 132, arguments, constants, {"num_warps": 8})


def hopper_fp8_gemm() -> Case:
    from hybrid_mxfp8.triton_kernels.gemm import hopper_fp8, hopper_fp8_config

    b = _numbering()
    y, w, w_scales, x, x_scales = b(BF16, T, N), b(FP8, E, N, K), b(U8, E, N, 16), b(FP8, T, K), b(U8, S, 16)
    offsets, scale_offsets = b(I32, E + 1), b(I32, E + 1, offset=36)
    buffers = GemmBuffers(x, x_scales, offsets, offsets, scale_offsets, w, w_scales, y, None)
    problem = Problem(E, N, K, T, BF16, torch.device("cpu"), scale_group=128)
    (launch,) = hopper_fp8.plan(problem, buffers, hopper_fp8_config.select_hopper_fp8_config(T, E, False))
    return Case(
        *(90, "gemm.hopper_fp8", "hopper_fp8_gemm_kernel", launch.programs, launch.arguments, launch.constants),
        dict(launch.options),
    )


def portable_gemm() -> Case:
    b = _numbering()
    arguments = (
        *(b(FP8, T, K), b(U8, S, 16), b(FP8, E, N, K), b(U8, E, N, 16), b(BF16, T, N)),
        *(b(I32, E + 1), b(I32, E + 1, offset=36), T, S, E, N, K),
    )
    options = {"num_warps": 4, "num_stages": 3}
    return Case(90, "gemm.portable", "grouped_gemm_kernel", 26, arguments, (E, 16, "scaled"), options)


def blackwell_gemm(block_t: int = 128) -> Case:
    b = _numbering()
    x_scales = b(U8, S, 16)
    tiles = (1, S // 128, 4, 2, 256)
    arguments = (
        *(b(BF16, T, N), TensorMap(b(FP8, T, K), (T, K), (block_t, 128))),
        *(TensorMap(x_scales, tiles, (1, max(block_t // 128, 1), 1, 2, 256)), x_scales),
        TensorMap(b(FP8, E, N, K), (E * N, K), (128, 128)),
        TensorMap(b(U8, E, N, 16), (1, E * N // 128, 4, 2, 256), (1, 1, 1, 2, 256)),
        *(b(I32, E + 1), b(I32, E + 1, offset=36), T, S, E, N, K),
    )
    wide = block_t > 32
    constants = (E, block_t, wide, 4)
    options = {"num_warps": 8 if wide else 4, "num_stages": 4}
    return Case(100, "gemm.blackwell", "grouped_gemm_blackwell_kernel", 30, arguments, constants, options)


CASES: dict[str, Callable[[], Case]] = {
    "quantize": quantize,
    "quantize_unaligned": lambda: quantize(torch.float16, aligned=False, row_stride=K + 1),
    "quantize_swiglu": lambda: quantize(swiglu=True),
    "quantize_counts": quantize_counts,
    "quantize_copied": lambda: quantize(FP8, row_stride=544, copied=True),
    "pack_tokens": pack_tokens,
    "group_offsets": group_offsets,
    "rank": rank,
    "combine": combine,
    "combine_bias": lambda: combine(bias=True),
    "expert_bias": expert_bias,
    "dequantize_tokens": dequantize_tokens,
    "hopper_gemm": hopper_gemm,
    "hopper_gemm_fused": lambda: hopper_gemm(fused=True),
    "hopper_fp8_gemm": hopper_fp8_gemm,
    "portable_gemm": portable_gemm,
    "blackwell_gemm": blackwell_gemm,
    "blackwell_gemm_small": lambda: blackwell_gemm(16),
}
