"""Every 16-bit code and millions of fp32 patterns, as amax and below one, bit for bit."""

from __future__ import annotations

from collections.abc import Callable

import bit_patterns
import cases
import numpy as np
import pytest
import torch
import truth

import hybrid_mxfp8 as mx
from hybrid_mxfp8 import reference


def seeded(make: Callable[[torch.Generator], torch.Tensor]) -> Callable[[], torch.Tensor]:
    return lambda: make(torch.Generator().manual_seed(65536))


PATTERNS: dict[str, Callable[[], torch.Tensor]] = {
    "bf16 codes": lambda: cases.every_code(torch.bfloat16),
    "fp16 codes": lambda: cases.every_code(torch.float16),
    "bf16 amax": lambda: cases.every_amax(torch.bfloat16),
    "fp16 amax": lambda: cases.every_amax(torch.float16),
    "bf16 below an amax": lambda: bit_patterns.every_code_below_an_amax(torch.bfloat16),
    "fp16 below an amax": lambda: bit_patterns.every_code_below_an_amax(torch.float16),
    "fp32 mantissas": cases.fp32_edges,
    "fp32 edges": seeded(bit_patterns.fp32_edges),
    "fp32 random": seeded(bit_patterns.fp32_random),
    "fp32 raw bits": seeded(bit_patterns.fp32_raw),
}
if cases.device() == "cuda":
    PATTERNS["fp32 8 million"] = seeded(lambda rng: bit_patterns.fp32_random(rng, blocks=2**18))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_kernel_reference_and_definition(kernels_run: None, device: str, pattern: str) -> None:
    """On a GPU kernel and reference there against the reference here, which is the definition."""
    x = PATTERNS[pattern]()
    there = x.to(device)
    groups = cases.layout([x.shape[0]], device=device)
    for rounding, group in (*((r, 32) for r in truth.ROUNDINGS), ("rceil", 128)):
        codes, linear = reference.quantize(x, rounding, group)
        if device == "cpu":
            expected_codes, expected_scales = truth.quantize(truth.doubles(x), rounding, group)
            assert np.array_equal(truth.as_bytes(linear), expected_scales)
            assert np.array_equal(truth.as_bytes(codes), expected_codes)
        else:
            codes_there, linear_there = reference.quantize(there, rounding, group)
            assert torch.equal(cases.bits(codes_there).cpu(), cases.bits(codes))
            assert torch.equal(linear_there.cpu(), linear)
        out = cases.poisoned_output(groups, 1024)
        options = {"scale_rounding": rounding, "scale_group": group}
        got = mx.quantize_grouped(there, groups, **options, out=out, backend="triton")
        assert torch.equal(cases.bits(got.values).cpu(), cases.bits(codes))
        assert torch.equal(got.scales.cpu(), mx.swizzle_scales(linear))


def test_patterns_are_what_they_are_said_to_be() -> None:
    """Every exponent of fp32; every finite 16-bit code, of both signs, at every distance."""
    fp32 = [PATTERNS[f"fp32 {name}"]() for name in ("edges", "random", "raw bits")]
    assert bit_patterns.distinct(*fp32) > 10**6
    assert ((fp32[0].view(torch.int32) >> 23) & 0xFF).unique().tolist() == list(range(255))
    for dtype, largest in ((torch.bfloat16, 0x7F7F), (torch.float16, 0x7BFF)):
        x = bit_patterns.every_code_below_an_amax(dtype)
        assert bit_patterns.distinct(x) == 2 * (largest + 1)
        elements = x.double().abs().reshape(-1, 32)
        ratios = torch.log2(elements.amax(1, keepdim=True) / elements)
        assert ratios[torch.isfinite(ratios) & (ratios > 0)].ceil().unique().numel() > bit_patterns.DISTANCES
