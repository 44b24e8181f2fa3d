"""Every kernel of the product as its own module launches it, for a small problem."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from hybrid_mxfp8.core.activation import SwiGLU
from hybrid_mxfp8.core.token_record import TokenRecord
from hybrid_mxfp8.dispatch.buffers import Buffer
from hybrid_mxfp8.dispatch.problem import GemmBuffers, Problem, QuantizeBuffers, QuantizeProblem
from hybrid_mxfp8.triton_kernels import group_layout
from hybrid_mxfp8.triton_kernels import quantize as quantizer
from hybrid_mxfp8.triton_kernels.gemm.blackwell import BlackwellConfig
from hybrid_mxfp8.triton_kernels.gemm.hopper_config import HopperGemmConfig
from hybrid_mxfp8.triton_kernels.gemm.hopper_fp8_config import select_hopper_fp8_config
from hybrid_mxfp8.triton_kernels.launch import KernelLaunch
from hybrid_mxfp8.triton_kernels.moe import combine, expert_bias, pack_tokens, route

T, E, N, K = 96, 8, 256, 512
S = 1120  # rows of scales
BF16, U8, I32, FP8 = torch.bfloat16, torch.uint8, torch.int32, torch.float8_e4m3fn


def _numbering() -> Callable[..., Buffer]:
    """Makes buffers, each of a tensor of its own."""
    count = iter(range(100))

    def buffer(dtype: torch.dtype, *shape: int, offset: int = 0, aligned: bool = True) -> Buffer:
        return Buffer(next(count), offset, dtype, shape, aligned)

    return buffer


def quantize(
    dtype: torch.dtype = BF16, *, aligned: bool = True, row_stride: int = K, swiglu: SwiGLU | None = None,
    copied: bool = False,
) -> KernelLaunch:  # fmt: skip
    """With a layout's offsets; gathered with an activation, to the rows of 4 choices if copied."""
    b = _numbering()
    x, values, scales = b(dtype, T, K, aligned=aligned, offset=0 if aligned else 2), b(FP8, T, K), b(U8, S, 16)
    index = b(I32, T) if swiglu else None
    layout = b(I32, E + 1), b(I32, E + 1, offset=36)
    choices = (b(I32, T, 4), b(torch.int64, T, 4), b(U8, T, K // 32, offset=K)) if copied else ()
    problem = QuantizeProblem(T, E, K, T, row_stride, "rceil", swiglu, scale_stride=row_stride if copied else 0)
    (launch,) = quantizer.quantize(problem, QuantizeBuffers(x, values, scales, index, *layout, None, None, *choices))
    return launch


def quantize_counts() -> KernelLaunch:
    b = _numbering()
    buffers = QuantizeBuffers(
        b(torch.float32, T, K), b(FP8, T, K), b(U8, S, 16), counts=b(torch.int64, E), layout=b(I32, 3 * E + 2)
    )
    problem = QuantizeProblem(T, E, K, T, K, "rceil", None, "counts", scale_group=128)
    (launch,) = quantizer.quantize(problem, buffers)
    return launch


def product(module: str, *config: Any, scale_group: int = 32) -> tuple[KernelLaunch, ...]:
    """All launches of a product; a module of Gluon is imported where it is asked for alone."""
    plan = importlib.import_module(f"hybrid_mxfp8.triton_kernels.gemm.{module}").plan
    b = _numbering()
    x, w = (b(FP8, T, K), b(U8, S, 16, offset=256)), (b(FP8, E, N, K), b(U8, E, N, 16))
    offsets, scale_offsets = b(I32, E + 1), b(I32, E + 1, offset=36)
    buffers = GemmBuffers(*x, offsets, offsets, scale_offsets, *w, b(BF16, T, N), b(U8, 2**20))
    launches: tuple[KernelLaunch, ...] = plan(
        Problem(E, N, K, T, BF16, torch.device("cpu"), scale_group), buffers, *config
    )
    return launches


def of_layer(plan: Callable[..., Any], *shapes: tuple[Any, ...], options: tuple[Any, ...] = ()) -> KernelLaunch:
    """A step of the layer, whose buffers have these dtypes and shapes."""
    b = _numbering()
    (launch,) = plan(*(b(*shape) if shape else None for shape in shapes), *options)
    return launch


ROWS, CHOICES, ROUTE = (BF16, 4 * T, N), (I32, T, 4), (I32, 3 * E + 2)
SUMMED = ROWS, CHOICES, CHOICES, (torch.float32, T, 4)
CASES: dict[str, Callable[[], KernelLaunch]] = {
    "quantize": quantize,
    "quantize_unaligned": lambda: quantize(torch.float16, aligned=False, row_stride=K + 1),
    "quantize_swiglu": lambda: quantize(swiglu=SwiGLU(1.702, 0.0, 7.0)),
    "quantize_counts": quantize_counts,
    "quantize_copied": lambda: quantize(FP8, row_stride=544, copied=True),
    "pack_tokens": lambda: of_layer(
        lambda x, *rest: pack_tokens.pack_tokens(x, K, *rest, E, 32),
        *((BF16, T - 9, K), (torch.int64, T, 4), (BF16, T, 4), (U8, T, TokenRecord(K, 4).size)),
    ),
    "group_offsets": lambda: of_layer(group_layout.group_offsets, (torch.int64, E), ROUTE, options=(T, False)),
    "rank": lambda: of_layer(route.route, CHOICES, CHOICES, ROUTE, (), options=(E,)),
    "combine": lambda: of_layer(combine.combine, *SUMMED, (), (BF16, T, N), options=(N,)),
    "combine_bias": lambda: of_layer(combine.combine, *SUMMED, (BF16, E, N), (BF16, T, N), options=(N,)),
    "expert_bias": lambda: of_layer(expert_bias.add_expert_bias, ROWS, CHOICES, (torch.int64, T, 4), (BF16, E, N)),
    "dequantize_tokens": lambda: product("hopper", HopperGemmConfig(16, 16, 64, 4))[0],
    "hopper_gemm": lambda: product("hopper", HopperGemmConfig(16, 16, 64, 4))[1],
    "hopper_gemm_fused": lambda: product("hopper", HopperGemmConfig(256, 64, 64, 4, True))[1],
    "hopper_fp8_gemm": lambda: product("hopper_fp8", select_hopper_fp8_config(T, E, False), scale_group=128)[0],
    "portable_gemm": lambda: product("portable")[0],
    "blackwell_gemm": lambda: product("blackwell", BlackwellConfig(128, True, 8, 4))[0],
    "blackwell_gemm_small": lambda: product("blackwell", BlackwellConfig(16, False, 4, 4))[0],
}
