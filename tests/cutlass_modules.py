"""What the tests of the CUTLASS backend compile: the judges of its operands, and mutants of them.

A mutant is the same judge with one fault seeded in the code that it shares with the SM100 kernel's launch. All
mutants of a judge are compiled as one file, each in a namespace of its own, because nearly all of the time goes
into CUTLASS's headers.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hybrid_mxfp8.cutlass_kernels import headers, jit
from hybrid_mxfp8.tensors import ExpertWeights, GroupedMXFP8

CUDA = Path(__file__).parent / "cuda"
SHARED = ("prepare.cuh", "grouped_gemm_sm100.cuh", "read_arguments.cuh", "tensor_checks.cuh")

Edits = tuple[tuple[str, str], ...]
"""Lines of the shared code, and what a plausible mistake would have made of them."""

CONTROL = "none"

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
}  # fmt: skip


def host_reference() -> jit.Source:
    """CUTLASS's CPU reference over our arguments."""
    return jit.Source("host_reference", jit.ROOM / "host_reference.cu", "8.0", tools=True)


def mutants(judge: jit.Source, folder: Path) -> jit.Source:
    """The judge's function once for each fault, named ``<function>_<number of the fault>``; written to ``folder``."""
    parts = []
    for number, edits in enumerate(FAULTS.values()):
        text = "\n".join([*((jit.ROOM / name).read_text() for name in SHARED), judge.file.read_text()])
        for right, wrong in edits:
            assert text.count(right) == 1, f"the fault no longer applies to: {right}"
            text = text.replace(right, wrong)
        text = re.sub(r"#pragma once\n|#include \"(?!cutlass/|cute/)[^\"]+\"\n", "", text)
        text = re.sub(r"\bhybrid_mxfp8\b", f"hybrid_mxfp8_fault_{number}", text)
        parts.append(re.sub(r"(TVM_FFI_DLL_EXPORT_TYPED_FUNC\(\w+)", rf"\1_{number}", text))
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{judge.name}_mutants.cu"
    file.write_text("\n".join(parts))
    return jit.Source(f"{judge.name}_mutants", file, judge.arch, judge.definitions, judge.flags, judge.tools)


def call(function: Callable[..., Any], x: GroupedMXFP8, w: ExpertWeights, out: torch.Tensor, *more: Any) -> None:
    """Call an exported function that takes the operands of a grouped GEMM."""
    groups = x.groups
    function(
        x.values.view(torch.uint8), x.scales, w.values.view(torch.uint8), w.scales,
        groups.tokens_per_expert, groups.expert_offsets, groups.scale_offsets, out, *more,
    )  # fmt: skip


def header_choices() -> list[headers.CutlassHeaders]:
    """One installed CUTLASS for each mainloop that the installed ones offer, the newest of each."""
    newest: dict[bool, headers.CutlassHeaders] = {}
    for found in sorted(headers.installed_cutlass(), key=lambda h: h.version):
        newest[found.ragged] = found
    return [newest[ragged] for ragged in sorted(newest, reverse=True)]


def mainloop(found: headers.CutlassHeaders) -> str:
    """The name of the mainloop that these headers give, for test ids."""
    return "ragged" if found.ragged else "pointer-array"
