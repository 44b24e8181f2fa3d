"""Tokens in bf16, in wgmma's order of columns, and the list of token tiles."""

from __future__ import annotations

from collections.abc import Sequence

import cases
import kernels
import numpy as np
import pytest
import torch
import truth
from hypothesis import given, settings

import hybrid_mxfp8 as mx
from hybrid_mxfp8.triton_kernels.gemm.dequantize_tokens import DequantizeConfig, select_dequantize_config
from hybrid_mxfp8.triton_kernels.gemm.hopper_config import HopperGemmConfig, WorkspaceLayout

pytestmark = pytest.mark.usefixtures("interpreter")
BLOCKS_T = (16, 256)


def operand_order(k: int) -> list[int]:
    """The column at each place: thread c of a quad deals its 16 neighbouring bytes out to four
    instructions in turn.

    Of an instruction's 16 columns it holds 2c, 2c + 1, 2c + 8 and 2c + 9 (PTX, wgmma's fragment of
    matrix A).
    """
    order = [-1] * k
    for group in range(0, k, 64):
        for c in range(4):
            own = iter(range(group + 16 * c, group + 16 * c + 16))
            for step in range(4):
                for column in (2 * c, 2 * c + 1, 2 * c + 8, 2 * c + 9):
                    order[group + 16 * step + column] = next(own)
    assert sorted(order) == list(range(k))
    return order


def dequantized(xq: mx.GroupedMXFP8, block_t: int, rows: int | None = None) -> tuple[torch.Tensor, list[list[int]]]:
    """Into poison: (T, roundup(K, 64)) bf16, the first ``rows`` or all; and the tiles listed."""
    layout = WorkspaceLayout.of(xq.groups.num_tokens, xq.groups.num_experts, xq.k, HopperGemmConfig(block_t, 16, 64, 2))
    workspace = torch.full((layout.size,), cases.POISON, dtype=torch.uint8)
    wanted = layout.num_tokens if rows is None else rows
    kernels.dequantize_tokens(xq, workspace, layout, block_t, wanted)
    words, expanded = kernels.hopper_workspace(layout, workspace)
    listed = words.tolist()
    assert listed[0][1] == 0, "slices taken"
    assert all(row[3] == 0 for row in listed[1 : 1 + listed[0][0]]), "slices done"
    return expanded, [row[:3] for row in listed[1 : 1 + listed[0][0]]]


def check(counts: Sequence[int], num_tokens: int, k: int, block_t: int, rng: torch.Generator) -> None:
    groups = cases.layout(counts, num_tokens)
    x = cases.random_rows(num_tokens, k, torch.bfloat16, rng)
    xq = mx.quantize_grouped(x, groups, out=cases.poisoned_output(groups, k), backend="reference")
    expanded, tiles = dequantized(xq, block_t)
    used = sum(counts)
    padded = np.zeros((used, expanded.shape[1]))
    padded[:, :k] = truth.doubles(xq.dequantize()[:used])
    assert np.array_equal(truth.doubles(expanded[:used]), padded[:, operand_order(expanded.shape[1])])
    reach = min(used + block_t, num_tokens)
    assert not truth.as_bytes(expanded[used:reach]).any(), "the last tile may reach into these"
    assert bool((truth.as_bytes(expanded[reach:]) == cases.POISON).all()), "rows that no expert owns"
    _, offsets, _ = truth.layout(counts, num_tokens)
    assert tiles == [
        [e, first, offsets[e + 1]]
        for e in range(len(counts))
        for first in range(offsets[e], offsets[e + 1], block_t)
    ]  # fmt: skip


@pytest.mark.parametrize("block_t", BLOCKS_T)
@pytest.mark.parametrize("name", [name for name, (_, t) in cases.RAGGED.items() if t])
def test_ragged(name: str, block_t: int, rng: torch.Generator) -> None:
    counts, num_tokens = cases.RAGGED[name]
    check(counts, num_tokens, 96, block_t, rng)


@pytest.mark.parametrize("k", [32, 64, 96, 128, 1056])
def test_columns_beyond_k_are_zero(k: int, rng: torch.Generator) -> None:
    check([3, 0, 2, 4], 9, k, 16, rng)


@pytest.mark.parametrize("rows", [0, 16, 64])
def test_only_the_first_rows(rows: int, rng: torch.Generator) -> None:
    """The product fused_dequantize the others itself, and needs the whole list."""
    counts, k = [30, 0, 41, 50], 96
    groups = cases.layout(counts)
    xq = mx.quantize_grouped(cases.random_rows(121, k, torch.bfloat16, rng), groups, backend="reference")
    all_rows, all_tiles = dequantized(xq, 16)
    expanded, tiles = dequantized(xq, 16, rows)
    assert tiles == all_tiles
    assert torch.equal(expanded[:rows], all_rows[:rows])
    # The interpreter's programs are of 64 rows.
    assert bool((truth.as_bytes(expanded[-(-rows // 64) * 64 :]) == cases.POISON).all())


def test_more_tiles_of_an_expert_than_are_listed_at_once(rng: torch.Generator) -> None:
    groups = cases.layout([3, 16 * 128 + 1, 40])
    _, tiles = dequantized(mx.quantize_grouped(torch.zeros(2092, 32), groups, backend="reference"), 16, rows=0)
    ends = [3, 2052, 2092]
    expected = [[e, first, ends[e]] for e, start in enumerate([0, *ends[:2]]) for first in range(start, ends[e], 16)]
    assert tiles == expected


@pytest.mark.parametrize(
    ("num_tokens", "k", "config"),
    [
        (0, 64, DequantizeConfig(1, 128, 2)),
        (32, 7168, DequantizeConfig(1, 512, 2)),
        (2048, 1024, DequantizeConfig(1, 512, 2)),
        (2049, 1024, DequantizeConfig(4, 1024, 4)),
        (8192, 7168, DequantizeConfig(4, 1024, 4)),
    ],
)
def test_select_dequantize_config(num_tokens: int, k: int, config: DequantizeConfig) -> None:
    assert select_dequantize_config(num_tokens, k) == config


@settings(max_examples=10)
@given(case=cases.ragged(max_experts=6, max_tokens=60))
def test_any_layout(case: cases.Ragged) -> None:
    if case.num_tokens:
        check(case.counts, case.num_tokens, 64, 16, torch.Generator().manual_seed(0))


def test_every_code_with_every_scale() -> None:
    """Exact from 2**-133 up; below, half a unit may be lost. 255 and NaN codes are NaN."""
    codes = np.tile(np.arange(256, dtype=np.uint8), (256, 1))
    scales = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 8, axis=1)
    xq = mx.GroupedMXFP8(
        torch.from_numpy(codes).view(torch.float8_e4m3fn),
        torch.from_numpy(truth.swizzle(scales)).view(256, 8),
        cases.layout([256]),
    )
    expanded, _ = dequantized(xq, 16)
    got, expected = truth.doubles(expanded), truth.dequantize(codes, scales)[:, operand_order(256)]
    assert np.array_equal(np.isnan(got), np.isnan(expected))
    finite = np.isfinite(expected) & (np.abs(expected) < 2.0**128)
    loss = np.where(finite, np.abs(np.where(finite, got, 0) - np.where(finite, expected, 0)), 0)
    assert loss[3:].max() == 0
    assert 0 < loss.max() <= 2.0**-134
    assert bool(np.isinf(got[np.abs(expected) >= 2.0**128]).all())


@pytest.mark.parametrize(
    "offsets", [(0, 1000, 2000, 30, 70000), (-50, 20, 10, 64, 90), (0, 64, 0, 64, 64), (2**31 - 1, -(2**31), 0, 5, 5)]
)
def test_a_layout_put_together_by_hand_lists_no_row_outside(offsets: tuple[int, ...], rng: torch.Generator) -> None:
    """Overlapping, falling and far offsets: tiles stay within T rows, their list in its buffer."""
    good = cases.layout([16, 16, 16, 16])
    xq = mx.quantize_grouped(cases.random_rows(64, 64, torch.bfloat16, rng), good, backend="reference")
    bad = mx.GroupLayout.unchecked(
        good.tokens_per_expert, torch.tensor(offsets, dtype=torch.int32), good.scale_offsets, 64
    )
    _, tiles = dequantized(mx.GroupedMXFP8(xq.values, xq.scales, bad), 16)
    for expert, first, end in tiles:
        assert 0 <= expert < 4
        assert 0 <= first < end <= 64


def test_scales_far_outside_are_not_read(rng: torch.Generator) -> None:
    """Of a layout put together by hand: rows whose scales don't exist get the scale 0, 2**-127."""
    good = cases.layout([16, 16])
    xq = mx.quantize_grouped(cases.random_rows(32, 64, torch.bfloat16, rng), good, backend="reference")
    scale_offsets = torch.tensor([0, 2**31 - 128, 2**31 - 128], dtype=torch.int32)
    bad = mx.GroupLayout.unchecked(good.tokens_per_expert, good.expert_offsets, scale_offsets, 32)
    expanded, _ = dequantized(mx.GroupedMXFP8.unchecked(xq.values, xq.scales, bad), 16)
    assert torch.equal(expanded[:16], dequantized(xq, 16)[0][:16])
    assert float(expanded[16:].float().abs().max()) <= 448 * 2.0**-127
