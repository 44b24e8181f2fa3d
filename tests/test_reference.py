"""The reference against MXFP8's definition, in float64 and by search."""

from __future__ import annotations

import cases
import numpy as np
import pytest
import torch
import truth

import hybrid_mxfp8 as mx
from hybrid_mxfp8 import reference

PATTERNS = {
    "bf16 codes": lambda: cases.every_code(torch.bfloat16),
    "fp16 codes": lambda: cases.every_code(torch.float16),
    "bf16 amax": lambda: cases.every_amax(torch.bfloat16),
    "fp16 amax": lambda: cases.every_amax(torch.float16),
    "fp32 edges": cases.fp32_edges,
    "special bf16": lambda: cases.special_rows(torch.bfloat16),
    "special fp16": lambda: cases.special_rows(torch.float16),
    "special fp32": lambda: cases.special_rows(torch.float32),
}


@pytest.mark.parametrize("rounding", truth.ROUNDINGS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_quantize_equals_the_definition(pattern: str, rounding: str) -> None:
    x = PATTERNS[pattern]()
    values, scales = reference.quantize(x, rounding)
    expected_codes, expected_scales = truth.quantize(truth.doubles(x), rounding)
    assert np.array_equal(truth.as_bytes(scales), expected_scales)
    assert np.array_equal(truth.as_bytes(values), expected_codes)


def one_block(*elements: float) -> tuple[list[int], int]:
    """Codes of the first elements of a block of these and zeros, and its scale byte."""
    x = torch.zeros(1, 32)
    x[0, : len(elements)] = torch.tensor(elements)
    values, scales = reference.quantize(x)
    return values.view(torch.uint8)[0, : len(elements)].tolist(), int(scales[0, 0])


def test_448_fits_scale_one_and_the_next_float_does_not() -> None:
    assert one_block(448.0) == ([0x7E], 127)
    assert one_block(448.00003) == ([0x76], 128)  # 224


def test_block_max_500_by_rounding() -> None:
    """500: floor keeps scale 1 and clips to 448; rceil and even take 2."""
    x = torch.zeros(1, 32)
    x[0, 0] = 500.0
    results = {r: reference.quantize(x, r) for r in truth.ROUNDINGS}
    assert {r: int(s[0, 0]) for r, (_, s) in results.items()} == {"rceil": 128, "floor": 127, "even": 128}
    assert float(results["floor"][0][0, 0]) == 448.0
    assert float(results["rceil"][0][0, 0]) == 256.0  # 250, nearer to 256 than to 240


def test_zero_block_keeps_signs() -> None:
    assert one_block(0.0, -0.0) == ([0x00, 0x80], 0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_spoils_its_block_alone(bad: float) -> None:
    x = torch.ones(2, 64)
    x[0, 3] = bad
    values, scales = reference.quantize(x)
    assert scales.tolist()[0][0] == 255
    assert values.view(torch.uint8)[0, :32].tolist() == [0x7F] * 32
    assert bool(torch.isfinite(reference.dequantize(values, scales))[0, 32:].all())
    assert bool(torch.isfinite(reference.dequantize(values, scales))[1].all())


def test_tiny_blocks_stay_finite() -> None:
    """The smallest positive fp32: scale 0, and an element that rounds to zero, not 448 or NaN."""
    assert one_block(2.0**-149) == ([0], 0)
    assert one_block(448 * 2.0**-127) == ([0x7E], 0)
    assert one_block(2.0**-136) == ([0x01], 0)


def test_dequantize_inverts_exact_values() -> None:
    x = torch.from_numpy(truth.decode_e4m3(np.arange(0, 127, dtype=np.uint8))).float()
    x = torch.nn.functional.pad(x, (0, 1)).reshape(4, 32) * 2.0**5
    values, scales = reference.quantize(x)
    assert torch.equal(reference.dequantize(values, scales)[3], x[3])  # the block that has 448


@pytest.mark.parametrize("rounding", truth.ROUNDINGS)
def test_grouped_operand_has_the_defined_bytes(rounding: str, rng: torch.Generator) -> None:
    counts, num_tokens = cases.RAGGED["empty experts"]
    x = cases.random_rows(num_tokens, 160, torch.bfloat16, rng)
    groups = cases.layout(counts, num_tokens)
    out = cases.poisoned_output(groups, 160)
    mx.quantize_grouped(x, groups, scale_rounding=rounding, out=out, backend="reference")
    codes, scales = truth.quantize(truth.doubles(x), rounding)
    values, stored = truth.grouped_bytes(codes, scales, counts, groups.scale_rows, cases.POISON)
    assert np.array_equal(truth.as_bytes(out.values), values)
    assert np.array_equal(truth.as_bytes(out.scales).reshape(-1), stored)


def test_operands_dequantize_to_fp32(rng: torch.Generator) -> None:
    xq = mx.quantize_grouped(torch.randn(7, 96, generator=rng), cases.layout([3, 0, 4]), backend="reference")
    wq = mx.quantize_weights(torch.randn(3, 40, 96, generator=rng), backend="reference")
    assert xq.dequantize().dtype == wq.dequantize().dtype == torch.float32


def test_grouped_dequantize_is_the_dequantized_rows_and_zero_beyond(rng: torch.Generator) -> None:
    counts, num_tokens = cases.RAGGED["rows beyond the groups"]
    x = cases.random_rows(num_tokens, 96, torch.float32, rng)
    groups = cases.layout(counts, num_tokens)
    out = cases.poisoned_output(groups, 96)
    got = mx.quantize_grouped(x, groups, out=out, backend="reference").dequantize()
    expected = truth.dequantize(*truth.quantize(truth.doubles(x)))
    expected[sum(counts) :] = 0
    assert np.array_equal(truth.doubles(got), expected)


def test_expert_weights_dequantize_and_linear_scales(rng: torch.Generator) -> None:
    w = cases.random_rows(3 * 40, 96, torch.bfloat16, rng).reshape(3, 40, 96)
    wq = mx.quantize_weights(w, backend="reference")
    codes, scales = truth.quantize(truth.doubles(w.reshape(120, 96)))
    assert np.array_equal(truth.as_bytes(wq.linear_scales()).reshape(120, 3), scales)
    assert np.array_equal(truth.doubles(wq.dequantize()).reshape(120, 96), truth.dequantize(codes, scales))
    again = mx.ExpertWeights.from_linear_scales(wq.values, wq.linear_scales())
    assert torch.equal(again.scales, wq.scales)
    from_bytes = mx.ExpertWeights.from_linear_scales(
        wq.values.view(torch.uint8), wq.linear_scales().view(torch.float8_e8m0fnu)
    )
    assert torch.equal(from_bytes.scales, wq.scales)
    assert from_bytes.values.dtype == torch.float8_e4m3fn


@pytest.mark.parametrize("k", [32, 96, 128, 160])
@pytest.mark.parametrize("case", cases.RAGGED)
def test_tokens_from_linear_scales_and_back(case: str, k: int, rng: torch.Generator) -> None:
    """Of tokens that arrive quantized come the bytes that quantizing them here gives, padding included."""
    counts, num_tokens = cases.RAGGED[case]
    groups = cases.layout(counts, num_tokens)
    x = cases.random_rows(num_tokens, k, torch.float32, rng)
    codes, scales = truth.quantize(truth.doubles(x))
    values, linear = torch.from_numpy(codes), torch.from_numpy(scales)
    xq = mx.GroupedMXFP8.from_linear_scales(values, linear, groups)
    expected = mx.quantize_grouped(x, groups, backend="reference")
    used = int(groups.scale_offsets[-1])
    assert xq.groups is groups
    assert torch.equal(xq.scales[:used], expected.scales[:used])
    assert not xq.scales[used:].any()
    assert xq.values.data_ptr() == values.data_ptr()
    assert xq.values.dtype == torch.float8_e4m3fn
    owned = sum(counts)
    assert torch.equal(xq.linear_scales()[:owned], linear[:owned])
    assert not xq.linear_scales()[owned:].any()
    assert torch.equal(xq.dequantize(), expected.dequantize())
    typed = mx.GroupedMXFP8.from_linear_scales(
        values.view(torch.float8_e4m3fn), linear.view(torch.float8_e8m0fnu), groups
    )
    assert torch.equal(typed.scales, xq.scales)


def test_operands_say_what_they_are_and_weights_move(rng: torch.Generator) -> None:
    wq = mx.quantize_weights(torch.randn(3, 40, 96, generator=rng), backend="reference")
    xq = mx.quantize_grouped(torch.randn(7, 96, generator=rng), cases.layout([3, 0, 4]), backend="reference")
    assert repr(wq) == "ExpertWeights(num_experts=3, n=40, k=96, device='cpu')"
    assert repr(xq) == "GroupedMXFP8(num_tokens=7, k=96, num_experts=3, device='cpu')"
    same, elsewhere = wq.to("cpu"), wq.to(torch.device("meta"))
    assert (same.values.data_ptr(), same.scales.data_ptr()) == (wq.values.data_ptr(), wq.scales.data_ptr())
    assert elsewhere.values.is_meta
    assert elsewhere.scales.is_meta
    assert (elsewhere.num_experts, elsewhere.n, elsewhere.k) == (3, 40, 96)


@pytest.mark.parametrize("given", [torch.bfloat16, torch.uint8, None, "nowhere"])
def test_weights_move_to_devices_alone(given: object, rng: torch.Generator) -> None:
    """Tensor.to takes a dtype as well, which would make numbers of the bytes."""
    wq = mx.quantize_weights(torch.randn(1, 8, 32, generator=rng), backend="reference")
    with pytest.raises(ValueError, match=f"^device: must be a torch.device or the name of one, got {given!r}$"):
        wq.to(given)


def test_calc_diff() -> None:
    a = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    assert mx.calc_diff(a, a) == pytest.approx(0, abs=1e-15)
    assert mx.calc_diff(a, -a) == pytest.approx(2)
    assert mx.calc_diff(torch.zeros(3), torch.zeros(3)) == 0
    assert mx.calc_diff(a, 1.01 * a) == pytest.approx(0.01**2 / (1 + 1.01**2), rel=1e-6)
    with pytest.raises(ValueError, match=r"y: must have the shape of x = \(3,\), got \(2,\)"):
        mx.calc_diff(a, a[:2])


def test_signal_to_noise() -> None:
    a = torch.tensor([3.0, 4.0])
    assert mx.signal_to_noise_db(a, a) == float("inf")
    assert mx.signal_to_noise_db(a, a * 0.9) == pytest.approx(20, rel=1e-5)
    assert mx.signal_to_noise_db(torch.zeros(2), a) == float("-inf")
    with pytest.raises(ValueError, match="approximation: must have the shape of signal"):
        mx.signal_to_noise_db(a, a[:1])


@pytest.mark.parametrize(
    ("rounding", "least"),
    [("rceil", 28.0), ("even", 28.0), ("floor", 25.0)],
)
def test_normal_data_keeps_its_signal(rounding: str, least: float, rng: torch.Generator) -> None:
    x = torch.randn(256, 1024, generator=rng)
    assert mx.signal_to_noise_db(x, reference.dequantize(*reference.quantize(x, rounding))) > least
