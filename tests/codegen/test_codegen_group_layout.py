"""The layout kernel of the SGLang functions compiles for every architecture, without spills."""

from __future__ import annotations

from pathlib import Path

import kernels
import pytest
import torch
from compiling import CompileFor

from hybrid_mxfp8.triton_kernels import group_layout


@pytest.mark.parametrize("num_experts", [1, 8, 256, 1024])
def test_compiles(compile_for: CompileFor, arch: int, num_experts: int, tmp_path: Path) -> None:
    given = torch.empty(num_experts, dtype=torch.int32, device="meta")
    compiled = compile_for(
        arch,
        group_layout,
        "caller_layout_kernel",
        lambda: kernels.caller_layout(given, given, 4096, 8192),
    )
    assert compiled.grid == (1,)
    assert compiled.resources(tmp_path).stack == 0
