"""The SM100 kernels as compiled: the instructions they must have, no spills, and what fits an SM.

A few by default, a minute each; with HYBRID_MXFP8_TEST_CONFIGS=all every shipped one, with each
mainloop. Run as a program, this writes the table of figures in docs/cutlass-backend.md.
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import cutlass_modules
import pages
import pytest
import torch
from compiling import reached

from hybrid_mxfp8.cutlass_kernels.config import MODULES, GemmConfig
from hybrid_mxfp8.cutlass_kernels.grouped_gemm import OUT_TYPES, source, workspace_bound
from hybrid_mxfp8.cutlass_kernels.jit import build as jit
from hybrid_mxfp8.cutlass_kernels.jit import toolchain
from hybrid_mxfp8.dispatch.problem import Problem
from hybrid_mxfp8.errors import BackendUnavailableError

pytestmark = pytest.mark.slow

SHARED_MEMORY = 227 * 1024  # of an SM, what a block may have
REGISTERS = {True: 168, False: 255}
"""By whether the mainloop is the ragged one, whose blocks have 384 threads; the others' 256."""


class Kernel(NamedTuple):
    """What to compile, and with which headers."""

    cutlass: toolchain.CutlassHeaders
    module: str
    out: torch.dtype
    arch: str

    def __str__(self) -> str:
        return f"{cutlass_modules.mainloop(self.cutlass)}-{self.module}-{OUT_TYPES[self.out][0]}-{self.arch}"


FEW = {
    True: [("2sm_256x128x128", torch.bfloat16, "10.0a"), ("1sm_128x64x128", torch.float32, "10.3a")],
    False: [("2sm_256x256x128", torch.float32, "10.0a"), ("1sm_128x128x128", torch.float16, "10.0a")],
}
"""By whether the mainloop is the ragged one."""


def kernels() -> list[Kernel]:
    """The shipped ones, or the few."""
    chosen = []
    for cutlass in cutlass_modules.header_choices():
        few = FEW[cutlass.ragged]
        if os.environ.get("HYBRID_MXFP8_TEST_CONFIGS") == "all":
            few = [(module, out, "10.0a") for module in MODULES for out in OUT_TYPES]
            few += [("2sm_256x128x128", torch.bfloat16, arch) for arch in ("10.3a", "10.0f")]
        chosen += [Kernel(cutlass, *one) for one in few]
    return chosen


@pytest.fixture(scope="module", params=kernels(), ids=str)
def kernel(request: pytest.FixtureRequest) -> Kernel:
    return request.param


@pytest.fixture(scope="module")
def built(kernel: Kernel) -> Path:
    try:
        toolchain.find_cuda()
    except BackendUnavailableError as reason:
        pytest.skip(str(reason))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HYBRID_MXFP8_CUTLASS_DIR", str(kernel.cutlass.include))
        return jit.build(source(kernel.module, kernel.out, kernel.arch)).library


def printed(tool: str, *arguments: object, folder: str | None = None) -> str:
    """What a disassembler says, of the compiler's own toolkit if it is whole, or Triton's wheel."""
    path = toolchain.find_cuda().home / "bin" / tool
    if not path.exists():
        path = Path(getattr(pytest.importorskip("triton").knobs.nvidia, tool).path)
    command = [str(path), *map(str, arguments)]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout


def read_sass(library: Path) -> str:
    """The GEMM kernel's instructions."""
    with tempfile.TemporaryDirectory() as folder:
        printed("cuobjdump", "-xelf", "all", library, folder=folder)
        cubin = max(Path(folder).glob("*.cubin"), key=lambda file: file.stat().st_size)  # linking adds an empty one
        arch = re.search(r"sm_(\d+)", cubin.name)
        assert arch
        if f"SM{arch[1]}" not in printed("nvdisasm", "--help"):  # that of Triton 3.6, from CUDA 12.8
            pytest.skip(f"nvdisasm does not know sm_{arch[1]}")
        functions = re.split(r"^\s*\.section\s+\.text\.", printed("nvdisasm", "-c", cubin), flags=re.MULTILINE)
    (gemm,) = (text for text in functions if "GemmUniversal" in text.split("\n", 1)[0])
    return gemm


def read_usage(library: Path) -> dict[str, int]:
    """The GEMM kernel's registers, stack and so on."""
    lines = printed("cuobjdump", "--dump-resource-usage", library).splitlines()
    (gemm,) = (after for name, after in itertools.pairwise(lines) if "GemmUniversal" in name)
    return {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", gemm)}


@pytest.fixture(scope="module")
def sass(built: Path) -> str:
    return read_sass(built)


@pytest.fixture(scope="module")
def module(built: Path) -> Any:
    import tvm_ffi

    return tvm_ffi.load_module(str(built))


def tensor_memory_columns(sass: str) -> int:
    """Of the 512 of an SM, what the kernel allocates, in units of 32 there."""
    (units,) = set(
        re.findall(r"UMOV (UR\d+), (0x[0-9a-f]+) ;(?:(?!UMOV).)*?UTCATOMSWS\S*FIND_AND_SET\S* UP\d, \1,", sass, re.S)
    )
    return 32 * int(units[1], 16)


def instructions(sass: str, pattern: str) -> set[str]:
    return set(re.findall(rf"\b({pattern}[A-Z0-9_.]*)", sass))


def test_instructions(kernel: Kernel, sass: str) -> None:
    """The MMA that scales by block, over two SMs exactly where the configuration says so; scales
    copied to tensor memory, by no thread; all loads by TMA and multicast; D stored by TMA."""
    products, loads = instructions(sass, "UTCQMMA"), instructions(sass, "UTMALDG")
    assert products
    assert all((".2CTA" in name) == kernel.module.startswith("2sm") for name in products)
    assert instructions(sass, "UTCCP")
    assert loads
    assert all("MULTICAST" in name for name in loads)
    assert instructions(sass, "UTMASTG")


def test_nothing_spills(kernel: Kernel, built: Path, sass: str) -> None:
    assert not instructions(sass, "(?:STL|LDL)")
    usage = read_usage(built)
    assert (usage["STACK"], usage["LOCAL"]) == (0, 0)
    assert usage["REG"] <= REGISTERS[kernel.cutlass.ragged]


GLOBAL = r"(?:LDG|LD|ST|STG|ATOM|ATOMG|RED|REDG|LDGSTS|UTMALDG|UTMASTG|UTMAREDG|UBLKCP|UBLKRED)\b"
"""Instructions that reach global memory."""


def before_wait(sass: str) -> set[str]:
    """Those that some path from the kernel's entry reaches without griddepcontrol.wait, ACQBULK."""
    code: list[str] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?)\s*;", line):
            code.append(instruction[1])
    lines = reached(code, labels, "ACQBULK", r"\.L_x_\d+", r"(BRA|BRXU?|EXIT|RET)\b")
    found = [re.sub(r"^@!?U?P\w+\s+", "", line) for line in lines]
    assert all(".L_x_" in line for line in found if re.match("U?BRX", line)), "an indirect branch without its targets"
    return {line.split()[0] for line in found if re.match(GLOBAL, line)}


def test_dependent_launch_waits(kernel: Kernel, sass: str, module: Any) -> None:
    """From CUTLASS 4.6 on: nothing reaches memory before the wait. In 4.2 the scheduler does."""
    assert module.launches_dependently() == (kernel.cutlass.version >= (4, 6, 0))
    assert "ACQBULK" in sass
    assert (before_wait(sass) == set()) == module.launches_dependently()


def test_no_symbol_of_the_driver_is_undefined(built: Path) -> None:
    """The runtime is linked in and looks the driver's functions up when it needs them."""
    listed = subprocess.run(["nm", "-D", "-u", built], check=True, capture_output=True, text=True).stdout
    assert not re.findall(r"\b(?:__)?cu(?:da)?[A-Z]\w*", listed)


def test_an_sm_holds_it(kernel: Kernel, module: Any, sass: str) -> None:
    """What of tensor memory is used is asserted in csrc, when the kernel is compiled."""
    assert 0 < module.shared_memory_bytes() <= SHARED_MEMORY
    assert module.mainloop_stages() >= (3 if kernel.module.endswith("x256x128") else 4)
    assert tensor_memory_columns(sass) <= 512


def test_workspace_is_small_and_grows_with_experts(kernel: Kernel, module: Any) -> None:
    """Descriptors for each SM, and a few hundred bytes an expert; no GPU is asked."""
    sizes = [module.workspace_size(experts, 4096, 7168, 64, 148) for experts in (1, 32, 4096)]
    assert sizes == sorted(sizes)
    assert sizes[0] < 1_100_000
    assert sizes[2] - sizes[0] < 4096 * 512
    assert module.workspace_size(1, 4096, 7168, 64, 74) < sizes[0]
    cpu = torch.device("cpu")  # with as many SMs as a B200
    for experts, size in zip((1, 32, 4096), sizes, strict=True):
        assert size == module.workspace_size(experts, 4096, 7168, 100_000, 148)
        assert size <= workspace_bound(Problem(experts, 4096, 7168, 64, torch.bfloat16, cpu))
    assert GemmConfig.parse(kernel.module).module == kernel.module


def table() -> str:
    """The figures of every kernel in the cache, as markdown."""
    import tvm_ffi

    lines = ["| kernel | registers | stages | shared memory, bytes | tensor memory, columns |", "|" + " --- |" * 5]
    for kernel in kernels():
        os.environ["HYBRID_MXFP8_CUTLASS_DIR"] = str(kernel.cutlass.include)
        library = jit.build(source(kernel.module, kernel.out, kernel.arch)).library
        module = tvm_ffi.load_module(str(library))
        columns = tensor_memory_columns(read_sass(library))
        figures = read_usage(library)["REG"], module.mainloop_stages(), module.shared_memory_bytes(), columns
        lines.append(f"| {kernel} | {' | '.join(map(str, figures))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    headers = ", ".join(
        f"CUTLASS {h.version_string} ({cutlass_modules.mainloop(h)})" for h in cutlass_modules.header_choices()
    )
    about = f"Made by `make sass` with nvcc {toolchain.find_cuda().version_string}, {headers}."
    pages.replace("cutlass-backend.md", "sass", f"{about}\n\n{table()}")
