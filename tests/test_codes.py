"""Every 16-bit code and millions of fp32 patterns, as a block's amax and below one: definition, reference and kernel alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import bit_patterns
import cases
import numpy as np
import pytest
import torch
import truth

import hybrid_mxfp8 as mx
from hybrid_mxfp8 import reference

Patterns = Callable[[], torch.Tensor]


def seeded(make: Callable[[torch.Generator], torch.Tensor]) -> Patterns:
    return lambda: make(torch.Generator().manual_seed(65536))


PATTERNS: dict[str, Patterns] = {
    "bf16 codes": lambda: cases.every_code(torch.bfloat16),
    "fp16 codes": lambda: cases.every_code(torch.float16),
    "bf16 below an amax": lambda: bit_patterns.every_code_below_an_amax(torch.bfloat16),
    "fp16 below an amax": lambda: bit_patterns.every_code_below_an_amax(torch.float16),
    "fp32 edges": seeded(bit_patterns.fp32_edges),
    "fp32 random": seeded(bit_patterns.fp32_random),
    "fp32 raw bits": seeded(bit_patterns.fp32_raw),
}
"""Each code as the amax is ``cases.every_amax``, in test_quantize.py and test_reference.py."""


@pytest.mark.parametrize("pattern", PATTERNS)
def test_reference_is_the_definition_and_the_kernel_is_the_reference(
    interpreter: None, pattern: str, tally: Any
) -> None:
    x = PATTERNS[pattern]()
    groups = cases.layout([x.shape[0]])
    exact, patterns = truth.doubles(x), bit_patterns.distinct(x)
    for rounding in truth.ROUNDINGS:
        codes, linear = reference.quantize(x, rounding)
        expected_codes, expected_scales = truth.quantize(exact, rounding)
        assert np.array_equal(truth.as_bytes(linear), expected_scales)
        assert np.array_equal(truth.as_bytes(codes), expected_codes)
        out = cases.poisoned_output(groups, 1024)
        got = mx.quantize_grouped(x, groups, scale_rounding=rounding, out=out, backend="triton")
        assert torch.equal(got.values.view(torch.uint8), codes.view(torch.uint8))
        assert torch.equal(got.scales, mx.swizzle_scales(linear))
        tally("codes", patterns)


def test_patterns_are_what_they_are_said_to_be() -> None:
    """More than 10^6 fp32 patterns; every exponent; every finite 16-bit code at every distance below an amax, and both signs."""
    fp32 = [PATTERNS[name]() for name in PATTERNS if name.startswith("fp32")]
    assert bit_patterns.distinct(*fp32) > 10**6
    assert ((fp32[0].view(torch.int32) >> 23) & 0xFF).unique().tolist() == list(range(255))
    for dtype, largest in ((torch.bfloat16, 0x7F7F), (torch.float16, 0x7BFF)):
        x = bit_patterns.every_code_below_an_amax(dtype)
        assert bit_patterns.distinct(x) == 2 * (largest + 1)
        amax = x.double().abs().reshape(-1, 32).amax(1, keepdim=True)
        elements = x.double().abs().reshape(-1, 32)
        ratios = torch.log2(amax / elements)[(elements > 0) & (elements < amax)]
        assert ratios.ceil().unique().numel() > bit_patterns.DISTANCES
    below = fp32[0].abs().reshape(-1, 32)
    assert bool((below.amax(1) > 0).float().mean() > 0.99)
