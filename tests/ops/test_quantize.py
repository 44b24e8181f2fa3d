"""quantize_grouped and quantize_weights: the kernel's, the reference's and the definition's bytes.

Hostile counts, addresses and strides are in test_bad_calls.py, all codes in test_codes.py.
"""

from __future__ import annotations

import math

import cases
import kernels
import numpy as np
import pytest
import swiglu_truth
import torch
import truth
from cases import same_bytes
from hypothesis import given, settings
from hypothesis import strategies as st

import hybrid_mxfp8 as mx
from hybrid_mxfp8.core.token_record import TokenRecord
from hybrid_mxfp8.reference import pack_tokens

pytestmark = pytest.mark.usefixtures("kernels_run")
dtypes = pytest.mark.parametrize("dtype", cases.DTYPES, ids=["bf16", "fp16", "fp32"])
roundings = pytest.mark.parametrize("rounding", truth.ROUNDINGS)
scale_groups = pytest.mark.parametrize("group", [32, 128])


def into_poison(
    backend: str, x: torch.Tensor, groups: mx.GroupLayout | torch.Tensor, rounding: str = "rceil",
    row_index: torch.Tensor | None = None, group: int = 32,
) -> mx.GroupedMXFP8:  # fmt: skip
    """Quantize into buffers that held poison."""
    rows = x.shape[0] if row_index is None else row_index.shape[0]
    layout = groups if isinstance(groups, mx.GroupLayout) else mx.GroupLayout.from_counts(groups, rows)
    out = cases.poisoned_output(layout, x.shape[1])
    options = {"scale_rounding": rounding, "scale_group": group, "row_index": row_index}
    got = mx.quantize_grouped(x, groups, **options, out=out, backend=backend)
    assert got.scale_group == group
    assert (got.values.data_ptr(), got.scales.data_ptr()) == (out.values.data_ptr(), out.scales.data_ptr())
    return got


def check(
    x: torch.Tensor, groups: mx.GroupLayout, rounding: str = "rceil", row_index: torch.Tensor | None = None,
    group: int = 32,
) -> mx.GroupedMXFP8:  # fmt: skip
    """The kernel against the reference."""
    got = into_poison("triton", x, groups, rounding, row_index, group)
    same_bytes(got, into_poison("reference", x, groups, rounding, row_index, group))
    return got


@pytest.mark.sanitizer
@dtypes
@roundings
@scale_groups
def test_zero_tiny_and_non_finite_blocks(device: str, dtype: torch.dtype, rounding: str, group: int) -> None:
    """NaN and Inf spread over their group, of which the last of a row is one block."""
    special = cases.special_rows(dtype)
    x = torch.cat([special, special.flip(0)[:, :32]], dim=1)
    groups = cases.layout([3, 5])
    got = check(x.to(device), groups if device == "cpu" else cases.layout([3, 5], device=device), rounding, None, group)
    codes, scales = truth.quantize(truth.doubles(x), rounding, group)
    values, stored = truth.grouped_bytes(codes, scales, [3, 5], groups.scale_rows, cases.POISON)
    assert np.array_equal(truth.as_bytes(got.values), values)
    assert np.array_equal(truth.as_bytes(got.scales).reshape(-1), stored)
    assert (scales == 255).sum() == (4 if group == 32 else 8) + 2


@pytest.mark.sanitizer
@pytest.mark.parametrize("k", [32, 160, 2880])
@pytest.mark.parametrize("name", cases.RAGGED)
@scale_groups
def test_ragged(device: str, name: str, k: int, group: int, rng: torch.Generator) -> None:
    """Rows beyond the groups and slack keep their poison, all other padding is zero."""
    counts, num_tokens = cases.RAGGED[name]
    k = min(k, 256) if device == "cpu" else k
    x = cases.random_rows(num_tokens, k, torch.bfloat16, rng, device)
    groups = cases.layout(counts, num_tokens, device)
    got = check(x, groups, group=group)
    content = truth.quantize(truth.doubles(x), group=group)
    values, stored = truth.grouped_bytes(*content, counts, groups.scale_rows, cases.POISON)
    assert np.array_equal(truth.as_bytes(got.values), values)
    assert np.array_equal(truth.as_bytes(got.scales).reshape(-1), stored)


@settings(max_examples=25 if cases.device() == "cuda" else 15)
@given(
    shape=cases.ragged(), k=st.sampled_from([32, 64, 96, 128, 288, 1056]), dtype=st.sampled_from(cases.DTYPES),
    rounding=st.sampled_from(truth.ROUNDINGS), group=st.sampled_from([32, 128]), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_any_layout(
    device: str, shape: cases.Ragged, k: int, dtype: torch.dtype, rounding: str, group: int, seed: int
) -> None:
    x = cases.random_rows(shape.num_tokens, k, dtype, torch.Generator().manual_seed(seed), device)
    check(x, cases.layout(shape.counts, shape.num_tokens, device), rounding, None, group)


ON_GPU = cases.device() == "cuda"


@pytest.mark.parametrize("num_experts", [1, 3, 128, 256, 1000, 1024, 1500, 3000] if ON_GPU else [1, 2, 127, 1024, 1025])
def test_layouts_and_counts_of_any_number_of_experts(device: str, num_experts: int, rng: torch.Generator) -> None:
    """Every configuration, and both forms: a layout, and counts that the kernel may scan."""
    shapes = [(64, 160), (64, 7168), (300, 7168), (3000, 160), (3000, 7168)] if ON_GPU else [(40, 64)]
    for num_tokens, k in shapes:
        owners = torch.randint(0, num_experts, (num_tokens,), generator=rng)
        counts = torch.bincount(owners, minlength=num_experts).to(device)
        x = cases.random_rows(num_tokens, k, torch.bfloat16, rng, device)
        groups = mx.GroupLayout.from_counts(counts, num_tokens)
        group = 32 if num_experts % 2 else 128
        expected = into_poison("reference", x, groups, group=group)
        few = ON_GPU or num_experts < 200
        for form in (groups, counts, counts.int()) if few else (counts.int(),):
            got = into_poison("triton", x, form, group=group)
            same_bytes(got, expected)
            for name in ("tokens_per_expert", "expert_offsets", "scale_offsets"):
                assert torch.equal(getattr(got.groups, name), getattr(groups, name))


@pytest.mark.parametrize("experts", [4, 100])
def test_most_rows_are_nobodys(device: str, experts: int, rng: torch.Generator) -> None:
    """As where experts are spread over GPUs: programs beyond the groups write nothing."""
    t, k = (6000, 512) if device == "cuda" else (600, 64)
    counts = torch.randint(0, 12 if device == "cuda" else 2, (experts,), generator=rng).tolist()
    x = cases.random_rows(t, k, torch.bfloat16, rng, device)
    check(x, cases.layout(counts, t, device))
    index = torch.randint(0, t, (t,), generator=rng, dtype=torch.int32)
    index[sum(counts) :] = 2**31 - 1
    check(x, cases.layout(counts, t, device), row_index=index.to(device))


@pytest.mark.sanitizer
@dtypes
def test_gather(device: str, dtype: torch.dtype, rng: torch.Generator) -> None:
    """Rows outside read as zeros."""
    x = cases.random_rows(17, 160, dtype, rng, device)
    index = torch.randint(0, 17, (70,), generator=rng, dtype=torch.int32)
    index[5], index[6], index[7], index[8] = -1, 17, 2**31 - 1, -(2**31)
    groups = cases.layout([30, 0, 40], device=device)
    got = check(x, groups, row_index=index.to(device))
    inside = (index >= 0) & (index < 17)
    rows = torch.where(inside[:, None].to(device), x[index.clamp(0, 16).long().to(device)], 0)
    same_bytes(got, into_poison("reference", rows, groups))


@pytest.mark.sanitizer
@dtypes
@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize(("tokens", "k", "top_k"), [(1, 32, 0), (9, 160, 3), (70, 1056, 8), (0, 96, 2)])
def test_tokens_in_records(
    device: str, dtype: torch.dtype, tokens: int, k: int, top_k: int, group: int, rng: torch.Generator
) -> None:
    """Elements, scales and choices as the definition and the router have them; records beyond the
    tokens choose nobody, and keep their other bytes."""
    x = cases.random_rows(tokens, 2 * k, dtype, rng, device)[:, k:]
    ids = torch.randint(-2, 12, (tokens, top_k), generator=rng)
    if ids.numel():
        ids[-1, 0] = 2**32 + 3
    weights = torch.rand(tokens, top_k, generator=rng).to(dtype)
    record, beyond = TokenRecord(k, top_k), 3
    size = (tokens + beyond, record.size)
    found = [torch.full(size, cases.POISON, dtype=torch.uint8, device=device) for _ in range(2)]
    kernels.pack_tokens(x, ids.to(device), weights.to(device), found[0], 10, group)
    pack_tokens(x, ids.to(device), weights.to(device), found[1], 10, group)
    assert torch.equal(*found)
    values, scales, got_ids, got_weights = (part.cpu() for part in record.split(found[0]))
    codes, linear = truth.quantize(truth.doubles(x), group=group)
    assert np.array_equal(truth.as_bytes(values[:tokens]), codes)
    assert np.array_equal(truth.as_bytes(scales[:tokens]), linear)
    assert torch.equal(got_ids[:tokens], torch.where((ids >= 0) & (ids < 10), ids, -1).int())
    assert torch.equal(got_weights[:tokens], weights.float())
    assert (got_ids[tokens:] == -1).all()
    assert not got_weights[tokens:].any()
    assert (truth.as_bytes(values[tokens:]) == cases.POISON).all()


# ---------------------------------------------------------------- SwiGLU

ACTIVATIONS = {
    "swiglu": mx.SwiGLU(),
    "swigluoai": mx.SwiGLU(1.702, 1.0, 7.0),
    "limit alone": mx.SwiGLU(limit=2.5),
    "alpha alone": mx.SwiGLU(alpha=0.5),
    "beta alone": mx.SwiGLU(beta=-0.25),
}


@pytest.mark.sanitizer
@dtypes
@pytest.mark.parametrize(
    ("name", "rounding", "group"),
    [
        *(("swiglu", rounding, 32) for rounding in truth.ROUNDINGS),
        *((activation, "rceil", 32) for activation in list(ACTIVATIONS)[1:]),
        ("swiglu", "rceil", 128),
    ],
)
def test_swiglu(
    backend: str, device: str, dtype: torch.dtype, name: str, rounding: str, group: int, rng: torch.Generator
) -> None:
    """Against float64. A limit meets both signs of gate and up, and the cut values themselves."""
    tenth = 70 if device == "cuda" else 7
    counts, activation = [3 * tenth, 0, 7 * tenth], ACTIVATIONS[name]
    x = 4 * torch.randn(10 * tenth, 320, generator=rng)
    x[:tenth] *= 30
    x[tenth, ::3] = 7.0
    x = x.to(dtype)
    groups = cases.layout(counts, device=device)
    options = {"activation": activation, "scale_rounding": rounding, "scale_group": group, "backend": backend}
    got = mx.quantize_grouped(x.to(device), groups, out=cases.poisoned_output(groups, 160), **options)
    swiglu_truth.check(got, x, counts, rounding, activation=activation)
    named = mx.quantize_grouped(x.to(device), groups, **{**options, "activation": "swigluoai"})
    assert torch.equal(cases.bits(named.values), cases.bits(got.values)) == (name == "swigluoai")


def test_what_a_limit_does_to_non_finite_values(backend: str, device: str) -> None:
    """As torch.clamp: infinite values are cut, NaN stays. A gate of -Inf has no limit."""
    x = torch.ones(4, 64)
    x[0, 0] = x[0, 33] = float("inf")
    x[1, 0], x[1, 32] = 3.0, float("-inf")
    x[2, 5], x[3, 40] = float("nan"), float("nan")
    groups, activation = cases.layout([4], device=device), mx.SwiGLU(limit=3.0)
    got = mx.quantize_grouped(x.to(device), groups, activation=activation, backend=backend).dequantize().cpu()
    cut = 3 / (1 + math.exp(-3))
    assert got[0, 0].item() == pytest.approx(cut, rel=2**-4)
    assert got[0, 1].item() == pytest.approx(3 / (1 + math.exp(-1)), rel=2**-4)
    assert got[1, 0].item() == pytest.approx(-3 * cut, rel=2**-4)
    assert bool(got[2:].isnan().all())
    assert not got[:2].isnan().any()


def test_swiglu_spreads_non_finite_values_over_their_block(backend: str, device: str) -> None:
    x = torch.ones(3, 128)
    x[0, 2], x[1, 64 + 40] = float("nan"), float("inf")
    x[2, 3] = -500.0  # exp(500) is Inf and the product zero, not NaN
    groups = cases.layout([3], device=device)
    got = mx.quantize_grouped(x.to(device), groups, activation="swiglu", backend=backend).dequantize().cpu()
    nan = torch.zeros(3, 64, dtype=torch.bool)
    nan[0, :32] = nan[1, 32:] = True
    assert torch.equal(torch.isnan(got), nan)
    assert got[2, 3] == 0


@pytest.mark.parametrize("form", ["layout", "counts"])
def test_swiglu_of_gathered_rows_with_strides(device: str, form: str, rng: torch.Generator) -> None:
    x = torch.randn(20, 300, generator=rng)[:, 5:261]
    index = torch.randint(0, 20, (40,), generator=rng, dtype=torch.int32)
    index[3] = 20
    groups = cases.layout([25, 15], device=device)
    got = mx.quantize_grouped(
        x.to(device), groups if form == "layout" else groups.tokens_per_expert,
        activation="swiglu", row_index=index.to(device), backend="triton",
    )  # fmt: skip
    rows = torch.where((index < 20)[:, None], x[index.clamp_max(19).long()], 0)
    swiglu_truth.check(got, rows, [25, 15], "rceil")


# ---------------------------------------------------------------- weights, buffers, syncs


@pytest.mark.sanitizer
@roundings
@pytest.mark.parametrize(
    ("e", "n", "k"), [(1, 1, 32), (3, 8, 96), (2, 136, 160), (2, 128, 128), (1, 300, 1056), (5, 40, 64)]
)
@scale_groups
def test_weights(device: str, e: int, n: int, k: int, rounding: str, group: int, rng: torch.Generator) -> None:
    """Into poison, so that every padding byte is seen to be written."""
    w = cases.random_rows(e * n, k, torch.bfloat16, rng, device).reshape(e, n, k)
    expected, got = (
        mx.quantize_weights(w, scale_rounding=rounding, scale_group=group, backend=backend)
        for backend in ("reference", "triton")
    )
    same_bytes(got, expected)
    assert got.scale_group == group
    values, scales = torch.empty_like(expected.values), torch.full_like(expected.scales, cases.POISON)
    values.view(torch.uint8).fill_(cases.POISON)
    kernels.launch(*kernels.quantize_weights_steps(w, values, scales, rounding, group))
    same_bytes(mx.ExpertWeights(values, scales), expected)
    for expert in range(e):
        codes, linear = truth.quantize(truth.doubles(w[expert]), rounding, group)
        assert np.array_equal(truth.as_bytes(expected.values[expert]), codes)
        assert np.array_equal(truth.as_bytes(expected.scales[expert]).reshape(-1), truth.swizzle(linear))


def test_no_sync(device: str, no_sync: None) -> None:
    x = torch.empty(64, 256, dtype=torch.bfloat16, device=device).normal_()
    counts = torch.full((4,), 16, dtype=torch.int32, device=device)
    groups = mx.GroupLayout.from_counts(counts, 64)
    for given_groups in (groups, counts):
        mx.quantize_grouped(x, given_groups, backend="triton")
        mx.quantize_grouped(x, given_groups, activation="swiglu", backend="triton")
    index = torch.zeros(64, dtype=torch.int32, device=device)
    mx.quantize_grouped(x, groups, row_index=index, backend="triton")
    mx.quantize_weights(x.view(4, 16, 256), backend="triton")
