"""A fake CUDA toolkit, CUTLASS, source and cache, for tests of building and keeping modules.

The fake nvcc writes a line to a log, waits as long as a test asks, and copies a library that was
compiled once, or fails where the source has an ``#error``. All else is the real path.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tvm_ffi  # now: an unprivileged user may not be able to import it later
from forked import Child

from hybrid_mxfp8.cutlass_kernels.jit import build as jit
from hybrid_mxfp8.dispatch.module_cache import BUILDING, Module

NVCC = """#!{python} -IS
import json, pathlib, shutil, sys, time
home = pathlib.Path(__file__).resolve().parent.parent
arguments = sys.argv[1:]
if "--version" in arguments:
    sys.exit(print("Cuda compilation tools, release 13.0, V13.0.88"))
if "--dryrun" in arguments:
    sys.exit(print(f"#$ _HERE_={{home / 'bin'}}"))
with open(home / "log", "a") as log:
    log.write(json.dumps(arguments) + "\\n")
time.sleep(float((home / "delay").read_text()))
output = pathlib.Path(arguments[arguments.index("-o") + 1])
if "#error" in pathlib.Path(arguments[arguments.index("-o") - 1]).read_text():
    output.write_text("half")
    print("In file included from module.cu:1:")
    print('module.cu(7): error: identifier "answr" is undefined')
    print('module.cu(9): error: expected a ";"')
    sys.exit(2)
shutil.copyfile(home / "compiled.so", output)
"""

# By tvm-ffi's C interface, whose header compiles in a blink.
MODULE = """
#include <tvm/ffi/c_api.h>
extern "C" int __tvm_ffi_answer(void*, const TVMFFIAny*, int32_t, TVMFFIAny* result) {
  result->type_index = kTVMFFIInt;
  result->v_int64 = ANSWER;
  return 0;
}
"""


@functools.cache
def _compiled() -> bytes:
    """The module that answers 42."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "toy.cc"), Path(folder, "toy.so")
        source.write_text(MODULE)
        paths = tvm_ffi.libinfo.find_include_path(), tvm_ffi.libinfo.find_dlpack_include_path()
        include = (f"-I{path}" for path in paths)
        subprocess.run(["c++", "-shared", "-fPIC", "-DANSWER=42", *include, source, "-o", library], check=True)
        return library.read_bytes()


def answer(source: jit.Source) -> int:
    """42, from the module; in a process of its own, as one process loads a module once."""
    got = Child(lambda: jit.load(source).answer()).result()
    assert isinstance(got, int), got
    return got


STRANGER = 12345  # a user who is neither this one nor root


def as_user(user: int, function: Callable[[], Any]) -> Any:
    """What it returns in a child for which file modes count: the user's, where this one is root."""

    def run() -> Any:
        if os.geteuid() == 0:
            os.setgroups([])
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
        return function()

    return Child(run).result()


def wait_until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.02)


@dataclass
class FakeToolkit:
    """Where all of it is, and what became of it."""

    folder: Path

    @property
    def cache(self) -> Path:
        return self.folder / "cache" / "cutlass"

    @property
    def source(self) -> jit.Source:
        return self.module("toy")

    def module(self, name: str, **settings: Any) -> jit.Source:
        settings = {"arch": "9.0", "definitions": (("ANSWER", "42"),), "include": (), **settings}
        return jit.Source(name, self.folder / "toy.cu", **settings)

    def delay(self, seconds: float) -> None:
        (self.folder / "cuda" / "delay").write_text(str(seconds))

    def compilations(self) -> int:
        log = self.folder / "cuda" / "log"
        return len(log.read_text().splitlines()) if log.exists() else 0

    def modules(self) -> list[str]:
        """The intact ones in the cache."""
        return [path.name for path in sorted(self.cache.glob("[!.]*-nvcc*")) if Module(path).intact()]

    def leftovers(self) -> list[Path]:
        return list(self.cache.glob(f"{BUILDING}*"))


@contextmanager
def open_fake_toolkit(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeToolkit]:
    """Set up in a new folder, with the environment pointing there; removed afterwards."""
    # Not tmp_path, whose parents only their owner may enter: one test goes on as another user.
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    home = folder / "cuda"
    (home / "bin").mkdir(parents=True)
    (home / "bin" / "nvcc").write_text(NVCC.format(python=sys.executable))
    (home / "bin" / "nvcc").chmod(0o755)
    (home / "compiled.so").write_bytes(_compiled())
    version = folder / "cutlass" / "include" / "cutlass" / "version.h"
    version.parent.mkdir(parents=True)
    version.write_text("#define CUTLASS_MAJOR 4\n#define CUTLASS_MINOR 2\n#define CUTLASS_PATCH 0\n")
    (folder / "toy.cu").write_text(MODULE)
    monkeypatch.setenv("CUDA_HOME", str(home))
    monkeypatch.setenv("HYBRID_MXFP8_CUTLASS_DIR", str(folder / "cutlass"))
    monkeypatch.setenv("HYBRID_MXFP8_CACHE_DIR", str(folder / "cache"))
    (home / "delay").write_text("0")
    yield FakeToolkit(folder)
    shutil.rmtree(folder)
