"""MXFP8 from its definition, in numpy float64, sharing no code with the library.

Every bf16, fp16 and fp32 value, every e4m3 value and every power of two used here is exact in
float64. Elements are encoded by search for the nearest of all e4m3 values, scales by search for the
exponent that the definition asks for, swizzled bytes by walking the storage in its own order.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Bytes = npt.NDArray[np.uint8]
Doubles = npt.NDArray[np.float64]


def _e4m3_magnitude(code: int) -> float:
    exponent, mantissa = divmod(code, 8)
    return mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)


E4M3 = np.array([_e4m3_magnitude(code) for code in range(127)] + [np.nan])
"""The magnitude of each code 0 .. 127; 126 is 448, 127 is NaN."""

_EVEN_FIRST = np.concatenate([np.arange(0, 127, 2), np.arange(1, 127, 2)]).astype(np.uint8)
ROUNDINGS = ("rceil", "floor", "even")


def decode_e4m3(codes: Bytes) -> Doubles:
    """Bytes to their values."""
    return np.where(codes & 0x80, -1.0, 1.0) * E4M3[codes & 0x7F]


def encode_e4m3(x: Doubles) -> Bytes:
    """The nearest e4m3 value, the even code of two, 448 beyond the range, 0x7F for NaN."""
    distinct, where = np.unique(np.abs(np.where(np.isnan(x), 0, x)), return_inverse=True)
    # argmin takes the first of equals, and even codes come first.
    codes = np.concatenate(
        [
            _EVEN_FIRST[np.abs(np.minimum(part, 448.0)[:, None] - E4M3[_EVEN_FIRST]).argmin(axis=1)]
            for part in np.array_split(distinct, 1 + distinct.size // 65536)
        ]
    )[where.reshape(x.shape)]
    codes = codes | (np.signbit(x).astype(np.uint8) << 7)
    return np.where(np.isnan(x), np.uint8(0x7F), codes)


def _floor_log2(a: Doubles) -> npt.NDArray[np.int64]:
    return np.frexp(a)[1].astype(np.int64) - 1


def scale_bytes(amax: Doubles, rounding: str) -> Bytes:
    """The E8M0 byte of blocks with this finite amax."""
    positive = np.where(amax > 0, amax, 1.0)
    if rounding == "rceil":
        b = np.zeros(amax.shape, np.int64)
        # The smallest b >= 0 with amax <= 448 * 2**(b - 127), by trying all.
        for candidate in range(254):
            b += positive > 448.0 * 2.0 ** (candidate - 127)
    elif rounding == "floor":
        b = _floor_log2(positive) - 8 + 127
    else:
        # amax rounded half up to 3 mantissa bits.
        unit = 2.0 ** (_floor_log2(positive) - 3).astype(np.float64)
        b = _floor_log2(np.floor(positive / unit + 0.5) * unit) - 8 + 127
    return np.where(amax > 0, np.maximum(b, 0), 0).astype(np.uint8)


def largest_of_group(of_blocks: npt.NDArray[Any], group: int) -> npt.NDArray[Any]:
    """For each block of (R, K/32) the largest of its stretch of ``group`` columns."""
    parts = np.split(of_blocks, range(group // 32, of_blocks.shape[1], group // 32), axis=1)
    return np.concatenate([np.broadcast_to(p.max(axis=1, keepdims=True), p.shape) for p in parts], axis=1)


def quantize(x: Doubles, rounding: str = "rceil", group: int = 32) -> tuple[Bytes, Bytes]:
    """x (R, K) to codes (R, K) and row-major scales (R, K/32), one a ``group`` of elements."""
    blocks = x.reshape(x.shape[0], x.shape[1] // 32, 32)
    finite = ~largest_of_group(~np.isfinite(blocks).all(axis=2), group)
    blocks = np.where(finite[:, :, None], blocks, 0)
    scales = scale_bytes(largest_of_group(np.abs(blocks).max(axis=2, initial=0), group), rounding)
    codes = encode_e4m3(blocks * 2.0 ** (127.0 - scales[:, :, None]))
    codes = np.where(finite[:, :, None], codes, np.uint8(0x7F))
    return codes.reshape(x.shape), np.where(finite, scales, np.uint8(255))


def scale_factors(scales: Bytes) -> Doubles:
    """E8M0 bytes to their values."""
    return np.where(scales == 255, np.nan, 2.0 ** (scales.astype(np.float64) - 127))


def dequantize(codes: Bytes, scales: Bytes) -> Doubles:
    """codes (..., K) times row-major scales (..., K/32)."""
    return decode_e4m3(codes) * np.repeat(scale_factors(scales), 32, axis=-1)


def padded(rows: int, multiple: int) -> int:
    """rows rounded up."""
    while rows % multiple:
        rows += 1
    return rows


def swizzle(linear: Bytes) -> Bytes:
    """Row-major (R, B) scales of one operand to its stored bytes, padding zero.

    The storage in its own order: tiles along rows, tiles along columns, 32 lanes, 4 quarters of 32
    rows, 4 columns.
    """
    rows, cols = padded(linear.shape[0], 128), padded(linear.shape[1], 4)
    full = np.zeros((rows, cols), np.uint8)
    full[: linear.shape[0], : linear.shape[1]] = linear
    stored = [
        full[128 * row_tile + lane :: 32][:4, 4 * col_tile : 4 * col_tile + 4].reshape(-1)
        for row_tile in range(rows // 128)
        for col_tile in range(cols // 4)
        for lane in range(32)
    ]
    return np.concatenate(stored) if stored else np.zeros(0, np.uint8)


def layout(counts: Sequence[int], num_tokens: int) -> tuple[list[int], list[int], list[int]]:
    """Tokens, expert offsets and scale offsets: what a valid layout is for any counts."""
    tokens, offsets, scale_offsets = [], [0], [0]
    for count in counts:
        tokens.append(min(max(count, 0), num_tokens - offsets[-1]))
        offsets.append(offsets[-1] + tokens[-1])
        scale_offsets.append(scale_offsets[-1] + padded(tokens[-1], 128))
    return tokens, offsets, scale_offsets


def layout_from_ends(ends: Sequence[int], num_tokens: int) -> tuple[list[int], list[int], list[int]]:
    """The same of inclusive ends."""
    counts, start = [], 0
    for end in ends:
        counts.append(max(end - start, 0))
        start = max(start, end)
    return layout(counts, num_tokens)


def grouped_bytes(
    codes: Bytes, scales: Bytes, counts: Sequence[int], scale_rows: int, poison: int
) -> tuple[Bytes, Bytes]:
    """What buffers that held ``poison`` hold after quantization: values (T, K), scales (S * C,).

    ``codes`` (T, K) and row-major ``scales`` (T, K/32) are of all rows; ``counts`` are the rows of
    each expert, those beyond are not written; ``scale_rows`` is S.
    """
    ends = list(itertools.accumulate(counts, initial=0))
    values = np.full_like(codes, poison)
    values[: ends[-1]] = codes[: ends[-1]]
    stored = [swizzle(scales[start:end]) for start, end in itertools.pairwise(ends)]
    flat = np.concatenate([*stored, np.zeros(0, np.uint8)])
    slack = np.full(scale_rows * padded(scales.shape[1], 4) - flat.size, poison, np.uint8)
    return values, np.concatenate([flat, slack])


def doubles(x: torch.Tensor) -> Doubles:
    """A tensor of any float dtype and device in float64."""
    out: Doubles = x.detach().cpu().double().numpy()
    return out


def as_bytes(x: torch.Tensor) -> Bytes:
    """The bytes of a tensor of a one-byte dtype, on the CPU."""
    out: Bytes = x.detach().contiguous().view(torch.uint8).cpu().numpy()
    return out
