"""What a device is, whether there is one of a name, and whether Triton kernels run on it. No kernel is imported here."""

from __future__ import annotations

import functools
import importlib.util

import torch

from hybrid_mxfp8 import env

TRITON_MIN_CAPABILITY = (8, 9)
"""The first with instructions for e4m3."""


@functools.cache
def capability(device: torch.device) -> tuple[int, int] | None:
    """Compute capability; None on a CPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


@functools.cache
def multiprocessors(device: torch.device) -> int | None:
    """Streaming multiprocessors; None on a CPU."""
    if device.type != "cuda":
        return None
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def compiles_kernels(device: torch.device) -> bool:
    """Whether Triton kernels of this package run on ``device`` compiled; False for a CPU."""
    found = capability(device)
    return (
        found is not None
        and found >= TRITON_MIN_CAPABILITY
        and torch.version.hip is None
        and has_triton()
        and not env.triton_interpret()
    )


def resolve_device(given: torch.device | str) -> torch.device:
    """The device of this name.

    Raises:
        ValueError: no such device here.
    """
    try:
        device = torch.device(given)
    except (RuntimeError, TypeError):
        raise ValueError(f"device: must be a torch.device or the name of one, got {given!r}") from None
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ValueError(f"device: there are {count} GPUs that this PyTorch can use, got {str(device)!r}")
    return device
