"""The formats that are compared, each as what becomes of a matrix on its way through it and back to fp32.

MXFP8 is the reference quantizer, whose bytes every backend writes. The FP8 formats have an fp32 scale, amax/448, for a
whole tensor or for each row; a row is a token of the activations, or an output feature of the weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch

from hybrid_mxfp8 import reference
from hybrid_mxfp8.core.formats import BLOCK_SIZE, E4M3_MAX, SCALE_ROUNDINGS


@dataclass(frozen=True)
class Format:
    """One way to store a matrix.

    Attributes:
        name: for tables.
        kind: ``bf16``, ``mxfp8`` or ``fp8``.
        bits: of an element, its share of the scales included; of K.
        through: (R, K) fp32 to what is left of it, (R, K) fp32.
    """

    name: str
    kind: str
    bits: Callable[[int], float]
    through: Callable[[torch.Tensor], torch.Tensor]


def through_mxfp8(scale_rounding: str, x: torch.Tensor) -> torch.Tensor:
    """x (R, K) through MXFP8; K % 32 == 0."""
    return reference.dequantize(*reference.quantize(x, scale_rounding))


def through_row_fp8(x: torch.Tensor) -> torch.Tensor:
    """x (R, K) through e4m3 with one scale a row."""
    return _through_e4m3(x, x.abs().amax(dim=1, keepdim=True))


def through_tensor_fp8(x: torch.Tensor) -> torch.Tensor:
    """x (R, K) through e4m3 with one scale."""
    return _through_e4m3(x, x.abs().amax()) if x.numel() else x


def _through_e4m3(x: torch.Tensor, amax: torch.Tensor) -> torch.Tensor:
    # Zeros need some scale; which one makes no difference to them.
    scale = torch.where(amax > 0, amax / E4M3_MAX, 1.0)
    return (x / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float() * scale


FORMATS: Final = (
    Format("bf16", "bf16", lambda k: 16.0, lambda x: x.bfloat16().float()),
    *(
        Format(f"MXFP8 {rounding}", "mxfp8", lambda k: 8 + 8 / BLOCK_SIZE, functools.partial(through_mxfp8, rounding))
        for rounding in SCALE_ROUNDINGS
    ),
    Format("FP8 per row", "fp8", lambda k: 8 + 32 / k, through_row_fp8),
    Format("FP8 per tensor", "fp8", lambda k: 8.0, through_tensor_fp8),
)
