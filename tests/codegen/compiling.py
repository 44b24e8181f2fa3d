"""Compile kernels for GPUs that are not there, as their launches describe them.

A stub driver stands for a device of each architecture, so that the product's own shapes,
configurations and argument specialisation reach Triton's compiler. Nothing runs.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.backends.nvidia.compiler import get_ptxas

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

    def ptxas_output(self, folder: Path) -> str:
        """What ptxas says, verbosely: C7510 .. C7514 where it waits after each wgmma, C7508 where
        it ignores setmaxnreg."""
        source = folder / "kernel.ptx"
        source.write_text(self.ptx)
        command = [get_ptxas(self.arch).path, "-v", f"-arch=sm_{self.arch}a", source, "-o", folder / "kernel.cubin"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stderr


def before_the_wait(ptx: str) -> list[str]:
    """What a kernel may do to global memory before ``griddepcontrol.wait``, along any path from its
    entry; and "no wait" unless there is one, which some path reaches.

    Warps of their own wait at barrier 1 until the others, who come there behind their wait, start
    them: a path ends there, too, but at one such place only.
    """
    lines = [line.split("//")[0].strip() for line in ptx[ptx.index(".entry") :].splitlines()]
    labels = {line[:-1]: at for at, line in enumerate(lines) if line.endswith(":")}
    seen: set[int] = set()
    left, waits, starts, found = [0], 0, 0, []
    while left:
        at = left.pop()
        if at in seen or at == len(lines):
            continue
        seen.add(at)
        line = lines[at]
        if "griddepcontrol.wait;" in line:
            waits += 1
        elif re.search(r"barrier\.sync\s+1;", line):
            starts += 1
        else:
            operation = re.sub(r"^\{?\s*(@!?\S+\s+)?", "", line).split(" ")[0].split("\t")[0]
            inside = re.search(r"\.(shared|param|local)", operation) and ".global" not in operation
            if re.match(r"(ld|st|red|atom|cp|prefetch)\.", operation) and not inside:
                found.append(line)
            if target := re.search(r"\bbra\S*\s+(\S+);", line):
                left.append(labels[target[1]])
            if not re.match(r"(bra|ret|exit|trap)\b", line):
                left.append(at + 1)
    if (waits, len(re.findall(r"griddepcontrol\.wait;", ptx))) != (1, 1) or starts > 1:
        found.append(f"no wait: {waits} reached, {starts} starts of other warps")
    return found


CompileFor = Callable[[int, Any, str, Callable[[], object]], Compiled]
