"""Launches of Triton kernels, compiled for a GPU that is not there, with the parameters that Triton's launcher would pass."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from ptx import product, tensormap
from ptx.memory import GlobalMemory
from ptx.program import Program
from ptx.scheduler import Launch

DEVICE_TO_HOST = {8: 10, 9: 8, 10: 9}
"""Element types of tensor maps: Triton's numbers that differ from CUtensorMapDataType (backends/nvidia/driver.py)."""

SCALARS: dict[str, Any] = {
    "i1": np.uint8, "i8": np.int8, "i16": np.int16, "i32": np.int32, "u32": np.uint32, "i64": np.int64,
    "u64": np.uint64, "fp32": np.float32, "fp64": np.float64,
}  # fmt: skip


@dataclass(frozen=True)
class Captured:
    """A launch that was not made: what was compiled, its grid, and its arguments by name."""

    compiled: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]

    @property
    def ptx(self) -> str:
        """The module."""
        return str(self.compiled.asm["ptx"])

    def params(self, program: Program) -> np.ndarray:
        """Bytes of the kernel's parameters."""
        values: list[np.ndarray] = []
        maps = iter(getattr(self.compiled.metadata, "tensordesc_meta", None) or ())
        for name, kind in self.compiled.src.signature.items():
            if kind != "constexpr":
                values += _expand(self.arguments[name], kind, maps)
        values += [np.zeros(1, np.uint64)] * 2  # scratch memory, which no kernel of ours has
        parameters = program.kernel.parameters
        if len(parameters) != len(values):
            raise ValueError(f"parameters: the kernel has {len(parameters)}, the launch gives {len(values)}")
        packed = np.zeros(program.kernel.parameter_bytes, np.uint8)
        for parameter, value in zip(parameters, values, strict=True):
            raw = value.view(np.uint8)
            if raw.size != parameter.size:
                raise ValueError(f"parameter {parameter.name}: expected {parameter.size} bytes, got {raw.size}")
            packed[parameter.offset : parameter.offset + parameter.size] = raw
        return packed

    def launch(self, memory: GlobalMemory, *, edit: Callable[[str], str] = str, **more: Any) -> Launch:
        """In the emulator."""
        program = Program(edit(self.ptx), self.compiled.metadata.name)
        grid = (*self.grid, 1, 1)[:3]
        shared = int(self.compiled.metadata.shared)
        return Launch(program, self.params(program), memory, grid, program.kernel.threads, shared_bytes=shared, **more)


def _expand(value: Any, kind: str, maps: Any) -> list[np.ndarray]:
    """A Python argument as kernel parameters."""
    if kind.startswith("*"):
        return [np.array([0 if value is None else value.data_ptr()], np.uint64)]
    if kind.startswith("tensordesc"):
        return _descriptor(value, next(maps))
    return [np.array([value], SCALARS[kind])]


def _descriptor(value: TensorDescriptor, facts: dict[str, Any]) -> list[np.ndarray]:
    """A tensor map, the shape as int32 and the strides as int64; Triton counts dimensions from the outermost."""
    size = facts["elem_size"]
    made = tensormap.encode(
        value.base.data_ptr(),
        DEVICE_TO_HOST.get(facts["elem_type"], facts["elem_type"]),
        tuple(reversed(value.shape)),
        tuple(stride * size for stride in reversed(value.strides[:-1])),
        tuple(reversed(facts["block_size"])),
        facts["swizzle"],
    )
    shape = [np.array([extent], np.int32) for extent in value.shape]
    return [made, *shape, *(np.array([stride], np.int64) for stride in value.strides)]


def capture(arch: int, module: Any, names: tuple[str, ...], call: Callable[[], object]) -> list[Captured]:
    """Run ``call`` with some kernels of a module replaced: their launches are compiled for ``arch`` and captured."""
    captured: list[Captured] = []

    class Kernel:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            def take(*args: Any, **options: Any) -> None:
                compiled = self.kernel.warmup(*args, grid=grid, **options)
                captured.append(
                    Captured(compiled, grid, dict(zip(self.kernel.arg_names, args, strict=False)) | options)
                )

            return take

    os.environ.setdefault("TRITON_CACHE_DIR", str(product.env.cache_dir() / "ptx" / "triton"))
    driver, loaded = triton.runtime.driver._active, product.launch._loaded
    kernels = {name: getattr(module, name) for name in names}
    triton.runtime.driver._active, product.launch._loaded = product.StubDriver(arch), {}
    try:
        for name, kernel in kernels.items():
            setattr(module, name, Kernel(kernel))
        call()
    finally:
        triton.runtime.driver._active, product.launch._loaded = driver, loaded
        for name, kernel in kernels.items():
            setattr(module, name, kernel)
    return captured


def bytes_of(tensor: torch.Tensor) -> np.ndarray:
    """A contiguous tensor's memory, shared."""
    return tensor.view(torch.uint8).reshape(-1).numpy()
