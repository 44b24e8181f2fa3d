"""More than 2^31 elements on every side of a product, and layers of a million tokens.

Where an operand is too large for a truth in float64, it repeats: rows of a pattern whose length is
a multiple of every tile, so that the product must repeat too, byte for byte, and one period is
checked.
"""

from __future__ import annotations

import cases
import pytest
import torch
from products import check

import hybrid_mxfp8 as mx
from hybrid_mxfp8 import reference

pytestmark = pytest.mark.gpu

GPU = "cuda"
FAR = 2**31
PERIOD = 2048
"""Rows: whole scale tiles, and whole token tiles of every kernel."""


def random_codes(*shape: int) -> torch.Tensor:
    """Finite e4m3 of both signs."""
    codes = torch.randint(0, 0x7E, shape, dtype=torch.uint8, device=GPU)
    return (codes | (torch.randint(0, 2, shape, dtype=torch.uint8, device=GPU) << 7)).view(torch.float8_e4m3fn)


def random_scales(*shape: int) -> torch.Tensor:
    return torch.randint(118, 123, shape, dtype=torch.uint8, device=GPU)


def weights(e: int, n: int, k: int) -> mx.ExpertWeights:
    return mx.ExpertWeights.from_linear_scales(random_codes(e, n, k), random_scales(e, n, k // 32))


def repeated(num_tokens: int, k: int) -> tuple[mx.GroupedMXFP8, mx.GroupedMXFP8]:
    """num_tokens rows of one expert, which repeat after PERIOD, and one period alone."""
    codes, scales = random_codes(PERIOD, k), mx.swizzle_scales(random_scales(PERIOD, k // 32))
    times = num_tokens // PERIOD
    assert times * PERIOD == num_tokens
    many = mx.GroupedMXFP8(
        codes.view(torch.uint8).repeat(times, 1).view(torch.float8_e4m3fn),
        scales.repeat(times, 1),
        cases.layout([num_tokens], device=GPU),
    )
    return many, mx.GroupedMXFP8(codes, scales, cases.layout([PERIOD], device=GPU))


def check_repeats(y: torch.Tensor, period: torch.Tensor, rows: int = PERIOD) -> None:
    for start in range(0, y.shape[0], rows):
        assert torch.equal(y[start : start + rows], period), f"rows from {start}"


@pytest.mark.parametrize("gigabytes", [24], indirect=True)
@pytest.mark.parametrize(("n", "k"), [(136, 7168), (8200, 96)], ids=["T*K", "T*N"])
def test_products_beyond_2_31_elements(gigabytes: None, kernel: str, n: int, k: int) -> None:
    """Of T*K twice as many bytes where tokens are expanded to bf16."""
    xq, one = repeated((FAR // max(n, k) // PERIOD + 1) * PERIOD, k)
    wq = weights(1, n, k)
    y = mx.grouped_gemm(xq, wq, backend="triton")
    assert max(xq.values.numel(), y.numel()) > FAR
    check_repeats(y, check(one, wq, [PERIOD], torch.bfloat16, "triton"))


def layer_weights(rng: torch.Generator, experts: int, hidden: int, intermediate: int) -> list[mx.ExpertWeights]:
    shapes = ((experts, 2 * intermediate, hidden), (experts, hidden, intermediate))
    return [mx.quantize_weights((torch.randn(s, generator=rng) * s[2] ** -0.5).to(GPU)) for s in shapes]


@pytest.mark.parametrize("gigabytes", [30], indirect=True)
def test_a_layer_beyond_2_31_elements(gigabytes: None, kernel: str, rng: torch.Generator) -> None:
    """A million rows of 2048 columns before and after the products: tokens repeat, so what comes
    out must."""
    experts, hidden, intermediate, top_k, period = 4, 2048, 64, 2, 4096
    tokens = 2**19 + period
    x = cases.random_rows(period, hidden, torch.bfloat16, rng, GPU)
    ids = torch.randint(0, experts, (period, top_k), generator=rng).to(GPU)
    ids[:, 1] = (ids[:, 0] + 1) % experts
    scores = torch.rand(period, top_k, generator=rng).to(GPU)
    w = layer_weights(rng, experts, hidden, intermediate)
    expected = mx.moe_forward(x, *w, ids, scores, backend="triton")
    judged = mx.moe_forward(x, *w, ids, scores, backend="reference")
    assert mx.signal_to_noise_db(judged, expected) > 35.0
    times = tokens // period
    assert tokens * top_k * hidden > FAR
    y = mx.moe_forward(x.repeat(times, 1), *w, ids.repeat(times, 1), scores.repeat(times, 1), backend="triton")
    check_repeats(y, expected, period)


def test_a_layer_of_a_million_tokens(kernel: str, rng: torch.Generator) -> None:
    experts, tokens = 64, 1_000_000
    x = cases.random_rows(tokens, 64, torch.bfloat16, rng, GPU)
    ids = torch.randint(-1, experts + 1, (tokens, 2), generator=rng).to(GPU)
    scores = torch.rand(tokens, 2, generator=rng).to(GPU)
    w = layer_weights(rng, experts, 64, 32)
    y, expected = (mx.moe_forward(x, *w, ids, scores, backend=backend) for backend in ("triton", "reference"))
    assert mx.signal_to_noise_db(expected, y) > 35.0


@pytest.mark.parametrize("gigabytes", [30], indirect=True)
def test_quantized_beyond_2_31_elements(gigabytes: None, rng: torch.Generator) -> None:
    """Offsets beyond int32 in x, values and weights, checked in every row."""
    k, pattern = 7168, 1024
    base = cases.random_rows(pattern, k, torch.bfloat16, rng, GPU)
    times = FAR // k // pattern + 2
    x = base.repeat(times, 1)
    assert x.numel() > FAR
    got = mx.quantize_grouped(x, cases.layout([times * pattern], device=GPU), backend="triton")
    codes, scales = reference.quantize(base)
    check_repeats(cases.bits(got.values), cases.bits(codes), pattern)
    check_repeats(got.scales, mx.swizzle_scales(scales), pattern)
    wq = mx.quantize_weights(x.view(times, pattern, k), backend="triton")
    for expert in range(times):
        assert torch.equal(cases.bits(wq.values[expert]), cases.bits(codes))
        assert torch.equal(wq.scales[expert], mx.swizzle_scales(scales))
