"""Launches of Triton kernels, compiled for a GPU that is not there, with the parameters that
Triton's launcher would pass."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton

from ptx import product, tensormap
from ptx.memory import GlobalMemory
from ptx.program import Program
from ptx.scheduler import Launch

DEVICE_TO_HOST = {8: 10, 9: 8, 10: 9}
"""Element types of tensor maps: Triton's numbers that differ from CUtensorMapDataType
(backends/nvidia/driver.py)."""

SCALARS: dict[str, Any] = {
    "i1": np.uint8, "i8": np.int8, "i16": np.int16, "i32": np.int32, "u32": np.uint32, "i64": np.int64,
    "u64": np.uint64, "fp32": np.float32, "fp64": np.float64,
}  # fmt: skip


@dataclass(frozen=True)
class Captured:
    """A launch that was not made: what was compiled, its grid, its arguments by name, and the
    tensors that these stand for."""

    compiled: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    tensors: tuple[torch.Tensor, ...]

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
                values += self._expand(self.arguments[name], kind, maps)
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

    def _expand(self, value: Any, kind: str, maps: Iterator[dict[str, Any]]) -> list[np.ndarray]:
        """An argument as kernel parameters."""
        if kind.startswith("*"):
            return [np.array([self._address(value)], np.uint64)]
        if kind.startswith("tensordesc"):
            return self._descriptor(value, next(maps))
        return [np.array([value], SCALARS[kind])]

    def _address(self, buffer: product.Buffer) -> int:
        return self.tensors[buffer.operand].data_ptr() + buffer.offset

    def _descriptor(self, value: product.TensorMap, facts: dict[str, Any]) -> list[np.ndarray]:
        """A tensor map, the shape as int32 and the strides as int64; Triton counts dimensions from
        the outermost."""
        if tuple(facts["block_size"]) != value.box:
            raise ValueError(f"tensor map: compiled for boxes {tuple(facts['block_size'])}, got {value.box}")
        size = facts["elem_size"]
        strides = [math.prod(value.shape[at + 1 :]) for at in range(len(value.shape))]
        made = tensormap.encode(
            self._address(value.buffer),
            DEVICE_TO_HOST.get(facts["elem_type"], facts["elem_type"]),
            tuple(reversed(value.shape)),
            tuple(stride * size for stride in reversed(strides[:-1])),
            tuple(reversed(value.box)),
            facts["swizzle"],
        )
        shape = [np.array([extent], np.int32) for extent in value.shape]
        return [made, *shape, *(np.array([stride], np.int64) for stride in strides)]


def capture(arch: int, steps: Callable[..., Any], *tensors: torch.Tensor | None) -> list[Captured]:
    """The launches that ``steps`` makes of the tensors' buffers, compiled for ``arch``: 90 for
    compute capability 9.0."""
    os.environ.setdefault("TRITON_CACHE_DIR", str(product.env.cache_dir() / "ptx" / "triton"))
    given = tuple(tensor for tensor in tensors if tensor is not None)
    driver = triton.runtime.driver._active
    triton.runtime.driver._active = product.StubDriver(arch)
    try:
        captured = []
        for step in product.launches.steps_of(steps, *tensors):
            compiled = product.abi.compile_kernel(step.kernel, step.arguments, step.constants, dict(step.options))
            arguments = dict(zip(step.kernel.arg_names, step.arguments, strict=False))  # constants come last
            captured.append(Captured(compiled, (step.programs,), arguments, given))
        return captured
    finally:
        triton.runtime.driver._active = driver
