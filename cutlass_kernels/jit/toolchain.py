"""Where the CUTLASS headers and the CUDA compiler are.

CUTLASS comes from ``HYBRID_MXFP8_CUTLASS_DIR``, else from the newest of the installed packages that carry its
headers. The compiler comes from ``CUDA_HOME``, else from PATH, else from NVIDIA's compiler wheels, which suffice on
a machine with no toolkit. Packages are only located, never imported.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hybrid_mxfp8 import env
from hybrid_mxfp8.errors import BackendUnavailableError

MIN_CUTLASS = (4, 2, 0)
RAGGED_CUTLASS = (4, 4, 0)
"""The first version whose block-scaled ragged-contiguous mainloop takes MoEProblemShape."""

MIN_CUDA = (12, 8)
MIN_CUDA_103 = (12, 9)
"""The first compilers for sm_100a; for sm_103a and the family target sm_100f."""

CUTLASS_CARRIERS = {
    "nvidia-cutlass": ("cutlass_library", "source/include"),
    "sgl-deep-gemm": ("deep_gemm", "include"),
    "flashinfer-python": ("flashinfer", "data/cutlass/include"),
}
"""Package name: the module it installs, and where in that the headers are."""

CHOSEN = "HYBRID_MXFP8_CUTLASS_DIR"
"""The origin of headers that the user chose."""

INSTALL_CUTLASS = "pip install nvidia-cutlass, or pip install 'hybrid-mxfp8[ragged]' for newer headers"
INSTALL_CUDA = "pip install 'hybrid-mxfp8[nvcc]', or install a CUDA toolkit and set CUDA_HOME"


@dataclass(frozen=True)
class CutlassHeaders:
    """A folder that holds ``cutlass/`` and ``cute/``."""

    include: Path
    version: tuple[int, int, int]
    origin: str

    @property
    def identity(self) -> str:
        """What tells them from others: the version of a package, and of a folder that was chosen its contents, too.

        A checkout may be at any commit, or patched, and say the same version.
        """
        return self.version_string + (f"+{_digest(self.include)}" if self.origin == CHOSEN else "")

    @property
    def ragged(self) -> bool:
        """Whether the ragged-contiguous mainloop is there."""
        return self.version >= RAGGED_CUTLASS

    @property
    def version_string(self) -> str:
        """For names and tables, like ``4.2.0``."""
        return ".".join(map(str, self.version))


@dataclass(frozen=True)
class CudaCompiler:
    """A CUDA toolkit, or as much of one as compiles and links."""

    home: Path
    version: tuple[int, ...]
    origin: str

    @property
    def nvcc(self) -> Path:
        """The compiler."""
        return self.home / "bin" / "nvcc"

    @property
    def version_string(self) -> str:
        """For names and tables, like ``13.0.88``."""
        return ".".join(map(str, self.version))


@dataclass(frozen=True)
class Candidate:
    """A place that was looked at, for ``doctor``."""

    origin: str
    path: Path
    version: str
    problem: str = ""

    def __str__(self) -> str:
        return f"{self.origin}: {self.version or '?'} at {self.path}" + (f" ({self.problem})" if self.problem else "")


# ---------------------------------------------------------------- CUTLASS


def find_cutlass() -> CutlassHeaders:
    """The headers to compile with.

    Raises:
        BackendUnavailableError: there are none, or HYBRID_MXFP8_CUTLASS_DIR has none; says what to install.
    """
    chosen = env.cutlass_dir()
    if chosen is not None:
        headers = _read_chosen(chosen)
        if headers is None:
            raise BackendUnavailableError(
                f"HYBRID_MXFP8_CUTLASS_DIR: expected a folder that holds include/cutlass/version.h, got {chosen}"
            )
        if headers.version < MIN_CUTLASS:
            raise BackendUnavailableError(
                f"HYBRID_MXFP8_CUTLASS_DIR: CUTLASS 4.2 or later is needed, {chosen} has {headers.version_string}"
            )
        return headers
    usable = installed_cutlass()
    if not usable:
        raise BackendUnavailableError(f"no CUTLASS headers of version 4.2 or later: {INSTALL_CUTLASS}")
    return max(usable, key=lambda headers: headers.version)


def installed_cutlass() -> list[CutlassHeaders]:
    """The usable headers among the installed packages."""
    return [headers for headers in _carried() if headers.version >= MIN_CUTLASS]


def find_cutlass_tools(headers: CutlassHeaders) -> Path:
    """The include folder of ``cutlass/util``, CUTLASS's CPU references, which judge this backend in its tests.

    That of the same checkout if it has one, else that of nvidia-cutlass, the only package with it.

    Raises:
        BackendUnavailableError: neither is there.
    """
    beside = headers.include.parent / "tools" / "util" / "include"
    candidates = [beside]
    package = package_folder("cutlass_library")
    if package is not None:
        candidates.append(package / "source" / "tools" / "util" / "include")
    for candidate in candidates:
        if (candidate / "cutlass" / "util" / "reference" / "host" / "gett.hpp").is_file():
            return candidate
    raise BackendUnavailableError("no cutlass/util headers: pip install nvidia-cutlass")


def cutlass_candidates() -> list[Candidate]:
    """Every place that headers were looked for in and found, with its version."""
    found = []
    chosen = env.cutlass_dir()
    if chosen is not None:
        headers = _read_chosen(chosen)
        version = headers.version_string if headers else ""
        found.append(Candidate("HYBRID_MXFP8_CUTLASS_DIR", chosen, version, "" if headers else "no CUTLASS headers"))
    for headers in _carried():
        problem = "" if headers.version >= MIN_CUTLASS else "too old: 4.2 is needed"
        found.append(Candidate(headers.origin, headers.include, headers.version_string, problem))
    return found


def _read_chosen(folder: Path) -> CutlassHeaders | None:
    """A CUTLASS checkout, or its include folder."""
    return _read_cutlass(folder / "include", CHOSEN) or _read_cutlass(folder, CHOSEN)


@functools.cache
def _digest(include: Path) -> str:
    """Of all headers' names and contents; 30 MB are read once in a process."""
    digest = hashlib.sha256()
    for path in sorted(path for part in ("cute", "cutlass") for path in (include / part).rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(include)}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


def _carried() -> Iterator[CutlassHeaders]:
    for origin, (module, folder) in CUTLASS_CARRIERS.items():
        package = package_folder(module)
        headers = _read_cutlass(package / folder, origin) if package is not None else None
        if headers is not None:
            yield headers


def _read_cutlass(include: Path, origin: str) -> CutlassHeaders | None:
    try:
        text = (include / "cutlass" / "version.h").read_text()
    except OSError:
        return None
    numbers = [re.search(rf"#define\s+CUTLASS_{part}\s+(\d+)", text) for part in ("MAJOR", "MINOR", "PATCH")]
    major, minor, patch = (int(match.group(1)) if match else 0 for match in numbers)
    return CutlassHeaders(include.resolve(), (major, minor, patch), origin)


def package_folder(module: str) -> Path | None:
    """The folder of a top-level module; finding its spec runs none of its code."""
    spec = importlib.util.find_spec(module)
    locations = list(spec.submodule_search_locations or []) if spec is not None else []
    return Path(locations[0]) if locations else None


# ---------------------------------------------------------------- CUDA


def find_cuda() -> CudaCompiler:
    """The compiler to use: of the usable ones, the first of CUDA_HOME, PATH and the compiler wheels.

    Raises:
        BackendUnavailableError: CUDA_HOME has none, or there is none anywhere; says what to install.
    """
    problems = []
    for origin, nvcc in _nvcc_candidates():
        found = _probe_nvcc(nvcc)
        if isinstance(found, tuple) and found[1] >= MIN_CUDA:
            return CudaCompiler(found[0], found[1], origin)
        problem = found if isinstance(found, str) else f"CUDA {_dotted(found[1])} is older than {_dotted(MIN_CUDA)}"
        if origin == "CUDA_HOME":
            raise BackendUnavailableError(f"CUDA_HOME: expected a toolkit with a usable bin/nvcc, {nvcc}: {problem}")
        problems.append(f"{nvcc}: {problem}")
    seen = f" ({'; '.join(problems)})" if problems else ""
    raise BackendUnavailableError(f"no CUDA compiler of version {_dotted(MIN_CUDA)} or later{seen}: {INSTALL_CUDA}")


def cuda_candidates() -> list[Candidate]:
    """Every compiler that was looked at, with its version."""
    found = []
    for origin, nvcc in _nvcc_candidates():
        probed = _probe_nvcc(nvcc)
        if isinstance(probed, str):
            found.append(Candidate(origin, nvcc, "", probed))
        else:
            problem = "" if probed[1] >= MIN_CUDA else f"too old: {_dotted(MIN_CUDA)} is needed"
            found.append(Candidate(origin, probed[0], _dotted(probed[1]), problem))
    return found


def _nvcc_candidates() -> Iterator[tuple[str, Path]]:
    home = env.cuda_home()
    if home is not None:
        yield "CUDA_HOME", home / "bin" / "nvcc"
    for folder in env.search_path():
        if (folder / "nvcc").is_file():
            yield "PATH", folder / "nvcc"
            break
    # The CUDA 13 wheels share one folder; those of CUDA 12 have one each and link nothing. Some of the latter make a package of
    # `nvidia`, which hides folders of that name elsewhere on the path from the import system. So look at all of them.
    for entry in sys.path:
        for nvcc in sorted(Path(entry, "nvidia").glob("cu*/bin/nvcc"), reverse=True):
            yield "nvidia-cuda-nvcc", nvcc


def _probe_nvcc(nvcc: Path) -> tuple[Path, tuple[int, ...]] | str:
    """(toolkit folder, version), or what is wrong."""
    try:
        return _probe_unchanged_nvcc(nvcc, nvcc.stat().st_mtime_ns)
    except OSError as error:
        return error.strerror or str(error)


@functools.lru_cache
def _probe_unchanged_nvcc(nvcc: Path, mtime_ns: int) -> tuple[Path, tuple[int, ...]] | str:
    """Asks nvcc itself: it may be a wrapper script, whose folder says nothing of the toolkit's."""
    version = _output(nvcc, "--version")
    match = re.search(r"release [\d.]+, V([\d.]+)", version)
    if match is None:
        return f"not nvcc: {version.strip().splitlines()[0]}" if version.strip() else "not nvcc: no --version"
    # A dry run prints the environment nvcc would work in, its own real folder first.
    here = re.search(r"^#\$ _HERE_=(.+)$", _output(nvcc, "--dryrun", "-x", "cu", "/dev/null"), re.MULTILINE)
    folder = Path(here.group(1)) if here is not None else nvcc.resolve().parent
    return folder.resolve().parent, tuple(map(int, match.group(1).split(".")))


def _output(nvcc: Path, *arguments: str) -> str:
    done = subprocess.run([nvcc, *arguments], capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
