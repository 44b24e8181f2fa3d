"""The geometry of scales: formulas against layouts walked element by element."""

from __future__ import annotations

import itertools

import pytest
import torch
import truth
from hypothesis import given
from hypothesis import strategies as st

import hybrid_mxfp8 as mx
from hybrid_mxfp8.core import formats


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (128, 4), (129, 5), (31, 90), (300, 7), (257, 8)])
def test_scales_are_stored_tile_by_tile(rows: int, cols: int) -> None:
    linear = (torch.arange(rows * cols) * 37 % 251 + 1).to(torch.uint8).view(rows, cols)  # neighbours differ
    stored = mx.swizzle_scales(linear).reshape(-1)
    assert truth.as_bytes(stored).tobytes() == truth.swizzle(linear.numpy()).tobytes()
    padded_cols = formats.round_up(cols, 4)
    for row, col in itertools.product(range(rows), range(cols)):
        assert stored[formats.scale_offset(row, col, padded_cols)] == linear[row, col]


def test_the_first_bytes_of_a_tile_are_rows_0_32_64_96() -> None:
    """The 128x4 tile by hand: 4 columns of row 0, then of row 32, 64, 96, then of row 1."""
    linear = torch.arange(128, dtype=torch.uint8)[:, None] + torch.zeros(4, dtype=torch.uint8)
    stored = mx.swizzle_scales(linear).reshape(-1)
    assert stored[:20].tolist() == [0] * 4 + [32] * 4 + [64] * 4 + [96] * 4 + [1] * 4


@given(rows=st.integers(0, 300), cols=st.integers(0, 40), batch=st.sampled_from([(), (1,), (3,), (2, 2)]))
def test_unswizzle_inverts_swizzle(rows: int, cols: int, batch: tuple[int, ...]) -> None:
    seeded = torch.Generator().manual_seed(rows)
    linear = torch.randint(0, 256, (*batch, rows, cols), dtype=torch.uint8, generator=seeded)
    swizzled = mx.swizzle_scales(linear)
    assert swizzled.shape == (*batch, formats.padded_scale_rows(rows), formats.round_up(cols, 4))
    assert torch.equal(mx.swizzle_scales(linear.mT.contiguous().mT), swizzled)
    assert torch.equal(mx.swizzle_scales(linear.view(torch.float8_e8m0fnu)), swizzled)
    spread, typed = torch.stack([swizzled, swizzled], -1)[..., 0], swizzled.view(torch.float8_e8m0fnu)
    for stored in (swizzled, spread, typed):
        assert torch.equal(mx.unswizzle_scales(stored, rows, cols), linear)


def needed_scale_rows(counts: list[int]) -> int:
    return sum(truth.padded(count, 128) for count in counts)


@given(counts=st.lists(st.integers(0, 400), max_size=20), beyond=st.integers(0, 5))
def test_grouped_scale_rows_suffices_and_is_tight(counts: list[int], beyond: int) -> None:
    """One token each and the rest to the first expert needs every row of the bound."""
    num_tokens, num_experts = sum(counts) + beyond, len(counts)
    bound = formats.grouped_scale_rows(num_tokens, num_experts)
    assert needed_scale_rows(counts) <= bound
    if counts:
        worst = [int(e < num_tokens) for e in range(num_experts)]
        worst[0] += num_tokens - sum(worst)
        assert needed_scale_rows(worst) == bound
