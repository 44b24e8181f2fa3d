"""A Hopper GPU that isn't there: kernels and what launches them are stand-ins, its memory is the CPU's."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import cases
import pytest
import torch
import triton
from fake_triton import Device, Flat, Kernel, Nested

LAUNCHERS = {"3.6": Flat, "3.7": Nested}
"""CudaLaunchers by the first Triton that has such a one."""

Arguments = dict[str, Any]


def stand_in(monkeypatch: pytest.MonkeyPatch, version: str) -> Device:
    """Have every kernel launched on the returned device, with launchers as in a version of Triton."""
    from hybrid_mxfp8.triton_kernels import (
        combine,
        dequantize_tokens,
        expert_bias,
        grouped_gemm,
        grouped_gemm_hopper,
        launch,
        quantize,
        route,
    )

    device = Device()
    monkeypatch.setattr(importlib.import_module("hybrid_mxfp8.dispatch.registry"), "_interpreted", lambda: True)
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(launch, "_loaded", {})
    monkeypatch.setattr(grouped_gemm, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(grouped_gemm, "_multiprocessors", lambda device: 132)
    monkeypatch.setattr(grouped_gemm, "formulation_for", lambda device: "bf16")
    fake = SimpleNamespace(get_current_stream=lambda index: device.stream)
    monkeypatch.setattr(triton.runtime.driver, "_active", fake)
    for module, name in (
        (route, "rank_kernel"),
        (route, "count_kernel"),
        (route, "sum_kernel"),
        (route, "scatter_kernel"),
        (quantize, "quantize_kernel"),
        (dequantize_tokens, "dequantize_tokens_kernel"),
        (grouped_gemm, "grouped_gemm_kernel"),
        (grouped_gemm_hopper, "hopper_gemm_kernel"),
        (expert_bias, "expert_bias_kernel"),
        (combine, "combine_kernel"),
    ):
        monkeypatch.setattr(module, name, Kernel(name, device, LAUNCHERS[version]))
    return device


def aligned_bytes(size: int) -> torch.Tensor:
    """A boundary of 256 bytes, as PyTorch allocates on a GPU."""
    buffer = torch.zeros(size + 256, dtype=torch.uint8)
    start = -buffer.data_ptr() % 256
    return buffer[start : start + size]


def fp8(*shape: int) -> torch.Tensor:
    size = torch.Size(shape).numel()
    return aligned_bytes(size).view(shape).view(torch.float8_e4m3fn)


def moved(tensor: torch.Tensor) -> torch.Tensor:
    there = aligned_bytes(tensor.numel() * tensor.itemsize)
    there.copy_(tensor.contiguous().view(torch.uint8).view(-1))
    return there.view(tensor.dtype).view(tensor.shape)


def shrunk(tensor: torch.Tensor, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Another shape, or dtype, at the same address."""
    dtype = dtype or tensor.dtype
    size = torch.Size(shape).numel() * dtype.itemsize
    return tensor.view(torch.uint8).view(-1)[:size].view(dtype).view(shape)


def run(function: Callable[..., object], arguments: Arguments, device: Device) -> list[Any]:
    """What it launches."""
    device.take()
    function(**arguments)
    return list(device.launches)


def warm(function: Callable[..., object], arguments: Arguments, device: Device) -> list[Any]:
    """What it launches every time, the third by repeating."""
    first = run(function, arguments, device)
    assert device.by_triton or not first
    for with_tensors in (True, False, False):
        assert run(function, arguments, device) == first
        assert (device.by_triton, set(device.with_tensors)) == ([], {with_tensors})
    return first


def check_changed(
    function: Callable[..., object], arguments: Arguments, changed: Arguments, device: Device
) -> tuple[list[Any], list[Any]]:
    """The launches before and after the change, which are those of a process that has seen no other call."""
    before = warm(function, arguments, device)
    after = run(function, changed, device)
    assert run(function, arguments, device) == before
    for _ in range(3):
        assert run(function, changed, device) == after
    cases.forget_calls()
    assert run(function, changed, device) == after
    return before, after
