"""What Hopper's grouped GEMMs compile to: asynchronous wgmma, in bf16 on register operands, in FP8
from shared memory; TMA, no spills."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import kernels
import pytest
import torch
from compiling import MULTIPROCESSORS, SHARED_LIMIT, Compiled, CompileFor
from sanitize import dispatch_lines

from hybrid_mxfp8.triton_kernels.gemm import dequantize_tokens, hopper, hopper_fp8
from hybrid_mxfp8.triton_kernels.gemm.hopper_config import WorkspaceLayout, select_hopper_config
from hybrid_mxfp8.triton_kernels.gemm.hopper_fp8_config import HopperFp8Config, select_hopper_fp8_config

E = 8
AVERAGES = (1, 128, 1000)
"""Tokens an expert: one for each configuration."""

REGISTER_OPERAND = r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k16\.f32\.bf16\.bf16 \{[^}]*\}, \{[^}]*\}, %rd"
WIDEST_STACK = 160
"""Bytes: the widest tile is at the limit of registers. With Triton 3.9 row numbers are kept in
memory, 72 bytes and for fp32 160; with 3.6 nothing is. :func:`local_accesses_among_products` says
that the loop over K does not touch it."""


@pytest.fixture
def compile_product(compile_for: CompileFor) -> CompileFor:
    """compile_product(average, ...): the launch of the product in the configuration of so many
    tokens an expert, without that of the expansion before it."""

    def compile_one(
        average: int, dtype: torch.dtype = torch.bfloat16, n: int = 4096, k: int = 7168, t: int = 8192
    ) -> Compiled:
        config = select_hopper_config(average * E, E)
        workspace = torch.empty(WorkspaceLayout.of(t, E, k, config).size, dtype=torch.uint8, device="meta")
        given = (hopper.plan, *kernels.meta_operands(t, n, k, E, dtype), config)
        stack = WIDEST_STACK if config.block_t == 256 else 0
        return compile_for(90, hopper.hopper_gemm_kernel, lambda: kernels.product(*given, workspace=workspace), stack)

    return compile_one


def instructions(compiled: Compiled) -> list[str]:
    """The machine code, an instruction a line."""
    return re.findall(r"/\*[0-9a-f]{4,5}\*/\s+((?:@!?U?P\d+ )?\S.*?) ;", compiled.machine_code)


def local_accesses_among_products(compiled: Compiled) -> int:
    """Reads and writes of local memory from the first to the last product of each width."""
    code = instructions(compiled)
    products: dict[str, list[int]] = {}
    for i, line in enumerate(code):
        if found := re.match(r"HGMMA\.(\w+)", line):
            products.setdefault(found[1], []).append(i)
    assert products
    return sum(
        bool(re.search(r"\b(LDL|STL)\b", line)) for lines in products.values() for line in code[lines[0] : lines[-1]]
    )


@pytest.mark.parametrize(
    ("average", "dtype"),
    [*((average, torch.bfloat16) for average in AVERAGES), (1000, torch.float16), (1000, torch.float32)],
    ids=str,
)
def test_each_configuration(compile_product: CompileFor, average: int, dtype: torch.dtype) -> None:
    """And other outputs at the widest tile."""
    config = select_hopper_config(average * E, E)
    compiled = compile_product(average, dtype)
    assert compiled.grid == (MULTIPROCESSORS,)
    products = compiled.count(r"wgmma\.mma_async")
    assert products > 0
    assert products == compiled.count(REGISTER_OPERAND), "weights must reach wgmma from registers"
    assert compiled.count(r"mma\.sync") == 0
    assert compiled.count(r"cp\.async\.bulk\.tensor\.2d\.shared") >= 3, "weights, scales and tokens through TMA"
    assert compiled.count(r"cvt\.rn\.f16x2\.e4m3x2") > 0
    assert compiled.count(r"\.ftz") == 0
    # The compiler adds padding between buffers, less than a swizzle atom.
    assert config.shared_memory <= compiled.shared <= min(config.shared_memory + 1024, SHARED_LIMIT[90])
    assert local_accesses_among_products(compiled) == 0
    # The feeding warp waits for tokens.
    assert (compiled.count(r"ld\.acquire\.gpu") > 0) == config.fused_dequantize
    assert "C75" not in compiled.ptxas_output, "wgmma is serialized"


def test_a_small_product_takes_a_small_grid(compile_product: CompileFor) -> None:
    """N = 136 is two tiles of weights; 64 tokens of 8 experts are at most 8 token tiles of 64."""
    assert compile_product(8, n=136, k=96, t=64).grid == (16,)


def test_spare_warps_expand_without_shared_memory(compile_product: CompileFor) -> None:
    """Three copies of the code, each a warp's: words of codes in, 16 bytes out, then all of it
    fenced for TMA and counted."""
    code = instructions(compile_product(1000))
    counted = [i for i, line in enumerate(code) if re.search(r"REDG\.E\.ADD|ATOMG.* RZ, ", line)]
    assert len(counted) == 3
    for i in counted:
        stores = [j for j in range(i) if "STG.E.128" in code[j]]
        written = max(stores)
        began = max(j for j in range(written) if "BAR.SYNC" in code[j])
        assert sum(began < j for j in stores) == 4, "1024 columns in bf16 are 4 stores of 16 bytes a lane"
        part = code[began + 1 : i]
        assert not any(re.search(r"\b(LDS|STS|LDL|STL|BAR\.SYNC)", line) for line in part)
        assert sum(bool(re.search(r"LDG\.E R", line)) for line in part) >= 8, "32 codes a lane, 4 at a time"
        fences = code[written:i]
        assert any("FENCE.VIEW.ASYNC" in line for line in fences), "TMA reads what these stores wrote"
        assert any("MEMBAR.ALL.GPU" in line for line in fences)


def test_outputs_of_neighbouring_rows_are_stored_together(compile_product: CompileFor) -> None:
    """bf16 leaves in pairs: a thread's two weight rows are neighbours."""
    compiled = compile_product(1)
    assert compiled.count(r"st\.global\.b32") > 0
    assert compiled.count(r"st\.global\.b16") == 0


@pytest.mark.parametrize("average", AVERAGES)
def test_the_loop_over_k_frees_the_stages_it_passes(compile_product: CompileFor, average: int) -> None:
    """Not the stage that the tile began with, again and again: that starves the feeding warp after
    one round (seen on an H100 as a hang at K = 7168, from a variable that Triton did not carry
    through the loop)."""
    intermediate = str(compile_product(average).kernel.asm["ttgir"])
    loops = re.split(r"scf\.for %k_tile\b", intermediate)[1:]
    freed = 0
    for loop in loops:
        body = loop[: loop.index("scf.yield")]
        for stage in re.findall(r"memdesc_index %empty\[(%\w+)\]", body):
            assert re.search(rf"^\s*{re.escape(stage)} = ", body, re.MULTILINE), f"{stage} is the same in every round"
            freed += 1
    assert freed > 0


@pytest.fixture
def compile_expansion(compile_for: CompileFor) -> CompileFor:
    """compile_expansion(t, k, e): the launch of the expansion of t tokens."""

    def compile_one(t: int, k: int, e: int) -> Compiled:
        config = select_hopper_config(t, e)
        layout = WorkspaceLayout.of(t, e, k, config)
        x, _, _ = kernels.meta_operands(t, 8, k, e, torch.bfloat16)
        given = (x, torch.empty(layout.size, dtype=torch.uint8, device="meta"), layout, config.block_t, t)
        kernel = dequantize_tokens.dequantize_tokens_kernel
        return compile_for(90, kernel, lambda: kernels.dequantize_tokens(*given))

    return compile_one


@pytest.mark.parametrize(("t", "k"), [(8192, 7168), (16384, 2048)])
def test_expansion_reads_and_writes_16_bytes_at_once(compile_expansion: CompileFor, t: int, k: int) -> None:
    compiled = compile_expansion(t, k, 32)
    assert compiled.count(r"ld\.global\.v4\.b32") > 0
    assert compiled.count(r"st\.global\.v4\.b32") > 0
    assert compiled.count(r"\.ftz") == 0


@pytest.mark.parametrize("e", [1, 2, 4, 8, 32, 256])
@pytest.mark.parametrize(("t", "k"), [(96, 256), (64, 7168), (9000, 7168)])
def test_expansion_searches_experts_in_one_dimension(compile_expansion: CompileFor, t: int, k: int, e: int) -> None:
    """A (rows, experts) sum in the layout of the scales went over the wrong lanes (Triton 3.6, E =
    4, on an H100)."""
    intermediate = str(compile_expansion(t, k, e).kernel.asm["ttgir"])
    summed = re.findall(r"\}\) : \(tensor<([^,]*),", intermediate)
    assert summed
    assert all(shape.count("x") == 1 for shape in summed), summed


def straight(code: list[str]) -> list[str]:
    """The instructions up to a barrier or a branch."""
    return list(itertools.takewhile(lambda line: not re.search(r"BAR\.|BRA|BRX|EXIT|CALL", line), code))


@pytest.mark.parametrize("average", AVERAGES)
def test_partitions_are_handed_out_behind_barriers(compile_product: CompileFor, average: int) -> None:
    """Triton's code for it: a byte in shared memory says which partition a warp is to run.
    Racecheck calls that a race.

    There is no other store to shared memory in the kernel: all else is written by TMA, or is an
    operation on a barrier. Each write is followed by barrier 1 of all warps, and the read comes
    after one; between two writes is another such barrier, which the others reach when they have
    read.
    """
    code = instructions(compile_product(average))
    barrier = [i for i, line in enumerate(code) if re.fullmatch(r"BAR\.SYNC\.DEFER_BLOCKING 0x1", line)]
    ((read, base),) = [
        (i, int(m[1], 16)) for i, line in enumerate(code) if (m := re.match(r"LDS\.U8 .*\+(0x\w+)\]", line))
    ]
    states = range(base + 8, base + 12)  # warps 8 to 11 have theirs at the read's address plus their number
    writes = [
        i
        for i, line in enumerate(code)
        if (m := re.match(r"(?:@\S+ )?STS\S* \[\w+\+(0x\w+)\]", line)) and int(m[1], 16) in states
    ]
    assert read - 1 - len(straight(code[read - 1 :: -1])) in barrier
    assert len(writes) == 2
    assert writes == [i for i, line in enumerate(code) if re.search(r"\b(STS|STSM|ATOMS)\b", line)]
    first, last = writes
    for write in writes:
        assert write + 1 + len(straight(code[write + 1 :])) in barrier
    # The one right after the first write lets the others read, the next lets them start, the third
    # says they are done.
    assert len([i for i in barrier if first < i < last]) == 3
    assert any("EXIT" in line for line in code[last : last + 4])


@pytest.mark.parametrize("average", AVERAGES)
def test_the_sanitizers_report_knows_the_lines_of_that_code(compile_product: CompileFor, average: int) -> None:
    """What racecheck would name: the lines that the kernel's stores to shared memory, and the read,
    are attributed to."""
    places: list[tuple[str, int]] = []
    place = ("", 0)
    for line in compile_product(average).machine_code.splitlines():
        if found := re.search(r'//## File "([^"]+)", line (\d+)', line):
            place = (Path(found[1]).name, int(found[2]))
        elif re.search(r"\b(STS|LDS\.U8)\b", line):
            places.append(place)
    assert len(places) == 3
    assert set(places) <= dispatch_lines()["hopper_gemm_kernel"]


# ---------------------------------------------------------------- FP8

FP8 = [
    select_hopper_fp8_config(average * E, E, squares)
    for average, squares in ((1, False), (32, False), (1000, False), (1000, True))
]


@pytest.fixture
def compile_fp8(compile_for: CompileFor) -> CompileFor:
    """compile_fp8(config, dtype)"""

    def compile_one(config: HopperFp8Config, dtype: torch.dtype = torch.bfloat16) -> Compiled:
        given = (*kernels.meta_operands(8192, 4096, 7168, E, dtype), config)
        return compile_for(90, hopper_fp8.hopper_fp8_gemm_kernel, lambda: kernels.product(hopper_fp8.plan, *given))

    return compile_one


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("config", FP8, ids=lambda config: f"{config.block_t}{' squares' * config.squares}")
def test_each_configuration_in_fp8(compile_fp8: CompileFor, config: HopperFp8Config, dtype: torch.dtype) -> None:
    compiled = compile_fp8(config, dtype)
    assert compiled.grid == (MULTIPROCESSORS,)
    widths = re.findall(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k32\.f32\.e4m3\.e4m3 \{[^}]*\}, %rd", compiled.ptx)
    assert len(widths) == compiled.count(r"wgmma\.mma_async"), "operands come from shared memory"
    # For each width 4 instructions a stage of 128 columns, in each of two partitions.
    assert widths == ([str(config.block_t // 2)] * 4 + [str(config.block_t)] * 4) * 2
    assert compiled.count(r"mma\.sync") == 0
    assert compiled.count(r"\.ftz") == 0, "a scale may be subnormal"
    # The compiler adds room for the output on its way to memory.
    assert config.shared_memory <= compiled.shared <= SHARED_LIMIT[90]
    assert (compiled.count(r"mul\.f32") < 10) == config.squares, "scales are multiplied with each other, not with sums"
    assert "C75" not in compiled.ptxas_output, "wgmma is serialized"


@pytest.mark.parametrize("config", FP8[2:], ids=["128", "128 squares"])
def test_a_stage_is_freed_after_its_sums(compile_fp8: CompileFor, config: HopperFp8Config) -> None:
    """The stage that the loop over K carries: one from outside would starve the feeding warps after
    one round."""
    intermediate = str(compile_fp8(config).kernel.asm["ttgir"])
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


def test_the_warp_that_loads_tokens_waits_for_the_kernel_before(compile_fp8: CompileFor) -> None:
    """The one that loads weights does not, and reads tile list and weights alone. Those that
    multiply store the output, once tokens have come."""
    operations = r"griddepcontrol\.wait|(?:ld|st|red|atom)\.global|cp\.async\.bulk\.tensor"
    ptx = compile_fp8(FP8[0]).ptx
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
