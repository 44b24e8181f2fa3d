"""Atomic writes: a result is written under a hidden name beside its own and renamed when whole.

A process that ends early removes what it was writing. One that is killed can't; the next write of
the same result on the same machine does it.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SUFFIX = ".partial"

_writing: set[Path] = set()  # by this process; others of its number are leftovers of an earlier one


@contextmanager
def atomic_write(target: Path) -> Iterator[Path]:
    """The hidden path to write ``target`` to; ValueError where this process does so already, and
    for a device or a pipe, in whose place a file would be."""
    if target.exists() and not (target.is_file() or target.is_dir()):
        raise ValueError(f"{target}: must be a file or a folder to be replaced, got a device or the like")
    path = target.with_name(f"{_prefix(target)}{os.getpid()}{SUFFIX}")
    if path in _writing:
        raise ValueError(f"{target}: is being written by this process already")
    _remove_leftovers(target)
    _writing.add(path)
    try:
        yield path
    finally:
        _remove(path)
        _writing.discard(path)


def replace_folder(new: Path, target: Path) -> None:
    """Rename ``new`` to ``target``; a folder of that name is removed only when that is done."""
    if not target.exists():
        new.rename(target)
        return
    old = target.with_name(f"{_prefix(target)}{os.getpid()}.replaced")
    target.rename(old)
    try:
        new.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old)


def _alive(process: int) -> bool:
    """Whether a process of this number runs on this machine."""
    try:
        os.kill(process, 0)
    except OSError as error:
        return isinstance(error, PermissionError)
    return True


def _prefix(target: Path) -> str:
    return f".{target.name}.{platform.node()}-"


def _remove_leftovers(target: Path) -> None:
    """Remove what killed processes of this machine left of the same result."""
    pattern = re.compile(rf"{re.escape(_prefix(target))}(\d{{1,9}}){re.escape(SUFFIX)}")
    beside: list[Path] = []
    with contextlib.suppress(OSError):  # a folder that can be written but not listed
        beside = list(target.parent.iterdir())
    for path in beside:
        found = pattern.fullmatch(path.name)
        if found and path not in _writing and (int(found[1]) == os.getpid() or not _alive(int(found[1]))):
            _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
