"""How far a product may be from the float64 truth of its MXFP8 operands: one table, with reasons.

The operands are exact in fp32, products of two e4m3 values are exact in fp32, and scales are powers
of two. So what can differ is the accumulation and the rounding of the output:

    |y - ref| <= half_ulp(dtype) * |ref| + ACCUMULATION * (|x| @ |w|.T)
                 + smallest(dtype) + K * UNDERFLOW + dropped(formulation)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from truth import Bytes, Doubles, dequantize

HALF_ULP = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
"""Relative to |ref|, which is at least the power of two that the ulp is counted from."""

SMALLEST = {torch.bfloat16: 2.0**-134, torch.float16: 2.0**-25, torch.float32: 2.0**-150}
"""Half the smallest subnormal: what rounding may cost near zero."""

OVERFLOW = {torch.bfloat16: 2.0**128 - 2.0**119, torch.float16: 65520.0, torch.float32: 2.0**128 - 2.0**103}
"""Magnitudes from here on round to Inf: half way between the dtype's largest value and the power of
two after it."""

ACCUMULATION = 2e-5
"""Relative to the sum of magnitudes. fp32 accumulation costs at most K * 2**-24 of it, 1.2e-4 at K
= 2048; roundings of random sign add up to about sqrt(K) * 2**-24, 3e-6 there, and to 5e-6 at K =
7168. Matrix units also align the addends of a step before they add them, which drops bits below
their widest one's; this leaves four times for that."""

UNDERFLOW = 2.0**-150
"""Half of fp32's smallest subnormal: what the product of two elements may lose where it is one
itself. Sums of subnormals are exact."""

BF16_DROPPED = 2.0**-134
"""The bf16 formulation rounds dequantized elements below 2**-133, which only scale bytes 0 to 2
produce."""


def check_gemm(
    y: torch.Tensor,
    x: tuple[Bytes, Bytes],
    w: tuple[Bytes, Bytes],
    counts: Sequence[int],
    *,
    bf16_formulation: bool = False,
) -> float:
    """Compare y (T, N) with truth, row by row of each expert; returns the largest error in units of
    its bound. ``x`` and ``w`` are codes (T, K) and (E, N, K), each with row-major scales, and
    ``counts`` the rows of each expert; ``bf16_formulation``: operands passed through bf16."""
    got = y.detach().cpu().double().numpy()
    start, worst = 0, 0.0
    for e, count in enumerate(counts):
        rows = slice(start, start + count)
        start += count
        if not count:
            continue
        xd, wd = dequantize(x[0][rows], x[1][rows]), dequantize(w[0][e], w[1][e])
        ref, magnitude = xd @ wd.T, np.abs(xd) @ np.abs(wd).T
        nan = np.isnan(ref)
        assert np.array_equal(np.isnan(got[rows]), nan), f"expert {e}: NaN where truth has none, or the reverse"
        dropped: Doubles | float = xd.shape[1] * UNDERFLOW
        if bf16_formulation:
            dropped += BF16_DROPPED * (np.abs(xd).sum(1)[:, None] + np.abs(wd).sum(1)[None, :])
        bound = HALF_ULP[y.dtype] * np.abs(ref) + ACCUMULATION * magnitude + SMALLEST[y.dtype] + dropped
        inf = np.isinf(got[rows]) & (np.signbit(got[rows]) == np.signbit(ref))
        may, must = (np.abs(ref) + sign * bound >= OVERFLOW[y.dtype] for sign in (1, -1))
        finite_error = np.abs(np.where(inf, ref, got[rows]) - ref) / bound
        error = np.where(inf, np.where(may, 0, np.inf), np.where(must, np.inf, finite_error))
        worst = max(worst, float(np.where(nan, 0, error).max()))
    assert worst <= 1.0, f"largest error is {worst:.3g} times its bound"
    return worst
