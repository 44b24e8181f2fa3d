"""The Blackwell kernel, interpreted, against float64; what it compiles to is in tests/codegen."""

from __future__ import annotations

import cases
import kernels
import pytest
import torch
import triton
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from products import check_product, operands

import hybrid_mxfp8 as mx
from hybrid_mxfp8.triton_kernels.gemm import blackwell
from hybrid_mxfp8.triton_kernels.gemm.blackwell import BlackwellConfig, select_blackwell_config


@pytest.fixture(autouse=True)
def _interpreted_dot_scaled(interpreter: None) -> None:
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 9):
        pytest.skip(f"needs the exact tl.dot_scaled of Triton 3.9's interpreter, this is {triton.__version__}")


def check(xq: mx.GroupedMXFP8, wq: mx.ExpertWeights, counts: list[int], dtype: torch.dtype, block_t: int) -> None:
    out = cases.poisoned_product(xq.groups.num_tokens, wq.n, dtype)
    kernels.product(blackwell.plan, xq, wq, out, BlackwellConfig(block_t, block_t >= 64, 4, 2))
    check_product(out, xq, wq, counts)


@pytest.mark.parametrize("block_t", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("name", [name for name, (_, t) in cases.RAGGED.items() if t and name != "a token each"])
def test_ragged(name: str, block_t: int, rng: torch.Generator) -> None:
    counts, num_tokens = cases.RAGGED[name]
    check(*operands(counts, num_tokens, 136, 160, rng), counts, torch.float32, block_t)


@settings(max_examples=10)
@given(
    shape=cases.ragged(max_experts=5, max_tokens=200), n=st.sampled_from([8, 136, 256]),
    k=st.sampled_from([32, 160, 256]), block_t=st.sampled_from([16, 64, 256]),
    dtype=st.sampled_from(cases.DTYPES), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_any_layout(shape: cases.Ragged, n: int, k: int, block_t: int, dtype: torch.dtype, seed: int) -> None:
    assume(shape.num_tokens > 0)
    xq, wq = operands(shape.counts, shape.num_tokens, n, k, torch.Generator().manual_seed(seed))
    check(xq, wq, shape.counts, dtype, block_t)


@pytest.mark.parametrize(("average", "block_t"), [(1, 16), (16, 16), (17, 128), (128, 128), (129, 256)])
def test_select_blackwell_config(average: int, block_t: int) -> None:
    assert select_blackwell_config(average * 8, 8).block_t == block_t
