"""Group layouts: the reference and the kernel against plain Python, on data of routers and on hostile data."""

from __future__ import annotations

from collections.abc import Callable

import cases
import pytest
import torch
import truth
from hypothesis import given
from hypothesis import strategies as st

import hybrid_mxfp8 as mx
from hybrid_mxfp8 import reference

Offsets = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
GroupOffsets = Callable[[torch.Tensor, int, bool], Offsets]
ALL_DATA = {**cases.RAGGED, **cases.HOSTILE, "no experts": ([], 0), "no experts, padded batch": ([], 7)}


@pytest.fixture
def group_offsets(backend: str) -> GroupOffsets:
    if backend == "reference":
        return reference.group_offsets
    from hybrid_mxfp8.triton_kernels.group_layout import group_offsets

    return group_offsets


def check(group_offsets: GroupOffsets, given: list[int], num_tokens: int, dtype: torch.dtype, from_ends: bool) -> None:
    expected = (truth.layout_from_ends if from_ends else truth.layout)(given, num_tokens)
    got = group_offsets(torch.tensor(given, dtype=dtype), num_tokens, from_ends)
    assert [part.tolist() for part in got] == list(expected)
    assert all(part.dtype == torch.int32 and part.is_contiguous() for part in got)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("from_ends", [False, True], ids=["counts", "ends"])
@pytest.mark.parametrize("name", ALL_DATA)
def test_offsets(group_offsets: GroupOffsets, name: str, dtype: torch.dtype, from_ends: bool) -> None:
    check(group_offsets, *ALL_DATA[name], dtype, from_ends)


@pytest.mark.parametrize("from_ends", [False, True], ids=["counts", "ends"])
@pytest.mark.parametrize("name", cases.HUGE)
def test_offsets_of_huge_int64(group_offsets: GroupOffsets, name: str, from_ends: bool) -> None:
    check(group_offsets, *cases.HUGE[name], torch.int64, from_ends)


@pytest.mark.parametrize(("ends", "num_tokens"), [([5, 3, 9], 9), ([5, 3, 9, 2, 12], 10), ([-3, 0, 4, -1], 4)])
def test_ends_that_fall_make_empty_experts(group_offsets: GroupOffsets, ends: list[int], num_tokens: int) -> None:
    check(group_offsets, ends, num_tokens, torch.int32, True)


@pytest.mark.parametrize("num_experts", [1, 2, 127, 128, 129, 384, 1024])
def test_offsets_of_many_experts(group_offsets: GroupOffsets, num_experts: int, rng: torch.Generator) -> None:
    counts = torch.randint(0, 300, (num_experts,), generator=rng).tolist()
    check(group_offsets, counts, sum(counts), torch.int32, False)


@given(
    counts=st.lists(
        st.sampled_from([2**62, 2**63 - 1, -(2**63)]) | st.integers(-(2**63), 2**63 - 1) | st.integers(-3, 300)
    ),
    num_tokens=st.integers(0, 1000),
    from_ends=st.booleans(),
)
def test_any_int64_data_makes_a_valid_layout(
    group_offsets: GroupOffsets, counts: list[int], num_tokens: int, from_ends: bool
) -> None:
    check(group_offsets, counts, num_tokens, torch.int64, from_ends)


def test_strided_counts(group_offsets: GroupOffsets) -> None:
    counts = torch.tensor([3, 99, 0, 99, 5, 99], dtype=torch.int32)[::2]
    assert group_offsets(counts, 8, False)[1].tolist() == [0, 3, 3, 8]


def test_kernel_writes_nothing_beside_its_output(interpreter: None) -> None:
    """Guard words around it, for a number of experts that is no power of two."""
    from hybrid_mxfp8.triton_kernels.group_layout import group_offsets_kernel

    given = torch.tensor([4, -2, 900, 1, 7], dtype=torch.int32)
    for from_ends in (False, True):
        buffer = torch.full((8 + 5 + 6 + 6 + 8,), -7, dtype=torch.int32)
        group_offsets_kernel[(1,)](given, buffer[8:25], 600, 5, FROM_ENDS=from_ends, BLOCK=8)
        written = torch.zeros_like(buffer, dtype=torch.bool)
        written[8:25] = True
        assert torch.equal(buffer != -7, written)


def test_layout_attributes() -> None:
    groups = mx.GroupLayout.from_counts(torch.tensor([3, 0, 130]), 140)
    assert (groups.num_experts, groups.num_tokens, groups.scale_rows) == (3, 140, (140 + 3 * 127) // 128 * 128)
    assert groups.tokens_per_expert.tolist() == [3, 0, 130]
    assert groups.expert_offsets.tolist() == [0, 3, 3, 133]
    assert groups.scale_offsets.tolist() == [0, 128, 128, 384]
    assert groups.device == torch.device("cpu")


def test_from_ends_equals_from_counts() -> None:
    a = mx.GroupLayout.from_counts(torch.tensor([3, 0, 130]), 140)
    b = mx.GroupLayout.from_ends(torch.tensor([3, 3, 133], dtype=torch.int32), 140)
    for name in ("tokens_per_expert", "expert_offsets", "scale_offsets"):
        assert torch.equal(getattr(a, name), getattr(b, name))
