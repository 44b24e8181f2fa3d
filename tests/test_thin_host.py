"""The host side of an eager call: what it allocates and launches. Counted, not timed: bench/ times."""

from __future__ import annotations

from typing import Any

import cases
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import hybrid_mxfp8 as mx

ALLOCATIONS = (
    "aten.empty",
    "aten.zeros",
    "aten.ones",
    "aten.full",
    "aten.clone",
    "aten._to_copy",
    "aten.new_",
    "aten.arange",
)


class Recorder(TorchDispatchMode):
    """The names of the operators that PyTorch dispatches."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))

    @property
    def allocations(self) -> list[str]:
        return [name for name in self.names if name.startswith(ALLOCATIONS)]


@pytest.fixture
def launches(interpreter: None, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The kernels launched, which do not run: what runs inside a kernel is no host work."""
    from hybrid_mxfp8.triton_kernels import group_layout, quantize
    from hybrid_mxfp8.triton_kernels.gemm import portable as grouped_gemm

    seen: list[Any] = []
    for module in (group_layout, grouped_gemm, quantize):
        monkeypatch.setattr(module, "launch", lambda kernel, *args, **kwargs: seen.append(kernel))
    return seen


@pytest.fixture
def operands(interpreter: None, rng: torch.Generator) -> tuple[torch.Tensor, mx.GroupedMXFP8, mx.ExpertWeights]:
    x = cases.random_rows(9, 64, torch.bfloat16, rng)
    groups = cases.layout([4, 0, 5], 9)
    xq = mx.quantize_grouped(x, groups, backend="triton")
    return x, xq, mx.quantize_weights(torch.randn(3, 16, 64, generator=rng), backend="triton")


def test_quantize_is_one_launch_and_two_allocations(operands: Any, launches: list[Any]) -> None:
    x, xq, _ = operands
    with Recorder() as recorder:
        mx.quantize_grouped(x, xq.groups, backend="triton")
    assert len(launches) == 1
    assert len(recorder.allocations) == 2, recorder.names  # values, scales


def test_quantize_into_buffers_allocates_nothing(operands: Any, launches: list[Any]) -> None:
    x, xq, _ = operands
    with Recorder() as recorder:
        mx.quantize_grouped(x, xq.groups, out=xq, backend="triton")
    assert len(launches) == 1
    assert recorder.allocations == []


def test_counts_cost_one_allocation_and_no_launch(operands: Any, launches: list[Any]) -> None:
    x, xq, _ = operands
    with Recorder() as recorder:
        mx.quantize_grouped(x, xq.groups.tokens_per_expert, out=xq, backend="triton")
    assert len(launches) == 1
    assert len(recorder.allocations) == 1, recorder.names  # the layout


def test_gemm_is_one_launch_and_one_allocation(operands: Any, launches: list[Any]) -> None:
    _, xq, wq = operands
    with Recorder() as recorder:
        mx.grouped_gemm(xq, wq, backend="triton")
    assert len(launches) == 1
    assert len(recorder.allocations) == 1, recorder.names  # the output


def test_gemm_into_buffers_allocates_nothing(operands: Any, launches: list[Any]) -> None:
    _, xq, wq = operands
    out = torch.empty(9, 16, dtype=torch.bfloat16)
    workspace = torch.empty(mx.grouped_gemm_workspace_size(wq, 9, backend="triton"), dtype=torch.uint8)
    with Recorder() as recorder:
        mx.grouped_gemm(xq, wq, out=out, workspace=workspace, backend="triton")
    assert len(launches) == 1
    assert recorder.allocations == []
