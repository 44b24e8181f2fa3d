"""What quantized SwiGLU may be, when only its exponential is not exact.

silu(g) * u is computed in fp32 with an exponential and a division that may differ in their last
places between the CPU, the interpreter and a GPU. With d the relative error that these allow, the
true value v lies somewhere in [v(1-d), v(1+d)], so the scale must be one that some amax in its
interval asks for, and each code must lie between the codes of the interval's ends at that scale.
Where no boundary is within d this leaves a single answer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import truth
from products import linear_scales

import hybrid_mxfp8 as mx
from hybrid_mxfp8.core.activation import PLAIN_SWIGLU
from hybrid_mxfp8.core.formats import scale_cols


def relative_error(exponent: truth.Doubles) -> truth.Doubles:
    """Exponentials are 2**(g * log2 e): rounding the product costs |g| * 2**-24, and five more
    operations 2 ulp each.

    g is the gate times alpha, whose rounding and the product's cost another |g| * 2**-24; beta is
    one more operation.
    """
    error: truth.Doubles = (np.abs(exponent) * 2.5 + 24) * 2.0**-24
    return error


def check(
    got: mx.GroupedMXFP8,
    x: torch.Tensor,
    counts: Sequence[int],
    rounding: str,
    ambiguous: float = 0.02,
    activation: mx.SwiGLU = PLAIN_SWIGLU,
) -> None:
    """Check finite rows of x (T, 2K), sorted by expert as ``counts`` says, against ``got``.

    Nearly every block and element has one answer only: more than the share ``ambiguous`` of them
    with two would say little. A single block of a tiny operand may well have two.
    """
    gate, up = np.split(truth.doubles(x), 2, axis=1)
    if activation.limit is not None:
        gate, up = np.minimum(gate, activation.limit), np.clip(up, -activation.limit, activation.limit)
    exponent = activation.alpha * gate
    true = gate / (1 + np.exp(-np.clip(exponent, -700, 700))) * (up + activation.beta)
    # Where exp(-exponent) leaves fp32's range the product is flushed to zero: it is below 2**-118
    # times up.
    flushed = np.abs(true) + 2.0**-118 * (np.abs(up) + abs(activation.beta))
    slack = np.abs(true) * relative_error(exponent) + np.where(exponent < -86, flushed, 0)
    blocks, slack = (a.reshape(a.shape[0], -1, 32) for a in (true, slack))
    magnitude = np.abs(blocks)
    lowest, highest = (
        truth.scale_bytes(truth.largest_of_group(bound.max(axis=2), got.scale_group), rounding)
        for bound in (np.maximum(magnitude - slack, 0), magnitude + slack)
    )

    scales = linear_scales(got, counts)[: lowest.shape[0]]
    assert got.scales.shape[1] == scale_cols(gate.shape[1])
    assert bool(((scales >= lowest) & (scales <= highest)).all())
    assert (lowest != highest).mean() <= ambiguous

    inverse = 2.0 ** (127.0 - scales[:, :, None])
    codes = truth.decode_e4m3(truth.as_bytes(got.values)).reshape(blocks.shape)
    low = truth.decode_e4m3(truth.encode_e4m3((blocks - slack) * inverse))
    high = truth.decode_e4m3(truth.encode_e4m3((blocks + slack) * inverse))
    assert bool(((codes >= low) & (codes <= high)).all())
    assert (low != high).mean() <= ambiguous
