"""The grouped product in plain PyTorch: dequantized operands, accumulated in float64."""

from __future__ import annotations

import itertools

import torch

from hybrid_mxfp8.core.dequantize import dequantize_experts, dequantize_grouped


def grouped_matmul(
    x_values: torch.Tensor,  # (T, K) e4m3
    x_scales: torch.Tensor,  # (S, C) uint8, swizzled
    expert_offsets: torch.Tensor,  # (E+1,) int32
    scale_offsets: torch.Tensor,  # (E+1,) int32
    w_values: torch.Tensor,  # (E, N, K) e4m3
    w_scales: torch.Tensor,  # (E, roundup(N, 128), C) uint8, swizzled
    out: torch.Tensor,  # (T, N) bf16, fp16 or fp32; rows that no expert owns keep what they hold
) -> None:
    """out[t] = x[t] @ w[expert of t].T, accumulated in float64; syncs to learn the group sizes."""
    x = dequantize_grouped(x_values, x_scales, expert_offsets, scale_offsets, torch.float64)
    offsets = expert_offsets.clamp(0, out.shape[0]).tolist()
    for e, (start, end) in enumerate(itertools.pairwise(offsets)):
        if start < end:
            w = dequantize_experts(w_values[e : e + 1], w_scales[e : e + 1], torch.float64)[0]
            out[start:end] = (x[start:end] @ w.T).to(out.dtype)
