"""FP8 in blocks of 128x128 to MXFP8, as tensors: files are in test_convert_fp8.py, models in test_transformers.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hybrid_mxfp8 as mx
from hybrid_mxfp8 import reference
from hybrid_mxfp8.checkpoint.fp8_blocks import quantize_fp8_blocks

FP8 = torch.float8_e4m3fn


def blocks(rng: torch.Generator, e: int, n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    values = (torch.randn(e, n, k, generator=rng) * 64).to(FP8)
    return values, torch.rand(e, -(-n // 128), -(-k // 128), generator=rng) * 0.01 + 1e-4


@pytest.mark.parametrize("rounding", ["rceil", "floor", "even"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu])
@pytest.mark.parametrize("shape", [(3, 200, 288), (1, 128, 128), (2, 8, 32), (2, 257, 160)], ids=str)
def test_equals_quantizing_what_it_stands_for(
    shape: tuple[int, int, int], dtype: torch.dtype, rounding: str, rng: torch.Generator
) -> None:
    values, scales = blocks(rng, *shape)
    scales = (scales.log2().round().exp2() if dtype == torch.float8_e8m0fnu else scales).to(dtype)
    exact = torch.empty(shape)
    for e, row, col in torch.cartesian_prod(*map(torch.arange, scales.shape)).reshape(-1, 3).tolist():
        block = (e, slice(128 * row, 128 * row + 128), slice(128 * col, 128 * col + 128))
        exact[block] = values[block].float() * scales[e, row, col].float()
    wq = quantize_fp8_blocks(values, scales, scale_rounding=rounding, backend="reference")
    expected = mx.quantize_weights(exact, scale_rounding=rounding, backend="reference")
    assert torch.equal(wq.values.view(torch.uint8), expected.values.view(torch.uint8))
    assert torch.equal(wq.scales, expected.scales)


def test_in_the_interpreter(backend: str, rng: torch.Generator) -> None:
    values, scales = blocks(rng, 2, 136, 160)
    wq = quantize_fp8_blocks(values, scales, backend=backend)
    expected = quantize_fp8_blocks(values, scales, backend="reference")
    assert torch.equal(wq.values.view(torch.uint8), expected.values.view(torch.uint8))
    assert torch.equal(wq.scales, expected.scales)


def test_powers_of_two_lose_nothing(rng: torch.Generator) -> None:
    """Of every code, at every place of the exponents that a weight's scale may have."""
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(2, 128).repeat(1, 128).view(2, 128, 128)
    codes[(codes & 0x7F) == 0x7F] = 0x7E
    for exponent in (-100, -13, 0, 90):
        scales = torch.full((2, 1, 1), 2.0**exponent)
        wq = quantize_fp8_blocks(codes.view(FP8), scales, backend="reference")
        assert torch.equal(wq.dequantize(), codes.view(FP8).float() * 2.0**exponent)


def test_device_is_where_the_result_is(rng: torch.Generator) -> None:
    values, scales = blocks(rng, 2, 136, 160)
    wq = quantize_fp8_blocks(values, scales, device=torch.device("meta"))
    assert wq.values.is_meta
    assert (wq.num_experts, wq.n, wq.k) == (2, 136, 160)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"values": torch.zeros(2, 136, 160)}, TypeError, "^values: dtype must be float8_e4m3fn, got float32$"),
        ({"values": torch.zeros(136, 160).to(FP8)}, ValueError, r"^values: must have shape \(E, N, K\)"),
        ({"values": torch.zeros(2, 136, 100).to(FP8)}, ValueError, "^values: K must be a positive multiple of 32"),
        ({"scales": torch.ones(2, 2, 2, dtype=torch.uint8)}, TypeError, "^scales: dtype must be float32 or bfloat16"),
        (
            {"scales": torch.ones(2, 136, 5)},
            ValueError,
            r"^scales: must have shape \(E, ceil\(N/128\), ceil\(K/128\)\) = \(2, 2, 2\), got \(2, 136, 5\)$",
        ),
        ({"scales": torch.ones(2, 2, 2, device="meta")}, ValueError, "^scales: must be on cpu"),
        ({"scale_rounding": "up"}, ValueError, "^scale_rounding: "),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str, rng: torch.Generator) -> None:
    values, scales = blocks(rng, 2, 136, 160)
    with pytest.raises(error, match=message):
        quantize_fp8_blocks(**{"values": values, "scales": scales, "backend": "reference", **change})


def test_values_and_scales_of_parameters_are_taken(rng: torch.Generator) -> None:
    """Which require grad in transformers."""
    values, scales = blocks(rng, 1, 8, 32)
    wq = quantize_fp8_blocks(torch.nn.Parameter(values), torch.nn.Parameter(scales), backend="reference")
    assert not wq.values.requires_grad
    exact = values.float() * scales.repeat_interleave(8, 1)[:, :, :1]
    assert torch.equal(wq.linear_scales(), reference.quantize(exact)[1])
