"""Environment variables. This file is the only reader of ``os.environ``.

| variable | values | effect |
| --- | --- | --- |
| ``HYBRID_MXFP8_BACKEND`` | ``auto`` (default), ``cutlass``, ``triton``, ``reference`` | the backend where neither ``backend=`` nor ``use_backend()`` names one |
| ``HYBRID_MXFP8_CONFIG`` | a configuration's name, as ``explain()`` prints it | forces that tile configuration of the CUTLASS backend |
| ``HYBRID_MXFP8_PDL`` | ``1`` (default), ``0`` | programmatic dependent launch (Hopper and newer): each kernel of a call after the first starts while the one before still runs, and waits for it on the GPU; ``0`` launches them one after another |
| ``HYBRID_MXFP8_HOPPER_GEMM`` | ``1`` (default), ``bf16``, ``0`` | on compute capability 9.0, the triton backend's GEMM kernel: 1: warp-specialized, in FP8 for operands of scale group 128, else in bf16; bf16: warp-specialized, always in bf16; 0: the portable kernel |
| ``HYBRID_MXFP8_VERIFY`` | ``1`` (default), ``0`` | whether each CUTLASS module is compared with the reference before its first use on a GPU |
| ``HYBRID_MXFP8_CUTLASS_DIR`` | a folder that holds ``include/cutlass`` | CUTLASS headers, in preference to any installed package |
| ``HYBRID_MXFP8_CACHE_DIR`` | a folder | compiled modules; default ``$XDG_CACHE_HOME/hybrid_mxfp8``, else ``~/.cache/hybrid_mxfp8`` |
| ``HYBRID_MXFP8_TRUST_CACHE`` | ``0`` (default), ``1`` | ``1`` loads compiled modules whoever owns them or can write them; only for folders that nobody else can reach |
| ``HYBRID_MXFP8_LOG`` | ``debug``, ``info``, ``warning``, ``error`` | the level of the logger ``hybrid_mxfp8``; its lines go to stderr unless the program has log handlers |
| ``CUDA_HOME``, ``CUDA_PATH`` | a CUDA toolkit | the compiler of the CUTLASS backend, in preference to ``nvcc`` on PATH |
| ``TRITON_INTERPRET`` | ``1`` | Triton's own variable: kernels run on the CPU through its interpreter |

All are read at each call, so a change takes effect at once, except that Triton reads
``TRITON_INTERPRET`` when a kernel is first imported, that ``HYBRID_MXFP8_LOG`` is read once, before
the first choice of a backend, and that a process keeps the compiler, headers and modules of the
CUTLASS backend, and the launcher, once it has found them.

A variable that begins with ``HYBRID_MXFP8_`` and is none of these is named in a warning, once.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import logging
import os
import tempfile
import threading
from pathlib import Path
from typing import Final

VARIABLES: Final = (
    "HYBRID_MXFP8_BACKEND",
    "HYBRID_MXFP8_CONFIG",
    "HYBRID_MXFP8_PDL",
    "HYBRID_MXFP8_HOPPER_GEMM",
    "HYBRID_MXFP8_VERIFY",
    "HYBRID_MXFP8_CUTLASS_DIR",
    "HYBRID_MXFP8_CACHE_DIR",
    "HYBRID_MXFP8_TRUST_CACHE",
    "HYBRID_MXFP8_LOG",
    "CUDA_HOME",
    "CUDA_PATH",
    "TRITON_INTERPRET",
)
"""The table's first column."""

LOG_LEVELS: Final = ("debug", "info", "warning", "error")

_locks: Final[dict[int, contextlib.AbstractContextManager[object]]] = {}

_RAW: Final = getattr(os.environ, "_data", os.environ)
_SNAPSHOT_KEYS: Final = tuple(
    name if _RAW is os.environ else os.environ.encodekey(name)
    for name in (*VARIABLES, "PATH")
    if name != "HYBRID_MXFP8_LOG"
)


def snapshot() -> tuple[object, ...]:
    """All that a choice of kernels may depend on, to see whether anything has changed.

    Taken at every call: ``os.environ`` needs 1.7 µs for each that is unset, its own dictionary
    0.05.
    """
    return tuple(map(_RAW.get, _SNAPSHOT_KEYS))


def variables_set() -> dict[str, str]:
    """Those of the variables that are set, with their values."""
    return {name: os.environ[name] for name in VARIABLES if name in os.environ}


def start() -> None:
    """Set the logger's level, and warn of variables of ours that don't exist, misspelt as it seems:
    once in a process, at the first choice of a backend or by the command line."""
    with one_thread():
        _start_once()


def one_thread() -> contextlib.AbstractContextManager[object]:
    """The lock of this process, which one thread may take more than once: a fork's child gets its
    own, since the thread that held its parent's is not there."""
    return _locks.setdefault(os.getpid(), threading.RLock())


@functools.cache
def _start_once() -> None:
    logger = logging.getLogger("hybrid_mxfp8")
    level = os.environ.get("HYBRID_MXFP8_LOG", "").strip()
    if level.lower() in LOG_LEVELS:
        logger.setLevel(level.upper())
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter(logging.BASIC_FORMAT))
        # Asked at each line: a program may configure logging after its first call.
        handler.addFilter(lambda record: not logging.root.handlers and logger.handlers == [handler])
        logger.addHandler(handler)
    elif level:
        logger.warning("HYBRID_MXFP8_LOG: must be one of %s, got %r", ", ".join(LOG_LEVELS), level)
    ours = [name for name in VARIABLES if name.startswith("HYBRID_MXFP8_")]
    for name in sorted(os.environ):
        if name.startswith("HYBRID_MXFP8_") and not name.startswith("HYBRID_MXFP8_TEST_") and name not in ours:
            (closest,) = difflib.get_close_matches(name.upper(), ours, n=1, cutoff=0.0)
            logger.warning("%s: no such variable, did you mean %s?", name, closest)


def backend() -> str | None:
    """HYBRID_MXFP8_BACKEND; None if unset or blank."""
    return os.environ.get("HYBRID_MXFP8_BACKEND", "").strip() or None


def config() -> str | None:
    """HYBRID_MXFP8_CONFIG; None if unset or empty."""
    return os.environ.get("HYBRID_MXFP8_CONFIG", "").strip() or None


def pdl() -> bool:
    """HYBRID_MXFP8_PDL: False only for 0, ValueError for neither 0 nor 1."""
    return _choice("HYBRID_MXFP8_PDL", "1", "0") == "1"


def verify() -> bool:
    """HYBRID_MXFP8_VERIFY: False only for 0, ValueError for neither 0 nor 1."""
    return _choice("HYBRID_MXFP8_VERIFY", "1", "0") == "1"


def hopper_gemm() -> str:
    """HYBRID_MXFP8_HOPPER_GEMM: 1, bf16 or 0; ValueError for anything else."""
    return _choice("HYBRID_MXFP8_HOPPER_GEMM", "1", "bf16", "0")


def trust_cache() -> bool:
    """HYBRID_MXFP8_TRUST_CACHE: True only for 1, ValueError for neither 0 nor 1."""
    return _choice("HYBRID_MXFP8_TRUST_CACHE", "0", "1") == "1"


def _choice(name: str, default: str, *others: str) -> str:
    value = (os.environ.get(name) or default).strip()
    if value not in (default, *others):
        allowed = sorted((default, *others))
        raise ValueError(f"{name}: must be {', '.join(allowed[:-1])} or {allowed[-1]}, got {value!r}")
    return value


def cutlass_dir() -> Path | None:
    """HYBRID_MXFP8_CUTLASS_DIR; None if unset or empty."""
    return _folder("HYBRID_MXFP8_CUTLASS_DIR")


def cuda_home() -> tuple[str, Path] | None:
    """CUDA_HOME, else CUDA_PATH: the variable's name and the folder; None if neither is set."""
    found = ((name, _folder(name)) for name in ("CUDA_HOME", "CUDA_PATH"))
    return next(((name, folder) for name, folder in found if folder is not None), None)


def _folder(name: str) -> Path | None:
    """A variable, ~ replaced if there is a home folder: Path.expanduser raises if not."""
    value = os.environ.get(name)
    return Path(os.path.expanduser(value)) if value else None


def cache_dir() -> Path:
    """Where compiled modules are kept, as an absolute path; the folder need not exist yet.

    A user without a home folder (a container run under a number that no password file knows) has a
    folder of that number in the system's folder for temporary files.
    """
    if folder := _folder("HYBRID_MXFP8_CACHE_DIR"):
        return folder.absolute()
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # the XDG specification: relative paths are to be ignored
        base = os.path.expanduser("~/.cache")
    if not os.path.isabs(base):
        return Path(tempfile.gettempdir()).absolute() / f"hybrid_mxfp8-{os.getuid() if hasattr(os, 'getuid') else 0}"
    return Path(base) / "hybrid_mxfp8"


def search_path() -> list[Path]:
    """The folders of PATH."""
    return [Path(p) for p in os.environ.get("PATH", "").split(os.pathsep) if p]


def child_environment(**variables: str) -> dict[str, str]:
    """The environment for a child process, with ``variables`` set."""
    return {**os.environ, **variables}


def triton_interpret() -> bool:
    """Whether Triton kernels imported from now on run in the interpreter (Triton's own parsing)."""
    return os.environ.get("TRITON_INTERPRET", "").strip().lower() in ("1", "true", "on", "yes", "y")


def enable_triton_interpreter() -> None:
    """Set TRITON_INTERPRET=1 for this process; must come before a kernel is imported."""
    os.environ["TRITON_INTERPRET"] = "1"
