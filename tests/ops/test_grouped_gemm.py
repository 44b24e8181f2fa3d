"""The grouped GEMM, each way to multiply against float64, and backend against backend.

Scale bytes, NaN and rows in any company are in test_edges.py, hostile layouts in test_bad_calls.py.
"""

from __future__ import annotations

import cases
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from products import check, operands

import hybrid_mxfp8 as mx


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("name", cases.RAGGED)
def test_ragged(multiplier: str, device: str, name: str, dtype: torch.dtype, rng: torch.Generator) -> None:
    counts, num_tokens = cases.RAGGED[name]
    check(*operands(counts, num_tokens, 136, 160, rng, device), counts, dtype, multiplier)


@pytest.mark.parametrize(("n", "k"), [(8, 32), (64, 96), (128, 128), (136, 288), (264, 64), (40, 1056)])
def test_shapes(multiplier: str, device: str, n: int, k: int, rng: torch.Generator) -> None:
    counts = [3, 0, 20, 1]
    check(*operands(counts, 24, n, k, rng, device), counts, torch.bfloat16, multiplier)


@settings(max_examples=12)
@given(
    shape=cases.ragged(max_experts=6, max_tokens=160), n=st.sampled_from([8, 72, 136]),
    k=st.sampled_from([32, 96, 128, 224]), dtype=st.sampled_from(cases.DTYPES), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_any_layout(
    multiplier: str, device: str, shape: cases.Ragged, n: int, k: int, dtype: torch.dtype, seed: int
) -> None:
    rng = torch.Generator().manual_seed(seed)
    check(*operands(shape.counts, shape.num_tokens, n, k, rng, device), shape.counts, dtype, multiplier)


@pytest.mark.parametrize("num_experts", [1, 3, 128, 257, 1024, *([4096] if cases.device() == "cuda" else [])])
def test_number_of_experts(multiplier: str, device: str, num_experts: int, rng: torch.Generator) -> None:
    owners = torch.randint(0, num_experts, (40 if device == "cpu" else 2000,), generator=rng)
    counts = torch.bincount(owners, minlength=num_experts).tolist()
    check(*operands(counts, sum(counts), 8, 64, rng, device), counts, torch.float32, multiplier)


@pytest.mark.sanitizer
def test_a_nan_weight_reaches_only_its_expert_and_column(multiplier: str, device: str, rng: torch.Generator) -> None:
    counts = [3, 4, 20]
    w = cases.random_rows(3 * 40, 160, torch.bfloat16, rng).reshape(3, 40, 160)
    w[1, 11, 159] = float("nan")
    xq, _ = operands(counts, 27, 40, 160, rng, device)
    y = check(xq, mx.quantize_weights(w.to(device), backend="reference"), counts, torch.bfloat16, multiplier)
    assert torch.isnan(y).nonzero().tolist() == [[row, 11] for row in (3, 4, 5, 6)]


def test_no_sync(kernel: str, device: str, no_sync: None) -> None:
    x = torch.empty(64, 256, dtype=torch.bfloat16, device=device).normal_()
    counts = torch.full((4,), 16, dtype=torch.int32, device=device)
    wq = mx.quantize_weights(x.view(4, 16, 256), backend="triton")
    xq = mx.quantize_grouped(x, mx.GroupLayout.from_counts(counts, 64), backend="triton")
    mx.grouped_gemm(xq, wq, backend="triton")
    mx.explain(xq, wq)
