"""Whether Triton kernels run on a device: what decides between a kernel and its twin before a
backend is chosen."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from hybrid_mxfp8.core.checks import resolve_device
from hybrid_mxfp8.dispatch import device as hardware

GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _forget(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    hardware.compiles_kernels.cache_clear()
    yield
    hardware.compiles_kernels.cache_clear()


@pytest.mark.parametrize(("found", "expected"), [((8, 0), False), ((8, 9), True), ((9, 0), True), ((12, 0), True)])
def test_by_capability(monkeypatch: pytest.MonkeyPatch, found: tuple[int, int], expected: bool) -> None:
    monkeypatch.setattr(hardware, "capability", lambda device: found)
    monkeypatch.setattr(hardware, "has_triton", lambda: True)
    assert hardware.compiles_kernels(GPU) is expected


def test_not_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a layout, and the reference backend behind it, works on a GPU where Triton is
    missing."""
    monkeypatch.setattr(hardware, "capability", lambda device: (9, 0))
    monkeypatch.setattr(hardware, "has_triton", lambda: False)
    assert not hardware.compiles_kernels(GPU)


def test_not_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "capability", lambda device: (9, 0))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert not hardware.compiles_kernels(GPU)


def test_not_on_rocm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "capability", lambda device: (9, 4))
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert not hardware.compiles_kernels(GPU)


def test_devices_are_counted_from_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [resolve_device(f"cuda:{index}").index for index in range(2)] == [0, 1]
    with pytest.raises(ValueError, match=r"^device: there are 2 GPUs that this PyTorch can use, got 'cuda:2'"):
        resolve_device("cuda:2")


def test_not_on_a_cpu() -> None:
    assert not hardware.compiles_kernels(torch.device("cpu"))
