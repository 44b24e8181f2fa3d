"""What every launcher needs around its launch."""

from __future__ import annotations

import contextlib

import torch

from hybrid_mxfp8.triton_kernels.numerics import INTERPRET

INTERPRETED: bool = INTERPRET.value
"""Whether this process's kernels run in Triton's interpreter, on the CPU."""

_NOTHING: contextlib.AbstractContextManager[None] = contextlib.nullcontext()


def on_device_of(tensor: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Make ``tensor``'s GPU current: Triton launches on the current device, whatever its arguments are on."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return _NOTHING


def raw(fp8: torch.Tensor) -> torch.Tensor:
    """An e4m3 tensor as a kernel argument: the interpreter knows its bytes alone."""
    return fp8.view(torch.uint8) if INTERPRETED else fp8
