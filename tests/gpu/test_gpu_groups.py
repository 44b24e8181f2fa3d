"""Group layouts on the GPU: one launch, no sync, valid whatever the data."""

from __future__ import annotations

from typing import Any

import cases
import pytest
import torch
import truth
from torch.utils._python_dispatch import TorchDispatchMode

import hybrid_mxfp8 as mx
from hybrid_mxfp8.triton_kernels import group_layout

pytestmark = pytest.mark.gpu

ALL_DATA = {**cases.RAGGED, **cases.HOSTILE, "no experts": ([], 0), "no experts, padded batch": ([], 7)}


def check(given: list[int], num_tokens: int, dtype: torch.dtype, from_ends: bool) -> None:
    build = mx.GroupLayout.from_ends if from_ends else mx.GroupLayout.from_counts
    groups = build(torch.tensor(given, dtype=dtype, device="cuda"), num_tokens)
    tokens, offsets, scale_offsets = (truth.layout_from_ends if from_ends else truth.layout)(given, num_tokens)
    assert groups.tokens_per_expert.tolist() == tokens
    assert groups.expert_offsets.tolist() == offsets
    assert groups.scale_offsets.tolist() == scale_offsets


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("from_ends", [False, True], ids=["counts", "ends"])
def test_offsets(from_ends: bool, dtype: torch.dtype) -> None:
    for given, num_tokens in ALL_DATA.values():
        check(given, num_tokens, dtype, from_ends)
    if dtype == torch.int64:
        for given, num_tokens in cases.HUGE.values():
            check(given, num_tokens, dtype, from_ends)


@pytest.mark.parametrize("num_experts", [1, 127, 128, 129, 384, 1024, 4096])
def test_many_experts(num_experts: int, rng: torch.Generator) -> None:
    counts = torch.randint(-3, 300, (num_experts,), generator=rng).tolist()
    check(counts, sum(max(c, 0) for c in counts), torch.int32, False)
    check(torch.tensor(counts).cumsum(0).tolist(), 10**6, torch.int64, True)


class Operators(TorchDispatchMode):
    """Names of the PyTorch operators called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("build", ["from_counts", "from_ends"])
def test_one_launch_and_no_sync(monkeypatch: pytest.MonkeyPatch, build: str, no_sync: None) -> None:
    """One kernel; the only PyTorch operators are those that allocate and those that make views."""
    given = torch.ones(32, dtype=torch.int32, pin_memory=True).to("cuda", non_blocking=True)
    launched: list[Any] = []
    launch = group_layout.launch

    def counting(kernel: Any, *args: Any) -> None:
        launched.append(kernel)
        launch(kernel, *args)

    monkeypatch.setattr(group_layout, "launch", counting)
    with Operators() as operators:
        getattr(mx.GroupLayout, build)(given, 40)
    assert launched == [group_layout.group_offsets_kernel]
    assert set(operators.names) <= {"empty", "split", "split_with_sizes", "slice", "view", "narrow"}
    assert operators.names.count("empty") == 1
