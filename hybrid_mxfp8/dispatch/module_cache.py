"""Compiled modules on disk: whose files are loaded, and how a module is built once.

A module is machine code: whoever can write it can run code as the user who loads it. So it and its
folders, links followed, must belong to this user or to root, and nobody else may be able to write
them. Only a folder with the sticky bit, such as ``/tmp``, may be open to all.

A build works in a private folder and ends in one rename, so a module is there whole or not at all.
A file lock makes other processes wait. Where a network file system does not honour it, two builds
run, and the second finds the first one's module in place.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import json
import logging
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybrid_mxfp8 import env
from hybrid_mxfp8.errors import BackendUnavailableError

logger = logging.getLogger("hybrid_mxfp8")

LIBRARY = "module.so"
MANIFEST = "build.json"

BUILDING = ".building-"  # how the names of private folders begin
ABANDONED_SECONDS = 3600.0  # a private folder older than this was left by a build that was killed


@dataclass(frozen=True)
class Module:
    """A compiled module's folder."""

    folder: Path

    @property
    def library(self) -> Path:
        """The shared library, which exports functions through tvm-ffi."""
        return self.folder / LIBRARY

    def manifest(self) -> dict[str, Any]:
        """What it was built from, and its library's digest; empty if unreadable or damaged."""
        try:
            manifest = json.loads((self.folder / MANIFEST).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        return manifest if isinstance(manifest, dict) and isinstance(manifest.get("sha256"), str) else {}

    def trust_problem(self) -> str:
        """Why it is not loaded although it is there: others own it or can write it; else empty."""
        paths = (self.folder, self.library, self.folder / MANIFEST)
        return next(filter(None, map(trust_problem, paths)), "")

    def intact(self) -> bool:
        """Whether the library is the one that was built, by this user or root."""
        if self.trust_problem():
            return False
        try:
            return self.manifest().get("sha256") == _digest(self.library)
        except OSError:
            return False

    def load(self) -> Any:
        """The tvm-ffi module, loaded once in a process; BackendUnavailableError if it can't be."""
        return _load(self.library)


@functools.cache
def _load(library: Path) -> Any:
    import tvm_ffi

    try:
        return tvm_ffi.load_module(str(library))
    except (RuntimeError, OSError) as error:
        raise BackendUnavailableError(f"{library} does not load; delete its folder to rebuild: {error}") from error


def write_manifest(folder: Path, **about: Any) -> None:
    """The last step of a build: say what the library in ``folder`` was built from."""
    manifest = {**about, "sha256": _digest(folder / LIBRARY)}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def digest(about: object, files: Iterable[Path] = ()) -> str:
    """16 hex digits of what ``about`` prints as, and of the files' names and contents."""
    whole = hashlib.sha256(repr(about).encode())
    for path in files:
        whole.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        whole.update(path.read_bytes())
    return whole.hexdigest()[:16]


def package_folder(module: str) -> Path | None:
    """The folder of a top-level module; finding its spec runs none of its code."""
    spec = importlib.util.find_spec(module)
    locations = list(spec.submodule_search_locations or []) if spec is not None else []
    return Path(locations[0]) if locations else None


def trust_problem(path: Path) -> str:
    """Why code at ``path`` is not loaded: others own it or can write it; empty if it is loaded.
    Nothing is wrong with a path that is not there, with HYBRID_MXFP8_TRUST_CACHE=1, and on systems
    without numbered users (Windows)."""
    if env.trust_cache() or not hasattr(os, "geteuid"):
        return ""
    try:
        found, link = path.stat(), path.lstat()
    except OSError:
        return ""
    user = os.geteuid()
    for what, owner in ((path, found.st_uid), (f"the link {path}", link.st_uid)):
        if owner not in (0, user):
            return f"{what} belongs to user {owner}, not to user {user}, who runs this, or to root"
    sticky = stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not sticky:
        writers = "everyone" if found.st_mode & stat.S_IWOTH else f"group {found.st_gid}"
        return f"{path} can be written by {writers} (mode {stat.S_IMODE(found.st_mode):04o})"
    return ""


def check_trusted(*paths: Path) -> None:
    """BackendUnavailableError if others own or can write one of these; says what to do."""
    for problem in filter(None, map(trust_problem, paths)):
        raise BackendUnavailableError(
            f"the cache is not loaded: {problem}: make it yours alone (chown, chmod go-w), or set "
            "HYBRID_MXFP8_CACHE_DIR to a folder that is; where you trust all who can write there, "
            "HYBRID_MXFP8_TRUST_CACHE=1 loads it as it is"
        )


def build_once(folder: Path, build: Callable[[Path], None], valid: Callable[[], bool]) -> None:
    """Put a module into ``folder`` unless that is ``valid()``; another process's build is waited
    for. ``build`` writes the files into the empty folder that it is given. BackendUnavailableError
    where the folder above can't be written or is someone else's; what ``build`` raises leaves
    nothing."""
    try:
        _make_folder(folder.parent)
        check_trusted(folder.parent)  # a file server may have given it to another user
        with _locked(folder):
            if not valid():  # else another process was faster
                _remove_abandoned(folder)
                _build(folder, build, valid)
    except OSError as error:
        raise BackendUnavailableError(
            f"the cache folder {folder.parent} cannot be written ({error.strerror or error}): set "
            "HYBRID_MXFP8_CACHE_DIR to one that can, or copy a warmed-up cache there"
        ) from error


def _build(folder: Path, build: Callable[[Path], None], valid: Callable[[], bool]) -> None:
    private, replaced = _private_folder(folder), _private_folder(folder)
    private.mkdir(0o755)
    try:
        build(private)
        for path in private.iterdir():  # a lenient umask lets others write them
            path.chmod(stat.S_IMODE(path.stat().st_mode) & ~(stat.S_IWGRP | stat.S_IWOTH))
        if folder.exists() and not valid():
            os.rename(folder, replaced)
        try:
            os.rename(private, folder)
        except OSError:
            if not valid():  # else the lock was not honoured, and another build got here first
                raise
    finally:
        for path in (private, replaced):
            shutil.rmtree(path, ignore_errors=True)


def _private_folder(folder: Path) -> Path:
    return folder.with_name(f"{BUILDING}{folder.name}-{os.urandom(8).hex()}")


def _remove_abandoned(folder: Path) -> None:
    for private in folder.parent.glob(f"{BUILDING}{folder.name}-*"):
        with contextlib.suppress(FileNotFoundError):  # removed meanwhile
            if private.lstat().st_mtime < time.time() - ABANDONED_SECONDS:
                shutil.rmtree(private, ignore_errors=True)


def _make_folder(folder: Path) -> None:
    """With what is missing above it: readable for all, so that root can warm up an image."""
    for missing in reversed([path for path in (folder, *folder.parents) if not path.exists()]):
        missing.mkdir(0o755, exist_ok=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One build of a module at a time; the system frees the lock of a process that dies."""
    import filelock

    lock = filelock.FileLock(f"{folder}.lock", mode=0o600, thread_local=False)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        logger.warning("waiting for another process that compiles %s", folder.name)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
