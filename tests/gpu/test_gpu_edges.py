"""Compiled kernels at the edges: every code, what NaN reaches, scale bytes at both ends, repeats, rows in any company."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import bit_patterns
import cases
import edges
import moe_truth
import pytest
import torch
import truth
from gpu_truth import GPU, bf16_formulation
from test_codes import PATTERNS

import hybrid_mxfp8 as mx
from hybrid_mxfp8 import reference
from hybrid_mxfp8.triton_kernels.gemm import portable as launcher
from hybrid_mxfp8.triton_kernels.gemm.hopper_config import select_hopper_config

pytestmark = pytest.mark.gpu

COUNTS = {"few": [3, 0, 17, 1], "some": [3, 0, 200, 1, 70], "many": [300, 0, 700, 5]}
"""By tokens an expert, which choose the tile."""


def configurations(kernel: str) -> list[Any]:
    """All that a kernel is ever run with."""
    if kernel == "hopper":
        return [select_hopper_config(8 * average, 8) for average in (1, 32, 64, 128, 1000)]
    formulation = launcher.formulation_for(torch.device(GPU, 0))
    return [launcher.select_gemm_config(8 * average, 8, formulation) for average in (1, 32, 64, 1000)]


def pin(kernel: str, configuration: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run every problem with this configuration."""
    name = "hopper_config_for" if kernel == "hopper" else "select_gemm_config"
    monkeypatch.setattr(launcher, name, lambda *args: configuration)
    cases.forget_calls()


# ---------------------------------------------------------------- codes


@pytest.mark.parametrize("pattern", [*PATTERNS, "bf16 amax", "fp16 amax", "8 million"])
def test_codes(pattern: str, tally: Any) -> None:
    """Kernel and reference on the GPU against the reference on the CPU, which test_codes.py holds against the definition."""
    if pattern == "8 million":
        x = bit_patterns.fp32_random(torch.Generator().manual_seed(23), blocks=2**18)
    elif pattern.endswith("amax"):
        x = cases.every_amax(torch.bfloat16 if pattern.startswith("bf16") else torch.float16)
    else:
        x = PATTERNS[pattern]()
    patterns, there = bit_patterns.distinct(x), x.to(GPU)
    groups = cases.layout([x.shape[0]], device=GPU)
    for rounding in truth.ROUNDINGS:
        codes, linear = reference.quantize(x, rounding)
        out = cases.poisoned_output(groups, 1024)
        got = mx.quantize_grouped(there, groups, scale_rounding=rounding, out=out, backend="triton")
        assert torch.equal(got.values.view(torch.uint8).cpu(), codes.view(torch.uint8))
        assert torch.equal(got.scales.cpu(), mx.swizzle_scales(linear))
        codes_there, linear_there = reference.quantize(there, rounding)
        assert torch.equal(codes_there.view(torch.uint8).cpu(), codes.view(torch.uint8))
        assert torch.equal(linear_there.cpu(), linear)
        tally("codes", patterns)


@pytest.mark.parametrize("side", ["x", "w"])
def test_every_code_by_every_scale(kernel: str, side: str) -> None:
    """What the products make of operands: exact, but for what bf16 drops below 2**-133."""
    edges.check_every_code_by_every_scale(side, GPU, "triton", through_bf16=bf16_formulation())


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=["bf16", "fp16", "fp32"])
def test_scale_bytes_at_both_ends(kernel: str, dtype: torch.dtype, rng: torch.Generator, tally: Any) -> None:
    tally("poisoned rows", edges.check_scale_bytes(dtype, rng, GPU, "triton", through_bf16=bf16_formulation()))


# ---------------------------------------------------------------- poison


@pytest.mark.parametrize("k", [160, 256])
@pytest.mark.parametrize("name", COUNTS)
def test_a_bad_row_spoils_only_itself(kernel: str, name: str, k: int, rng: torch.Generator, tally: Any) -> None:
    tally("poisoned rows", edges.check_poisoned_rows(COUNTS[name], 136, k, torch.bfloat16, rng, GPU, "triton"))


@pytest.mark.parametrize("n", [40, 136])
@pytest.mark.parametrize("name", COUNTS)
def test_a_bad_expert_spoils_only_its_rows(kernel: str, name: str, n: int, rng: torch.Generator, tally: Any) -> None:
    """A tile of 128 weight rows reaches into the next expert."""
    tally("poisoned rows", edges.check_poisoned_experts(COUNTS[name], n, 96, torch.bfloat16, rng, GPU, "triton"))


@pytest.mark.parametrize("tokens", [9, 500])
def test_bad_tokens_and_experts_of_a_layer(kernel: str, tokens: int, rng: torch.Generator, tally: Any) -> None:
    tally("poisoned rows", edges.check_poisoned_tokens_of_a_layer(rng, tokens, GPU, "triton"))


@pytest.mark.parametrize("name", COUNTS)
def test_scales_of_rows_that_do_not_exist(kernel: str, name: str, rng: torch.Generator) -> None:
    edges.check_padding_rows(COUNTS[name], 40, 160, rng, GPU, "triton")


# ---------------------------------------------------------------- the same bytes each time

REPEATS = 100


def test_quantize_repeats_its_bytes(rng: torch.Generator, tally: Any) -> None:
    counts = torch.randint(0, 200, (32,), generator=rng).to(GPU)
    x = cases.random_rows(int(counts.sum()) + 5, 2048, torch.bfloat16, rng, GPU)
    groups = mx.GroupLayout.from_counts(counts, x.shape[0])
    first = mx.quantize_grouped(x, groups, out=cases.poisoned_output(groups, 2048), backend="triton")
    out = cases.poisoned_output(groups, 2048)
    for _ in range(REPEATS):
        out.values.view(torch.uint8).fill_(cases.POISON)
        out.scales.fill_(cases.POISON)
        mx.quantize_grouped(x, groups, out=out, backend="triton")
        assert torch.equal(edges.bits(out.values), edges.bits(first.values))
        assert torch.equal(out.scales, first.scales)
    tally("repeats", REPEATS)


@pytest.mark.parametrize("tokens", [2, 40, 300])
def test_gemm_repeats_its_bytes(kernel: str, tokens: int, rng: torch.Generator, tally: Any) -> None:
    counts = [tokens, 0, 2 * tokens, 1] * 4
    c = edges.make_company(counts, 1032, 1056, torch.bfloat16, rng, GPU, "triton")
    xq = mx.quantize_grouped(torch.cat(c.rows), cases.layout(counts, device=GPU), backend="triton")
    wq = mx.quantize_weights(c.weights, backend="triton")
    first = mx.grouped_gemm(xq, wq, out_dtype=torch.float32, backend="triton")
    assert bool(torch.isfinite(first).all())
    for _ in range(REPEATS):
        assert torch.equal(mx.grouped_gemm(xq, wq, out_dtype=torch.float32, backend="triton"), first)
    tally("repeats", REPEATS)


@pytest.mark.parametrize("tokens", [3, 1500])
def test_moe_forward_repeats_its_bytes(kernel: str, tokens: int, rng: torch.Generator, tally: Any) -> None:
    """One launch of routing, and three."""
    layer = moe_truth.make_layer(rng, tokens=tokens, experts=16, hidden=256, intermediate=128, top_k=4, dropped=True)
    layer = moe_truth.to(layer, GPU)
    w13q, w2q = (mx.quantize_weights(w, backend="triton") for w in (layer.w13, layer.w2))
    call = (layer.x, w13q, w2q, layer.ids, layer.weights)
    first = mx.moe_forward(*call, backend="triton")
    for _ in range(REPEATS):
        assert torch.equal(mx.moe_forward(*call, backend="triton"), first)
    tally("repeats", REPEATS)


@pytest.fixture
def deterministic_algorithms() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_deterministic_algorithms_are_what_runs(deterministic_algorithms: None, rng: torch.Generator) -> None:
    """PyTorch's switch, under which new memory is filled with NaN."""
    layer = moe_truth.to(moe_truth.make_layer(rng, tokens=40, hidden=256, intermediate=128, dropped=True), GPU)
    w13q, w2q = (mx.quantize_weights(w, backend="triton") for w in (layer.w13, layer.w2))
    y = mx.moe_forward(layer.x, w13q, w2q, layer.ids, layer.weights, backend="triton")
    assert mx.signal_to_noise_db(moe_truth.forward(layer), y.cpu()) > 22.0


# ---------------------------------------------------------------- in any company


@pytest.mark.parametrize("place", range(5))
def test_any_company(
    kernel: str, place: int, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch, tally: Any
) -> None:
    """What is promised: within a configuration, an expert's rows are the same bytes whatever stands beside them."""
    configured = configurations(kernel)
    pin(kernel, configured[place % len(configured)], monkeypatch)
    c = edges.make_company([5, 33, 0, 2, 300], 136, 288, torch.float32, rng, GPU, "triton")
    tally("rearrangements", edges.check_any_company(c, rng))


def test_any_configuration(kernel: str, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch, tally: Any) -> None:
    """More than is promised: a kernel's tiles add up K in the same order, so their products have the same bytes."""
    c = edges.make_company([5, 33, 0, 2, 300], 136, 1056, torch.float32, rng, GPU, "triton")
    products = []
    for configuration in configurations(kernel):
        pin(kernel, configuration, monkeypatch)
        products.append(torch.cat(c.product(c.rows, range(5))))
    different = [int((y != products[0]).sum()) for y in products]
    assert different == [0] * len(products), (
        f"{kernel}: elements that differ from the first configuration's: {different}"
    )
    tally("rearrangements", len(products) - 1)


@pytest.mark.parametrize("tokens", [12, 400])
def test_a_batchs_tokens_in_another_order(kernel: str, tokens: int, rng: torch.Generator, tally: Any) -> None:
    layer = moe_truth.make_layer(rng, tokens=tokens, experts=8, hidden=256, intermediate=128, top_k=3, dropped=True)
    layer = moe_truth.to(layer, GPU)
    w13q, w2q = (mx.quantize_weights(w, backend="triton") for w in (layer.w13, layer.w2))

    def forward(order: torch.Tensor) -> torch.Tensor:
        batch = (layer.ids[order], layer.weights[order])
        return mx.moe_forward(layer.x[order], w13q, w2q, *batch, backend="triton")

    expected = forward(torch.arange(tokens, device=GPU))
    for _ in range(5):
        order = torch.randperm(tokens, generator=rng).to(GPU)
        assert torch.equal(forward(order), expected[order])
    tally("rearrangements", 5)
