"""Truth on the GPU: the float64 product of dequantized operands, with the bounds of tolerances.py."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import tolerances
import torch

import hybrid_mxfp8 as mx

GPU = "cuda"


def bf16_formulation() -> bool:
    """Whether the Triton backend's operands pass through bf16 here."""
    return torch.cuda.get_device_capability() < (10, 0)


def check_product(y: torch.Tensor, xq: mx.GroupedMXFP8, wq: mx.ExpertWeights, counts: Sequence[int]) -> float:
    """Compare rows of each expert; rows beyond must still be the NaN they were. Returns the largest error in bounds."""
    x = xq.dequantize()
    worst = 0.0
    for e, (start, end) in enumerate(itertools.pairwise(itertools.accumulate(counts, initial=0))):
        if start == end:
            continue
        one = mx.ExpertWeights(wq.values[e : e + 1], wq.scales[e : e + 1])
        xd, wd = x[start:end].double(), one.dequantize()[0].double()
        ref, magnitude = xd @ wd.T, xd.abs() @ wd.abs().T
        nan = torch.isnan(ref)
        assert torch.equal(torch.isnan(y[start:end]), nan), f"expert {e}: NaN where truth has none, or the reverse"
        bound = tolerances.HALF_ULP[y.dtype] * ref.abs() + tolerances.ACCUMULATION * magnitude
        bound += tolerances.SMALLEST[y.dtype]
        if bf16_formulation():
            bound += tolerances.BF16_DROPPED * (xd.abs().sum(1)[:, None] + wd.abs().sum(1)[None, :])
        error = torch.where(nan, 0, (y[start:end].double() - ref).abs() / bound)
        worst = max(worst, float(error.max()))
    assert worst <= 1.0, f"largest error is {worst:.3g} times its bound"
    assert bool(torch.isnan(y[sum(counts) :]).all())
    return worst


def same_bytes(a: mx.GroupedMXFP8 | mx.ExpertWeights, b: mx.GroupedMXFP8 | mx.ExpertWeights) -> None:
    """Both operands' buffers, wherever they are."""
    for name in ("values", "scales"):
        x, y = getattr(a, name).view(torch.uint8), getattr(b, name).view(torch.uint8)
        y = y.to(x.device)
        assert torch.equal(x, y), f"{name}: {int((x != y).sum())} of {x.numel()} bytes differ"
