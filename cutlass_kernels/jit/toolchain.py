"""Where the CUTLASS headers and the CUDA compiler are.

CUTLASS comes from ``HYBRID_MXFP8_CUTLASS_DIR``, else from the newest of the installed packages that
have its headers. The compiler comes from ``CUDA_HOME``, else from PATH, else from NVIDIA's compiler
wheels, which suffice on a machine with no toolkit. Packages are located, never imported.
"""

from __future__ import annotations

import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hybrid_mxfp8 import env
from hybrid_mxfp8.dispatch.module_cache import digest, package_folder
from hybrid_mxfp8.errors import BackendUnavailableError

MIN_CUTLASS = (4, 2, 0)
RAGGED_CUTLASS = (4, 4, 0)  # the first whose ragged-contiguous mainloop takes MoEProblemShape
PDL_CUTLASS = (4, 6, 0)  # the first whose kernels may overlap: kPdlIsSafe in csrc has the reasons
MIN_CUDA = (12, 8)  # the first compiler for sm_100a
MIN_CUDA_103 = (12, 9)  # for sm_103a and the family target sm_100f

CUTLASS_PACKAGES = {
    "nvidia-cutlass": ("cutlass_library", "source/include"),
    "sgl-deep-gemm": ("deep_gemm", "include"),
    "flashinfer-python": ("flashinfer", "data/cutlass/include"),
}
"""Package name: the module it installs, and where in that the headers are."""

CHOSEN = "HYBRID_MXFP8_CUTLASS_DIR"  # the origin of headers that the user chose
INSTALL_CUTLASS = "pip install nvidia-cutlass, or pip install 'hybrid-mxfp8[ragged]' for newer headers"
INSTALL_CUDA = "pip install 'hybrid-mxfp8[nvcc]', or install a CUDA toolkit and set CUDA_HOME"
NO_HOST_COMPILER = "no host compiler: install g++ (apt install g++, dnf install gcc-c++), or name one in NVCC_CCBIN"


@dataclass(frozen=True)
class CutlassHeaders:
    """A folder with ``cutlass/`` and ``cute/``, and who brought it."""

    include: Path
    version: tuple[int, int, int]
    origin: str

    @property
    def version_string(self) -> str:
        """For names and tables, like ``4.2.0``."""
        return _dotted(self.version)

    @property
    def identity(self) -> str:
        """The version; of a chosen folder, at any commit or patched, with its contents' digest."""
        return self.version_string + (f"+{_digest(self.include)}" if self.origin == CHOSEN else "")

    @property
    def ragged(self) -> bool:
        """Whether the ragged-contiguous mainloop is there."""
        return self.version >= RAGGED_CUTLASS

    @property
    def hint(self) -> str:
        """What newer headers bring, and how to get them; empty if these are new enough."""
        if self.version >= PDL_CUTLASS:
            return ""
        lacks = "overlap of its two kernels" if self.ragged else "ragged mainloop and overlap of its two kernels"
        return f"{lacks} with newer CUTLASS headers: pip install 'hybrid-mxfp8[ragged]'"

    @property
    def problem(self) -> str:
        """Why these headers are not used; empty if they can be."""
        if self.version < MIN_CUTLASS:
            return "CUTLASS 4.2 or later is needed"
        if self.version[:2] == (4, 3):
            return "CUTLASS 4.3 calls cuDriverGetVersion, which no module is linked to: take 4.2, or 4.4 or later"
        return ""


@dataclass(frozen=True)
class CudaCompiler:
    """A CUDA toolkit, or as much of one as compiles and links, and where it was found."""

    home: Path
    version: tuple[int, ...]
    origin: str
    problem: str = ""  # why it is not used
    host: str = ""  # the command that host code is handed to; empty if it does not say

    @property
    def nvcc(self) -> Path:
        """The compiler."""
        return self.home / "bin" / "nvcc"

    @property
    def version_string(self) -> str:
        """For names and tables, like ``13.0.88``."""
        return _dotted(self.version)


def find_for(arch: str) -> tuple[CutlassHeaders, CudaCompiler]:
    """What builds for a target like ``10.3a``; BackendUnavailableError says what to install."""
    cutlass, cuda = find_cutlass(), find_cuda()
    needed = MIN_CUDA_103 if arch.startswith("10.3") or arch.endswith("f") else MIN_CUDA
    if cuda.version < needed:
        raise BackendUnavailableError(
            f"target {arch} needs CUDA {_dotted(needed)} or later, {cuda.nvcc} is {cuda.version_string}: {INSTALL_CUDA}"
        )
    return cutlass, cuda


def find_cutlass() -> CutlassHeaders:
    """The headers to compile with; BackendUnavailableError if there are none."""
    found = cutlass_candidates()
    if (chosen := env.cutlass_dir()) is not None:
        if not found or found[0].origin != CHOSEN:
            raise BackendUnavailableError(
                f"{CHOSEN}: expected a folder that holds include/cutlass/version.h, got {chosen}"
            )
        if found[0].problem:
            raise BackendUnavailableError(f"{CHOSEN}: {found[0].problem}, {chosen} has {found[0].version_string}")
        return found[0]
    usable = [headers for headers in found if not headers.problem]
    if not usable:
        said = "".join(f" ({h.origin} has {h.version_string}: {h.problem})" for h in found)
        raise BackendUnavailableError(f"no CUTLASS headers of version 4.2 or later{said}: {INSTALL_CUTLASS}")
    return max(usable, key=lambda headers: headers.version)


def cutlass_candidates() -> list[CutlassHeaders]:
    """All headers that were found: those of HYBRID_MXFP8_CUTLASS_DIR first, then each package's."""
    found = []
    if (chosen := env.cutlass_dir()) is not None:  # a CUTLASS checkout, or its include folder
        found.append(_read_cutlass(chosen / "include", CHOSEN) or _read_cutlass(chosen, CHOSEN))
    for origin, (module, folder) in CUTLASS_PACKAGES.items():
        if (package := package_folder(module)) is not None:
            found.append(_read_cutlass(package / folder, origin))
    return [headers for headers in found if headers is not None]


def _read_cutlass(include: Path, origin: str) -> CutlassHeaders | None:
    try:
        text = (include / "cutlass" / "version.h").read_text()
    except OSError:
        return None
    numbers = [re.search(rf"#define\s+CUTLASS_{part}\s+(\d+)", text) for part in ("MAJOR", "MINOR", "PATCH")]
    major, minor, patch = (int(match.group(1)) if match else 0 for match in numbers)
    return CutlassHeaders(include.resolve(), (major, minor, patch), origin)


@functools.cache
def _digest(include: Path) -> str:
    """Of all headers' names and contents; 30 MB are read once in a process."""
    files = sorted(path for part in ("cute", "cutlass") for path in (include / part).rglob("*") if path.is_file())
    return digest([str(path.relative_to(include)) for path in files], files)[:8]


def find_cuda() -> CudaCompiler:
    """The first usable compiler of CUDA_HOME, PATH and the wheels; BackendUnavailableError."""
    problems = []
    for found in cuda_candidates():
        if not found.problem:
            return found
        said = f"{found.nvcc}: {found.problem}"
        if found.origin in ("CUDA_HOME", "CUDA_PATH"):
            raise BackendUnavailableError(f"{found.origin}: expected a toolkit with a usable bin/nvcc, {said}")
        if found.problem == NO_HOST_COMPILER:  # nor has another nvcc
            raise BackendUnavailableError(said)
        problems.append(said)
    said = f" ({'; '.join(problems)})" if problems else ""
    raise BackendUnavailableError(f"no CUDA compiler of version {_dotted(MIN_CUDA)} or later{said}: {INSTALL_CUDA}")


def cuda_candidates() -> Iterator[CudaCompiler]:
    """Every compiler there is, usable or not, the preferred first."""
    for origin, nvcc in _nvcc_candidates():
        try:
            yield _probe_nvcc(origin, nvcc, nvcc.stat().st_mtime_ns, tuple(env.search_path()))
        except OSError as error:
            yield CudaCompiler(nvcc.parent.parent, (), origin, error.strerror or str(error))


def _nvcc_candidates() -> Iterator[tuple[str, Path]]:
    if (named := env.cuda_home()) is not None:
        variable, home = named
        yield variable, home / "bin" / "nvcc"
    for folder in env.search_path():
        if (folder / "nvcc").is_file():
            yield "PATH", folder / "nvcc"
            break
    # The CUDA 13 wheels share one folder; those of CUDA 12 have one each and link nothing. Some of
    # the latter make a package of `nvidia`, so importlib would miss others' folders of that name.
    for entry in sys.path:
        for nvcc in sorted(Path(entry, "nvidia").glob("cu*/bin/nvcc"), reverse=True):
            yield "nvidia-cuda-nvcc", nvcc


@functools.lru_cache
def _probe_nvcc(origin: str, nvcc: Path, mtime_ns: int, path: tuple[Path, ...]) -> CudaCompiler:
    """What nvcc itself says: it may be a wrapper script outside the toolkit's folder. ``path`` is
    PATH, on which it finds its host compiler, and like ``mtime_ns`` a key of the cache alone."""
    said = _output(nvcc, "--version")
    match = re.search(r"release [\d.]+, V([\d.]+)", said)
    if match is None:
        first = said.strip().partition("\n")[0]
        return CudaCompiler(nvcc.parent.parent, (), origin, f"not nvcc: {first or 'no --version'}")
    version = tuple(map(int, match.group(1).split(".")))
    # A dry run prints the environment nvcc would work in, its own real folder first, then commands.
    # It runs the host compiler before, and prints nothing if that fails.
    dry_run = _output(nvcc, "--dryrun", "-x", "cu", "/dev/null")
    here = re.search(r"^#\$ _HERE_=(.+)$", dry_run, re.MULTILINE)
    host = re.search(r"^#\$ (\S.*?) -D__CUDA_ARCH", dry_run, re.MULTILINE)
    folder = Path(here.group(1)) if here is not None else nvcc.resolve().parent
    problem = "" if version >= MIN_CUDA else f"CUDA {_dotted(version)} is older than {_dotted(MIN_CUDA)}"
    if not problem and "host compiler" in dry_run:
        problem = NO_HOST_COMPILER
    command = host.group(1).replace('"', "") if host is not None else ""
    return CudaCompiler(folder.resolve().parent, version, origin, problem, command)


def first_line(compiler: str) -> str:
    """The first line of a compiler's ``--version``; empty if it does not run."""
    try:
        return _output(compiler, "--version").partition("\n")[0]
    except OSError:
        return ""


def _output(program: Path | str, *arguments: str) -> str:
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
