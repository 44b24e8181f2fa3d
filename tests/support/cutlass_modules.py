"""What the tests of the CUTLASS backend compile: references for its operands, and mutants of them.

Run as a program it compiles all of it into the ordinary cache, with no GPU.

A mutant is a reference with one fault seeded in the code that it shares with the SM100 kernel's
launch. All mutants of a reference are compiled as one file, each in a namespace of its own, because
nearly all of the time goes into CUTLASS's headers. The first has no fault: it is the reference.
"""

from __future__ import annotations

import dataclasses
import os
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from hybrid_mxfp8.commands import warmup
from hybrid_mxfp8.core.operands import ExpertWeights, GroupedMXFP8
from hybrid_mxfp8.cutlass_kernels.grouped_gemm import OUT_TYPES
from hybrid_mxfp8.cutlass_kernels.jit import build as jit
from hybrid_mxfp8.cutlass_kernels.jit import toolchain

GPU_ARCH = "9.0"
"""PTX is not kept, so the tests of tests/gpu run on Hopper."""

CUDA = Path(__file__).parents[1] / "cuda"
SHARED = ("prepare.cuh", "grouped_gemm_sm100.cuh", "read_arguments.cuh", "tensor_checks.cuh", "call.cuh")

Edits = tuple[tuple[str, str], ...]
"""Lines of the shared code, and what a plausible mistake would have made of them."""

CONTROL, BIT_21 = "none", "bit 21 left in descriptors"

FAULTS: dict[str, Edits] = {
    CONTROL: (),
    "expert offset off by one": (
        ("arrays.token_rows[expert] = operands.tokens + rows.begin * k;",
         "arrays.token_rows[expert] = operands.tokens + (rows.begin + 1) * k;"),
    ),
    "scale base in wrong units": (
        ("operands.token_scales + rows.scale_begin * problem.scale_cols();",
         "operands.token_scales + rows.scale_begin;"),
    ),
    "weights and tokens swapped": (
        ("args.mainloop.ptr_A = operands.weights;", "args.mainloop.ptr_A = operands.tokens;"),
        ("arrays.weights[expert] = operands.weights + expert * n * k;",
         "arrays.weights[expert] = operands.tokens + rows.begin * k;"),
        ("arrays.token_rows[expert] = operands.tokens + rows.begin * k;",
         "arrays.token_rows[expert] = operands.weights + expert * n * k;"),
    ),
    "leading dimension of D": (
        ("arrays.out_stride[expert] = Gemm::out_stride(problem.n);",
         "arrays.out_stride[expert] = Gemm::out_stride(problem.k);"),
    ),
    "padding rows counted": (
        ("arrays.tokens[expert] = rows.tokens;",
         "arrays.tokens[expert] = min(round_up(rows.tokens, kScaleTileRows), problem.num_tokens - rows.begin);"),
    ),
    "scales of experts from a common base": (
        ("rows.scale_begin * problem.scale_cols();", "rows.begin * problem.scale_cols();"),
    ),
    BIT_21: (("words[1] &= ~(uint64_t{1} << 21);", ""),),
}  # fmt: skip

OPERAND_FAULTS = tuple(fault for fault in FAULTS if fault != BIT_21)
"""What a product shows of the faults."""

SCHEDULER_FAULTS = (CONTROL, "padding rows counted")
"""What a scheduler can see of the faults."""


def host_reference() -> jit.Source:
    """CUTLASS's CPU reference over our arguments, with a driver that only encodes descriptors."""
    own_driver = (("CUTLASS_ENABLE_DIRECT_CUDA_DRIVER_CALL", "1"),)
    on_host = ("-include", "device_code_on_host.cuh", "-diag-suppress=20011,20014", "-Xcompiler=-O0")
    include = (jit.CSRC, CUDA, cutlass_tools(toolchain.find_cutlass()))
    return jit.Source("host_reference", CUDA / "host_reference.cu", "8.0", own_driver, on_host, include)


def host_side(out: str) -> jit.Source:
    """Every configuration's host side, for an output type."""
    element = {short: element for short, element in OUT_TYPES.values()}[out]
    return _for_gpu("host_side", f"host_side_{out}", (("HYBRID_MXFP8_OUT", element),))


def argument_walker() -> jit.Source:
    """A plain kernel over our arguments."""
    return _for_gpu("argument_walker")


def tile_scheduler() -> jit.Source:
    """The kernel's tile scheduler, counting."""
    return _for_gpu("tile_scheduler")


def _for_gpu(file: str, name: str = "", definitions: tuple[tuple[str, str], ...] = ()) -> jit.Source:
    return jit.Source(name or file, CUDA / f"{file}.cu", GPU_ARCH, definitions, include=(jit.CSRC, CUDA))


def mutants(reference: jit.Source, folder: Path, faults: Sequence[str] = OPERAND_FAULTS) -> jit.Source:
    """The reference's functions once for each fault, named ``<function>_<number of the fault>``.

    With CUTLASS's CPU reference come those of host_loads.cu, without a fault and with its own.
    """
    parts = []
    for number, (fault, edits) in enumerate(FAULTS.items()):
        own = [reference.file] if fault in faults else []
        if reference.name == "host_reference" and fault in (CONTROL, BIT_21):
            own.append(CUDA / "host_loads.cu")
        shared = [CUDA / name if (CUDA / name).exists() else jit.CSRC / name for name in SHARED] if own else []
        text = "\n".join(file.read_text() for file in (*shared, *own))
        for right, wrong in edits if own else ():
            assert text.count(right) == 1, f"the fault no longer applies to: {right}"
            text = text.replace(right, wrong)
        text = re.sub(r"#pragma once\n|#include \"(?!cutlass/|cute/)[^\"]+\"\n", "", text)
        text = re.sub(r"\bhybrid_mxfp8\b", f"hybrid_mxfp8_fault_{number}", text)
        parts.append(re.sub(r"(TVM_FFI_DLL_EXPORT_TYPED_FUNC\(\w+)", rf"\1_{number}", text))
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{reference.name}_mutants.cu"
    file.write_text("\n".join(parts))
    return dataclasses.replace(reference, name=f"{reference.name}_mutants", file=file)


def call(function: Callable[..., Any], x: GroupedMXFP8, w: ExpertWeights, out: torch.Tensor, *more: Any) -> Any:
    """Call an exported function that takes the operands of a grouped GEMM."""
    groups = x.groups
    return function(
        x.values.view(torch.uint8), x.scales, w.values.view(torch.uint8), w.scales,
        groups.tokens_per_expert, groups.expert_offsets, groups.scale_offsets, out, *more,
    )  # fmt: skip


def header_choices() -> list[toolchain.CutlassHeaders]:
    """One installed CUTLASS for each mainloop that the installed ones offer, the newest of each."""
    usable = [found for found in toolchain.cutlass_candidates() if not found.problem]
    newest = {found.ragged: found for found in sorted(usable, key=lambda found: found.version)}
    return [newest[ragged] for ragged in sorted(newest, reverse=True)]


def mainloop(found: toolchain.CutlassHeaders) -> str:
    """The name of the mainloop that these headers give, for test ids."""
    return "ragged" if found.ragged else "pointer-array"


def cutlass_tools(found: toolchain.CutlassHeaders) -> Path:
    """The folder of CUTLASS's CPU references: the checkout's, else nvidia-cutlass's."""
    package = toolchain.package_folder("cutlass_library") or Path()
    folders = [root / "tools" / "util" / "include" for root in (found.include.parent, package / "source")]
    return next(f for f in folders if (f / "cutlass" / "util" / "reference" / "host" / "gett.hpp").is_file())


def build_all() -> None:
    """Compile every module that tests load, for each mainloop that the installed headers offer."""
    for found in header_choices():
        os.environ["HYBRID_MXFP8_CUTLASS_DIR"] = str(found.include)
        with tempfile.TemporaryDirectory() as folder:
            wanted = [
                mutants(host_reference(), Path(folder)),
                argument_walker(),
                mutants(argument_walker(), Path(folder)),
                tile_scheduler(),
                mutants(tile_scheduler(), Path(folder), SCHEDULER_FAULTS),
                *(host_side(short) for short, _ in OUT_TYPES.values()),
            ]
            failures = warmup.build_all(wanted, warmup.default_jobs())
        if failures:
            sys.exit("\n".join(failures))


if __name__ == "__main__":
    build_all()
