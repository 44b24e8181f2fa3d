"""What each format keeps: of a grouped GEMM, and of all else when one channel is large.

Truth is the product of the fp32 operands, accumulated in float64; so are the products of what the
formats leave of them, which shows the formats alone and no kernel's accumulation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch

from hybrid_mxfp8.commands.accuracy.formats import FORMATS, Format
from hybrid_mxfp8.commands.demo.measure import Quality, grouped_product, quality
from hybrid_mxfp8.commands.demo.workload import Operands
from hybrid_mxfp8.core.formats import BLOCK_SIZE
from hybrid_mxfp8.core.metrics import signal_to_noise_db


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


def score(operands: Operands, formats: Sequence[Format] = FORMATS) -> list[Score]:
    """Each format on a grouped GEMM. Scales of tokens span all experts', those of weights one's.

    Raises:
        ValueError: no expert has a token.
    """
    busy = [e for e, count in enumerate(operands.rows) if count]
    if not busy:
        raise ValueError(f"operands: {operands.name} must have at least one token, got none")
    x, w, rows = operands.x, operands.w[busy], [operands.rows[e] for e in busy]
    scores = []
    for form in formats:
        xq, wq = form.through(x), torch.stack([form.through(matrix) for matrix in w])
        scores.append(Score(form, tuple(quality(x, w, rows, xq, wq, grouped_product(xq, wq, rows)))))
    return scores


@dataclass(frozen=True)
class ChannelEffect:
    """What is left of other blocks, in dB, for a channel of rms ``ratio`` times theirs."""

    ratio: float
    db: dict[str, float]


def channel_effect(
    x: torch.Tensor, ratios: Sequence[float], formats: Sequence[Format] = FORMATS
) -> list[ChannelEffect]:
    """Make the largest channel of x (R, K) fp32 larger in every token; look at the other blocks.

    Transformers' activations have such channels in every token: a scale a token is no help.
    """
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
        left = {form.name: signal_to_noise_db(rest, form.through(spoiled)[:, others]) for form in formats}
        effects.append(ChannelEffect(ratio, left))
    return effects
