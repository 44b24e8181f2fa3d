"""What each format keeps: of a grouped GEMM, and of all else when one channel is large.

MXFP8 is the reference quantizer. The FP8 formats have an fp32 scale, amax/448, for a whole tensor
or for each row. Truth is the product of the fp32 operands, accumulated in float64; so are the
products of what the formats leave of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Final

import torch

from hybrid_mxfp8 import reference
from hybrid_mxfp8.commands.demo.measure import Effect, Quality, grouped_product, per_tensor_fp8, quality, through_e4m3
from hybrid_mxfp8.commands.demo.workload import Operands
from hybrid_mxfp8.core.formats import BLOCK_SIZE, SCALE_ROUNDINGS
from hybrid_mxfp8.core.metrics import signal_to_noise_db
from hybrid_mxfp8.core.scales import dequantize


@dataclass(frozen=True)
class Format:
    """One way to store a matrix."""

    name: str
    bits: Callable[[int], float]  # of an element of rows of K, its share of the scales included
    through: Callable[[torch.Tensor], torch.Tensor]  # (R, K) fp32 to what is left of it


def _mxfp8(scale_rounding: str, x: torch.Tensor) -> torch.Tensor:
    return dequantize(*reference.quantize(x, scale_rounding))


FORMATS: Final = (
    Format("bf16", lambda k: 16.0, lambda x: x.bfloat16().float()),
    *(
        Format(f"MXFP8 {rounding}", lambda k: 8 + 8 / BLOCK_SIZE, functools.partial(_mxfp8, rounding))
        for rounding in SCALE_ROUNDINGS
    ),
    Format("FP8 per row", lambda k: 8 + 32 / k, lambda x: through_e4m3(x, x.abs().amax(dim=1, keepdim=True))),
    Format("FP8 per tensor", lambda k: 8.0, per_tensor_fp8),
)


@dataclass(frozen=True)
class Score:
    """One format on one grouped GEMM: the figures of each expert that has tokens."""

    format: Format
    experts: tuple[Quality, ...]

    def mean(self, figure: str) -> float:
        """The mean over experts of one of Quality's figures."""
        return fmean(getattr(q, figure) for q in self.experts)

    @property
    def worst_db(self) -> float:
        """The lowest signal-to-noise of an expert's product."""
        return min(q.product_db for q in self.experts)

    @property
    def worst_diff(self) -> float:
        """The largest calc_diff of an expert's product."""
        return max(q.product_diff for q in self.experts)


def score(operands: Operands) -> list[Score]:
    """Each format on a grouped GEMM, of one token at least; a per-tensor scale of x spans all."""
    busy = [e for e, count in enumerate(operands.rows) if count]
    if not busy:
        raise ValueError(f"operands: {operands.name} must have at least one token, got none")
    gemm = Operands(operands.name, operands.x, operands.w[busy], tuple(operands.rows[e] for e in busy))
    scores = []
    for form in FORMATS:
        xq, wq = form.through(gemm.x), torch.stack([form.through(matrix) for matrix in gemm.w])
        scores.append(Score(form, tuple(quality(gemm, xq, wq, grouped_product(xq, wq, gemm.rows)))))
    return scores


def channel_effect(x: torch.Tensor, ratios: Sequence[float]) -> list[Effect]:
    """Make the largest channel of x (R, K) fp32 larger in all tokens; look at other blocks."""
    channel = int(x.square().sum(dim=0).argmax())
    others = torch.ones(x.shape[1], dtype=torch.bool)
    others[channel // BLOCK_SIZE * BLOCK_SIZE :][:BLOCK_SIZE] = False
    rest = x[:, others]
    rms = rest.double().square().mean().sqrt()
    unit = x[:, channel] / x[:, channel].double().square().mean().sqrt()
    effects = []
    for ratio in ratios:
        spoiled = x.clone()
        spoiled[:, channel] = (unit * rms * ratio).to(x.dtype)
        left = {form.name: signal_to_noise_db(rest, form.through(spoiled)[:, others]) for form in FORMATS}
        effects.append(Effect(ratio, left))
    return effects
