"""FP8 with one scale for each block of 128x128, as DeepSeek-V3, Kimi-K2, MiniMax-M2 and Qwen3's FP8 models are published.

A weight ``NAME`` (..., N, K) is F8_E4M3; ``NAME_scale_inv`` (..., ceil(N/128), ceil(K/128)) multiplies, in spite of its
name. It is no MXFP8, whose scales are powers of two for 32 elements of one row, but can be turned into it: exactly, where
the scales happen to be powers of two, as in DeepSeek-V3.1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from hybrid_mxfp8.formats import ceil_div
from hybrid_mxfp8.safetensors_writer import Entry

if TYPE_CHECKING:
    from hybrid_mxfp8.checkpoint import Checkpoint

BLOCK: Final = 128
"""Rows and columns that share a scale."""

SCALE_NAMES: Final = {"F32": "fp32", "BF16": "bf16", "F8_E8M0": "E8M0"}
"""Of the dtypes that such scales have."""


def block_scales(checkpoint: Checkpoint, weight: Entry) -> Entry | None:
    """The scales of a weight that is FP8 in blocks of 128x128; None if it is anything else."""
    scale_name = checkpoint.scale_of(weight.name)
    if weight.dtype != "F8_E4M3" or len(weight.shape) < 2 or scale_name is None:
        return None
    scale, (n, k) = checkpoint.entry(scale_name), weight.shape[-2:]
    expected = (*weight.shape[:-2], ceil_div(n, BLOCK), ceil_div(k, BLOCK))
    return scale if scale.dtype in SCALE_NAMES and scale.shape == expected else None


def dequantize(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """What rows of such a weight stand for: each element times its block's scale, rounded once, to fp32.

    Args:
        values: (R, K) float8_e4m3fn, whose first row is the first of a block.
        scales: (ceil(R/128), ceil(K/128)) fp32, bf16 or float8_e8m0fnu, on the same device.

    Returns:
        (R, K) fp32.
    """
    rows, k = values.shape
    each = scales.float().repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :k]
    return values.float().mul_(each)
