"""A process in which libcuda.so.1 is fakecuda.c: launches are recorded, and nothing runs.

A test that is marked ``@in_child`` runs there, one process for all of a file. Its parameters must
be picklable; fixtures are not there.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import inspect
import multiprocessing
import os
import re
import shutil
import subprocess
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest

from hybrid_mxfp8.dispatch import launcher

Child = Callable[..., Any]


def build(folder: Path, *flags: str) -> None:
    """Compile fakecuda.c to ``folder``/libcuda.so.1."""
    compiler = shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler for the fake driver")
    include = launcher._headers("triton", "triton", "backends/nvidia/include", "cuda.h")
    source = Path(__file__).with_name("fakecuda.c")
    command = [compiler, "-O1", "-shared", "-fPIC", source, f"-I{include}", "-Wl,-soname,libcuda.so.1"]
    subprocess.run([*command, *flags, "-o", folder / "libcuda.so.1"], check=True)


@pytest.fixture(scope="module")
def child(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Child]:
    """child(function, *arguments): call it in a process that has the fake driver."""
    folder = tmp_path_factory.mktemp("fake driver")
    build(folder)
    with mock.patch.dict(os.environ):
        os.environ.update(
            LD_LIBRARY_PATH=os.pathsep.join([str(folder), os.environ.get("LD_LIBRARY_PATH", "")]),
            TRITON_LIBCUDA_PATH=str(folder),
            TRITON_CACHE_DIR=str(folder / "triton"),
            HYBRID_MXFP8_CACHE_DIR=str(folder / "cache"),
        )
        os.environ.pop("TRITON_INTERPRET", None)
        pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        pool.submit(os.getpid).result()
    with pool:
        yield lambda function, *arguments: pool.submit(function, *arguments).result()


def in_child(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test in the process of ``child``."""

    @functools.wraps(test)
    def run(child: Child, **parameters: Any) -> None:
        child(_call, test.__module__, test.__name__, parameters)

    signature = inspect.signature(test)
    added = inspect.Parameter("child", inspect.Parameter.KEYWORD_ONLY)
    run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), added])  # type: ignore[attr-defined]
    return run


def _call(module: str, name: str, parameters: dict[str, Any]) -> None:
    fake().fake_forget()
    fake().fake_fail(b"", 0)
    fake().fake_set_current(0)
    try:
        getattr(importlib.import_module(module), name).__wrapped__(**parameters)
    except pytest.fail.Exception as error:  # which can't be pickled
        raise AssertionError(str(error)) from None


@functools.cache
def fake() -> Any:
    """The fake driver's own functions."""
    library = ctypes.CDLL("libcuda.so.1")
    library.fake_record.restype = ctypes.POINTER(_Record)
    return library


class _Record(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared_bytes", ctypes.c_uint32),
        ("num_attributes", ctypes.c_uint32),
        ("attributes", ctypes.c_uint32 * 2 * 4),
        ("stream", ctypes.c_uint64),
        ("function", ctypes.c_uint64),
        ("context_device", ctypes.c_int64),
        ("num_bytes", ctypes.c_uint64),
        ("bytes", ctypes.c_ubyte * 16384),
    ]


class Launch(NamedTuple):
    """A launch as the driver was asked for it."""

    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared_bytes: int
    attributes: tuple[tuple[int, int], ...]
    stream: int
    function: int
    context_device: int
    params: bytes


def launches() -> list[Launch]:
    """What was launched since the last call or the test's start."""
    records = [fake().fake_record(i).contents for i in range(fake().fake_num_records())]
    found = [
        Launch(
            tuple(r.grid), tuple(r.block), r.shared_bytes, tuple(map(tuple, r.attributes[: r.num_attributes])),
            r.stream, r.function, r.context_device, bytes(r.bytes[: r.num_bytes]),
        )
        for r in records
    ]  # fmt: skip
    fake().fake_forget()
    return found


def set_sizes(function: int, sizes: list[int]) -> None:
    """The bytes of each parameter of a loaded function."""
    fake().fake_set_sizes(function, (ctypes.c_int64 * len(sizes))(*sizes), len(sizes))


def new_function(*sizes: int) -> int:
    """A function with such parameters."""
    function = int(fake().fake_new_function())
    set_sizes(function, list(sizes))
    return function


def program_of(*parts: Any) -> launcher.Program:
    """A program of ``launcher.program_words``."""
    return launcher.Program(array("q", launcher.program_words(*parts)))


def sizes_in_ptx(ptx: str) -> list[int]:
    """The bytes of each parameter of the kernel, as its PTX declares them."""
    entry = re.search(r"\.entry[^(]*\((.*?)\)", ptx, re.DOTALL)
    assert entry, ptx[:1000]
    sizes = []
    for line in entry[1].split(","):
        found = re.match(r"\.param (?:\.align \d+ )?\.[a-z](\d+) .*?(?:\[(\d+)\])?$", line.strip())
        assert found, line
        sizes.append(int(found[1]) // 8 * int(found[2] or 1))
    return sizes
