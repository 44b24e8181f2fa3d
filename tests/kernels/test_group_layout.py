"""Group layouts: reference and kernel against plain Python, on routers' and on hostile data."""

from __future__ import annotations

from collections.abc import Callable

import cases
import kernels
import pytest
import torch
import truth
from hypothesis import given
from hypothesis import strategies as st

import hybrid_mxfp8 as mx
from hybrid_mxfp8.core.layout import group_offsets as reference_offsets

GroupOffsets = Callable[..., tuple[torch.Tensor, ...]]
ALL_DATA = {
    **cases.RAGGED,
    **cases.HOSTILE,
    "no experts": ([], 0),
    "no experts, padded batch": ([], 7),
    "falls": ([5, 3, 9, 2, 12], 10),
    "falls below zero": ([-3, 0, 4, -1], 4),
}


def public(given: torch.Tensor, num_tokens: int, from_ends: bool) -> tuple[torch.Tensor, ...]:
    build = mx.GroupLayout.from_ends if from_ends else mx.GroupLayout.from_counts
    with cases.unlooked():
        groups = build(given, num_tokens)
    return groups.tokens_per_expert, groups.expert_offsets, groups.scale_offsets


@pytest.fixture(params=[public, reference_offsets, kernels.group_offsets], ids=["public", "reference", "kernel"])
def group_offsets(request: pytest.FixtureRequest, device: str) -> GroupOffsets:
    if request.param is kernels.group_offsets:
        request.getfixturevalue("kernels_run")
    return request.param  # type: ignore[no-any-return]


def check(group_offsets: GroupOffsets, given: list[int], num_tokens: int, dtype: torch.dtype, from_ends: bool) -> None:
    expected = (truth.layout_from_ends if from_ends else truth.layout)(given, num_tokens)
    tensor = torch.tensor(given, dtype=dtype, device=cases.device())
    for strided in (tensor, torch.stack([tensor, tensor], 1)[:, 0]):
        got = group_offsets(strided, num_tokens, from_ends)
        assert [part.tolist() for part in got] == list(expected)
        assert all(part.dtype == torch.int32 and part.is_contiguous() for part in got)


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("from_ends", [False, True], ids=["counts", "ends"])
def test_offsets(group_offsets: GroupOffsets, dtype: torch.dtype, from_ends: bool) -> None:
    for data in {**ALL_DATA, **(cases.HUGE if dtype == torch.int64 else {})}.values():
        check(group_offsets, *data, dtype, from_ends)


@pytest.mark.parametrize("num_experts", [1, 2, 127, 128, 129, 384, 1024, 4096])
def test_offsets_of_many_experts(group_offsets: GroupOffsets, num_experts: int, rng: torch.Generator) -> None:
    counts = torch.randint(-3, 300, (num_experts,), generator=rng).tolist()
    check(group_offsets, counts, sum(max(count, 0) for count in counts), torch.int32, False)
    check(group_offsets, torch.tensor(counts).cumsum(0).tolist(), 10**6, torch.int64, True)


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


def test_layout_attributes(device: str) -> None:
    groups = mx.GroupLayout.from_indptr(torch.tensor([0, 3, 3, 133], device=device), 140)
    assert (groups.num_experts, groups.num_tokens, groups.scale_rows) == (3, 140, (140 + 3 * 127) // 128 * 128)
    assert groups.device.type == device
    assert groups.tokens_per_expert.tolist() == [3, 0, 130]
    assert groups.expert_offsets.tolist() == [0, 3, 3, 133]
    assert groups.scale_offsets.tolist() == [0, 128, 128, 384]
    same = torch.tensor([1, 2, 4], device=device)  # is read as what it is said to be, call after call
    assert mx.GroupLayout.from_counts(same, 7).tokens_per_expert.tolist() == [1, 2, 4]
    assert mx.GroupLayout.from_ends(same, 7).tokens_per_expert.tolist() == [1, 1, 2]
