"""A fake CUDA toolkit, a source and a cache, for tests of building and keeping modules.

The fake toolkit's nvcc hands a C++ source to the host compiler, after whatever delay or failure a test asks for,
and writes a line to a log each time. Everything else, tvm-ffi and ninja included, is the real path.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import tvm_ffi  # now: an unprivileged user may not be able to import it later

from hybrid_mxfp8.cutlass_kernels.jit import build as jit

NVCC = """#!{python}
import os, pathlib, subprocess, sys, time
home = pathlib.Path(__file__).resolve().parent.parent
arguments = sys.argv[1:]
if "--version" in arguments:
    sys.exit(print("Cuda compilation tools, release 13.0, V13.0.88"))
if "--dryrun" in arguments:
    sys.exit(print(f"#$ _HERE_={{home / 'bin'}}"))
with open(home / "log", "a") as log:
    log.write("compile\\n")
time.sleep(float((home / "delay").read_text()))
while (home / "hold").exists():
    time.sleep(0.05)
source = pathlib.Path(arguments[arguments.index("-c") + 1]).read_text()
if "#error" in source:
    print("In file included from module.cu:1:")
    print('module.cu(7): error: identifier "answr" is undefined')
    print('module.cu(9): error: expected a ";"')
    sys.exit(2)
keep = [a for a in arguments if a.startswith(("-I", "-D"))]
source_and_object = ["-c", arguments[arguments.index("-c") + 1], "-o", arguments[arguments.index("-o") + 1]]
sys.exit(subprocess.call(["c++", "-x", "c++", "-std=c++17", "-fPIC", *keep, *source_and_object]))
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

PROGRAM = """
import sys
from pathlib import Path
from hybrid_mxfp8.cutlass_kernels.jit import build as jit
source = jit.Source("toy", Path(sys.argv[1]), "9.0", definitions=(("ANSWER", "42"),), include=())
print(jit.load(source).answer(), flush=True)
"""


# What a build's process does in place of tvm-ffi where the compiler itself is not the matter.
COPY = """
import json, pathlib, sys, time
home = pathlib.Path({home!r})
with open(home / "log", "a") as log:
    log.write("compile\\n")
time.sleep(float((home / "delay").read_text()))
library = pathlib.Path(json.load(sys.stdin)["build_directory"], "toy.so")
library.write_bytes(pathlib.Path({library!r}).read_bytes())
print(library)
"""


@functools.cache
def _compiled() -> bytes:
    """The module that answers 42."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "toy.cc"), Path(folder, "toy.so")
        source.write_text(MODULE)
        include = (
            f"-I{path}" for path in (tvm_ffi.libinfo.find_include_path(), tvm_ffi.libinfo.find_dlpack_include_path())
        )
        subprocess.run(["c++", "-shared", "-fPIC", "-DANSWER=42", *include, source, "-o", library], check=True)
        return library.read_bytes()


@dataclass
class Workshop:
    """A fake toolkit, a source and a cache, and processes that use them."""

    folder: Path

    @property
    def cache(self) -> Path:
        return self.folder / "cache" / "cutlass"

    @property
    def source(self) -> jit.Source:
        return jit.Source("toy", self.folder / "toy.cu", "9.0", definitions=(("ANSWER", "42"),), include=())

    def delay(self, seconds: float) -> None:
        (self.folder / "cuda" / "delay").write_text(str(seconds))

    @contextmanager
    def held(self) -> Iterator[None]:
        """No compilation ends in the block."""
        hold = self.folder / "cuda" / "hold"
        hold.touch()
        yield
        hold.unlink()

    def compilations(self) -> int:
        log = self.folder / "cuda" / "log"
        return len(log.read_text().splitlines()) if log.exists() else 0

    def start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(self.folder / "toy.cu")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self) -> tuple[int, str, str]:
        process = self.start()
        out, err = process.communicate(timeout=120)
        return process.returncode, out, err

    def without_compiler(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """From here on a compilation copies a library that was compiled once: the rest of a build is as it is."""
        library = self.folder / "compiled.so"
        library.write_bytes(_compiled())
        monkeypatch.setattr(jit, "_BUILD", COPY.format(library=str(library), home=str(self.folder / "cuda")))

    def module(self, name: str, answer: int = 1) -> jit.Source:
        """Another module of the same source."""
        return jit.Source(name, self.folder / "toy.cu", "9.0", definitions=(("ANSWER", str(answer)),), include=())

    def modules(self) -> list[str]:
        return [built.folder.name for built in jit.built()]

    def leftovers(self) -> list[str]:
        return [path.name for path in self.cache.glob(f"{jit.BUILDING}*")]


@contextmanager
def open_workshop(monkeypatch: pytest.MonkeyPatch) -> Iterator[Workshop]:
    """Set up in a new folder, with the environment pointing there; removed afterwards."""
    # Not tmp_path, whose parents only their owner may enter: one test goes on as another user.
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    home = folder / "cuda"
    (home / "bin").mkdir(parents=True)
    (home / "bin" / "nvcc").write_text(NVCC.format(python=sys.executable))
    (home / "bin" / "nvcc").chmod(0o755)
    (home / "lib64").mkdir()
    subprocess.run(["cc", "-shared", "-x", "c", os.devnull, "-o", home / "lib64" / "libcudart.so"], check=True)
    version = folder / "cutlass" / "include" / "cutlass" / "version.h"
    version.parent.mkdir(parents=True)
    version.write_text("#define CUTLASS_MAJOR 4\n#define CUTLASS_MINOR 2\n#define CUTLASS_PATCH 0\n")
    (folder / "toy.cu").write_text(MODULE)
    monkeypatch.setenv("CUDA_HOME", str(home))
    monkeypatch.setenv("HYBRID_MXFP8_CUTLASS_DIR", str(folder / "cutlass"))
    monkeypatch.setenv("HYBRID_MXFP8_CACHE_DIR", str(folder / "cache"))
    made = Workshop(folder)
    made.delay(0)
    yield made
    shutil.rmtree(folder)


class Child:
    """A forked process that runs a function; forking is cheap where starting Python anew and importing torch is not."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        context = multiprocessing.get_context("fork")
        self._mine, theirs = context.Pipe(duplex=False)
        self.process: BaseProcess = context.Process(target=_answer, args=(theirs, function, arguments))
        self.process.start()
        theirs.close()

    def result(self, seconds: float = 60) -> Any:
        """What the function returned, or the traceback as a string; None if the process was killed."""
        try:
            answer = self._mine.recv() if self._mine.poll(seconds) else "it never ended"
        except EOFError:
            answer = None
        self.process.join(seconds)
        assert self.process.exitcode is not None
        return answer


def _answer(pipe: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.setsid()  # a compiler it starts can be killed with it
    try:
        pipe.send(function(*arguments))
    except BaseException:
        pipe.send(traceback.format_exc())
