"""The reference quantizer by hand: what each rounding makes of a block, and what it keeps.

Against the definition it is held, by all codes, in ops/test_codes.py.
"""

from __future__ import annotations

import pytest
import torch
import truth

from hybrid_mxfp8 import reference
from hybrid_mxfp8.core.scales import dequantize


def one_block(*elements: float, rounding: str = "rceil") -> tuple[list[int], int]:
    """Codes of the first elements of a block of these and zeros, and its scale byte."""
    x = torch.zeros(1, 32)
    x[0, : len(elements)] = torch.tensor(elements)
    values, scales = reference.quantize(x, rounding)
    return values.view(torch.uint8)[0, : len(elements)].tolist(), int(scales[0, 0])


def test_blocks_by_hand() -> None:
    assert one_block(448.0) == ([0x7E], 127)
    assert one_block(448.00003) == ([0x76], 128)  # 224: the next float does not fit scale 1
    assert one_block(0.0, -0.0) == ([0x00, 0x80], 0)
    assert one_block(2.0**-149) == ([0], 0)  # the smallest fp32 rounds to zero, not to 448 or NaN
    assert one_block(448 * 2.0**-127) == ([0x7E], 0)
    assert one_block(2.0**-136) == ([0x01], 0)
    # Block max 500: floor keeps scale 1 and clips to 448; rceil and even take 2, and 256 for 250.
    by_rounding = {rounding: one_block(500.0, rounding=rounding) for rounding in truth.ROUNDINGS}
    assert by_rounding == {"rceil": ([0x78], 128), "floor": ([0x7E], 127), "even": ([0x78], 128)}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_spoils_its_block_alone(bad: float) -> None:
    x = torch.ones(2, 64)
    x[0, 3] = bad
    values, scales = reference.quantize(x)
    assert scales.tolist() == [[255, 119], [119, 119]]
    assert values.view(torch.uint8)[0, :32].tolist() == [0x7F] * 32
    assert dequantize(values, scales).isnan().sum() == 32


def test_scale_bytes_dequantize_exactly() -> None:
    """All 256 by all codes, in float64; in float32 all but what reaches 2**128."""
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).repeat(256, 1)
    scales = torch.arange(256, dtype=torch.int32).to(torch.uint8)[:, None].expand(256, 8)
    values = codes.view(torch.float8_e4m3fn)
    exact = torch.from_numpy(truth.dequantize(codes.numpy(), scales.numpy()))
    torch.testing.assert_close(dequantize(values, scales, torch.float64), exact, rtol=0, atol=0, equal_nan=True)
    single = dequantize(values, scales)
    torch.testing.assert_close(single, exact.float(), rtol=0, atol=0, equal_nan=True)
    held = ~exact.isnan() & (exact.abs() < 2.0**128)
    assert torch.equal(single[held].double(), exact[held])
