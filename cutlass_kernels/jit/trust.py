"""Whose files are loaded.

A module in the cache is machine code: who can write there can run code as whoever loads it. So the cache folder, the folder
of a module and the files in it must belong to this process's user or to root, and nobody else may be able to write
them. A folder with the sticky bit, such as ``/tmp``, may be open to all: nobody can replace another's files in it. Symbolic
links are followed and their targets checked; the links must not be someone else's either.

Above the cache folder only one thing is refused, a folder in which everyone can rename what is not theirs. The
owners of those folders and their groups are trusted not to exchange the cache between check and load; what they put there
of their own would not pass.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from hybrid_mxfp8 import env
from hybrid_mxfp8.errors import BackendUnavailableError

WAYS_OUT = (
    "make it yours alone (chown, chmod go-w), or set HYBRID_MXFP8_CACHE_DIR to a folder that is; where you trust all who "
    "can write there, HYBRID_MXFP8_TRUST_CACHE=1 loads it as it is"
)


def problem(path: Path) -> str:
    """Why code at this path would not be loaded; empty if it would, or if nothing is there.

    HYBRID_MXFP8_TRUST_CACHE=1 and systems without numbered users (Windows) have no such problems.
    """
    if env.trust_cache() or not hasattr(os, "geteuid"):
        return ""
    try:
        found, link = path.stat(), path.lstat()
    except OSError:  # not there, or not to be looked at: then it can't be read either
        return ""
    user = os.geteuid()
    for what, owner in ((path, found.st_uid), (f"the link {path}", link.st_uid)):
        if owner not in (0, user):
            return f"{what} belongs to user {owner}, not to user {user}, who runs this, or to root"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not _sticky_folder(found):
        return f"{path} can be written by {_writers(found)} (mode {stat.S_IMODE(found.st_mode):04o})"
    return ""


def check_folder(*folders: Path) -> None:
    """That these folders, each inside the one before it, and what is above them are safe to load code from.

    Raises:
        BackendUnavailableError: one is not; says which, why, and what to do.
    """
    for folder in folders:
        if found := problem(folder):
            raise BackendUnavailableError(f"the cache is not loaded: {found}: {WAYS_OUT}")
    if env.trust_cache():
        return
    for parent in Path(os.path.realpath(folders[0])).parents:
        try:
            found_parent = parent.stat()
        except OSError:
            continue
        if found_parent.st_mode & stat.S_IWOTH and not _sticky_folder(found_parent):
            raise BackendUnavailableError(
                f"the cache is not loaded: everyone can rename what is in {parent} (mode "
                f"{stat.S_IMODE(found_parent.st_mode):04o}), where {folders[0]} is: {WAYS_OUT}"
            )


def close_to_others(path: Path) -> None:
    """Take from group and others the right to write, which a lenient umask gave them."""
    mode = stat.S_IMODE(path.stat().st_mode)
    path.chmod(mode & ~(stat.S_IWGRP | stat.S_IWOTH))


def _sticky_folder(found: os.stat_result) -> bool:
    return stat.S_ISDIR(found.st_mode) and bool(found.st_mode & stat.S_ISVTX)


def _writers(found: os.stat_result) -> str:
    return "everyone" if found.st_mode & stat.S_IWOTH else f"group {found.st_gid}"
