"""What every launcher needs around its launch."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton

from hybrid_mxfp8.triton_kernels.c_launcher import CLauncher, find_c_launcher
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
        device_index: the device.
        c_launcher: how to launch it without Triton's Python; None where Triton must do it.
    """

    kernel: Any
    device_index: int
    c_launcher: CLauncher | None


class Launched(NamedTuple):
    """A launch that was made, with its tensors."""

    loaded: Loaded
    c_launcher: CLauncher
    programs: int
    after_stream: tuple[Any, ...]

    def repeat(self) -> Repeat:
        """What makes the same launch again, and keeps no tensor."""
        return Repeat(self)


class Repeat:
    """A launch that can be made again: ``repeat()`` makes it on the current stream, with the numbers it was made with.

    Addresses are among them, but no tensors: right for whatever lies there, if shapes, strides and dtypes are those of the
    first time. ``repeat()`` is True; or False, with nothing done, where Triton must launch: while hooks are installed, such
    as a profiler's, and in a forked child, to which the kernel's handle is of no use.
    """

    __slots__ = ("_after_stream", "_device_index", "_launch", "_loaded", "_process", "_programs", "_stream_of")

    def __init__(self, made: Launched) -> None:
        self._loaded = made.loaded  # Triton unloads a kernel that nobody holds
        self._launch = made.c_launcher.launch
        self._programs = made.programs
        self._after_stream = made.c_launcher.without_tensors(made.after_stream)
        self._stream_of = made.c_launcher.stream_of
        self._device_index = made.loaded.device_index
        self._process = _process

    def __call__(self) -> bool:
        """Launch; whether that was done."""
        if self._process is not _process or _RUNTIME.launch_enter_hook.calls or _RUNTIME.launch_exit_hook.calls:
            return False
        device_index = self._device_index
        if _several_gpus() and device_index != torch.cuda.current_device():
            with torch.cuda.device(device_index):
                self._launch(self._programs, 1, 1, self._stream_of(device_index), *self._after_stream)
        else:
            self._launch(self._programs, 1, 1, self._stream_of(device_index), *self._after_stream)
        return True


_loaded: dict[Hashable, Loaded] = {}
_locks: dict[int, contextlib.AbstractContextManager[object]] = {}
_RUNTIME: Any = triton.knobs.runtime
_process = object()  # another one in a forked child


def _launcher_is_known(version: str = triton.__version__) -> bool:
    """Whether this Triton's launcher is one that ``c_launcher`` was written for."""
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
) -> Launched | None:
    """Launch ``kernel`` on a grid of ``programs``, through Triton's dispatch the first time only.

    Triton's dispatch of a call costs 8 to 11 us of host time, most of it spent on finding out again how the kernel is
    specialized; its C function takes what was compiled as it is.

    Args:
        kernel: a jitted function whose constexpr parameters come last.
        programs: size of the grid; 0 launches nothing.
        arguments: the other parameters, in order; the first is a tensor on the device to launch on.
        constants: the constexpr parameters, in order.
        options: compile options, such as ``(("num_warps", 4),)``.
        key: all that Triton specializes ``arguments`` on, besides the device: the kernel, dtypes, 16-byte alignment
            of pointers, and each integer that is not in ``do_not_specialize``.

    Returns:
        The launch, to be repeated; None where nothing was launched, or Triton did it.
    """
    if not programs:
        return None
    if INTERPRETED:
        with _one_thread():
            kernel[(programs,)](*arguments, *constants, **dict(options))
        return None
    full_key = (key, constants, options, arguments[0].device)
    loaded = _loaded.get(full_key)
    if loaded is None:
        with _one_thread():
            loaded = _loaded.get(full_key)
            if loaded is None:
                _loaded[full_key] = _load(kernel, programs, arguments, constants, options)
                return None
    c_launcher = loaded.c_launcher
    if c_launcher is None or _RUNTIME.launch_enter_hook.calls or _RUNTIME.launch_exit_hook.calls:
        loaded.kernel[(programs, 1, 1)](*arguments, *constants)
        return None
    after_stream = c_launcher.after_stream(arguments + constants)
    c_launcher.launch(programs, 1, 1, c_launcher.stream_of(loaded.device_index), *after_stream)
    return Launched(loaded, c_launcher, programs, after_stream)


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
    c_launcher = find_c_launcher(compiled, len(arguments) + len(constants)) if _launcher_is_known() else None
    return Loaded(compiled, arguments[0].device.index, c_launcher)


@functools.cache
def _forget_in_children() -> None:
    """What is loaded here is not in a forked child: there Triton's dispatch must meet PyTorch's check of CUDA, and its error."""
    os.register_at_fork(after_in_child=_forget)


def _forget() -> None:
    global _process
    _loaded.clear()
    _process = object()


def aligned(*tensors: torch.Tensor) -> bool:
    """Whether all of them start at a 16-byte boundary."""
    bits = 0
    for tensor in tensors:
        bits |= tensor.data_ptr()
    return bits % 16 == 0
