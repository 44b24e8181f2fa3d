"""What routing, expert bias and combine compile to: no spills, wide accesses, a combine that rounds
as its counterpart does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import kernels
import pytest
import torch
from compiling import Compiled, CompileFor

from hybrid_mxfp8.core.token_record import TokenRecord
from hybrid_mxfp8.triton_kernels.moe import combine, expert_bias, pack_tokens, route

META = torch.device("meta")


def routing(tokens: int, top_k: int, experts: int, dtype: torch.dtype) -> Callable[[], None]:
    def ints(*size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.int32, device=META)

    def call() -> None:
        slots = tokens * top_k
        ids = torch.empty(tokens, top_k, dtype=dtype, device=META)
        scratch = ints(route.scratch_elements(slots, experts))
        kernels.route(ids, experts, ints(slots), ints(tokens, top_k), ints(3 * experts + 2), scratch)

    return call


LAUNCHES: dict[str, int] = {"rank_kernel": 16, "count_kernel": 8192, "sum_kernel": 8192, "scatter_kernel": 8192}
"""Each routing kernel, and a number of tokens with which it runs."""


@pytest.fixture
def compile_route(compile_for: CompileFor) -> Callable[..., Compiled]:
    """compile_route(arch, kernel, tokens, top_k, experts, dtype): one of the routing kernels."""

    def compile_one(arch: int, name: str, *shape: Any) -> Compiled:
        return compile_for(arch, route, name, routing(*shape))

    return compile_one


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
@pytest.mark.parametrize("name", LAUNCHES)
def test_route(
    compile_route: Callable[..., Compiled], arch: int, name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    compiled = compile_route(arch, name, LAUNCHES[name], 8, 256, dtype)
    resources = compiled.resources(tmp_path)
    assert resources.stack == 0, "spills"
    assert resources.registers <= 128
    assert compiled.shared <= 16384


@pytest.mark.parametrize("experts", [1, 8, 1024])
@pytest.mark.parametrize("name", LAUNCHES)
def test_route_of_any_number_of_experts(
    compile_route: Callable[..., Compiled], name: str, experts: int, tmp_path: Path
) -> None:
    assert compile_route(90, name, LAUNCHES[name], 8, experts, torch.int64).resources(tmp_path).stack == 0


def test_below_hopper_no_kernel_waits_for_the_one_before(compile_for: CompileFor) -> None:
    """What all others do is checked wherever one is compiled, for 9.0 and more."""
    compile_for(80, combine, "combine_kernel", summed(16, 256, 4, torch.bfloat16, False))


def test_route_writes_without_global_atomics(compile_route: Callable[..., Compiled]) -> None:
    """Histograms may add in shared memory, where integers sum to the same in any order; no row
    depends on an order."""
    for name, tokens in LAUNCHES.items():
        assert compile_route(90, name, tokens, 8, 256, torch.int64).count(r"atom\.global|red\.global") == 0


def test_a_batch_of_another_size_compiles_few_kernels(compile_route: Callable[..., Compiled]) -> None:
    """The width of the comparison follows the batch up to 1024 slots, in powers of two; nothing
    else does."""
    compiled = {id(compile_route(90, "rank_kernel", t, 8, 256, torch.int64).kernel) for t in range(1, 513, 15)}
    assert len(compiled) <= 6
    compiled = {id(compile_route(90, "scatter_kernel", t, 8, 256, torch.int64).kernel) for t in (600, 8192, 9999)}
    assert len(compiled) == 1


def summed(tokens: int, hidden: int, top_k: int, dtype: torch.dtype, bias: bool) -> Callable[[], None]:
    def call() -> None:
        kernels.combine(
            torch.empty(tokens * top_k, hidden, dtype=dtype, device=META),
            torch.empty(tokens, top_k, dtype=torch.int32, device=META),
            torch.empty(tokens, top_k, dtype=torch.int64, device=META),
            torch.empty(tokens, top_k, dtype=torch.float32, device=META),
            torch.empty(4, hidden, dtype=dtype, device=META) if bias else None,
            torch.empty(tokens, hidden, dtype=dtype, device=META),
        )

    return call


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_combine(compile_for: CompileFor, arch: int, dtype: torch.dtype, bias: bool, tmp_path: Path) -> None:
    compiled = compile_for(arch, combine, "combine_kernel", summed(16, 7168, 8, dtype, bias))
    resources = compiled.resources(tmp_path)
    assert resources.stack == 0, "spills"
    assert resources.registers <= 128
    assert compiled.count(r"fma\.rn\.f32") == 0, "the counterpart rounds product and sum"
    # Elements by 16 bytes; indices and weights one by one.
    assert compiled.count(r"ld\.global(\.\w+)*\.v4\.b32") >= 8 * (1 + bias)
    assert compiled.count(r"ld\.global(\.\w+)*\.b(8|16)\b") == 0
    assert compiled.count(r"st\.global(\.\w+)*\.v4\.b32") > 0


@pytest.mark.parametrize("hidden", [32, 2880])
def test_combine_of_other_shapes(compile_for: CompileFor, hidden: int, tmp_path: Path) -> None:
    compiled = compile_for(90, combine, "combine_kernel", summed(3, hidden, 4, torch.bfloat16, False))
    assert compiled.resources(tmp_path).stack == 0


def test_expert_bias(compile_for: CompileFor, arch: int, tmp_path: Path) -> None:
    def call() -> None:
        kernels.add_expert_bias(
            torch.empty(64, 4096, dtype=torch.bfloat16, device=META),
            torch.empty(16, 4, dtype=torch.int32, device=META),
            torch.empty(16, 4, dtype=torch.int64, device=META),
            torch.empty(8, 4096, dtype=torch.bfloat16, device=META),
        )

    compiled = compile_for(arch, expert_bias, "expert_bias_kernel", call)
    assert compiled.resources(tmp_path).stack == 0
    assert compiled.count(r"ld\.global(\.\w+)*\.v4\.b32") == 2
    assert compiled.count(r"st\.global(\.\w+)*\.v4\.b32") == 1


@pytest.mark.parametrize("tokens", [16, 8192])
@pytest.mark.parametrize("top_k", [0, 8])
def test_pack_tokens(compile_for: CompileFor, arch: int, tokens: int, top_k: int, tmp_path: Path) -> None:
    """Rows of bf16 are read 16 bytes at a time, and nothing spills."""

    def call() -> None:
        record = TokenRecord(7168, top_k)
        x = torch.empty(tokens, 7168, dtype=torch.bfloat16, device=META)
        ids = torch.empty(tokens, top_k, dtype=torch.int64, device=META) if top_k else None
        weights = torch.empty(tokens, top_k, dtype=torch.float32, device=META) if top_k else None
        kernels.pack_tokens(x, ids, weights, torch.empty(tokens, record.size, dtype=torch.uint8, device=META), 256)

    compiled = compile_for(arch, pack_tokens, "pack_tokens_kernel", call)
    resources = compiled.resources(tmp_path)
    assert resources.stack == 0, "spills"
    assert resources.registers <= 128
    assert compiled.count(r"ld\.global(\.\w+)*\.v4\.b32") >= 1
