"""The number formats: what bytes of e4m3 and e8m0 mean, and how fp32 rounds to bf16 and e4m3."""

from __future__ import annotations

import numpy as np


def _e4m3(code: int) -> float:
    exponent, fraction = code >> 3 & 15, code & 7
    if code & 127 == 127:
        return float("nan")
    magnitude = (1 + fraction / 8) * 2.0 ** (exponent - 7) if exponent else fraction / 8 * 2.0**-6
    return -magnitude if code >> 7 else magnitude


E4M3 = np.array([_e4m3(code) for code in range(256)])
"""Values of e4m3 by code, in double."""

E8M0 = np.array([2.0 ** (code - 127) for code in range(255)] + [np.nan])
"""Values of e8m0 by code, in double."""

_E4M3_POSITIVE = E4M3[:127]


def bf16_bits(value: np.ndarray) -> np.ndarray:
    """fp32 to bf16, to nearest even, as uint16; NaN is 0x7FFF."""
    raw = value.view(np.uint32).astype(np.uint64)
    rounded = (raw + 0x7FFF + (raw >> np.uint64(16) & np.uint64(1))) >> np.uint64(16)
    return np.where(np.isnan(value), np.uint64(0x7FFF), rounded).astype(np.uint16)


def e4m3_bits(value: np.ndarray) -> np.ndarray:
    """fp32 to e4m3, to nearest even, saturating to 448, as uint8; NaN is 0x7F."""
    magnitude = np.minimum(np.abs(value.astype(np.float64)), 448.0)
    above = np.searchsorted(_E4M3_POSITIVE, np.nan_to_num(magnitude)).clip(1, 126)
    low, high = _E4M3_POSITIVE[above - 1], _E4M3_POSITIVE[above]
    middle = (low + high) / 2
    up = (magnitude > middle) | ((magnitude == middle) & (above % 2 == 0))
    code = np.where(up, above, above - 1)
    code = np.where(np.isnan(value), 127, code)
    return (code | np.where(np.signbit(value) & ~np.isnan(value), 128, 0)).astype(np.uint8)
