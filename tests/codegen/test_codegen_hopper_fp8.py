"""What the Hopper FP8 grouped GEMM compiles to: asynchronous e4m3 wgmma from shared memory, in
two partitions, no spills."""

from __future__ import annotations

import re

import kernels
import pytest
import torch
from compiling import MULTIPROCESSORS, SHARED_LIMIT, Compiled, CompileFor

from hybrid_mxfp8.triton_kernels.gemm import hopper_fp8
from hybrid_mxfp8.triton_kernels.gemm.hopper_fp8_config import HopperFp8Config, select_hopper_fp8_config

E = 8
CONFIGS = [select_hopper_fp8_config(*given) for given in ((E, E, False), (1000 * E, E, False), (1000 * E, E, True))]


@pytest.fixture
def compile_product(compile_for: CompileFor) -> CompileFor:
    """compile_product(config, dtype)"""

    def compile_one(config: HopperFp8Config, dtype: torch.dtype = torch.bfloat16) -> Compiled:
        given = (*kernels.meta_operands(8192, 4096, 7168, E, dtype), config)
        return compile_for(90, hopper_fp8.hopper_fp8_gemm_kernel, lambda: kernels.product(hopper_fp8.plan, *given))

    return compile_one


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.block_t}{' squares' * config.squares}")
def test_each_configuration(compile_product: CompileFor, config: HopperFp8Config, dtype: torch.dtype) -> None:
    compiled = compile_product(config, dtype)
    assert compiled.grid == (MULTIPROCESSORS,)
    widths = re.findall(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k32\.f32\.e4m3\.e4m3 \{[^}]*\}, %rd", compiled.ptx)
    assert len(widths) == compiled.count(r"wgmma\.mma_async"), "operands come from shared memory"
    # For each width 4 instructions a stage of 128 columns, in each of two partitions.
    assert widths == ([str(config.small_t)] * 4 + [str(config.block_t)] * 4) * 2
    assert compiled.count(r"mma\.sync") == 0
    assert compiled.count(r"\.ftz") == 0, "a scale may be subnormal"
    # The compiler adds room for the output on its way to memory.
    assert config.shared_memory <= compiled.shared <= SHARED_LIMIT[90]
    assert (compiled.count(r"mul\.f32") < 10) == config.squares, "scales are multiplied with each other, not with sums"
    assert "C75" not in compiled.ptxas_output, "wgmma is serialized"


@pytest.mark.parametrize("config", CONFIGS[1:], ids=["128", "128 squares"])
def test_a_stage_is_freed_after_its_sums(compile_product: CompileFor, config: HopperFp8Config) -> None:
    """The stage that the loop over K carries: one from outside would starve the feeding warps after
    one round."""
    intermediate = str(compile_product(config).kernel.asm["ttgir"])
    loops = [
        loop for loop in re.findall(r"scf\.for .*?scf\.yield", intermediate, re.DOTALL) if "warp_group_dot " in loop
    ]
    assert len(loops) == 4
    for loop in loops:
        order = re.findall(r"ttng\.(?:warp_group_dot(?:_wait)?|async_copy_mbarrier_arrive) (?=%)|arith\.addf", loop)
        dot, wait, *sums, after, freed = (operation.strip().removeprefix("ttng.") for operation in order)
        assert (dot, wait, set(sums), after) == ("warp_group_dot", "warp_group_dot_wait", {"arith.addf"}, wait)
        assert freed == "async_copy_mbarrier_arrive"
        (barrier,) = re.findall(r"async_copy_mbarrier_arrive (%\w+)", loop)
        (stage,) = re.findall(rf"{barrier} = ttg\.memdesc_index %\w+\[(%\w+)\]", loop)
        assert f"{stage} = " in loop


def test_the_warp_that_loads_tokens_waits_for_the_kernel_before(compile_product: CompileFor) -> None:
    """The one that loads weights does not, and reads tile list and weights alone. Those that
    multiply store the output, once tokens have come."""
    operations = r"griddepcontrol\.wait|(?:ld|st|red|atom)\.global|cp\.async\.bulk\.tensor"
    ptx = compile_product(CONFIGS[0]).ptx
    texts = re.split(r"barrier\.sync\s+1;", ptx)
    parts = [re.findall(operations, text) for text in texts]
    (tokens,) = [part for part in parts if "griddepcontrol.wait" in part]
    (weights,) = [part for part in parts if "ld.global" in part and part is not tokens]
    assert tokens[0] == "griddepcontrol.wait"
    assert set(tokens[1:]) == set(weights) == {"ld.global", "cp.async.bulk.tensor"}
    assert weights.count("cp.async.bulk.tensor") == 2, "weights, and their scales"
    before_its_loads = texts[parts.index(weights)].partition("ld.global")[0]
    assert "fence.acq_rel.gpu" in before_its_loads, "L1 may be older than the routing"
    assert {operation for part in parts if part not in (tokens, weights) for operation in part} == {"st.global"}
