"""Write a safetensors file piece by piece; have it, or a folder of them, appear at once and whole.

The safetensors library writes a file from tensors that are all in memory. A conversion must hold no
more than a part of one, so this writes the format itself: eight bytes with the length of a JSON
header, the header, the data. Names, dtypes and shapes come first; data then arrive in any order.

Writes are atomic: a result has a hidden name beside its own until it is whole. A process that ends
early removes what it was writing. One that is killed can't; the next write of the same result on
the same machine does it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import platform
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch

ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}
"""Bytes of one element, by the format's name of a dtype."""

CHUNK_BYTES = 2**26
MAX_HEADER_BYTES = 100_000_000  # what the library reads
SUFFIX = ".partial"

_writing: set[Path] = set()  # by this process; other paths with its number are an earlier process's


class Entry(NamedTuple):
    """A tensor of a file: its name, its dtype as safetensors names it, and its shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of its data; ValueError for a dtype that is not in :data:`ITEM_BYTES`."""
        if self.dtype not in ITEM_BYTES:
            raise ValueError(f"{self.name}: dtype {self.dtype} is not known here")
        return ITEM_BYTES[self.dtype] * math.prod(self.shape)


@contextlib.contextmanager
def errors_name(file: Path) -> Iterator[None]:
    """Have OSErrors name ``file``: those of opening name the temporary one, others none."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"can't be written: {error.strerror}", str(file)) from error


class SafetensorsWriter:
    """A file being written: ``append`` within the ``with`` block, a complete file after it."""

    def __init__(self, path: Path, entries: Sequence[Entry], metadata: Mapping[str, str]) -> None:
        """Lay out the file with all its tensors, to replace ``path``; ValueError for what the
        format or the library can't hold, and for two of one name."""
        header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
        self._at: dict[str, int] = {}
        self._end: dict[str, int] = {}
        start = 0
        # Wide elements first, as the library does: each tensor starts at a multiple of its element.
        for entry in sorted(entries, key=lambda e: (-ITEM_BYTES.get(e.dtype, 0), e.name)):
            if entry.name in self._at:
                raise ValueError(f"entries: {entry.name!r} is there twice")
            if entry.name == "__metadata__" or any("\ud800" <= c <= "\udfff" for c in entry.name):
                raise ValueError(f"entries: a safetensors file can't hold a tensor of the name {entry.name!r}")
            end = start + entry.num_bytes
            header[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [start, end]}
            self._at[entry.name], self._end[entry.name] = start, end
            start = end
        text = json.dumps(header, separators=(",", ":")).encode()
        self._header = text + b" " * (-len(text) % 8)
        if (size := len(self._header)) > MAX_HEADER_BYTES:
            allowed = f"of which the format allows {MAX_HEADER_BYTES}"
            raise ValueError(f"{path}: its header would have {size} bytes, {allowed}")
        self._path = path
        self._file: BinaryIO

    def __enter__(self) -> SafetensorsWriter:
        self._replaces = os.path.lexists(self._path)
        with contextlib.ExitStack() as stack, errors_name(self._path):
            self._temporary = stack.enter_context(atomic_write(self._path))
            self._file = self._temporary.open("wb")
            stack.callback(self._close)
            self._file.write(len(self._header).to_bytes(8, "little") + self._header)
            self._stack = stack.pop_all()
        return self

    def append(self, name: str, data: torch.Tensor) -> None:
        """Write a tensor's next bytes: all of ``data``, row-major, of any dtype, on any device.
        ValueError for more than the tensor has left; OSError, of a full disk say, names the file.
        """
        data = data.detach().contiguous().reshape(-1).view(torch.uint8)
        if data.numel() > (left := self._end[name] - self._at[name]):
            raise ValueError(f"{name}: {data.numel()} bytes where {left} are left")
        with errors_name(self._path):
            self._file.seek(8 + len(self._header) + self._at[name])
            for part in data.split(CHUNK_BYTES):
                self._file.write(memoryview(part.cpu().numpy()))
        self._at[name] += data.numel()

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        with self._stack, errors_name(self._path):
            if kind is None:
                short = [name for name, at in self._at.items() if at != self._end[name]]
                if short:
                    raise ValueError(f"{short[0]}: not all of its bytes were written")
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()
                check_still_absent(self._path, self._replaces)
                self._temporary.replace(self._path)

    def _close(self) -> None:
        with contextlib.suppress(OSError):  # such as a full disk: the file is thrown away anyway
            self._file.close()


@contextlib.contextmanager
def atomic_write(target: Path) -> Iterator[Path]:
    """The hidden path to write ``target`` to; ValueError if this process is writing it already, and
    for a device or a pipe, which the rename would replace."""
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


def check_still_absent(target: Path, replaces: bool) -> None:
    """That nobody made ``target`` while this process wrote it, unless it ``replaces`` one."""
    if not replaces and os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, "something else made it meanwhile", str(target))


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
