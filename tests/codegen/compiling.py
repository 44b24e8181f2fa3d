"""Compile kernels for GPUs that are not there, through their real launchers.

A stub driver stands for a device of each architecture, so that the launchers' own shapes,
configurations and argument specialisation reach Triton's compiler; the launch itself is replaced by
``warmup``. Nothing runs.
"""

from __future__ import annotations

import importlib
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from hybrid_mxfp8.core.formats import grouped_scale_rows, padded_scale_rows, scale_cols
from hybrid_mxfp8.core.layout import GroupLayout
from hybrid_mxfp8.core.operands import ExpertWeights, GroupedMXFP8

ARCHS = (90, 100, 103, 120)
SHARED_LIMIT = {90: 232448, 100: 232448, 103: 232448, 120: 101376}
"""Bytes of shared memory a block may have."""

TENSOR_MEMORY_COLUMNS = 512


class StubDriver(DriverBase):
    """A device of one architecture that can only be compiled for."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # Triton's caches of compiled kernels are keyed by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Callable[..., list[float]]:
        return lambda *args, **kwargs: [0.0]

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty


@dataclass(frozen=True)
class Resources:
    """What ptxas gave a kernel; bytes of stack are local memory, spills among it."""

    registers: int
    stack: int


@dataclass(frozen=True)
class Compiled:
    """One compiled kernel and its launch."""

    arch: int
    kernel: Any
    grid: tuple[int, ...]

    @property
    def ptx(self) -> str:
        return str(self.kernel.asm["ptx"])

    @property
    def shared(self) -> int:
        return int(self.kernel.metadata.shared)

    @property
    def tensor_memory(self) -> int:
        """Columns of tensor memory."""
        return int(getattr(self.kernel.metadata, "tmem_size", 0) or 0)

    def count(self, pattern: str) -> int:
        """Matches of a regular expression in the PTX."""
        return len(re.findall(pattern, self.ptx))

    def resources(self, folder: Path) -> Resources:
        cubin = folder / "kernel.cubin"
        cubin.write_bytes(self.kernel.asm["cubin"])
        tool = triton.knobs.nvidia.cuobjdump.path
        text = subprocess.run([tool, "--dump-resource-usage", cubin], check=True, capture_output=True, text=True).stdout
        found = re.search(r"REG:(\d+) STACK:(\d+)", text)
        assert found, text
        return Resources(int(found[1]), int(found[2]))


class CapturingLauncher:
    """Takes the place of a kernel in its module: ``[grid](...)`` compiles."""

    def __init__(self, kernel: Any, arch: int, compiled: list[Compiled]) -> None:
        self.kernel, self.arch, self.compiled = kernel, arch, compiled

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            self.compiled.append(Compiled(self.arch, self.kernel.warmup(*args, grid=grid, **kwargs), grid))

        return launch


class NotLaunched:
    """Takes the place of the other kernels of a launcher."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **kwargs: None


KERNELS = {
    "caller_layout_kernel": "caller_layout",
    "quantize_kernel": "quantize",
    "grouped_gemm_kernel": "gemm.portable",
    "grouped_gemm_blackwell_kernel": "gemm.blackwell",
    "hopper_gemm_kernel": "gemm.hopper",
    "dequantize_tokens_kernel": "gemm.dequantize_tokens",
    "rank_kernel": "moe.route",
    "count_kernel": "moe.route",
    "sum_kernel": "moe.route",
    "scatter_kernel": "moe.route",
    "combine_kernel": "moe.combine",
    "expert_bias_kernel": "moe.expert_bias",
}
"""The module of each kernel, below triton_kernels."""


def module_of(kernel: str) -> Any:
    return importlib.import_module(f"hybrid_mxfp8.triton_kernels.{KERNELS[kernel]}")


def capture(arch: int, kernel: str, call: Callable[[], object], patch: pytest.MonkeyPatch) -> list[Compiled]:
    """Every launch of this kernel that ``call`` makes, for this architecture; others are not
    made."""
    from hybrid_mxfp8.triton_kernels import launch

    compiled: list[Compiled] = []
    patch.setattr(triton.runtime.driver, "_active", StubDriver(arch))
    patch.setattr(launch, "_loaded", {})  # nothing that is loaded comes of this
    for other in KERNELS:
        stand_in = (
            CapturingLauncher(getattr(module_of(other), other), arch, compiled) if other == kernel else NotLaunched()
        )
        patch.setattr(module_of(other), other, stand_in)
    call()
    return compiled


CompileFor = Callable[[int, str, Callable[[], object]], Compiled]
META = torch.device("meta")


def ints(*size: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.empty(size, dtype=dtype, device=META)


def layout(num_tokens: int, experts: int) -> GroupLayout:
    offsets = ints(experts + 1)
    return GroupLayout(offsets[1:], offsets, offsets, num_tokens)


def grouped(num_tokens: int, k: int, experts: int) -> GroupedMXFP8:
    values = torch.empty(num_tokens, k, dtype=torch.float8_e4m3fn, device=META)
    scales = torch.empty(grouped_scale_rows(num_tokens, experts), scale_cols(k), dtype=torch.uint8, device=META)
    return GroupedMXFP8.unchecked(values, scales, layout(num_tokens, experts))


def weights(experts: int, n: int, k: int) -> ExpertWeights:
    values = torch.empty(experts, n, k, dtype=torch.float8_e4m3fn, device=META)
    scales = torch.empty(experts, padded_scale_rows(n), scale_cols(k), dtype=torch.uint8, device=META)
    return ExpertWeights.unchecked(values, scales)


def product(num_tokens: int, n: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(num_tokens, n, dtype=dtype, device=META)


def machine_code(compiled: Compiled, folder: Path, *options: str) -> str:
    """The disassembly."""
    cubin = folder / "disassembled.cubin"
    cubin.write_bytes(compiled.kernel.asm["cubin"])
    tool = triton.knobs.nvidia.nvdisasm.path
    return subprocess.run([tool, *options, "-c", cubin], check=True, capture_output=True, text=True).stdout
