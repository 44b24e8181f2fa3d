"""The device functions of numerics.py, interpreted, against torch's conversions."""

from __future__ import annotations

from typing import Any

import cases
import pytest
import torch
import triton
import triton.language as tl
import truth

from hybrid_mxfp8.core.scales import scale_values
from hybrid_mxfp8.triton_kernels.numerics import (
    e4m3_codes_to_fp32,
    e8m0_to_bf16,
    e8m0_to_fp32,
    from_fp32,
    to_e4m3_codes,
    to_fp32,
)

pytestmark = pytest.mark.usefixtures("interpreter")

BLOCK = 2**18


@triton.jit
def _apply(x_ptr, out_ptr, total, FUNCTION: tl.constexpr, TYPED: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < total)
    out = FUNCTION(x, out_ptr.dtype.element_ty) if TYPED else FUNCTION(x)
    tl.store(out_ptr + i, out, mask=i < total)


def apply(function: Any, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    out = torch.empty(x.shape, dtype=dtype)
    _apply[(triton.cdiv(x.numel(), BLOCK),)](x, out, x.numel(), function, function is from_fp32, BLOCK)
    return out


def dense_fp32() -> torch.Tensor:
    """Fp32 patterns of both signs: every 2,047th of all, and all within 4 of every e4m3 value and
    midpoint, bf16 and fp16 rounding boundary near the ends of their ranges."""
    spread = torch.arange(0, 2**31, 2047, dtype=torch.int64)
    magnitudes = torch.from_numpy(truth.E4M3[:127]).float()
    midpoints = (magnitudes[1:] + magnitudes[:-1]) / 2
    ends = torch.tensor([464.0, 480.0, 512.0, 65504.0, 65519.0, 65520.0, 3.3895e38, 3.4028e38, 2.0**-126, 2.0**-133])
    heads = torch.cat([magnitudes, midpoints, ends]).view(torch.int32).long()
    near = (heads[:, None] + torch.arange(-4, 5)).reshape(-1)
    special = torch.tensor([0x7F800000, 0x7F800001, 0x7FC00000, 0x7FFFFFFF])
    magnitude_bits = torch.cat([spread, near[near >= 0], special])
    bits = torch.cat([magnitude_bits, magnitude_bits - 2**31])
    return bits.to(torch.int32).view(torch.float32)


def test_e4m3_conversion() -> None:
    """Equal to torch's after a clamp, and to the nearest of all e4m3 values."""
    x = dense_fp32()
    assert x.numel() > 2_000_000
    got = apply(to_e4m3_codes, x, torch.uint8)
    nan = torch.isnan(x)
    expected = x.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    assert torch.equal(got[~nan], expected[~nan])
    assert bool(((got[nan] & 0x7F) == 0x7F).all())
    near = x.abs() < 600
    assert torch.equal(got[near], torch.from_numpy(truth.encode_e4m3(truth.doubles(x[near]))))


@pytest.mark.parametrize(("function", "dtype"), [(e8m0_to_fp32, torch.float32), (e8m0_to_bf16, torch.bfloat16)])
def test_e8m0_decoding(function: Any, dtype: torch.dtype) -> None:
    scales = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    got = apply(function, scales, dtype)
    assert torch.isnan(got[255])
    assert got[:255].double().tolist() == [2.0 ** (b - 127) for b in range(255)]
    assert torch.equal(got[:255].float(), scale_values(scales)[:255])


def check(got: torch.Tensor, expected: torch.Tensor) -> None:
    """NaN where torch has it, all other bits its own, signs of zero too."""
    nan = torch.isnan(expected)
    assert torch.equal(torch.isnan(got), nan)
    assert torch.equal(cases.bits(got[~nan]), cases.bits(expected[~nan]))


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_output_rounding_equals_torch(dtype: torch.dtype) -> None:
    x = dense_fp32()
    check(apply(from_fp32, x, dtype), x.to(dtype))


def test_widening_is_exact_for_every_code() -> None:
    for dtype in cases.HALF_DTYPES:
        codes = cases.every_code(dtype)
        check(apply(to_fp32, codes, torch.float32), codes.float())
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    check(apply(e4m3_codes_to_fp32, codes, torch.float32), codes.view(torch.float8_e4m3fn).float())
