"""NaN stays where it is, scale bytes at both ends, and equal bytes each time and in any company."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import cases
import edges
import moe_truth
import pytest
import torch
import truth

import hybrid_mxfp8 as mx
from hybrid_mxfp8 import reference
from hybrid_mxfp8.triton_kernels.gemm import portable as kernel_module

COUNTS = [3, 0, 17, 1]


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=["bf16", "fp16", "fp32"])
def test_a_bad_row_spoils_only_itself(backend: str, dtype: torch.dtype, rng: torch.Generator, tally: Any) -> None:
    tally("poisoned rows", edges.check_poisoned_rows(COUNTS, 40, 160, dtype, rng, "cpu", backend))


@pytest.mark.parametrize("n", [40, 136])
def test_a_bad_expert_spoils_only_its_rows(backend: str, n: int, rng: torch.Generator, tally: Any) -> None:
    tally("poisoned rows", edges.check_poisoned_experts(COUNTS, n, 96, torch.bfloat16, rng, "cpu", backend))


def test_bad_tokens_and_experts_of_a_layer(backend: str, rng: torch.Generator, tally: Any) -> None:
    tally("poisoned rows", edges.check_poisoned_tokens_of_a_layer(rng, 9, "cpu", backend))


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=["bf16", "fp16", "fp32"])
def test_scale_bytes_at_both_ends(backend: str, dtype: torch.dtype, rng: torch.Generator, tally: Any) -> None:
    tally("poisoned rows", edges.check_scale_bytes(dtype, rng, "cpu", backend, through_bf16=False))


@pytest.mark.parametrize("side", ["x", "w"])
def test_every_code_by_every_scale(backend: str, side: str) -> None:
    edges.check_every_code_by_every_scale(side, "cpu", backend, through_bf16=False)


def test_scales_of_rows_that_do_not_exist(backend: str, rng: torch.Generator) -> None:
    edges.check_padding_rows([3, 0, 17], 40, 160, rng, "cpu", backend)


def test_scale_bytes_dequantize_exactly() -> None:
    """All 256 of them by all codes, in float64; in float32 all but what reaches 2**128."""
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).repeat(256, 1)
    scales = torch.arange(256, dtype=torch.int32).to(torch.uint8)[:, None].expand(256, 8)
    values = codes.view(torch.float8_e4m3fn)
    exact = torch.from_numpy(truth.dequantize(codes.numpy(), scales.numpy()))
    assert torch.equal(torch.nan_to_num(reference.dequantize(values, scales, torch.float64)), torch.nan_to_num(exact))
    single = reference.dequantize(values, scales)
    nan = torch.isnan(exact)
    assert torch.equal(torch.isnan(single), nan)
    assert torch.equal(single[~nan], exact[~nan].float())
    assert bool((single[~nan].double() == exact[~nan])[exact[~nan].abs() < 2.0**128].all())


@pytest.mark.parametrize("byte", [0, 1, 254, 255])
def test_scale_bytes_survive_the_swizzle(byte: int) -> None:
    linear = torch.full((130, 5), 127, dtype=torch.uint8)
    linear[::7, 3] = byte
    assert torch.equal(mx.unswizzle_scales(mx.swizzle_scales(linear), 130, 5), linear)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=["bf16", "fp16", "fp32"])
def test_subnormal_inputs(backend: str, dtype: torch.dtype, rng: torch.Generator) -> None:
    """Blocks of nothing but the dtype's subnormals: none is flushed that e4m3 with scale 2**-127 or more can hold."""
    smallest = torch.finfo(dtype).smallest_normal
    x = (torch.rand(20, 64, generator=rng, dtype=torch.float64) * smallest).to(dtype)
    got = mx.quantize_grouped(x, cases.layout([20]), backend=backend).dequantize().double()
    codes, scales = truth.quantize(edges.truth.doubles(x))
    assert torch.equal(got, torch.from_numpy(truth.dequantize(codes, scales)))
    assert bool((got > 0).float().mean() > 0.9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_the_top_of_the_range_becomes_two_to_the_128(backend: str, dtype: torch.dtype) -> None:
    """Above 248 * 2**120, e4m3's nearest is 256 * 2**120: a value of MXFP8, and beyond fp32. Below it nothing overflows."""
    top = 248 * 2.0**120
    x = torch.zeros(3, 32, dtype=dtype)
    x[0, 0], x[1, 0], x[2, 0] = torch.finfo(dtype).max, torch.tensor(top * (1 - 2.0**-7)), -torch.finfo(dtype).max
    xq = mx.quantize_grouped(x, cases.layout([3]), backend=backend)
    assert xq.dequantize()[:, 0].tolist() == [float("inf"), 240 * 2.0**120, float("-inf")]
    exact = reference.dequantize_grouped(
        xq.values, xq.scales, xq.groups.expert_offsets, xq.groups.scale_offsets, torch.float64
    )
    assert exact[:, 0].tolist() == [2.0**128, 240 * 2.0**120, -(2.0**128)]
    w = torch.zeros(1, 8, 32)
    w[0, 0, 0] = 2.0**-40
    y = mx.grouped_gemm(xq, mx.quantize_weights(w, backend=backend), out_dtype=torch.float32, backend=backend)
    assert float(y[1, 0]) == 240 * 2.0**80
    assert y[0, 0] in (2.0**88, float("inf"))  # the reference's, in float64; a kernel's, in fp32 or bf16


# ---------------------------------------------------------------- the same bytes each time

REPEATS = {"reference": 100, "triton": 20}
"""An interpreted kernel has no two things at once that could change places; compiled ones repeat in tests/gpu."""


def test_quantize_repeats_its_bytes(backend: str, rng: torch.Generator, tally: Any) -> None:
    x = cases.random_rows(40, 96, torch.bfloat16, rng)
    x[7, 3] = float("nan")
    groups = cases.layout([3, 0, 30], 40)
    first = mx.quantize_grouped(x, groups, out=cases.poisoned_output(groups, 96), backend=backend)
    for _ in range(REPEATS[backend]):
        again = mx.quantize_grouped(x, groups, out=cases.poisoned_output(groups, 96), backend=backend)
        assert torch.equal(edges.bits(again.values), edges.bits(first.values))
        assert torch.equal(again.scales, first.scales)
    tally("repeats", REPEATS[backend])


def test_gemm_repeats_its_bytes(backend: str, rng: torch.Generator, tally: Any) -> None:
    c = edges.make_company([3, 0, 20], 40, 160, torch.float32, rng, "cpu", backend)
    xq = mx.quantize_grouped(torch.cat(c.rows), cases.layout([3, 0, 20]), backend="reference")
    wq = mx.quantize_weights(c.weights, backend="reference")
    first = mx.grouped_gemm(xq, wq, out_dtype=torch.float32, backend=backend)
    for _ in range(REPEATS[backend]):
        assert torch.equal(mx.grouped_gemm(xq, wq, out_dtype=torch.float32, backend=backend), first)
    tally("repeats", REPEATS[backend])


def test_moe_forward_repeats_its_bytes(backend: str, rng: torch.Generator, tally: Any) -> None:
    layer = moe_truth.make_layer(rng, tokens=3, experts=3, dropped=True)
    w13q, w2q = (mx.quantize_weights(w, backend="reference") for w in (layer.w13, layer.w2))
    call = (layer.x, w13q, w2q, layer.ids, layer.weights)
    first = mx.moe_forward(*call, backend=backend)
    for _ in range(REPEATS[backend]):
        assert torch.equal(mx.moe_forward(*call, backend=backend), first)
    tally("repeats", REPEATS[backend])


@pytest.fixture
def deterministic_algorithms() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_deterministic_algorithms_are_what_runs(
    backend: str, deterministic_algorithms: None, rng: torch.Generator
) -> None:
    """PyTorch's switch, under which an operator that is not deterministic raises, and new memory is filled with NaN."""
    layer = moe_truth.make_layer(rng, dropped=True, bias=True)
    w13q, w2q = (mx.quantize_weights(w, backend=backend) for w in (layer.w13, layer.w2))
    bias = {"w13_bias": layer.w13_bias, "w2_bias": layer.w2_bias}
    y = mx.moe_forward(layer.x, w13q, w2q, layer.ids, layer.weights, backend=backend, **bias)
    assert mx.signal_to_noise_db(moe_truth.forward(layer), y) > 20.0


# ---------------------------------------------------------------- in any company


def test_any_company_with_the_reference(rng: torch.Generator, tally: Any) -> None:
    """Its sums are float64, and rounded once."""
    c = edges.make_company([5, 33, 0, 2, 70], 72, 160, torch.bfloat16, rng, "cpu", "reference")
    tally("rearrangements", edges.check_any_company(c, rng))


@pytest.mark.parametrize("block_t", [16, 64])
def test_any_company_with_the_kernel(
    interpreter: None, block_t: int, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch, tally: Any
) -> None:
    """Within a configuration. Of exact sums: in the interpreter NumPy multiplies, whose order of additions depends on the
    CPU and on where a row lies in its tile."""
    formulation = kernel_module.formulation_for(torch.device("cpu"))
    config = kernel_module.TritonGemmConfig(block_t, formulation, 4, 1)
    monkeypatch.setattr(kernel_module, "select_gemm_config", lambda *args: config)
    c = edges.make_company([5, 18, 0, 2], 40, 160, torch.float32, rng, "cpu", "triton", exact=True)
    tally("rearrangements", edges.check_any_company(c, rng))


def test_a_tokens_choices_in_any_company(backend: str, rng: torch.Generator, tally: Any) -> None:
    """moe_forward of a batch, of its tokens backwards, and of each token alone: the same bytes, a configuration given."""
    layer = moe_truth.make_layer(rng, tokens=7, experts=4, dropped=True, bias=True)
    w13q, w2q = (mx.quantize_weights(w, backend="reference") for w in (layer.w13, layer.w2))

    def forward(tokens: torch.Tensor) -> torch.Tensor:
        bias = {"w13_bias": layer.w13_bias, "w2_bias": layer.w2_bias}
        batch = (layer.ids[tokens], layer.weights[tokens])
        return mx.moe_forward(layer.x[tokens], w13q, w2q, *batch, backend=backend, **bias)

    every = torch.arange(7)
    expected = forward(every)
    assert torch.equal(forward(every.flip(0)), expected.flip(0))
    assert torch.equal(torch.cat([forward(every[i : i + 1]) for i in range(7)]), expected)
    tally("rearrangements", 8)
