"""``python -m hybrid_mxfp8 cache list|clear``: what is kept in the cache folder, and its removal.

Kept are modules of the CUTLASS backend, records of their verification, and the launcher. They are
known by their names, which :data:`KINDS` lists. ``clear`` removes these, and nothing else: other
files, links, and what another process is building right now stay where they are.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from hybrid_mxfp8 import env
from hybrid_mxfp8.commands.terminal import format_table, size
from hybrid_mxfp8.cutlass_kernels import verify
from hybrid_mxfp8.cutlass_kernels.jit.build import MODULE_NAME
from hybrid_mxfp8.dispatch.module_cache import LIBRARY, MANIFEST, Module, trust_problem

LAUNCHER: Final = r"[0-9a-f]{16}"
BUILT: Final = rf"{MODULE_NAME}(?:\.verified-[0-9a-f]{{8}})?"

KINDS: Final = {
    "cutlass": {
        "module": MODULE_NAME,
        "verification": rf"{MODULE_NAME}\.verified-[0-9a-f]{{8}}",
        "failed build": rf"{MODULE_NAME}\.log",
        "unfinished build": rf"\.building-{BUILT}-[0-9a-f]{{16}}",
        "lock": rf"{BUILT}\.lock",
    },
    "launcher": {
        "launcher": LAUNCHER,
        "unfinished build": rf"\.building-{LAUNCHER}-[0-9a-f]{{16}}",
        "lock": rf"{LAUNCHER}\.lock",
    },
}
"""The names of each kind of entry, by the folder below the cache's."""

WRITTEN: Final = (LIBRARY, MANIFEST, verify.RECORD)  # the files of an entry that is a folder


class Entry(NamedTuple):
    """Something in the cache that this package wrote."""

    kind: str  # of :data:`KINDS`
    path: Path  # a file, or a folder of some of the files of :data:`WRITTEN`
    about: str  # what it is, in a line
    num_bytes: int  # of all in it


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("action", choices=("list", "clear"), help="list what is kept, or remove it")


def run(args: argparse.Namespace) -> int:
    """List or clear; 0, 1 if something could not be removed, 2 if the folder is refused."""
    folder = env.cache_dir()
    if folder.exists() and not folder.is_dir():
        print(f"cache: {folder} is no folder; HYBRID_MXFP8_CACHE_DIR names another", file=sys.stderr)
        return 2
    try:
        found = entries(folder)
        if args.action == "list":
            print(listing(folder, found))
            return 0
        if reason := refusal(folder):
            said = f"{folder} is not cleared: {reason}; HYBRID_MXFP8_CACHE_DIR names another"
            print(f"cache: {said}", file=sys.stderr)
            return 2
        kept = [f"{entry.path}: {why}" for entry in found if (why := remove(entry))]
    except (OSError, RuntimeError, ValueError) as error:  # links in a circle; a variable neither 0 nor 1
        print(f"cache: {error}", file=sys.stderr)
        return 2
    gone = [entry for entry in found if not os.path.lexists(entry.path)]
    print(f"{folder}: removed {sum(e.kind != 'lock' for e in gone)} entries, {size(sum(e.num_bytes for e in gone))}")
    for line in kept:
        print(f"kept {line}", file=sys.stderr)
    return 1 if kept else 0


def entries(folder: Path) -> list[Entry]:
    """What this package wrote there, by kind and name; links are left out."""
    found = []
    for below, kinds in KINDS.items():
        # os.path's tests answer False for a path that cannot be, such as one too long.
        inside = sorted((folder / below).iterdir()) if os.path.isdir(folder / below) else []
        for kind, pattern in kinds.items():
            named = [path for path in inside if re.fullmatch(pattern, path.name) and not path.is_symlink()]
            if kind == "launcher":  # other files may have such a name, too
                named = [path for path in named if path.is_dir()]
            found += [Entry(kind, p, _about(kind, p), sum(f.stat().st_size for f in _files(p))) for p in named]
    return found


def _about(kind: str, path: Path) -> str:
    if kind in ("module", "launcher"):
        module = Module(path)
        m = module.manifest() if module.intact() else {}
        said = ("name", "arch", "cutlass", "nvcc") if kind == "module" else ("sha256",)
        if not all(isinstance(m.get(key), str) for key in said):
            return f"{path.name}, {module.trust_problem() or 'damaged'}"
        if kind == "launcher":
            return f"makes kernel launches, by {m.get('compiler')}"
        return f"{m['name']} for {m['arch']}, CUTLASS {m['cutlass']}, nvcc {m['nvcc']}"
    if kind == "verification":
        name, r = path.name.partition("-")[0], verify.read_record(path)
        if r is None:
            return f"{name}, damaged"
        outcome = "right" if r["ok"] else "wrong"
        return f"{name}: {outcome} on {r.get('gpu')}, driver {r.get('driver')}, {r.get('date')}: {r['reason']}"
    return path.name


def _files(path: Path) -> Iterator[Path]:
    inside = path.rglob("*") if path.is_dir() else [path]
    return (p for p in inside if p.is_file() and not p.is_symlink())


def listing(folder: Path, found: list[Entry]) -> str:
    """The entries as a table, without the locks."""
    rows = [(e.kind, size(e.num_bytes), e.about) for e in found if e.kind != "lock"]
    others = sum(p.stat().st_size for p in _files(folder)) if os.path.isdir(folder) else 0
    others -= sum(e.num_bytes for e in found)
    lines = [f"{folder}: {len(rows)} entries, {size(sum(e.num_bytes for e in found))}"]
    lines += [format_table(("what", "size", "which"), rows, left=(0, 2))] if rows else []
    lines += [f"other files, which clear leaves: {size(others)}"] if others else []
    return "\n".join(lines)


def refusal(folder: Path) -> str:
    """Why nothing in this folder is removed; empty if ``clear`` may."""
    home = Path(os.path.expanduser("~")).resolve()
    if folder.resolve() in (home, *home.parents):
        return "it is the home folder, or holds it"
    below = [folder / name for name in KINDS]
    links = [f"{path} is a link" for path in (folder, *below) if path.is_symlink()]
    return next(filter(None, (*links, *map(trust_problem, (folder, *below)))), "")


def remove(entry: Entry) -> str:
    """Remove one entry; why it stays, or empty."""
    import filelock

    name = re.sub(r"^\.building-(.*)-[0-9a-f]{16}$|\.lock$|\.log$", r"\1", entry.path.name)
    lock = entry.path.with_name(f"{name}.lock")
    try:
        with filelock.FileLock(lock, timeout=0) if lock.exists() else contextlib.nullcontext():
            if entry.path.is_dir():
                for file in map(entry.path.joinpath, WRITTEN):
                    file.unlink(missing_ok=True)
                entry.path.rmdir()
            else:
                entry.path.unlink(missing_ok=True)
    except filelock.Timeout:
        return "is being built by another process"
    except OSError as error:
        return f"{error.strerror}"
    return ""
