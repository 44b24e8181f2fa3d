"""The Blackwell kernel, interpreted, against float64 truth; what it compiles to is in tests/codegen."""

from __future__ import annotations

import cases
import pytest
import tolerances
import torch
import triton
from fake_hopper import aligned_bytes
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_grouped_gemm import operands, plain_operands

import hybrid_mxfp8 as mx
from hybrid_mxfp8.triton_kernels.gemm import portable as dispatch
from hybrid_mxfp8.triton_kernels.gemm.blackwell import (
    BlackwellConfig,
    grouped_gemm_blackwell,
    select_blackwell_config,
)


@pytest.fixture(autouse=True)
def _interpreted_dot_scaled(interpreter: None) -> None:
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < (3, 9):
        pytest.skip(f"needs the exact tl.dot_scaled of Triton 3.9's interpreter, this is {triton.__version__}")


def product(xq: mx.GroupedMXFP8, wq: mx.ExpertWeights, dtype: torch.dtype, block_t: int) -> torch.Tensor:
    out = cases.poisoned_product(xq.groups.num_tokens, wq.n, dtype)
    config = BlackwellConfig(block_t, block_t >= 64, 4, 2)
    grouped_gemm_blackwell(xq.values, xq.scales, xq.groups, wq.values, wq.scales, out, config)
    return out


@pytest.mark.parametrize("block_t", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("name", [name for name, (_, num_tokens) in cases.RAGGED.items() if num_tokens])
def test_ragged(name: str, block_t: int, rng: torch.Generator) -> None:
    counts, num_tokens = cases.RAGGED[name]
    xq, wq = operands(counts, num_tokens, 136, 160, rng)
    y = product(xq, wq, torch.float32, block_t)
    tolerances.check_gemm(y, *plain_operands(xq, wq, counts), counts)
    assert bool(torch.isnan(y[sum(counts) :]).all())


@settings(max_examples=10)
@given(
    shape=cases.ragged(max_experts=5, max_tokens=200),
    n=st.sampled_from([8, 136, 256]),
    k=st.sampled_from([32, 160, 256]),
    block_t=st.sampled_from([16, 64, 256]),
    dtype=st.sampled_from(cases.DTYPES),
    seed=st.integers(0, 2**31),
)
def test_any_layout(shape: cases.Ragged, n: int, k: int, block_t: int, dtype: torch.dtype, seed: int) -> None:
    counts, num_tokens = list(shape.counts), shape.num_tokens
    assume(num_tokens > 0)
    xq, wq = operands(counts, num_tokens, n, k, torch.Generator().manual_seed(seed))
    y = product(xq, wq, dtype, block_t)
    tolerances.check_gemm(y, *plain_operands(xq, wq, counts), counts)
    assert bool(torch.isnan(y[sum(counts) :]).all())


@pytest.mark.parametrize(("average", "block_t"), [(1, 16), (16, 16), (17, 32), (64, 64), (65, 128), (129, 256)])
def test_select_blackwell_config(average: int, block_t: int) -> None:
    assert select_blackwell_config(average * 8, 8).block_t == block_t


@pytest.mark.parametrize("unaligned", ["", "x values", "x scales", "w values", "w scales"])
def test_only_aligned_operands_reach_it(unaligned: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """TMA reads from 16-byte boundaries; others go to the portable kernel."""
    launched: list[str] = []
    for module in ("grouped_gemm", "grouped_gemm_blackwell"):
        monkeypatch.setattr(
            f"hybrid_mxfp8.triton_kernels.{module}.launch", lambda kernel, *rest: launched.append(kernel.fn.__name__)
        )
    monkeypatch.setattr(dispatch, "blackwell_takes", lambda *args: True)

    def at(name: str, *shape: int) -> torch.Tensor:
        by = 8 if name == unaligned else 0
        return aligned_bytes(torch.Size(shape).numel() + by)[by:].view(shape)

    groups = cases.layout([4, 0, 5], 9)
    dispatch.grouped_gemm(
        at("x values", 9, 64).view(torch.float8_e4m3fn),
        at("x scales", groups.scale_rows, 4),
        groups,
        at("w values", 3, 16, 64).view(torch.float8_e4m3fn),
        at("w scales", 3, 128, 4),
        torch.empty(9, 16),
    )
    assert launched == ["grouped_gemm_kernel" if unaligned else "grouped_gemm_blackwell_kernel"]
