"""What a device is: its capability, its size, its current stream, and whether kernels run there.

No kernel is imported here, so all of it can be asked where Triton, a compiler or a GPU is missing.
"""

from __future__ import annotations

import functools
import importlib.util

import torch

from hybrid_mxfp8.core.formats import BLOCK_SIZE

TRITON_MIN_CAPABILITY = (8, 9)  # the first with instructions for e4m3
SM100_CAPABILITIES = ((10, 0), (10, 3))  # with the block-scaled MMA of the SM100 family


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


def preferred_scale_group(device: torch.device) -> int:
    """128 on Hopper, whose FP8 tensor cores can sum four blocks of one scale; else 32."""
    return 128 if capability(device) == (9, 0) else BLOCK_SIZE


def default_device() -> torch.device:
    """The current GPU if there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def is_capturing(device: torch.device) -> bool:
    """Whether the device's current stream is being captured into a CUDA graph."""
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()
