"""Builds, loads and feeds ``launcher.c``, which makes all launches of a plan in one call.

The module is built once a machine, in 0.2 s, with the C compiler that Triton itself uses and the
``cuda.h`` of Triton's wheel; the driver is opened when first used. It is kept as one file:

    <cache_dir>/launcher/<key>-<digest of the file>.so

The key covers the source, both headers, the flags, the processor and the C library; not the
compiler, since any makes the same interface: a machine without one takes what was built before.
A build works in a private folder and ends in a rename, so a file is there whole or not at all, and
two processes that build at once both end with a good one. Only what matches its digest is loaded,
and only if nobody but this user or root can have written it.

Where there is no launcher, :func:`load` says why, and Triton's own makes the launches: slower, with
the same result.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from hybrid_mxfp8 import env

SOURCE = Path(__file__).with_suffix(".c")
FLAGS = ("-std=gnu11", "-O2", "-shared", "-fPIC", "-fvisibility=hidden", "-pthread")

SCALAR, ADDRESS, TENSOR_MAP = range(3)
"""Kinds of a kernel's parameter; launcher.c has what follows each of them."""

MAX_PARAMS, MAX_TENSOR_MAPS = 128, 16
"""Of one launch, as launcher.c holds them."""


class LauncherUnavailableError(RuntimeError):
    """The launcher can't make these launches, but Triton's own can; one line says why."""


class Launcher(NamedTuple):
    """The functions of launcher.c.

    Attributes:
        run: ``run(program.address, stream, *addresses)``, ints all: 0; or 1 + i * (how many) + j,
            and nothing was launched, since buffer i, which is written, overlaps buffer j.
            RuntimeError: from the driver.
        check: ``check(function, *sizes)``: RuntimeError unless the kernel with this handle of the
            driver has parameters of these sizes in bytes, and no more.
        verify: ``verify(address, length)``: ValueError unless the words there are a program.
    """

    run: Callable[..., int]
    check: Callable[..., int]
    verify: Callable[[int, int], int]


class Program:
    """All launches of a plan, as ``run`` reads them; it must outlive every ``run``.

    Attributes:
        words: as :func:`program_words` gives them.
        address: of the words, for ``run``.
        run: of the Launcher.

    Raises:
        ValueError: a word is out of range, or a launch has more parameters than launcher.c holds.
        LauncherUnavailableError: as :func:`load`.
    """

    __slots__ = ("address", "run", "words")

    def __init__(self, words: array[int]) -> None:
        self.words = words
        self.address, length = words.buffer_info()
        launcher = load()
        launcher.verify(self.address, length)
        self.run = launcher.run


def program_words(
    device_index: int,
    extents: Sequence[int],
    written: Sequence[tuple[int, int]],
    launches: Sequence[Sequence[int]],
) -> list[int]:
    """Put a program together.

    Args:
        device_index: of the GPU that the kernels are loaded on.
        extents: bytes of each buffer that ``run`` takes the address of; 0 overlaps nothing.
        written: (index of a buffer that is written, index of the one buffer that it may be the
            same memory as, else -1). A buffer that overlaps it in any other way is refused by
            ``run``, also one that starts where it does.
        launches: their words in order, as ``Abi.words`` or :func:`launch_words` gives them.
    """
    words = [device_index, len(extents), *extents, len(written)]
    for pair in written:
        words += pair
    words.append(len(launches))
    for launch in launches:
        words += launch
    return words


def launch_words(
    function: int, grid: int, block_threads: int, shared_bytes: int, pdl: bool, params: Sequence[Sequence[int]]
) -> list[int]:
    """One launch; ``params`` are the words of each parameter, its kind first."""
    words = [function, grid, block_threads, shared_bytes, int(pdl), len(params)]
    for param in params:
        words += param
    return words


def load() -> Launcher:
    """The launcher, built if this machine has none yet; found out once in a process.

    Raises:
        LauncherUnavailableError: there is none; says why and what to do.
    """
    found = _load_once()
    if isinstance(found, str):
        raise LauncherUnavailableError(found)
    return found


def status() -> str:
    """Whether there is a launcher, and why not, in a line."""
    found = _load_once()
    return f"not available: {found}" if isinstance(found, str) else "available"


@functools.cache
def _load_once() -> Launcher | str:
    try:
        return _load()
    except LauncherUnavailableError as error:
        return str(error)


def _load() -> Launcher:
    cuda, tvm_ffi = _package("triton") / "backends/nvidia/include", _package("tvm_ffi")
    cuda_header, tvm_ffi_header = cuda / "cuda.h", tvm_ffi / "include/tvm/ffi/c_api.h"
    for wheel, header in (("triton", cuda_header), ("apache-tvm-ffi", tvm_ffi_header)):
        if not header.is_file():
            raise LauncherUnavailableError(f"{header} is missing: pip install --force-reinstall {wheel}")
    folder, key = env.cache_dir() / "launcher", _key(cuda_header, tvm_ffi_header)
    for path in _kept(folder, key):
        try:
            return _open(path)
        except OSError:  # built for a newer C library, say: what is built here replaces it
            continue
    path = _build(folder, key, cuda, tvm_ffi)
    try:
        return _open(path)
    except OSError as error:
        raise LauncherUnavailableError(f"{path} was built but does not load: {_first_line(error)}") from error


def _open(path: Path) -> Launcher:
    import tvm_ffi

    try:
        module = tvm_ffi.load_module(str(path))
        return Launcher(module.run, module.check, module.verify)
    except (RuntimeError, AttributeError) as error:  # tvm-ffi's own error for what dlopen refuses
        raise OSError(_first_line(error)) from error


def _package(name: str) -> Path:
    """The folder of an installed package, without importing it."""
    found = importlib.util.find_spec(name)
    if found is None or not found.submodule_search_locations:
        wheel = {"tvm_ffi": "apache-tvm-ffi"}.get(name, name)
        raise LauncherUnavailableError(f"{wheel} is not installed: pip install {wheel}")
    return Path(found.submodule_search_locations[0])


def _key(*headers: Path) -> str:
    digest = hashlib.sha256("\0".join((*FLAGS, platform.machine(), *platform.libc_ver())).encode())
    for path in (SOURCE, *headers):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------- the cache


def _digest(library: bytes) -> str:
    return hashlib.sha256(library).hexdigest()[:32]


def _kept(folder: Path, key: str) -> list[Path]:
    """The modules in the cache that are whole and nobody else's.

    Raises:
        LauncherUnavailableError: someone else could have written what is there, or it can't be
            read.
    """
    try:
        paths = sorted(folder.glob(f"{key}-*.so"))
        if paths:
            _check_owner(folder, *paths)
        return [path for path in paths if path.stem == f"{key}-{_digest(path.read_bytes())}"]
    except OSError as error:
        raise LauncherUnavailableError(
            f"{error.filename} can't be read ({error.strerror}): set HYBRID_MXFP8_CACHE_DIR to a folder that can"
        ) from error


def _check_owner(folder: Path, *files: Path) -> None:
    if env.trust_cache():
        return
    for path in (folder.parent, folder, *files):
        if problem := writable_by_others(path):
            raise LauncherUnavailableError(
                f"the cache is not loaded: {problem}: make it yours alone (chown, chmod go-w), or set "
                "HYBRID_MXFP8_CACHE_DIR to a folder that is"
            )


def writable_by_others(path: Path) -> str:
    """Why code at ``path`` may be someone else's; empty if only this user or root can write it."""
    found = path.stat()
    if found.st_uid not in (0, os.geteuid()):
        return f"{path} belongs to user {found.st_uid}, not to user {os.geteuid()}, who runs this, or to root"
    sticky_folder = stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not sticky_folder:
        return f"{path} can be written by others (mode {stat.S_IMODE(found.st_mode):04o})"
    return ""


# ---------------------------------------------------------------- one build


def _compiler() -> str:
    """As Triton chooses it: CC, else gcc, else clang."""
    environment = env.child_environment()
    compiler = environment.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise LauncherUnavailableError("no C compiler: install gcc or clang, or set CC")
    return compiler


def _build(folder: Path, key: str, cuda: Path, tvm_ffi: Path) -> Path:
    compiler = _compiler()
    try:
        for missing in (folder.parent, folder):
            missing.mkdir(0o755, parents=True, exist_ok=True)
        _check_owner(folder)
        with tempfile.TemporaryDirectory(prefix=".building-", dir=folder) as private:
            made = Path(private) / "launcher.so"
            command = [compiler, *FLAGS, str(SOURCE), f"-I{cuda}", f"-I{tvm_ffi / 'include'}", "-o", str(made)]
            command += [f"-L{tvm_ffi / 'lib'}", "-ltvm_ffi", "-ldl"]
            _compile(command)
            made.chmod(0o755)  # a lenient umask lets others write
            final = folder / f"{key}-{_digest(made.read_bytes())}.so"
            os.replace(made, final)
    except OSError as error:
        raise LauncherUnavailableError(
            f"the cache folder {folder} can't be written ({error.strerror}): set HYBRID_MXFP8_CACHE_DIR to one that can"
        ) from error
    return final


def _compile(command: list[str]) -> None:
    try:
        done = subprocess.run(command, env=env.child_environment(), capture_output=True, text=True, check=False)
    except OSError as error:
        raise LauncherUnavailableError(f"the C compiler {command[0]} does not run: {error.strerror}") from error
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        first = next((line for line in lines if "error" in line), "".join(lines[:1]) or f"exit code {done.returncode}")
        raise LauncherUnavailableError(f"{command[0]} can't compile {SOURCE.name}: {first.strip()}")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
