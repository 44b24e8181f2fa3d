"""What the Blackwell grouped GEMM compiles to: native MMA, TMA, scale copies, tensor memory, no
spills."""

from __future__ import annotations

import re

import kernels
import pytest
import torch
from compiling import SHARED_LIMIT, TENSOR_MEMORY_COLUMNS, Compiled, CompileFor

from hybrid_mxfp8.triton_kernels.gemm import blackwell

CASES = [(100, 16), (100, 128), (100, 256), (103, 16), (103, 256)]


def compile_case(
    compile_for: CompileFor, arch: int, block_t: int, n: int = 4096, k: int = 7168, e: int = 8
) -> Compiled:
    config = blackwell.select_blackwell_config(e * block_t, e)
    assert config.block_t == block_t
    given = (*kernels.meta_operands(e * block_t, n, k, e, torch.bfloat16), config)
    return compile_for(arch, blackwell.grouped_gemm_blackwell_kernel, lambda: kernels.product(blackwell.plan, *given))


@pytest.mark.parametrize(("arch", "block_t"), CASES, ids=[f"sm_{arch}-{block_t}" for arch, block_t in CASES])
def test_each_tile(compile_for: CompileFor, arch: int, block_t: int) -> None:
    compiled = compile_case(compile_for, arch, block_t)
    assert compiled.shared <= SHARED_LIMIT[arch]
    assert 0 < compiled.tensor_memory <= TENSOR_MEMORY_COLUMNS
    # Tokens, weights and weight scales; from 128 tokens on the tokens' scales too.
    assert compiled.count(r"cp\.async\.bulk\.tensor\.2d") >= 2
    assert compiled.count(r"cp\.async\.bulk\.tensor\.5d") >= (2 if block_t >= 128 else 1)
    assert compiled.count(r"tcgen05\.mma\.cta_group::1\.kind::mxf8f6f4\.block_scale") > 0
    assert compiled.count(r"tcgen05\.mma\.\S*kind::(?!mxf8f6f4)") == 0
    assert compiled.count(r"tcgen05\.cp\.") > 0, "no scales copied to tensor memory as they lie"


@pytest.mark.parametrize("block_t", [16, 256])
def test_machine_code_of_sm_100(compile_for: CompileFor, block_t: int) -> None:
    text = compile_case(compile_for, 100, block_t).machine_code
    for instruction in ("UTCQMMA", "UTCCP", "UTMALDG"):
        assert instruction in text, instruction


@pytest.mark.parametrize(("n", "k", "e"), [(2880, 2880, 128), (136, 160, 3), (40, 32, 1)])
@pytest.mark.parametrize("block_t", [16, 256])
def test_shapes_off_the_tile(compile_for: CompileFor, block_t: int, n: int, k: int, e: int) -> None:
    compiled = compile_case(compile_for, 100, block_t, n, k, e)
    assert compiled.count(r"tcgen05\.mma\.cta_group::1\.kind::mxf8f6f4\.block_scale") > 0


@pytest.mark.parametrize(("block_t", "stalls"), [(16, True), (128, False), (256, False)])
def test_main_loop(compile_for: CompileFor, block_t: int, stalls: bool) -> None:
    """From tiles of 128 tokens on, which expert sizes above 16 get, threads load no scales in the
    loop over K and no step waits for its own MMA. The tile of 16 does both, which shows that the
    two searches find them.
    """
    ttgir = compile_case(compile_for, 100, block_t).kernel.asm["ttgir"]
    loops = re.findall(r"^( *)\S*(?:.* = )?scf\.for .*\n((?:\1 .*\n)+)", ttgir, re.MULTILINE)
    bodies = [body for _, body in loops]
    (main_loop,) = (body for body in bodies if "tc_gen5_mma_scaled" in body)
    (done,) = re.findall(r"tc_gen5_mma_scaled .*?, (%\w+)\[%\w+\]", main_loop)
    waits = f"wait_barrier {done}," in main_loop
    loads = any(re.search(r"tt\.load|async_copy_global_to_local|local_load", body) for body in bodies)
    assert (waits, loads) == (stalls, stalls)
