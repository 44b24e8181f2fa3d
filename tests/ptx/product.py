# ruff: noqa: E402, F401
"""Every import of the product that the emulator's runs need, in one place."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
for folder in (ROOT, ROOT / "tests" / "support", ROOT / "tests" / "codegen"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import kernels as launches
import pages
import torch
from compiling import StubDriver

import hybrid_mxfp8 as mx
from hybrid_mxfp8 import env, reference
from hybrid_mxfp8.core.layout import GroupLayout, group_offsets
from hybrid_mxfp8.cutlass_kernels.config import GemmConfig
from hybrid_mxfp8.cutlass_kernels.grouped_gemm import OUT_TYPES
from hybrid_mxfp8.cutlass_kernels.grouped_gemm import source as gemm_source
from hybrid_mxfp8.cutlass_kernels.jit import build as jit
from hybrid_mxfp8.cutlass_kernels.jit import toolchain
from hybrid_mxfp8.dispatch.buffers import Buffer, TensorMap
from hybrid_mxfp8.errors import BackendUnavailableError
from hybrid_mxfp8.triton_kernels import abi, group_layout, launch
from hybrid_mxfp8.triton_kernels.gemm import blackwell
from hybrid_mxfp8.triton_kernels.moe import route

OUT_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def host_source(only: tuple[str, str] | None = None) -> jit.Source:
    """The host side for the product's JIT: of every configuration, or of one and an output type."""
    definitions = [("CUTLASS_ENABLE_DIRECT_CUDA_DRIVER_CALL", "1"), ("CUTLASS_ENABLE_GDC_FOR_SM100", "1")]
    name = "ptx_host"
    if only is not None:
        config, out = GemmConfig.parse(only[0]), only[1]
        name = f"ptx_host_{config.module}_{out}"
        values = (config.cta_group, config.token_tile, list(OUT_DTYPES).index(out), OUT_TYPES[OUT_DTYPES[out]][1])
        keys = ("GROUP", "TILE", "NUMBER", "OUT")
        definitions += [(f"HYBRID_MXFP8_ONLY_{key}", str(value)) for key, value in zip(keys, values, strict=True)]
    return jit.Source(name, Path(__file__).with_name("host.cu"), "9.0", tuple(definitions))


def installed_headers(mainloop: str) -> list[toolchain.CutlassHeaders]:
    """The installed CUTLASS headers that give a mainloop, ``ragged`` or ``pointer_array``."""
    return [h for h in toolchain.cutlass_candidates() if not h.problem and h.ragged == (mainloop == "ragged")]


@functools.cache
def mainloop_headers(mainloop: str) -> toolchain.CutlassHeaders:
    """The newest of them."""
    fitting = installed_headers(mainloop)
    if not fitting:
        raise SystemExit(
            f"no CUTLASS headers for the {mainloop} mainloop: pip install "
            + ("sgl-deep-gemm" if mainloop == "ragged" else "nvidia-cutlass")
        )
    return max(fitting, key=lambda h: h.version)
