"""Compile kernels for GPUs that are not there, as their launches describe them.

A stub driver stands for a device of each architecture, so that the product's own shapes,
configurations and argument specialisation reach Triton's compiler. Nothing runs.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas

ARCHS = (90, 100, 103, 120)
SHARED_LIMIT = {90: 232448, 100: 232448, 103: 232448, 120: 101376}
"""Bytes of shared memory a block may have."""

TENSOR_MEMORY_COLUMNS = 512
MULTIPROCESSORS = 132


class StubDriver:
    """A device of one architecture that can only be compiled for: what Triton's compiler asks of a
    driver."""

    def __init__(self, arch: int) -> None:
        self.get_current_target = lambda: GPUTarget("cuda", arch, 32)
        self.get_current_device = lambda: arch  # Triton's caches of compiled kernels are keyed by device
        self.get_current_stream = lambda device: 0


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

    @functools.cached_property
    def machine_code(self) -> str:
        """As nvdisasm prints it, with the places in the source that it is from."""
        return _printed([triton.knobs.nvidia.nvdisasm.path, "-g", "-c"], self.kernel.asm["cubin"])

    @functools.cached_property
    def usage(self) -> dict[str, int]:
        """Registers as REG; bytes of local memory, spills among it, as STACK; and so on."""
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage"]
        return {name: int(n) for name, n in re.findall(r"(\w+):(\d+)", _printed(command, self.kernel.asm["cubin"]))}

    @functools.cached_property
    def ptxas_output(self) -> str:
        """C7510 .. C7514 where ptxas waits after each wgmma, C7508 where it ignores setmaxnreg."""
        command = [get_ptxas(self.arch).path, "-v", f"-arch=sm_{self.arch}a", "-o", "/dev/null"]
        return _printed(command, self.ptx.encode())


def _printed(command: list[str], content: bytes) -> str:
    """What a tool prints of a file of this content."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        done = subprocess.run([*command, file.name], check=True, capture_output=True, text=True)
    return done.stdout + done.stderr


def reached(code: Sequence[str], labels: Mapping[str, int], stop: str, target: str, leave: str) -> list[str]:
    """The instructions on any path from the first up to those that match ``stop``, these included.
    ``target`` finds the labels that one may go to; one that matches ``leave`` goes nowhere else."""
    seen: set[int] = set()
    ahead = [0]
    while ahead:
        at = ahead.pop()
        if at in seen or at == len(code):
            continue
        seen.add(at)
        if not re.search(stop, code[at]):
            ahead += [labels[label] for label in re.findall(target, code[at])]
            if not re.match(leave, code[at]):
                ahead.append(at + 1)
    return [code[at] for at in sorted(seen)]


WAIT, START = r"griddepcontrol\.wait;", r"barrier\.sync\s+1;"


def before_the_wait(ptx: str) -> list[str]:
    """What a kernel may do to global memory before ``griddepcontrol.wait``, along any path from its
    entry; and "no wait" unless there is one, which some path reaches.

    Warps of their own wait at barrier 1 until the others, who come there behind their wait, start
    them: a path ends there, too, but at one such place only.
    """
    lines = [line.split("//")[0].strip() for line in ptx[ptx.index(".entry") :].splitlines()]
    labels = {line[:-1]: at for at, line in enumerate(lines) if line.endswith(":")}
    on_the_way = reached(lines, labels, f"{WAIT}|{START}", r"\bbra\S*\s+(\S+);", r"(bra|ret|exit|trap)\b")
    found = []
    for line in on_the_way:
        operation = re.sub(r"^\{?\s*(@!?\S+\s+)?", "", line).split(" ")[0].split("\t")[0]
        inside = re.search(r"\.(shared|param|local)", operation) and ".global" not in operation
        if re.match(r"(ld|st|red|atom|cp|prefetch)\.", operation) and not inside:
            found.append(line)
    waits, starts = (sum(bool(re.search(pattern, line)) for line in on_the_way) for pattern in (WAIT, START))
    if (waits, len(re.findall(WAIT, ptx))) != (1, 1) or starts > 1:
        found.append(f"no wait: {waits} reached, {starts} starts of other warps")
    return found


LOAD_16, STORE_16 = (rf"{name}\.global(\.\w+)*\.v4\.b32" for name in ("ld", "st"))


def empty(*size: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    """An argument without memory."""
    return torch.empty(size, dtype=dtype, device="meta")


CompileFor = Callable[..., Compiled]
"""As the fixture of that name has it."""
