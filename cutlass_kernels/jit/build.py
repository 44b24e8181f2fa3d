"""Compile a CUDA source with tvm-ffi once, keep it, and load it.

A module is kept in a folder of its own under ``env.cache_dir()``, named by what went into it:

    <module name>-<key>-cutlass<version>-nvcc<version>/   module.so, build.json

The key covers the contents of the sources, flags, definitions, architecture, host machine and the version of tvm-ffi. The
two versions, the first with a digest of the headers where these are a chosen folder's, stand outside it, so that a machine
that cannot compile can still find a module that was built elsewhere and copied.

A build works in a private folder and ends in one rename, so a module is there whole or not at all: a build that
was killed leaves nothing that is ever looked at. A file lock keeps others from building the same thing meanwhile.
Where a network file system does not honour it, two builds run and the second finds the first one's module in place.

Only what this user or root alone can have written is loaded: see trust.py.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import filelock

from hybrid_mxfp8 import env
from hybrid_mxfp8.checkpoint.atomic import alive
from hybrid_mxfp8.cutlass_kernels.jit import toolchain as headers
from hybrid_mxfp8.cutlass_kernels.jit import trust
from hybrid_mxfp8.errors import BackendUnavailableError

logger = logging.getLogger("hybrid_mxfp8")

CSRC = Path(__file__).parent.parent / "csrc"
LIBRARY = "module.so"
MANIFEST = "build.json"
MANIFEST_STRINGS = ("name", "arch", "cutlass", "nvcc", "sha256")
"""What every manifest has, as strings."""
BUILDING = ".building-"
FOLDER = re.compile(
    r"(?P<name>\w+)-(?P<key>[0-9a-f]+)-cutlass(?P<cutlass>\d+(\.\d+)*)(\+[0-9a-f]+)?-nvcc(?P<nvcc>\d+(\.\d+)*)"
)
"""A module's folder, as :func:`_folder_name` writes it; its log and lock have longer names."""

CUDA_FLAGS = (
    "-O3",
    "-DNDEBUG",
    "--expt-relaxed-constexpr",
    "--expt-extended-lambda",
    "-diag-suppress=20012",  # CUTLASS marks defaulted constructors __host__ __device__
)

PLAIN_PATH = re.compile(r"[\w/.,:+@%=~-]+")
"""Which a shell and ninja take as they are; letters of any alphabet."""

UNWRITABLE = (
    *(errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
    *(errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP),
    *(errno.EIO, errno.ESTALE),
)
"""What a full, forbidden, misnamed or failing file system answers, rather than a mistake made here."""

FAMILY = {"10.0": ("10.0a", "10.0f"), "10.3": ("10.3a", "10.0f")}
"""Targets whose code runs on a compute capability, the most specific first."""


@dataclass(frozen=True)
class Source:
    """What to compile.

    Attributes:
        name: of the module, unique among differing definitions; letters, digits, ``_``.
        file: the ``.cu`` file.
        arch: the target, like ``10.0a``, ``10.3a``, ``10.0f``, ``9.0``.
        definitions: macros and their values.
        flags: for nvcc, after CUDA_FLAGS.
        tools: whether it includes ``cutlass/util``.
        include: further include folders, before CUTLASS's; their headers are part of the key.
    """

    name: str
    file: Path
    arch: str
    definitions: tuple[tuple[str, str], ...] = ()
    flags: tuple[str, ...] = ()
    tools: bool = False
    include: tuple[Path, ...] = field(default=(CSRC,))

    def key(self) -> str:
        """A digest of all that this machine's compiler would be given, but for CUTLASS's headers."""
        digest = hashlib.sha256()
        own = sorted(path for folder in self.include for path in folder.glob("*.cuh"))
        for path in (self.file, *own):
            digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
            digest.update(path.read_bytes())
        settings = (self.name, self.arch, self.definitions, CUDA_FLAGS, self.flags, self.tools)
        digest.update(repr((*settings, platform.system(), platform.machine(), _tvm_ffi_version())).encode())
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Built:
    """A module in the cache."""

    folder: Path

    @property
    def library(self) -> Path:
        """The shared library."""
        return self.folder / LIBRARY

    def manifest(self) -> dict[str, Any]:
        """What it was built from, and its library's digest; empty if unreadable or damaged."""
        try:
            manifest = json.loads((self.folder / MANIFEST).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        if not isinstance(manifest, dict) or not all(isinstance(manifest.get(key), str) for key in MANIFEST_STRINGS):
            return {}
        return manifest

    def distrusted(self) -> str:
        """Why it is not loaded although it is there: someone else owns or can write it. Empty if nothing is wrong."""
        paths = (self.folder, self.library, self.folder / MANIFEST)
        return next(filter(None, map(trust.problem, paths)), "")

    def intact(self) -> bool:
        """Whether the library is the one that was built, by this user or root."""
        if self.distrusted():
            return False
        expected = self.manifest().get("sha256")
        try:
            return expected is not None and expected == _digest(self.library)
        except OSError:
            return False


def cache() -> Path:
    """The folder that holds the modules."""
    return env.cache_dir() / "cutlass"


def check_cache() -> None:
    """That the cache, if there is one, is safe to load code from.

    Raises:
        BackendUnavailableError: someone else owns it or can write there; says who, and what to do.
    """
    trust.check_folder(env.cache_dir(), cache())


def toolchain(arch: str) -> tuple[headers.CutlassHeaders, headers.CudaCompiler]:
    """The headers and the compiler of this machine that build for a target like ``10.3a``.

    Raises:
        BackendUnavailableError: one is missing, or the compiler is too old for the target; says what to install.
    """
    cutlass, cuda = headers.find_cutlass(), headers.find_cuda()
    needed = headers.MIN_CUDA_103 if arch.startswith("10.3") or arch.endswith("f") else headers.MIN_CUDA
    if cuda.version < needed:
        raise BackendUnavailableError(
            f"target {arch} needs CUDA {'.'.join(map(str, needed))} or later, {cuda.nvcc} is {cuda.version_string}: "
            f"{headers.INSTALL_CUDA}"
        )
    return cutlass, cuda


def find(source: Source) -> Built | None:
    """The module if it is built: by this machine's toolchain, or where that cannot build it, the newest by any.

    Raises:
        BackendUnavailableError: as :func:`check_cache`.
    """
    check_cache()
    try:
        exact = Built(cache() / _folder_name(source, *toolchain(source.arch)))
    except BackendUnavailableError:
        return next(carried([source]), None)
    return exact if _usable(exact) else None


def carried(sources: Iterable[Source]) -> Iterator[Built]:
    """The intact modules of these sources, by whatever versions of CUTLASS and nvcc, the newest versions first.

    Lists the cache once, and takes keys, which read every source file, only of what is listed.

    Raises:
        BackendUnavailableError: as :func:`check_cache`.
    """
    check_cache()
    listed = [match for folder in cache().glob("*-cutlass*-nvcc*") if (match := FOLDER.fullmatch(folder.name))]
    names = {match["name"] for match in listed}
    wanted = {(source.name, source.key()) for source in sources if source.name in names}
    for match in sorted(listed, key=_versions, reverse=True):
        module = Built(cache() / match.string)
        if (match["name"], match["key"]) in wanted and _usable(module):
            yield module


def _usable(module: Built) -> bool:
    """Whether it is intact, with a word if only its owner or mode is in the way."""
    if problem := module.distrusted():
        logger.warning("not loaded: %s", problem)
    return module.intact()


def build(source: Source) -> Built:
    """The module, built now if it is not there; another process's build of it is waited for.

    Raises:
        BackendUnavailableError: no headers or compiler, a compiler too old for the target, a compilation that
            fails, a cache folder that cannot be written, or one that is someone else's.
    """
    found = find(source)
    if found is not None:
        return found
    cutlass, cuda = toolchain(source.arch)
    final = Built(cache() / _folder_name(source, cutlass, cuda))
    with _writing(final.folder), _locked(final.folder):
        if final.intact():  # another process was faster
            return final
        _sweep(final.folder)
        _compile(source, cutlass, cuda, final.folder)
    return final


_loaded: dict[Path, Any] = {}
_loading = threading.Lock()


def load(source: Source) -> Any:
    """The tvm-ffi module, built if need be; loaded once in a process.

    Raises:
        BackendUnavailableError: as :func:`build`, or the library does not load.
    """
    import tvm_ffi

    library = build(source).library
    with _loading:
        if library not in _loaded:
            try:
                _loaded[library] = tvm_ffi.load_module(str(library))
            except (RuntimeError, OSError) as error:
                raise BackendUnavailableError(
                    f"{library} does not load; delete its folder to rebuild: {error}"
                ) from error
        return _loaded[library]


def built() -> list[Built]:
    """Every intact module in the cache, by name.

    Raises:
        BackendUnavailableError: as :func:`check_cache`.
    """
    check_cache()
    folders = sorted(cache().glob("*-cutlass*-nvcc*")) if os.path.isdir(cache()) else []
    return [b for b in map(Built, folders) if b.folder.is_dir() and b.intact()]


# ---------------------------------------------------------------- one build


def _folder_name(source: Source, cutlass: headers.CutlassHeaders, cuda: headers.CudaCompiler) -> str:
    return f"{source.name}-{source.key()}-cutlass{cutlass.identity}-nvcc{cuda.version_string}"


def _versions(folder: re.Match[str]) -> tuple[tuple[int, ...], ...]:
    """Of CUTLASS and nvcc, as numbers: 4.10.0 is newer than 4.8.1."""
    return tuple(tuple(map(int, folder[tool].split("."))) for tool in ("cutlass", "nvcc"))


@functools.cache
def _tvm_ffi_version() -> str:
    """Modules are compiled against its headers and linked to its library; empty where it is not installed."""
    try:
        return importlib.metadata.version("apache-tvm-ffi")
    except importlib.metadata.PackageNotFoundError:
        return ""


_BUILD = "import json, sys, tvm_ffi.cpp; print(tvm_ffi.cpp.build(**json.load(sys.stdin)))"


def _compile(source: Source, cutlass: headers.CutlassHeaders, cuda: headers.CudaCompiler, final: Path) -> None:
    """Build in a private folder, then rename its result to ``final``."""
    _check_tools(cuda)
    private = Path(tempfile.mkdtemp(prefix=f"{_private_prefix(final)}{os.getpid()}-", dir=final.parent))
    try:
        logger.warning("compiling %s for %s, about a minute, once", source.name, source.arch)
        arguments = {
            "name": source.name,
            "sources": [_ninja_path(source.file)],
            "extra_cuda_cflags": [
                *CUDA_FLAGS,
                *source.flags,
                *(f"-D{name}={value}" for name, value in source.definitions),
                *(_argument(f"-I{path.resolve()}") for path in _include_paths(source, cutlass)),
            ],
            "extra_ldflags": [_argument(flag) for flag in _link_flags(cuda, private)],
            "build_directory": str(private),
            "backend": "cuda",
        }
        # In a process of its own, because tvm-ffi takes toolkit and target from the environment.
        done = subprocess.run(
            [sys.executable, "-c", _BUILD],
            input=json.dumps(arguments),
            env=_build_environment(source.arch, cuda),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            log = final.parent / f"{final.name}.log"
            log.write_text(done.stdout + done.stderr, encoding="utf-8", errors="replace")
            raise BackendUnavailableError(
                f"compiling {source.name} failed: {_first_error(done.stdout + done.stderr)} (all of it in {log})"
            )
        result = private / "result"
        result.mkdir(0o755)
        os.replace(done.stdout.strip().splitlines()[-1], result / LIBRARY)
        manifest = {
            "name": source.name,
            "arch": source.arch,
            "definitions": dict(source.definitions),
            "cutlass": cutlass.version_string,
            "nvcc": cuda.version_string,
            "sha256": _digest(result / LIBRARY),
        }
        (result / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        for path in (result / LIBRARY, result / MANIFEST):
            trust.close_to_others(path)
        _put_in_place(result, final, private)
        (final.parent / f"{final.name}.log").unlink(missing_ok=True)
    finally:
        shutil.rmtree(private, ignore_errors=True)


def _put_in_place(result: Path, final: Path, private: Path) -> None:
    if final.exists() and not Built(final).intact():
        os.rename(final, private / "broken")
    try:
        os.rename(result, final)
    except OSError:
        # Only where the lock was not honoured: another build got here first.
        if not Built(final).intact():
            raise


def _include_paths(source: Source, cutlass: headers.CutlassHeaders) -> Iterator[Path]:
    yield from source.include
    yield cutlass.include
    if source.tools:
        yield headers.find_cutlass_tools(cutlass)


def _ninja_path(path: Path) -> str:
    """A path as ninja reads it in a list of files; tvm-ffi escapes the colons itself."""
    return str(path).replace("$", "$$").replace(" ", "$ ")


def _argument(word: str) -> str:
    """A word as ninja and then the shell read it: tvm-ffi writes a command's words to ninja's file as they are."""
    return shlex.quote(word).replace("$", "$$")


def _check_tools(cuda: headers.CudaCompiler) -> None:
    """That the paths which tvm-ffi puts into a command by itself mean there what they say."""
    for tool, folder in (("CUDA", cuda.home), ("tvm-ffi", headers.package_folder("tvm_ffi"))):
        if folder is not None and not PLAIN_PATH.fullmatch(str(folder)):
            raise BackendUnavailableError(
                f"{tool} is in {str(folder)!r}, from where tvm-ffi can't build: install it, or this environment, under a "
                "path without spaces, quotes and other signs that a shell reads"
            )


def _build_environment(arch: str, cuda: headers.CudaCompiler) -> dict[str, str]:
    import ninja

    return env.child_environment(
        path_first=[Path(ninja.BIN_DIR)],
        CUDA_HOME=str(cuda.home),
        TVM_FFI_CUDA_ARCH_LIST=arch,
        TVM_FFI_GPU_BACKEND="cuda",
        MAX_JOBS="1",
    )


def _link_flags(cuda: headers.CudaCompiler, private: Path) -> list[str]:
    """Let ``-lcudart`` resolve where lib64 is missing or has no unversioned name, and the module find it later."""
    folders = [folder for folder in (cuda.home / "lib64", cuda.home / "lib") if folder.is_dir()]
    flags = [f"-Wl,-rpath,{folder}" for folder in folders]
    if not (cuda.home / "lib64" / "libcudart.so").exists():
        versioned = sorted(path for folder in folders for path in folder.glob("libcudart.so*"))
        if versioned:
            (private / "lib").mkdir()
            (private / "lib" / "libcudart.so").symlink_to(versioned[0])
            flags.append(f"-L{private / 'lib'}")
    return flags


def _first_error(output: str) -> str:
    lines = [line.strip() for line in output.splitlines()]
    for pattern in (r"\berror\b\s*[:#]", r"\bfatal\b", r"\berror\b", r"Error"):
        for line in lines:
            if re.search(pattern, line) and not line.startswith(("#", "File ")):
                return line
    return next((line for line in reversed(lines) if line), "no output")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# ---------------------------------------------------------------- others at the same time


@contextmanager
def _writing(final: Path) -> Iterator[None]:
    """Says what to do where the cache cannot be written."""
    try:
        _make_folder(final.parent)
        if not os.access(final.parent, os.W_OK):
            raise PermissionError(errno.EACCES, "Permission denied", str(final.parent))
        check_cache()  # once more: a file server may have given the new folder to another user
        yield
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        raise BackendUnavailableError(
            f"the cache folder {final.parent} cannot be written ({error.strerror}): set HYBRID_MXFP8_CACHE_DIR to one "
            f"that can, or copy a warmed-up cache there"
        ) from error


def _make_folder(folder: Path) -> None:
    """With all that is missing above it. Readable for others, so that root can warm up an image for all; writable for none."""
    for missing in reversed([f for f in (folder, *folder.parents) if not f.exists()]):
        try:
            missing.mkdir(0o755)
        except FileExistsError:
            if not missing.is_dir():  # a link to nowhere, or a file that was made a moment ago
                raise NotADirectoryError(errno.ENOTDIR, "Not a directory", str(missing)) from None
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "Not a directory", str(folder))


@contextmanager
def _locked(final: Path) -> Iterator[None]:
    """One builder of a module at a time; the operating system frees the lock of a process that dies."""
    lock = filelock.FileLock(f"{final}.lock", mode=0o600, thread_local=False)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        logger.warning("waiting for another process that compiles %s", final.name)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _private_prefix(final: Path) -> str:
    return f"{BUILDING}{final.name}-{platform.node()}-"


def _sweep(final: Path) -> None:
    """Remove what killed builds of this module left, on this host: their processes are gone."""
    prefix = _private_prefix(final)
    for folder in final.parent.glob(f"{prefix}*"):
        owner = folder.name.removeprefix(prefix).split("-")[0]
        if owner.isdecimal() and not alive(int(owner)):
            shutil.rmtree(folder, ignore_errors=True)
