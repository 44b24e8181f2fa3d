"""Stand-ins for what Triton compiles and launches: dispatch, compiled kernels, and CudaLaunchers of several versions.

A launch is written down as the C function would see it, descriptors encoded and tensors as their addresses; after the
arguments come the dtypes that the kernel was compiled for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

STREAM = 7


class Map:
    """An encoded descriptor; equal to another of the same numbers."""

    def __init__(self, *numbers: Any) -> None:
        self.numbers = numbers

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Map) and self.numbers == other.numbers

    def __hash__(self) -> int:
        return hash(self.numbers)

    def __repr__(self) -> str:
        return f"Map{self.numbers}"


def numbers_of(arguments: Any) -> tuple[Any, ...]:
    return tuple(a.data_ptr() if hasattr(a, "data_ptr") else a for a in arguments)


@dataclass
class Device:
    """All launches of all kernels, (name, grid, stream, arguments); which Triton made; whether the C function got tensors."""

    launches: list[tuple[Any, ...]] = field(default_factory=list)
    by_triton: list[str] = field(default_factory=list)
    with_tensors: list[bool] = field(default_factory=list)
    stream: int = STREAM

    def take(self) -> list[tuple[Any, ...]]:
        taken, self.launches[:] = list(self.launches), []
        self.by_triton.clear()
        self.with_tensors.clear()
        return taken


class CFunction:
    """What is no Python function to ``isinstance``."""

    def __init__(self, name: str, device: Device, nested: bool, base: int, dtypes: tuple[Any, ...] = ()) -> None:
        self.name, self.device, self.nested, self.base, self.dtypes = name, device, nested, base, dtypes

    def __call__(self, *everything: Any) -> None:
        arguments = everything[-1] if self.nested else everything[self.base :]
        assert len(everything) == self.base + 1 if self.nested else len(everything) > self.base
        assert everything[4] == "function"
        self.device.with_tensors.append(any(isinstance(a, torch.Tensor) for a in arguments))
        self.device.launches.append((self.name, everything[:3], everything[3], numbers_of(arguments) + self.dtypes))


def encoded(arguments: Any) -> list[Any]:
    out: list[Any] = []
    for a in arguments:
        if hasattr(a, "block_shape"):
            out += [Map(a.base.data_ptr(), tuple(a.shape), tuple(a.block_shape)), *a.shape, *a.strides]
        else:
            out.append(a)
    return out


class Flat:
    """CudaLauncher of Triton 3.6: the kernel's arguments one by one, after scratch memory and metadata."""

    BASE = 13

    def __init__(self, name: str, device: Device, descriptors: bool = False, dtypes: tuple[Any, ...] = ()) -> None:
        launcher: Any = CFunction(name, device, False, self.BASE, dtypes)

        def inner(*args: Any) -> Any:
            return launcher(*args[: Flat.BASE], *encoded(args[Flat.BASE :]))

        self.launch = inner if descriptors else launcher

    def __call__(self, x: Any, y: Any, z: Any, stream: Any, function: Any, *args: Any) -> None:
        self.launch(x, y, z, stream, function, False, False, None, None, *args)


class Nested:
    """CudaLauncher of Triton 3.7 to 3.9: the kernel's arguments one tuple, after scratch memory and annotations."""

    BASE = 15

    def __init__(self, name: str, device: Device, descriptors: bool = False, dtypes: tuple[Any, ...] = ()) -> None:
        launcher: Any = CFunction(name, device, True, self.BASE, dtypes)

        def inner(*args: Any) -> Any:
            return launcher(*args[:-1], encoded(args[-1]))

        self.launch = inner if descriptors else launcher

    def __call__(
        self,
        x: Any,
        y: Any,
        z: Any,
        stream: Any,
        function: Any,
        kernel: Any,
        launch: Any,
        enter: Any,
        exit: Any,
        *args: Any,
    ) -> None:
        self.launch(
            *(x, y, z, stream, function, False, False, kernel, launch, enter, exit),
            *(None, None, ["annotation"], b"signature", args),
        )


class Compiled:
    """A compiled kernel, which Triton can launch too."""

    def __init__(self, name: str, device: Device, run: Any, dtypes: tuple[Any, ...] = ()) -> None:
        self.name, self.device, self.run, self.dtypes = name, device, run, dtypes
        self.metadata = SimpleNamespace(name=name, global_scratch_size=0, profile_scratch_size=0)
        self.function = "function"
        self.packed_metadata = (4, 1, 0)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any) -> None:
            self.device.by_triton.append(self.name)
            given = numbers_of(encoded(arguments)) + self.dtypes
            self.device.launches.append((self.name, grid, self.device.stream, given))

        return launch


class Kernel:
    """A jitted function: dispatch compiles and launches."""

    def __init__(self, name: str, device: Device, launcher: Callable[..., Any]) -> None:
        self.name, self.device, self.launcher = name, device, launcher

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Compiled]:
        def dispatch(*arguments: Any, **options: int) -> Compiled:
            dtypes = tuple(a.dtype for a in arguments if isinstance(a, torch.Tensor))
            descriptors = any(hasattr(a, "block_shape") for a in arguments)
            run = self.launcher(self.name, self.device, descriptors, dtypes)
            compiled = Compiled(self.name, self.device, run, dtypes)
            compiled[(grid[0], 1, 1)](*arguments)
            return compiled

        return dispatch
