"""What the portable GEMM and Blackwell's compile to: the matrix instruction, memory, no spills."""

from __future__ import annotations

import re

import kernels
import pytest
import torch
from compiling import SHARED_LIMIT, TENSOR_MEMORY_COLUMNS, Compiled, CompileFor

from hybrid_mxfp8.triton_kernels.gemm import blackwell, portable

E, N, K = 8, 4096, 7168

BLOCK_SCALED = r"tcgen05\.mma\.cta_group::1\.kind::mxf8f6f4\.block_scale"
NATIVE = {
    90: r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k16\.f32\.bf16\.bf16",
    100: BLOCK_SCALED,
    103: BLOCK_SCALED,
    120: r"mma\.sync\.aligned\.m16n8k32\.row\.col\.kind::mxf8f6f4\.block_scale\S*\.e4m3\.e4m3\.f32\.ue8m0",
}
ANY_MMA = r"wgmma\.mma_async\.sync\.aligned\.m|tcgen05\.mma\.|mma\.sync\.aligned\.m"


@pytest.fixture
def compile_product(compile_for: CompileFor) -> CompileFor:
    """compile_product(arch, t, ...): a product of t tokens, with what holds for all of them."""

    def compile_one(
        arch: int, t: int, dtype: torch.dtype = torch.bfloat16, n: int = N, k: int = K, e: int = E
    ) -> Compiled:
        operands = kernels.meta_operands(t, n, k, e, dtype)
        # 128x128 in bf16 takes all 255 registers, and with Triton 3.9 a few words more.
        stack = 16 if arch == 90 and t == 128 * e else 0
        kernel = portable.grouped_gemm_kernel
        compiled = compile_for(arch, kernel, lambda: kernels.product(portable.plan, *operands), stack)
        assert compiled.count(NATIVE[arch]) > 0
        assert compiled.count(NATIVE[arch]) == compiled.count(ANY_MMA), "another beside the native one"
        assert compiled.count(r"\.ftz") == 0
        assert 0 < compiled.shared <= SHARED_LIMIT[arch]
        assert compiled.tensor_memory <= TENSOR_MEMORY_COLUMNS
        assert (compiled.tensor_memory > 0) == (arch in (100, 103))
        return compiled

    return compile_one


@pytest.mark.parametrize("block_t", [16, 32, 64, 128])
def test_each_tile(compile_product: CompileFor, arch: int, block_t: int) -> None:
    """The block-scaled instruction down to 16 tokens an expert: weights are its 128 rows."""
    compiled = compile_product(arch, E * block_t)
    assert compiled.grid == ((E * block_t + (block_t - 1) * E) // block_t * (N // 128),)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])
@pytest.mark.parametrize("block_t", [16, 128])
def test_output_dtypes(compile_product: CompileFor, arch: int, block_t: int, dtype: torch.dtype) -> None:
    compile_product(arch, E * block_t, dtype)


@pytest.mark.parametrize(("n", "k", "e"), [(2880, 2880, 128), (136, 160, 3), (40, 32, 1)])
def test_shapes_off_the_tile(compile_product: CompileFor, arch: int, n: int, k: int, e: int) -> None:
    compile_product(arch, e * 16, n=n, k=k, e=e)


def test_sums_are_not_chained_through_one_accumulator_twice_a_step(compile_product: CompileFor) -> None:
    """Two dots chained into one accumulator in a loop miscompile there (triton issue 10821)."""
    assert compile_product(100, E * 64).kernel.asm["ttgir"].count("ttng.tc_gen5_mma_scaled") == 1


def test_a_batch_of_another_size_compiles_nothing_new(compile_product: CompileFor) -> None:
    """Token counts within one configuration share a kernel, whatever they are divisible by."""
    assert len({id(compile_product(90, t).kernel) for t in (1, 2, 16, 17, 48, 100, 128)}) == 1


# ---------------------------------------------------------------- Blackwell

CASES = [(100, 16), (100, 128), (100, 256), (103, 16), (103, 256)]


def compile_blackwell(compile_for: CompileFor, arch: int, block_t: int, n: int = N, k: int = K, e: int = E) -> Compiled:
    config = blackwell.select_blackwell_config(e * block_t, e)
    assert config.block_t == block_t
    given = (*kernels.meta_operands(e * block_t, n, k, e, torch.bfloat16), config)
    return compile_for(arch, blackwell.grouped_gemm_blackwell_kernel, lambda: kernels.product(blackwell.plan, *given))


@pytest.mark.parametrize(("arch", "block_t"), CASES, ids=[f"sm_{arch}-{block_t}" for arch, block_t in CASES])
def test_each_tile_on_blackwell(compile_for: CompileFor, arch: int, block_t: int) -> None:
    compiled = compile_blackwell(compile_for, arch, block_t)
    assert compiled.shared <= SHARED_LIMIT[arch]
    assert 0 < compiled.tensor_memory <= TENSOR_MEMORY_COLUMNS
    # Tokens, weights and weight scales; from 128 tokens on the tokens' scales too.
    assert compiled.count(r"cp\.async\.bulk\.tensor\.2d") >= 2
    assert compiled.count(r"cp\.async\.bulk\.tensor\.5d") >= (2 if block_t >= 128 else 1)
    assert compiled.count(BLOCK_SCALED) > 0
    assert compiled.count(r"tcgen05\.mma\.\S*kind::(?!mxf8f6f4)") == 0
    assert compiled.count(r"tcgen05\.cp\.") > 0, "no scales copied to tensor memory as they lie"
    if arch == 100:  # which all versions of nvdisasm know
        assert {"UTCQMMA", "UTCCP", "UTMALDG"} <= set(re.findall(r"\bUT[A-Z]+", compiled.machine_code))


@pytest.mark.parametrize(("n", "k", "e"), [(2880, 2880, 128), (136, 160, 3), (40, 32, 1)])
@pytest.mark.parametrize("block_t", [16, 256])
def test_shapes_off_the_tile_on_blackwell(compile_for: CompileFor, block_t: int, n: int, k: int, e: int) -> None:
    assert compile_blackwell(compile_for, 100, block_t, n, k, e).count(BLOCK_SCALED) > 0


@pytest.mark.parametrize(("block_t", "stalls"), [(16, True), (128, False), (256, False)])
def test_main_loop_on_blackwell(compile_for: CompileFor, block_t: int, stalls: bool) -> None:
    """From tiles of 128 tokens on, threads load no scales in the loop over K and no step waits for
    its own MMA. The tile of 16 does both, which shows that the two searches find them."""
    ttgir = compile_blackwell(compile_for, 100, block_t).kernel.asm["ttgir"]
    loops = re.findall(r"^( *)\S*(?:.* = )?scf\.for .*\n((?:\1 .*\n)+)", ttgir, re.MULTILINE)
    bodies = [body for _, body in loops]
    (main_loop,) = (body for body in bodies if "tc_gen5_mma_scaled" in body)
    (done,) = re.findall(r"tc_gen5_mma_scaled .*?, (%\w+)\[%\w+\]", main_loop)
    waits = f"wait_barrier {done}," in main_loop
    loads = any(re.search(r"tt\.load|async_copy_global_to_local|local_load", body) for body in bodies)
    assert (waits, loads) == (stalls, stalls)
