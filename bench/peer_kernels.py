"""Plain streaming kernels of the contenders that are not ours: silu(gate) * up before a quantizer,
and tokens to FP8 with an fp32 scale for each 128 elements, in the place of SGLang's."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def silu_mul_kernel(
    x_ptr,  # (T, 2K) contiguous
    y_ptr,  # (T, K) contiguous
    K,
    BLOCK: tl.constexpr,
):
    """Grid (T, cdiv(K, BLOCK)); computed in fp32."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = col < K
    gate = tl.load(x_ptr + row * 2 * K + col, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * 2 * K + K + col, mask=mask, other=0.0).to(tl.float32)
    y = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(y_ptr + row * K + col, y.to(y_ptr.dtype.element_ty), mask=mask)


def silu_mul(x: torch.Tensor, out: torch.Tensor) -> None:
    """Write ``silu(x[:, :K]) * x[:, K:]`` of x (T, 2K) into ``out`` (T, K), both contiguous."""
    tokens, k = out.shape
    silu_mul_kernel[(tokens, triton.cdiv(k, 1024))](x, out, k, BLOCK=1024, num_warps=4)


@triton.jit
def quantize_fp8_kernel(
    x_ptr,  # (T, K) contiguous
    y_ptr,  # (T, K) e4m3
    scales_ptr,  # (T, K / 128) fp32
    K,
    BLOCK: tl.constexpr,
):
    """Grid (T, cdiv(K, BLOCK)); K % 128 == 0."""
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    col = first + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * K + col, mask=col < K, other=0.0).to(tl.float32).reshape(BLOCK // 128, 128)
    scale = tl.maximum(tl.max(tl.abs(x), 1), 1e-10) / 448.0
    y = (x / scale[:, None]).to(tl.float8e4nv).reshape(BLOCK)
    tl.store(y_ptr + row * K + col, y, mask=col < K)
    block = first // 128 + tl.arange(0, BLOCK // 128)
    tl.store(scales_ptr + row * (K // 128) + block, scale, mask=block < K // 128)


def quantize_fp8(x: torch.Tensor, group: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (T, K) and scales (T, K / 128) of x (T, K) contiguous; ``group`` is 128."""
    tokens, k = x.shape
    y = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    scales = torch.empty(tokens, k // 128, device=x.device)
    quantize_fp8_kernel[(tokens, triton.cdiv(k, 1024))](x, y, scales, k, BLOCK=1024, num_warps=4)
    return y, scales
