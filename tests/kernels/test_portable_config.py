"""What the host decides for the grouped GEMM: formulation, tile, a bound on tiles."""

from __future__ import annotations

import cases
import pytest
import torch
import triton
from hypothesis import given
from hypothesis import strategies as st
from products import check, operands
from stand_ins import pretend_capability

from hybrid_mxfp8.dispatch.problem import Problem
from hybrid_mxfp8.triton_kernels.gemm import blackwell, portable
from hybrid_mxfp8.triton_kernels.gemm.portable import (
    Formulation,
    TritonGemmConfig,
    select_formulation,
    select_gemm_config,
    token_tiles_bound,
)


@pytest.mark.parametrize("formulation", ["fp32", "scaled"])
@pytest.mark.parametrize("block_t", [16, 32, 64, 128])
def test_each_formulation_and_tile(
    interpreter: None, formulation: Formulation, block_t: int, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    if formulation == "scaled" and portable.triton_version() < (3, 9):
        pytest.skip(f"tl.dot_scaled is exact in the interpreter from Triton 3.9 on, this is {triton.__version__}")
    config = TritonGemmConfig(block_t, formulation, 4, 1)
    monkeypatch.setattr(portable, "select_gemm_config", lambda *args: config)
    cases.forget_calls()
    counts = [block_t - 1, 0, block_t + 1, 1]
    check(*operands(counts, sum(counts) + 3, 136, 160, rng), counts, torch.bfloat16, "triton")


@pytest.mark.parametrize(
    ("capability", "version", "expected"),
    [
        (None, (3, 6), "fp32"),
        (None, (3, 8), "fp32"),
        (None, (3, 9), "scaled"),
        ((8, 9), (3, 9), "bf16"),
        ((9, 0), (3, 6), "bf16"),
        ((10, 0), (3, 6), "scaled"),
        ((10, 3), (3, 9), "scaled"),
        ((12, 0), (3, 6), "scaled"),
    ],
)
def test_select_formulation(capability: tuple[int, int] | None, version: tuple[int, int], expected: str) -> None:
    assert select_formulation(capability, version) == expected


@pytest.mark.parametrize(
    ("average", "formulation", "interpreted", "block_t", "num_warps", "num_stages"),
    [
        (1, "scaled", False, 16, 4, 4),
        (16, "scaled", False, 16, 4, 4),
        (17, "scaled", False, 32, 8, 4),
        (16, "bf16", False, 16, 8, 4),
        (32, "bf16", False, 32, 8, 4),
        (64, "scaled", False, 64, 8, 4),
        (65, "bf16", False, 128, 8, 3),
        (10**6, "bf16", False, 128, 8, 3),
        (16, "fp32", True, 16, 4, 1),
        (17, "fp32", True, 64, 4, 1),
    ],
)
def test_tile_by_the_average_number_of_tokens(
    average: int, formulation: Formulation, interpreted: bool, block_t: int, num_warps: int, num_stages: int
) -> None:
    config = select_gemm_config(8 * average, 8, formulation, interpreted)
    assert config == TritonGemmConfig(block_t, formulation, num_warps, num_stages)


@given(counts=st.lists(st.integers(0, 300), min_size=1, max_size=20), block_t=st.sampled_from([16, 32, 64, 128]))
def test_token_tiles_bound_suffices_and_is_tight(counts: list[int], block_t: int) -> None:
    """One token each and the rest to one expert needs them all."""
    bound = token_tiles_bound(sum(counts), len(counts), block_t)
    assert sum(-(-count // block_t) for count in counts) <= bound
    if total := sum(counts):
        worst = [1] * min(total, len(counts))
        worst[0] += total - len(worst)
        assert sum(-(-count // block_t) for count in worst) == bound


@pytest.mark.parametrize(
    ("capability", "num_experts", "n", "k", "taken"),
    [
        ((10, 3), 256, 4096, 7168, True),
        ((12, 0), 256, 4096, 7168, False),
        ((10, 0), 2**20, 2**11 - 8, 32, True),
        ((10, 0), 2**20, 2**11, 32, False),  # 2**31 rows
        ((10, 0), 1, 2**31 - 136, 32, True),
        ((10, 0), 1, 2**31 - 120, 32, False),  # the last tile's rows reach beyond
        ((10, 0), 2**16, 128, 2**22 - 128, True),
        ((10, 0), 2**16, 128, 2**22, False),  # 2**31 scale tiles
    ],
)
def test_blackwell_takes_what_32_bits_reach(
    capability: tuple[int, int], num_experts: int, n: int, k: int, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = pretend_capability(monkeypatch, capability)
    assert blackwell.takes(Problem(num_experts, n, k, 100, torch.bfloat16, gpu)) is taken
