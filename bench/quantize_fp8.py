"""Tokens to FP8 with an fp32 scale for each 128 elements: SGLang's quantizer, stood in for."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


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
