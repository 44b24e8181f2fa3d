"""What every launcher needs around its launch."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
import triton

from hybrid_mxfp8.triton_kernels.numerics import INTERPRET

INTERPRETED: bool = INTERPRET.value
"""Whether this process's kernels run in Triton's interpreter, on the CPU."""

_NOTHING: contextlib.AbstractContextManager[None] = contextlib.nullcontext()


@functools.cache
def _several_gpus() -> bool:
    return torch.cuda.device_count() > 1


def on_device_of(tensor: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Make ``tensor``'s GPU current: Triton launches on the current device, whatever its arguments are on."""
    if tensor.is_cuda and _several_gpus() and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return _NOTHING


def raw(fp8: torch.Tensor) -> torch.Tensor:
    """An e4m3 tensor as a kernel argument: the interpreter knows its bytes alone."""
    return fp8.view(torch.uint8) if INTERPRETED else fp8


@dataclass(frozen=True)
class Loaded:
    """A compiled kernel on its device.

    Attributes:
        kernel: what Triton compiled.
        stream_of: the raw handle of a device's current stream; None where Triton must launch the kernel itself.
        device_index: the device.
    """

    kernel: Any
    stream_of: Callable[[int], int] | None
    device_index: int


_loaded: dict[Hashable, Loaded] = {}
_locks: dict[int, contextlib.AbstractContextManager[object]] = {}
_RUNTIME: Any = triton.knobs.runtime


def _launcher_is_known(version: str = triton.__version__) -> bool:
    """Whether this Triton's launcher takes the arguments that :func:`launch` hands it."""
    return (3, 6) <= tuple(map(int, version.split(".")[:2])) <= (3, 9)


def _one_thread() -> contextlib.AbstractContextManager[object]:
    """A lock of this process: a fork's child gets a new one, since the thread that held its parent's is not there.

    Triton's interpreter keeps the place in the grid, and the functions it patches, in globals of the process: two
    threads in it at once fail, or compute each other's tiles. Compiling is locked so that threads that come to a
    kernel together compile it once; compiled kernels are launched without it.
    """
    return _locks.setdefault(os.getpid(), threading.RLock())


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
    specialized; its launcher takes what was compiled as it is.

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
        with _one_thread():
            kernel[(programs,)](*arguments, *constants, **dict(options))
        return
    full_key = (key, constants, options, arguments[0].device)
    loaded = _loaded.get(full_key)
    if loaded is None:
        with _one_thread():
            loaded = _loaded.get(full_key)
            if loaded is None:
                _loaded[full_key] = _load(kernel, programs, arguments, constants, options)
                return
    compiled = loaded.kernel
    if loaded.stream_of is None or _RUNTIME.launch_enter_hook.calls or _RUNTIME.launch_exit_hook.calls:
        compiled[(programs, 1, 1)](*arguments, *constants)
        return
    # As CompiledKernel.__getitem__ does, less what only hooks, such as a profiler's, need.
    stream = loaded.stream_of(loaded.device_index)
    compiled.run(
        programs, 1, 1, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments, *constants
    )


def _load(
    kernel: Any,
    programs: int,
    arguments: tuple[Any, ...],
    constants: tuple[Hashable, ...],
    options: tuple[tuple[str, int], ...],
) -> Loaded:
    """Compile the kernel or find it in Triton's cache, and launch it."""
    _forget_in_children()
    compiled = kernel[(programs,)](*arguments, *constants, **dict(options))
    stream_of = triton.runtime.driver.active.get_current_stream if _launcher_is_known() else None
    return Loaded(compiled, stream_of, arguments[0].device.index)


@functools.cache
def _forget_in_children() -> None:
    """What is loaded here is not in a forked child: there Triton's dispatch must meet PyTorch's check of CUDA, and its error."""
    os.register_at_fork(after_in_child=lambda: _loaded.clear())


def aligned(*tensors: torch.Tensor) -> bool:
    """Whether all of them start at a 16-byte boundary."""
    bits = 0
    for tensor in tensors:
        bits |= tensor.data_ptr()
    return bits % 16 == 0
