"""What the layer's other kernels compile to: no spills, wide accesses, rounding as in the twins."""

from __future__ import annotations

from typing import Any

import kernels
import pytest
import torch
from compiling import LOAD_16, STORE_16, Compiled, CompileFor, empty

from hybrid_mxfp8.core.token_record import TokenRecord
from hybrid_mxfp8.triton_kernels import group_layout
from hybrid_mxfp8.triton_kernels.moe import combine, expert_bias, pack_tokens, route

LAUNCHES = {"rank_kernel": 16, "count_kernel": 8192, "sum_kernel": 8192, "scatter_kernel": 8192}
"""Each routing kernel, and a number of tokens with which it runs."""


@pytest.fixture
def compile_route(compile_for: CompileFor) -> CompileFor:
    """compile_route(arch, kernel, tokens, experts, dtype), for 8 experts a token."""

    def compile_one(
        arch: int, name: str, tokens: int = 0, experts: int = 256, dtype: torch.dtype = torch.int64, stack: int = 0
    ) -> Compiled:
        ids = empty(tokens or LAUNCHES[name], 8, dtype=dtype)
        slots = ids.numel()
        given = (empty(*ids.shape), empty(3 * experts + 2), empty(route.scratch_elements(slots, experts)))
        return compile_for(arch, getattr(route, name), lambda: kernels.route(ids, experts, *given), stack)

    return compile_one


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
@pytest.mark.parametrize("name", LAUNCHES)
def test_route(compile_route: CompileFor, arch: int, name: str, dtype: torch.dtype) -> None:
    """Without global atomics: no row depends on an order. Histograms add in shared memory, where
    integers sum to the same in any."""
    compiled = compile_route(arch, name, dtype=dtype)
    assert compiled.usage["REG"] <= 128
    assert compiled.shared <= 16384
    assert compiled.count(r"atom\.global|red\.global") == 0


@pytest.mark.parametrize("experts", [1, 8, 1024])
@pytest.mark.parametrize("name", LAUNCHES)
def test_route_of_any_number_of_experts(compile_route: CompileFor, name: str, experts: int) -> None:
    compile_route(90, name, experts=experts)


def test_a_batch_of_another_size_compiles_few_kernels(compile_route: CompileFor) -> None:
    """The width of the comparison alone follows the batch, in powers of two up to 1024 slots."""
    # That of 512 slots keeps six words in memory.
    assert len({id(compile_route(90, "rank_kernel", t, stack=24).kernel) for t in range(1, 257, 15)}) <= 6
    assert len({id(compile_route(90, "scatter_kernel", t).kernel) for t in (600, 8192, 9999)}) == 1


@pytest.mark.parametrize("experts", [1, 8, 256, 1024])
def test_layout_of_the_sglang_functions(compile_for: CompileFor, arch: int, experts: int) -> None:
    given = (empty(experts), empty(experts), 4096, 8192)
    assert compile_for(arch, group_layout.caller_layout_kernel, lambda: kernels.caller_layout(*given)).grid == (1,)


@pytest.fixture
def compile_combine(compile_for: CompileFor) -> CompileFor:
    """compile_combine(arch, tokens, hidden, top_k, dtype, bias)"""

    def compile_one(
        arch: int, tokens: int, hidden: int, top_k: int, dtype: torch.dtype = torch.bfloat16, bias: bool = False
    ) -> Compiled:
        choices = (tokens, top_k)
        given = (
            empty(tokens * top_k, hidden, dtype=dtype), empty(*choices), empty(*choices, dtype=torch.int64),
            empty(*choices, dtype=torch.float32), empty(4, hidden, dtype=dtype) if bias else None,
            empty(tokens, hidden, dtype=dtype),
        )  # fmt: skip
        return compile_for(arch, combine.combine_kernel, lambda: kernels.combine(*given))

    return compile_one


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_combine(compile_combine: CompileFor, arch: int, dtype: torch.dtype, bias: bool) -> None:
    compiled = compile_combine(arch, 16, 7168, 8, dtype, bias)
    assert compiled.usage["REG"] <= 128
    assert compiled.count(r"fma\.rn\.f32") == 0, "the counterpart rounds product and sum"
    # Elements by 16 bytes; indices and weights one by one.
    assert compiled.count(LOAD_16) >= 8 * (1 + bias)
    assert compiled.count(r"ld\.global(\.\w+)*\.b(8|16)\b") == 0
    assert compiled.count(STORE_16) > 0


@pytest.mark.parametrize(("arch", "hidden"), [(90, 32), (90, 2880), (80, 256)])
def test_combine_of_other_shapes(compile_combine: CompileFor, arch: int, hidden: int) -> None:
    """And below Hopper, where no kernel may wait for the one before: ``compile_for`` sees it."""
    compile_combine(arch, 3, hidden, 4)


def test_expert_bias(compile_for: CompileFor, arch: int) -> None:
    bf16: Any = {"dtype": torch.bfloat16}
    given = (empty(64, 4096, **bf16), empty(16, 4), empty(16, 4, dtype=torch.int64), empty(8, 4096, **bf16))
    compiled = compile_for(arch, expert_bias.expert_bias_kernel, lambda: kernels.add_expert_bias(*given))
    assert (compiled.count(LOAD_16), compiled.count(STORE_16)) == (2, 1)


@pytest.mark.parametrize("tokens", [16, 8192])
@pytest.mark.parametrize("top_k", [0, 8])
def test_pack_tokens(compile_for: CompileFor, arch: int, tokens: int, top_k: int) -> None:
    """Rows of bf16 are read 16 bytes at a time."""
    x = empty(tokens, 7168, dtype=torch.bfloat16)
    choices = (empty(tokens, top_k, dtype=dtype) if top_k else None for dtype in (torch.int64, torch.float32))
    given = (x, *choices, empty(tokens, TokenRecord(7168, top_k).size, dtype=torch.uint8), 256)
    compiled = compile_for(arch, pack_tokens.pack_tokens_kernel, lambda: kernels.pack_tokens(*given))
    assert compiled.usage["REG"] <= 128
    assert compiled.count(LOAD_16) >= 1
