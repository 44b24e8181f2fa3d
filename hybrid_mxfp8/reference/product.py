"""The grouped product in plain PyTorch: dequantized operands, accumulated in float64."""

from __future__ import annotations

import itertools

import torch

from hybrid_mxfp8.core.dequantize import dequantize_experts, dequantize_grouped


def grouped_matmul(
    x_values: torch.Tensor,
    x_scales: torch.Tensor,
    expert_offsets: torch.Tensor,
    scale_offsets: torch.Tensor,
    w_values: torch.Tensor,
    w_scales: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """out[t] = x[t] @ w[expert of t].T, accumulated in float64; syncs to learn the group sizes.

    Args:
        x_values: (T, K) float8_e4m3fn.
        x_scales: (S, C) uint8, swizzled.
        expert_offsets: (E+1,) int32.
        scale_offsets: (E+1,) int32.
        w_values: (E, N, K) float8_e4m3fn.
        w_scales: (E, roundup(N, 128), C) uint8, swizzled.
        out: (T, N) bf16, fp16 or fp32; rows that no expert owns keep what they hold.
    """
    x = dequantize_grouped(x_values, x_scales, expert_offsets, scale_offsets, torch.float64)
    offsets = expert_offsets.clamp(0, out.shape[0]).tolist()
    for e, (start, end) in enumerate(itertools.pairwise(offsets)):
        if start < end:
            w = dequantize_experts(w_values[e : e + 1], w_scales[e : e + 1], torch.float64)[0]
            out[start:end] = (x[start:end] @ w.T).to(out.dtype)
