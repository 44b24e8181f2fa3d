"""Tiles of the quantizer: which are chosen, and that no byte depends on them."""

from __future__ import annotations

import cases
import pytest
import torch

import hybrid_mxfp8 as mx
from hybrid_mxfp8.triton_kernels import quantize
from hybrid_mxfp8.triton_kernels.quantize import QuantizeConfig, can_fuse_counts, select_quantize_config


@pytest.mark.parametrize(
    ("num_rows", "k", "num_experts", "interpreted", "expected"),
    [
        (1, 32, 1, False, QuantizeConfig(1, 128, 16, 1)),
        (8, 4096, 128, False, QuantizeConfig(1, 1024, 16, 4)),
        (2**20 // 2048, 2048, 8, False, QuantizeConfig(1, 1024, 16, 4)),
        (2**20 // 2048 + 1, 2048, 8, False, QuantizeConfig(4, 1024, 16, 4)),
        (256, 7168, 256, False, QuantizeConfig(4, 1024, 16, 4)),
        (131072, 7168, 8, False, QuantizeConfig(2, 2048, 16, 8, True)),
        (8192, 1024, 64, False, QuantizeConfig(2, 1024, 16, 8, True)),
        (16384, 7168, 65, False, QuantizeConfig(8, 512, 4, 4, True)),
        (300, 2880, 4, True, QuantizeConfig(128, 1024, 8, 4, True)),
        (3, 160, 4, True, QuantizeConfig(4, 256, 8, 4, True)),
    ],
)
def test_selected(num_rows: int, k: int, num_experts: int, interpreted: bool, expected: QuantizeConfig) -> None:
    assert select_quantize_config(num_rows, k, num_experts, interpreted) == expected


@pytest.mark.parametrize("interpreted", [False, True])
@pytest.mark.parametrize("k", [32, 64, 128, 160, 2880, 7168, 65536])
def test_every_config_is_valid(k: int, interpreted: bool) -> None:
    for num_rows in (1, 100, 5000, 10**6):
        for num_experts in (1, 1024):
            config = select_quantize_config(num_rows, k, num_experts, interpreted)
            assert config.block_cols % 128 == 0
            for power in (config.block_rows, config.block_cols, config.padding_tiles, config.num_warps):
                assert power & (power - 1) == 0


def test_bytes_do_not_depend_on_the_config(
    interpreter: None, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every tile that a GPU would use, interpreted, over rows most of which no expert owns."""
    x = cases.random_rows(13, 160, torch.bfloat16, rng)
    groups = cases.layout([2, 0, 5], 13)
    expected = mx.quantize_grouped(x, groups, out=cases.poisoned_output(groups, 160), backend="reference")
    for config in (
        QuantizeConfig(1, 128, 1, 2),
        QuantizeConfig(1, 256, 16, 4),
        QuantizeConfig(8, 512, 4, 4),
        QuantizeConfig(8, 512, 4, 4, skip_unowned=True),
        QuantizeConfig(2, 2048, 16, 8, skip_unowned=True),
    ):
        monkeypatch.setattr(quantize, "select_quantize_config", lambda *args, config=config: config)
        cases.forget_calls()
        out = cases.poisoned_output(groups, 160)
        cases.same_bytes(mx.quantize_grouped(x, groups, out=out, backend="triton"), expected)


@pytest.mark.parametrize(
    ("num_rows", "k", "num_experts", "expected"),
    [(1, 32, 1, True), (256, 7168, 256, True), (8, 4096, 1024, True), (8, 4096, 1025, False), (512, 7168, 8, False)],
)
def test_counts_are_scanned_for_small_batches(num_rows: int, k: int, num_experts: int, expected: bool) -> None:
    assert can_fuse_counts(num_rows, k, num_experts) is expected
