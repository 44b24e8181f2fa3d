"""PTX of the product's CUDA sources, compiled with the JIT's own flags and kept under the JIT's own
key."""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import filelock

from ptx import product

FOR_LIBRARIES = ("-shared", "-Xcompiler=-fPIC", "-cudart=static", "-Xlinker=-z,defs")
"""Flags of the JIT that say nothing of device code."""


def compile_ptx(source: Any, cutlass: Any) -> str:
    """What nvcc makes of a source of the JIT with some CUTLASS headers; from the cache if it was
    made before.

    The key covers the contents of the sources, flags and definitions, the headers and nvcc's
    version.
    """
    cuda = product.toolchain.find_cuda()
    name = f"{source.name}-{source.key()}-cutlass{cutlass.identity}-nvcc{cuda.version_string}.ptx"
    kept = product.env.cache_dir() / "ptx" / name
    kept.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{kept}.lock"):  # two workers of pytest come here together
        if not kept.is_file():
            _compile(source, cutlass, cuda, kept)
    return kept.read_text()


def _compile(source: Any, cutlass: Any, cuda: Any, kept: Path) -> None:
    number = source.arch.replace(".", "")
    command = [
        str(cuda.nvcc),
        "-ptx",
        *(flag for flag in product.jit.FLAGS if flag not in FOR_LIBRARIES),
        *source.flags,
        f"-gencode=arch=compute_{number},code=compute_{number}",
        *(f"-D{key}={value}" for key, value in source.definitions),
        *(f"-I{path}" for path in (*source.include, cutlass.include, *_tvm_ffi_include())),
        str(source.file),
    ]
    with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
        made = Path(folder, "module.ptx")
        done = subprocess.run([*command, "-o", str(made)], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise SystemExit(f"nvcc failed on {source.name}:\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
        os.replace(made, kept)


def _tvm_ffi_include() -> tuple[str, str]:
    from tvm_ffi import libinfo

    return libinfo.find_include_path(), libinfo.find_dlpack_include_path()
