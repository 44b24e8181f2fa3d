"""Builds, loads and feeds ``launcher.c``, which makes all launches of a plan in one call.

The module is built once a machine, in 0.2 s, with the C compiler that Triton itself uses and the
``cuda.h`` of Triton's wheel; the driver is opened when first used. It is kept in
``<cache_dir>/launcher/<key>/``, by the rules of :mod:`hybrid_mxfp8.dispatch.module_cache`. The key
covers the source, both headers, the flags, the processor and the C library; not the compiler, since
any makes the same interface: a machine without one takes what was built before.

Where there is no launcher, :func:`load` says why, and Triton's own makes the launches: slower, with
the same result.
"""

from __future__ import annotations

import functools
import platform
import shutil
import subprocess
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from hybrid_mxfp8 import env
from hybrid_mxfp8.dispatch.module_cache import (
    LIBRARY,
    Module,
    build_once,
    check_trusted,
    digest,
    package_folder,
    write_manifest,
)
from hybrid_mxfp8.errors import BackendUnavailableError

SOURCE = Path(__file__).with_suffix(".c")
FLAGS = ("-std=gnu11", "-O2", "-shared", "-fPIC", "-fvisibility=hidden", "-pthread")

SCALAR, ADDRESS, TENSOR_MAP = range(3)  # kinds of a parameter; launcher.c has what follows each
MAX_PARAMS, MAX_TENSOR_MAPS = 128, 16  # of one launch, as launcher.c holds them


class LauncherUnavailableError(RuntimeError):
    """The launcher can't make these launches, but Triton's own can; one line says why."""


class Launcher(NamedTuple):
    """The functions of launcher.c, which says what each raises."""

    run: Callable[..., int]  # (address of a program, stream, *addresses): 0, or 1 for an overlap
    check: Callable[..., int]  # (function, *bytes of each parameter)
    verify: Callable[[int, int], int]  # (address of a program, how many words)


class Program:
    """All launches of a plan, as ``run`` reads them, from :func:`program_words`; it must outlive
    every ``run``. ValueError for a word out of range, and for a launch of more parameters than
    launcher.c holds; LauncherUnavailableError as :func:`load`."""

    __slots__ = ("address", "run", "words")

    def __init__(self, words: array[int]) -> None:
        self.words = words
        self.address, length = words.buffer_info()
        launcher = load()
        launcher.verify(self.address, length)
        self.run = launcher.run


def program_words(
    device_index: int,  # of the GPU that the kernels are loaded on
    extents: Sequence[int],  # bytes of each buffer that ``run`` takes the address of; 0 overlaps nothing
    written: Sequence[tuple[int, int]],  # a buffer that is written, and the one whose address it may have, or -1
    launches: Sequence[Sequence[int]],  # in order, each of :func:`launch_words`
) -> list[int]:
    """The words of a program, which launcher.c describes."""
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
    """One launch; ``params`` are the words of each parameter, its kind first.

    With ``pdl`` it may start before the launch before it in the program has ended: a kernel that
    waits for that itself, by the rule of ``triton_kernels.dependent_launch``.
    """
    words = [function, grid, block_threads, shared_bytes, int(pdl), len(params)]
    for param in params:
        words += param
    return words


def load() -> Launcher:
    """The launcher, built if this machine has none yet; tried once in a process.
    LauncherUnavailableError says why there is none, and what to do."""
    found = _load_once()
    if isinstance(found, str):
        raise LauncherUnavailableError(found)
    return found


def status() -> str:
    """Whether the launcher is built, can be built, or why not, in a line; nothing is built."""
    try:
        module, _ = _module()
        return "built" if module.intact() else f"not built yet; the first call on a GPU builds it, with {_compiler()}"
    except (BackendUnavailableError, LauncherUnavailableError) as error:
        return f"not available, Triton makes the launches, slower: {error}"


@functools.cache
def _load_once() -> Launcher | str:
    try:
        module, options = _module()
        if not module.intact():
            compiler = _compiler()
            build_once(module.folder, lambda folder: _compile(compiler, options, folder), module.intact)
        functions = module.load()
    except (BackendUnavailableError, LauncherUnavailableError) as error:
        return str(error)
    return Launcher(functions.run, functions.check, functions.verify)


def _module() -> tuple[Module, tuple[str, ...]]:
    """Where the launcher is kept, if code there may be loaded, and its compiler's options."""
    cuda = _headers("triton", "triton", "backends/nvidia/include", "cuda.h")
    tvm_ffi = _headers("apache-tvm-ffi", "tvm_ffi", "include", "tvm/ffi/c_api.h")
    options = (f"-I{cuda}", f"-I{tvm_ffi}", f"-L{tvm_ffi.parent / 'lib'}", "-ltvm_ffi", "-ldl")
    about = (FLAGS, platform.machine(), platform.libc_ver())
    key = digest(about, (SOURCE, cuda / "cuda.h", tvm_ffi / "tvm/ffi/c_api.h"))
    folder = env.cache_dir() / "launcher"
    check_trusted(env.cache_dir(), folder)
    return Module(folder / key), options


def _headers(wheel: str, package: str, include: str, header: str) -> Path:
    """The folder of a wheel's headers, which must hold this one."""
    root = package_folder(package)
    if root is None:
        raise LauncherUnavailableError(f"{wheel} is not installed: pip install {wheel}")
    folder = root / include
    if not (folder / header).is_file():
        raise LauncherUnavailableError(f"{folder / header} is missing: pip install --force-reinstall {wheel}")
    return folder


def _compiler() -> str:
    """As Triton chooses it: CC, else gcc, else clang."""
    named = env.child_environment().get("CC")
    if named and shutil.which(named) is None:
        raise LauncherUnavailableError(f"CC: must be a C compiler, but {named} does not run")
    compiler = named or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise LauncherUnavailableError("no C compiler: install gcc or clang, or set CC")
    return compiler


def _compile(compiler: str, options: Sequence[str], folder: Path) -> None:
    command = [compiler, *FLAGS, str(SOURCE), "-o", str(folder / LIBRARY), *options]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise LauncherUnavailableError(f"the C compiler {compiler} does not run: {error.strerror}") from error
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        first = next((line for line in lines if "error" in line), "".join(lines[:1]) or f"exit code {done.returncode}")
        raise LauncherUnavailableError(f"{compiler} can't compile {SOURCE.name}: {first.strip()}")
    write_manifest(folder, compiler=compiler)
