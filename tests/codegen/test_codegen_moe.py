"""What routing, layouts, expert bias and combine compile to: no spills, wide accesses, a combine
that rounds as its reference does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import kernels
import pytest
import torch
from compiling import META, CompileFor, ints, product

LAUNCHES: dict[str, int] = {"rank_kernel": 16, "count_kernel": 8192, "sum_kernel": 8192, "scatter_kernel": 8192}
"""Each routing kernel, and a number of tokens with which it runs."""


def routing(tokens: int, experts: int = 256, dtype: torch.dtype = torch.int64) -> Callable[[], None]:
    slots, ids = 8 * tokens, ints(tokens, 8, dtype=dtype)
    outputs = ints(slots), ints(tokens, 8), ints(3 * experts + 2)
    return lambda: kernels.route(ids, experts, *outputs, ints(kernels.scratch_elements(slots, experts)))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
@pytest.mark.parametrize("name", LAUNCHES)
def test_route(compile_for: CompileFor, arch: int, name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Histograms may add in shared memory, where integers sum to the same in any order; no row
    depends on an order."""
    compiled = compile_for(arch, name, routing(LAUNCHES[name], dtype=dtype))
    resources = compiled.resources(tmp_path)
    assert resources.stack == 0, "spills"
    assert resources.registers <= 128
    assert compiled.shared <= 16384
    assert compiled.count(r"atom\.global|red\.global") == 0


@pytest.mark.parametrize("experts", [1, 8, 1024])
@pytest.mark.parametrize("name", LAUNCHES)
def test_route_of_any_number_of_experts(compile_for: CompileFor, name: str, experts: int, tmp_path: Path) -> None:
    assert compile_for(90, name, routing(LAUNCHES[name], experts)).resources(tmp_path).stack == 0


def test_a_batch_of_another_size_compiles_few_kernels(compile_for: CompileFor) -> None:
    """The width of the comparison follows the batch up to 1024 slots, in powers of two; nothing
    else does."""
    assert len({id(compile_for(90, "rank_kernel", routing(t)).kernel) for t in range(1, 513, 15)}) <= 6
    assert len({id(compile_for(90, "scatter_kernel", routing(t)).kernel) for t in (600, 8192, 9999)}) == 1


def summed(tokens: int, hidden: int, top_k: int, dtype: torch.dtype, bias: bool) -> Callable[[], None]:
    rows, ids = ints(tokens, top_k), ints(tokens, top_k, dtype=torch.int64)
    weights = torch.empty(tokens, top_k, dtype=torch.float32, device=META)
    y, biases, out = (product(t, hidden, dtype) for t in (tokens * top_k, 4, tokens))
    return lambda: kernels.combine(y, rows, ids, weights, biases if bias else None, out)


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_combine(compile_for: CompileFor, arch: int, dtype: torch.dtype, bias: bool, tmp_path: Path) -> None:
    compiled = compile_for(arch, "combine_kernel", summed(16, 7168, 8, dtype, bias))
    resources = compiled.resources(tmp_path)
    assert resources.stack == 0, "spills"
    assert resources.registers <= 128
    assert compiled.count(r"fma\.rn\.f32") == 0, "the reference rounds product and sum"
    # Elements by 16 bytes; indices and weights one by one.
    assert compiled.count(r"ld\.global(\.\w+)*\.v4\.b32") >= 8 * (1 + bias)
    assert compiled.count(r"ld\.global(\.\w+)*\.b(8|16)\b") == 0
    assert compiled.count(r"st\.global(\.\w+)*\.v4\.b32") > 0


@pytest.mark.parametrize("hidden", [32, 2880])
def test_combine_of_other_shapes(compile_for: CompileFor, hidden: int, tmp_path: Path) -> None:
    compiled = compile_for(90, "combine_kernel", summed(3, hidden, 4, torch.bfloat16, False))
    assert compiled.resources(tmp_path).stack == 0


def test_expert_bias(compile_for: CompileFor, arch: int, tmp_path: Path) -> None:
    y, bias, ids = product(64, 4096), product(8, 4096), ints(16, 4, dtype=torch.int64)
    compiled = compile_for(arch, "expert_bias_kernel", lambda: kernels.add_expert_bias(y, ints(16, 4), ids, bias))
    assert compiled.resources(tmp_path).stack == 0
    assert compiled.count(r"ld\.global(\.\w+)*\.v4\.b32") == 2
    assert compiled.count(r"st\.global(\.\w+)*\.v4\.b32") == 1


@pytest.mark.parametrize("num_experts", [1, 8, 256, 1024])
def test_caller_layout(compile_for: CompileFor, arch: int, num_experts: int, tmp_path: Path) -> None:
    given = ints(num_experts)
    compiled = compile_for(arch, "caller_layout_kernel", lambda: kernels.caller_layout(given, given, 4096, 8192))
    assert compiled.grid == (1,)
    assert compiled.resources(tmp_path).stack == 0
