"""Results on their way: written beside the name they will have, under a hidden one, and renamed when they are whole.

A process that ends early removes what it was writing. One that is killed can't; its leftover is removed by the next that
writes the same result on the same machine.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SUFFIX = ".partial"

_writing: set[Path] = set()
"""What this process is writing now: all else under its number was left by an earlier process of that number."""


@contextmanager
def partial(target: Path) -> Iterator[Path]:
    """The hidden path beside ``target`` to write to; gone at the end if it was not renamed.

    Raises:
        ValueError: this process is writing ``target`` already.
    """
    path = target.with_name(f"{_prefix(target)}{os.getpid()}{SUFFIX}")
    if path in _writing:
        raise ValueError(f"{target}: is being written by this process already")
    _sweep(target)
    _writing.add(path)
    try:
        yield path
    finally:
        _remove(path)
        _writing.discard(path)


def replace_folder(new: Path, target: Path) -> None:
    """Rename ``new`` to ``target``; a folder of that name is there until the new one is, and removed only then."""
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


def alive(process: int) -> bool:
    """Whether a process of this number runs on this machine; one that ended and was not waited for does not."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:  # gone meanwhile, or a system without /proc: then as it looked
        return True
    return state != "Z"


def _prefix(target: Path) -> str:
    return f".{target.name}.{platform.node()}-"


def _sweep(target: Path) -> None:
    """Remove what killed processes of this machine left of the same result."""
    prefix = _prefix(target)
    beside: list[Path] = []
    with contextlib.suppress(OSError):  # a folder that can be written but not listed
        beside = list(target.parent.iterdir())
    for path in beside:
        if path.name.startswith(prefix) and path.name.endswith(SUFFIX) and path not in _writing:
            process = path.name[len(prefix) : -len(SUFFIX)]
            if process.isdecimal() and (int(process) == os.getpid() or not alive(int(process))):
                _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
