"""The formats that are compared, each as what it leaves of a matrix, in fp32.

MXFP8 is the reference quantizer, whose bytes every backend writes. The FP8 formats have an fp32
scale, amax/448, for a whole tensor or for each row: a token, or an output feature of the weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch

from hybrid_mxfp8 import reference
from hybrid_mxfp8.commands.demo.measure import per_tensor_fp8, through_e4m3
from hybrid_mxfp8.core.formats import BLOCK_SIZE, SCALE_ROUNDINGS


@dataclass(frozen=True)
class Format:
    """One way to store a matrix."""

    name: str
    bits: Callable[[int], float]  # of an element of rows of K, its share of the scales included
    through: Callable[[torch.Tensor], torch.Tensor]  # (R, K) fp32 to what is left of it


def _mxfp8(scale_rounding: str, x: torch.Tensor) -> torch.Tensor:
    return reference.dequantize(*reference.quantize(x, scale_rounding))


def _per_row_fp8(x: torch.Tensor) -> torch.Tensor:
    return through_e4m3(x, x.abs().amax(dim=1, keepdim=True))


FORMATS: Final = (
    Format("bf16", lambda k: 16.0, lambda x: x.bfloat16().float()),
    *(
        Format(f"MXFP8 {rounding}", lambda k: 8 + 8 / BLOCK_SIZE, functools.partial(_mxfp8, rounding))
        for rounding in SCALE_ROUNDINGS
    ),
    Format("FP8 per row", lambda k: 8 + 32 / k, _per_row_fp8),
    Format("FP8 per tensor", lambda k: 8.0, per_tensor_fp8),
)
