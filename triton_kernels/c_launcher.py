"""Triton's C launch function, and how to call it with numbers alone.

``compiled.run``, a ``CudaLauncher``, is Python around a C function: it looks for scratch memory that no kernel here asks
for, encodes each host tensor descriptor for TMA (2 to 3 us each), and lets the C function ask each tensor for its
address and the driver about each address. The C function takes an int for a pointer as it is; with descriptors encoded
before, numbers are all that it is handed, so that a launch can be made again without its tensors.

What ``run`` hands on differs from one Triton to the next, and is not written down here but recorded: ``run`` is called once
with marks for arguments, and a function that notes them in the C function's place.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton

_PLAIN = frozenset({int, bool, str, types.NoneType})
"""What most arguments are."""


@dataclass(frozen=True)
class CLauncher:
    """The C function of a kernel, and what it takes: (gridX, gridY, gridZ, stream, *fixed, the kernel's arguments).

    Attributes:
        launch: the C function.
        stream_of: the raw handle of a device's current stream, from its index.
        fixed: what stands between the stream and the kernel's arguments; the same for every launch of the kernel.
        nested: whether the kernel's arguments are one tuple, at the end.
        encode: takes all that ``launch`` takes, and returns it with descriptors encoded; None for a kernel without any.
    """

    launch: Callable[..., object]
    stream_of: Callable[[int], int]
    fixed: tuple[Any, ...]
    nested: bool
    encode: Callable[..., tuple[Any, ...]] | None

    def after_stream(self, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """All that ``launch`` takes after the stream for these arguments of the kernel."""
        if self.encode is None:
            return (*self.fixed, arguments) if self.nested else self.fixed + arguments
        given = (arguments,) if self.nested else arguments
        return tuple(self.encode(0, 0, 0, 0, *self.fixed, *given)[4:])

    def without_tensors(self, after_stream: tuple[Any, ...]) -> tuple[Any, ...]:
        """The same, with tensors' addresses in their place."""
        if self.nested:
            return (*after_stream[:-1], _addresses(after_stream[-1]))
        return _addresses(after_stream)


def _addresses(arguments: Sequence[Any]) -> tuple[Any, ...]:
    # isinstance takes 0.1 us to say no.
    return tuple([a if type(a) in _PLAIN or not isinstance(a, torch.Tensor) else a.data_ptr() for a in arguments])


def find_c_launcher(compiled: Any, num_arguments: int) -> CLauncher | None:
    """The C function that launches ``compiled``, a kernel of ``num_arguments`` parameters, constexprs included.

    None where something is not as in Triton 3.6 to 3.9, or has to be done anew at every launch: scratch memory to be
    allocated, a sanitizer to be told.
    """
    run: Any = getattr(compiled, "run", None)
    outer = getattr(run, "launch", None)
    if outer is None or getattr(run, "gsan_enabled", False):
        return None
    if any(getattr(compiled.metadata, f"{kind}_scratch_size", None) != 0 for kind in ("global", "profile")):
        return None
    launch, encode = _taken_apart(outer)
    if launch is None:
        return None

    handed: list[tuple[Any, ...]] = []
    recording = copy.copy(run)
    recording.launch = lambda *everything: handed.append(everything)
    x, y, z, stream, *arguments = (object() for _ in range(4 + num_arguments))
    # As CompiledKernel.__getitem__ calls it, less what only hooks, such as a profiler's, need.
    recording(x, y, z, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments)
    if len(handed) != 1:
        return None
    everything = handed[0]
    nested = isinstance(everything[-1], (tuple, list))
    end = -1 if nested else -num_arguments
    # Equal only where identical: the marks are bare objects.
    if everything[:4] != (x, y, z, stream) or list(everything[-1] if nested else everything[end:]) != arguments:
        return None
    return CLauncher(launch, triton.runtime.driver.active.get_current_stream, everything[4:end], nested, encode)


def _taken_apart(launch: Any) -> tuple[Callable[..., object] | None, Callable[..., tuple[Any, ...]] | None]:
    """The C function in ``run.launch``, and the encoding of descriptors that Triton has put around it if there are any.

    The latter is a closure over the C function as ``launcher``. With one that returns its arguments in that place, the
    same code encodes and does not launch.
    """
    if not isinstance(launch, types.FunctionType):
        return launch, None
    cells = dict(zip(launch.__code__.co_freevars, launch.__closure__ or (), strict=True))
    if "launcher" not in cells or isinstance(cells["launcher"].cell_contents, types.FunctionType):
        return None, None
    closure = tuple(types.CellType(_as_given) if name == "launcher" else cell for name, cell in cells.items())
    encode = types.FunctionType(
        launch.__code__, launch.__globals__, launch.__name__, launch.__defaults__, closure=closure
    )
    return cells["launcher"].cell_contents, encode


def _as_given(*arguments: Any) -> tuple[Any, ...]:
    return arguments
