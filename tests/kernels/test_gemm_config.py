"""What the host decides for the grouped GEMM: formulation, tile, and how many tiles there may
be."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import cases
import pytest
import torch
import triton
from hypothesis import given
from hypothesis import strategies as st
from products import check, operands

import hybrid_mxfp8 as mx
from hybrid_mxfp8.triton_kernels.gemm import portable
from hybrid_mxfp8.triton_kernels.gemm.hopper_config import select_hopper_config
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
    if formulation == "scaled" and portable._triton_version() < (3, 9):
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
    monkeypatch.setattr(portable, "_capability", lambda device: capability)
    assert portable.blackwell_takes(num_experts, n, k, torch.device("cuda", 0)) is taken


TMA_KERNELS = [
    ("portable", "grouped_gemm_kernel"),
    ("blackwell", "grouped_gemm_blackwell_kernel"),
    ("hopper", "hopper_gemm_kernel"),
    ("dequantize_tokens", "dequantize_tokens_kernel"),
]
PARTS = ["", "x.values", "x.scales", "w.values", "w.scales"]


@pytest.mark.parametrize("unaligned", PARTS)
@pytest.mark.parametrize("kind", ["blackwell", "hopper"])
def test_only_operands_that_tma_reads_reach_its_kernels(
    interpreter: None, kind: str, unaligned: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From 16-byte boundaries: others go to the portable kernel. The Hopper kernel's tokens pass a workspace."""
    launched: list[str] = []

    class Spy:
        def __init__(self, name: str) -> None:
            self.name, self.fn, self.__name__ = name, self, name

        def __getitem__(self, grid: object) -> Callable[..., None]:
            return lambda *args, **options: launched.append(self.name)

    for module, name in TMA_KERNELS:
        monkeypatch.setattr(importlib.import_module(f"hybrid_mxfp8.triton_kernels.gemm.{module}"), name, Spy(name))
    if kind == "blackwell":
        monkeypatch.setattr(portable, "blackwell_takes", lambda *args: True)
    else:
        monkeypatch.setattr(portable, "hopper_config_for", lambda *args: select_hopper_config(9, 3))
        monkeypatch.setattr(portable, "_multiprocessors", lambda device: 132)
    cases.forget_calls()

    def at(name: str, x: torch.Tensor) -> torch.Tensor:
        by = 8 if name == unaligned else 0
        there = cases.aligned_bytes(x.numel() + by)[by:].view(x.dtype).view(x.shape)
        there.view(torch.uint8).copy_(x.view(torch.uint8))
        return there

    xq, wq = operands([4, 0, 5], 9, 16, 64, torch.Generator().manual_seed(0))
    x = mx.GroupedMXFP8(at("x.values", xq.values), at("x.scales", xq.scales), xq.groups)
    mx.grouped_gemm(x, mx.ExpertWeights(at("w.values", wq.values), at("w.scales", wq.scales)), backend="triton")
    taken = unaligned == "" or (kind == "hopper" and unaligned.startswith("x"))
    expected = {
        "blackwell": ["grouped_gemm_blackwell_kernel"],
        "hopper": ["dequantize_tokens_kernel", "hopper_gemm_kernel"],
    }
    assert launched == (expected[kind] if taken else ["grouped_gemm_kernel"])
