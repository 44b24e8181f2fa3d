"""Other backends and devices in the place of those that are there."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import cases
import pytest
import torch

from hybrid_mxfp8.dispatch import registry

DEVICE_USERS = (
    "hybrid_mxfp8.dispatch.problem",
    "hybrid_mxfp8.dispatch.registry",
    "hybrid_mxfp8.triton_kernels.backend",
    "hybrid_mxfp8.cutlass_kernels.backend",
)


def replace_backend(monkeypatch: pytest.MonkeyPatch, name: str, **changes: Any) -> None:
    """With other functions, such as ``can_run=lambda problem: (False, "no")``."""
    monkeypatch.setitem(registry._backends, name, registry.backend_of(name)._replace(**changes))
    cases.forget_calls()


def pretend_capability(monkeypatch: pytest.MonkeyPatch, value: tuple[int, int] | None) -> torch.device:
    """A CUDA device of this compute capability, without one; kernels count as compiled."""
    for name in DEVICE_USERS:
        module = importlib.import_module(name)
        monkeypatch.setattr(module, "capability", lambda device: value if device.type == "cuda" else None)
    monkeypatch.setattr(importlib.import_module("hybrid_mxfp8.triton_kernels.backend"), "INTERPRETED", False)
    return torch.device("cuda", 0)


class EveryCallTakes10Us:
    """In place of a GPU's timer: runs what it is given once."""

    failures = (RuntimeError, TypeError, ValueError, AttributeError, ImportError, OSError, AssertionError)

    def capture(self, calls: Callable[[], None]) -> Callable[[], None]:
        calls()
        return lambda: None

    def sample(self, replay: Callable[[], None]) -> Callable[[], float]:
        return lambda: 10.0

    def synchronize(self) -> None:
        pass
