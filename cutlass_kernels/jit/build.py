"""Compile a CUDA source once, keep the module, and load it.

A module is a shared library that exports functions through tvm-ffi. It has a folder of its own
below ``env.cache_dir()``, named by what went into it:

    <module name>-<key>-cutlass<version>-nvcc<version>/   module.so, build.json

The key covers the contents of the sources, flags, definitions, target, host machine and the version
of tvm-ffi. The two versions stand outside it, so that a machine that cannot compile still finds a
module that was built elsewhere and copied. Only what this user or root alone can have written is
loaded, and one process at a time builds a module: see dispatch/module_cache.py.
"""

from __future__ import annotations

import functools
import importlib.metadata
import logging
import os
import platform
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybrid_mxfp8 import env
from hybrid_mxfp8.cutlass_kernels.jit import toolchain
from hybrid_mxfp8.cutlass_kernels.jit.toolchain import CudaCompiler, CutlassHeaders
from hybrid_mxfp8.dispatch.module_cache import LIBRARY, Module, build_once, check_trusted, digest, write_manifest
from hybrid_mxfp8.errors import BackendUnavailableError

logger = logging.getLogger("hybrid_mxfp8")

CSRC = Path(__file__).parent.parent / "csrc"

FLAGS = (
    "-std=c++17",
    "-O3",
    "-DNDEBUG",
    "--expt-relaxed-constexpr",
    "--expt-extended-lambda",
    "-diag-suppress=20012",  # CUTLASS marks defaulted constructors __host__ __device__
    *("-shared", "-Xcompiler=-fPIC"),
    # An undefined symbol fails here, not when the module is loaded. The runtime is linked in: no
    # libcudart is needed where a module was copied to.
    *("-cudart=static", "-Xlinker=-z,defs"),
)

READ_BY_SHELL = re.compile(r"[$`\"\\\n]")
"""In double quotes, which is how nvcc hands paths to the shell that runs its parts."""

MODULE_NAME = r"\w+-[0-9a-f]{16}-cutlass([\d.]+)(?:\+[0-9a-f]+)?-nvcc([\d.]*\d)"
"""Of a module's folder: the versions are those of CUTLASS and nvcc."""


@dataclass(frozen=True)
class Source:
    """What to compile."""

    name: str  # of the module, unique among differing definitions; letters, digits, ``_``
    file: Path  # the ``.cu`` file
    arch: str  # the target, like ``10.0a``, ``10.3a``, ``10.0f``, ``9.0``
    definitions: tuple[tuple[str, str], ...] = ()  # macros and their values
    flags: tuple[str, ...] = ()  # for nvcc, after FLAGS
    include: tuple[Path, ...] = (CSRC,)  # searched before CUTLASS's; .cuh there are part of the key

    def key(self) -> str:
        """A digest of all that the compiler would be given, except CUTLASS's headers."""
        own = sorted(path for folder in self.include for path in folder.glob("*.cuh"))
        settings = (self.name, self.arch, self.definitions, FLAGS, self.flags, _tvm_ffi_version())
        return digest((*settings, platform.system(), platform.machine()), (self.file, *own))


def cache() -> Path:
    """The folder that holds the modules."""
    return env.cache_dir() / "cutlass"


def check_cache() -> None:
    """Check that code in the cache may be loaded, as all below do; BackendUnavailableError."""
    check_trusted(env.cache_dir(), cache())


def find(source: Source) -> Module | None:
    """The module if it is built, by this machine's tools; if it has none, the newest by any."""
    check_cache()
    try:
        exact = Module(cache() / _folder_name(source, *toolchain.find_for(source.arch)))
    except BackendUnavailableError:
        return built_elsewhere(source)
    return exact if _usable(exact) else None


def built_elsewhere(source: Source) -> Module | None:
    """The intact module of this source by the newest CUTLASS and nvcc, whichever those are."""
    check_cache()
    versions = {}
    # os.path's test answers False for a path that cannot be, such as one too long.
    folders = cache().glob(f"{source.name}-{source.key()}-cutlass*") if os.path.isdir(cache()) else ()
    for module in map(Module, folders):
        named = re.fullmatch(MODULE_NAME, module.folder.name)
        if named is not None and _usable(module):
            # As numbers: 4.10.0 is newer than 4.8.1.
            versions[module] = [[int(n) for n in re.findall(r"\d+", version)] for version in named.groups()]
    return max(versions, key=lambda module: versions[module], default=None)


def build(source: Source) -> Module:
    """The module, built now if need be, or waited for while another process does it.
    BackendUnavailableError for missing or old tools, a failed compilation, an unwritable cache."""
    if (found := find(source)) is not None:
        return found
    cutlass, cuda = toolchain.find_for(source.arch)
    module = Module(cache() / _folder_name(source, cutlass, cuda))
    build_once(module.folder, lambda folder: _compile(source, cutlass, cuda, folder, module), module.intact)
    return module


def load(source: Source) -> Any:
    """The tvm-ffi module, loaded once in a process; raises as :func:`build`."""
    return build(source).load()


def _usable(module: Module) -> bool:
    """Whether it is intact; logs where only its owner or mode is in the way."""
    if problem := module.trust_problem():
        logger.warning("not loaded: %s", problem)
    return module.intact()


def _folder_name(source: Source, cutlass: CutlassHeaders, cuda: CudaCompiler) -> str:
    return f"{source.name}-{source.key()}-cutlass{cutlass.identity}-nvcc{cuda.version_string}"


@functools.cache
def _tvm_ffi_version() -> str:
    """Modules are compiled against its headers and linked to its library."""
    try:
        return importlib.metadata.version("apache-tvm-ffi")
    except importlib.metadata.PackageNotFoundError:
        return ""


def _compile(source: Source, cutlass: CutlassHeaders, cuda: CudaCompiler, folder: Path, module: Module) -> None:
    """Write library and manifest of ``module`` to ``folder``."""
    logger.warning("compiling %s for %s, about a minute, once", source.name, source.arch)
    done = subprocess.run(
        _command(source, cutlass, cuda, folder / LIBRARY),
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    log = module.folder.with_name(f"{module.folder.name}.log")
    output = done.stdout + done.stderr
    if done.returncode != 0:
        log.write_text(output, encoding="utf-8")
        raise BackendUnavailableError(f"compiling {source.name} failed: {_first_error(output)} (all of it in {log})")
    write_manifest(
        folder,
        name=source.name,
        arch=source.arch,
        definitions=dict(source.definitions),
        cutlass=cutlass.version_string,
        nvcc=cuda.version_string,
    )
    log.unlink(missing_ok=True)


def _command(source: Source, cutlass: CutlassHeaders, cuda: CudaCompiler, library: Path) -> list[str]:
    from tvm_ffi import libinfo

    tvm_ffi_include = map(Path, (libinfo.find_include_path(), libinfo.find_dlpack_include_path()))
    include = (*source.include, cutlass.include, *tvm_ffi_include)
    for path in map(str, (*include, source.file, library, cuda.home)):
        if READ_BY_SHELL.search(path):
            raise BackendUnavailableError(
                f"nvcc can't build from {path!r}: it would read $, `, \" or \\ there as a shell does"
            )
    target = source.arch.replace(".", "")
    return [
        *(str(cuda.nvcc), *FLAGS, *source.flags),
        f"-gencode=arch=compute_{target},code=sm_{target}",
        *(f"-D{name}={value}" for name, value in source.definitions),
        *(f"-I{path.resolve()}" for path in include),
        *(str(source.file), "-o", str(library)),
        f"-L{cuda.home / 'lib'}",  # of NVIDIA's wheels; nvcc itself looks into lib64
        f"-L{Path(libinfo.find_libtvm_ffi()).parent}",
        "-ltvm_ffi",
    ]


def _first_error(output: str) -> str:
    lines = [line.strip() for line in output.splitlines()]
    for pattern in (r"\berror\b\s*[:#]", r"\bfatal\b", r"\berror\b", r"undefined reference", r"Error"):
        for line in lines:
            if re.search(pattern, line) and not line.startswith(("#", "File ")):
                return line
    return next((line for line in reversed(lines) if line), "no output")
