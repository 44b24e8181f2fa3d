"""What every launcher needs around its launch."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable
from typing import Any

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


_compiled: dict[Hashable, Any] = {}


def launch(
    kernel: Any,
    programs: int,
    arguments: tuple[Any, ...],
    constants: tuple[Hashable, ...],
    options: tuple[tuple[str, int], ...],
    key: Hashable,
) -> None:
    """Launch ``kernel`` on a grid of ``programs``, through Triton's dispatch the first time only.

    Triton's dispatch of a call costs 8 to 11 us of host time, most of it spent on finding out again how the kernel is
    specialized; launching what it compiled costs less than 2.

    Args:
        kernel: a jitted function whose constexpr parameters come last.
        programs: size of the grid; 0 launches nothing.
        arguments: the other parameters, in order; the first is a tensor on the device to launch on.
        constants: the constexpr parameters, in order.
        options: compile options, such as ``(("num_warps", 4),)``.
        key: all that Triton specializes ``arguments`` on, besides the device: the kernel, dtypes, 16-byte alignment
            of pointers, and each integer that is not in ``do_not_specialize``.
    """
    if not programs:
        return
    if INTERPRETED:
        kernel[(programs,)](*arguments, *constants, **dict(options))
        return
    full_key = (key, constants, options, arguments[0].device)
    compiled = _compiled.get(full_key)
    if compiled is None:
        _compiled[full_key] = kernel[(programs,)](*arguments, *constants, **dict(options))
    else:
        compiled[(programs, 1, 1)](*arguments, *constants)


def aligned(*tensors: torch.Tensor) -> bool:
    """Whether all of them start at a 16-byte boundary."""
    bits = 0
    for tensor in tensors:
        bits |= tensor.data_ptr()
    return bits % 16 == 0
