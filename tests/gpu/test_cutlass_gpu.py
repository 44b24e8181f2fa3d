"""What of the SM100 backend runs on other GPUs: its host side, its arguments, its tile scheduler.

The modules here compile for any architecture in a minute and are kept in the ordinary cache;
``python tests/support/cutlass_modules.py`` builds them all ahead of time, with no GPU.
"""

from __future__ import annotations

import ctypes
import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cutlass_modules
import pytest
import torch
from cases import RAGGED, layout, poisoned_product
from on_gpu import captured
from products import operands

import hybrid_mxfp8 as mx
from hybrid_mxfp8.core.formats import ceil_div, round_up
from hybrid_mxfp8.cutlass_kernels.config import CONFIGS, TOKEN_TILES
from hybrid_mxfp8.cutlass_kernels.jit import build as jit
from hybrid_mxfp8.cutlass_kernels.jit import toolchain

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

# Both accumulate products of e4m3 in fp32, in different orders.
RELATIVE_TO_LARGEST = 2e-5

# (E, N, K) of both products of the models, experts cut down where only their number is large, and
# odd sizes.
MODEL_SHAPES = [
    (256, 4096, 7168), (256, 7168, 2048), (384, 4096, 7168), (128, 3072, 4096), (128, 4096, 1536), (128, 1536, 2048),
    (128, 2048, 768), (160, 3072, 5120), (160, 5120, 1536), (128, 5760, 2880), (128, 2880, 2880), (16, 16384, 5120),
    (16, 5120, 8192), (8, 28672, 4096), (8, 4096, 14336), (32, 4096, 7168), (64, 4096, 4096),
    (16, 136, 96), (1, 8, 32), (4096, 136, 2880),
]  # fmt: skip
TOKENS = (1, 5, 64, 4096, 131072)


@pytest.fixture(scope="module", params=cutlass_modules.header_choices(), ids=cutlass_modules.mainloop)
def cutlass(request: pytest.FixtureRequest) -> toolchain.CutlassHeaders:
    return request.param


@pytest.fixture
def load(cutlass: toolchain.CutlassHeaders, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HYBRID_MXFP8_CUTLASS_DIR", str(cutlass.include))
    return jit.load


def triton_product(x: mx.GroupedMXFP8, w: mx.ExpertWeights) -> torch.Tensor:
    out = poisoned_product(x.groups.num_tokens, w.n, torch.float32, "cuda")
    return mx.grouped_gemm(x, w, out=out, out_dtype=torch.float32, backend="triton")


def agree(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    if not torch.equal(actual.isnan(), expected.isnan()):
        return False
    error = (actual - expected).nan_to_num().abs().amax()
    return bool(error <= RELATIVE_TO_LARGEST * expected.nan_to_num().abs().amax())


# ---------------------------------------------------------------- host side


SWIZZLE_128B = 3  # CU_TENSOR_MAP_SWIZZLE_128B
BLACKWELL_SWIZZLES = [(4,), (5,), (6,)]
"""CU_TENSOR_MAP_SWIZZLE_128B_ATOM_32B, _ATOM_32B_FLIP_8B and _ATOM_64B: compute capability 10 and
later."""


def read_descriptor(block: str) -> dict[str, tuple[int, ...]]:
    """What CuTe prints of a descriptor: lines of a name, spaces, and a number or a tuple of
    them."""
    lines = re.findall(r"^(\w+)\s+\(?([\w,]+)\)?$", block, re.MULTILINE)
    return {name: tuple(int(number, 0) for number in numbers.split(",")) for name, numbers in lines}


def encode(descriptor: dict[str, tuple[int, ...]]) -> int:
    """The driver's answer to a descriptor as CuTe prints it, whose first stride is the size of an
    element; 0 is yes."""
    (rank,) = descriptor["dim"]
    u64, u32 = ctypes.c_uint64 * rank, ctypes.c_uint32 * rank
    memory = (ctypes.c_byte * 192)()  # a descriptor is 128 bytes, 64-byte aligned
    return ctypes.CDLL("libcuda.so.1").cuTensorMapEncodeTiled(
        ctypes.c_void_p(-(-ctypes.addressof(memory) // 64) * 64),
        *descriptor["format"],
        rank,
        ctypes.c_void_p(*descriptor["gmem_address"]),
        u64(*descriptor["globalDim"][:rank]),
        u64(*descriptor["globalStrides"][1:rank], 0),
        u32(*descriptor["boxDim"][:rank]),
        u32(*descriptor["elementStrides"][:rank]),
        *descriptor["interleave"],
        *descriptor["swizzle"],
        *descriptor["l2Promotion"],
        *descriptor["oobFill"],
    )


@pytest.mark.parametrize("out", ["bf16", "fp16", "fp32"])
def test_host_side_takes_every_configuration(load, capfd: pytest.CaptureFixture[str], out: str) -> None:
    """can_implement, the workspace's size and the encoding of every TMA descriptor, with no CUDA
    error.

    CuTe reports a descriptor that the driver refuses on stderr alone. Refused may be only what asks
    for a swizzle that Blackwell brought, and each of these must pass with the swizzle of Hopper
    that is as wide.
    """
    check = load(cutlass_modules.host_side(out)).host_side
    buffer = torch.empty(64 << 20, dtype=torch.uint8, device="cuda")
    capfd.readouterr()  # what a compilation said
    for config, (num_experts, n, k) in itertools.product(CONFIGS, MODEL_SHAPES):
        for num_tokens in TOKENS:
            shape = (num_experts, n, k, num_tokens)
            size = check(buffer, config.cta_group, config.token_tile, *shape, 148, *config.cluster)
            assert 0 < size < 8 << 20, (config.name, shape, size)
    torch.cuda.synchronize()
    refused = [read_descriptor(block) for block in capfd.readouterr().err.split("TMA Desc Addr:")[1:]]
    for descriptor in {tuple(sorted(d.items())): d for d in refused}.values():
        assert torch.cuda.get_device_capability() < (10, 0), descriptor
        assert descriptor["swizzle"] in BLACKWELL_SWIZZLES, descriptor
        assert encode(descriptor) != 0, descriptor
        assert encode({**descriptor, "swizzle": (SWIZZLE_128B,)}) == 0, descriptor


def test_host_side_refuses_a_cluster_that_is_too_large(load) -> None:
    """The scales of a cluster are multicast to at most four CTAs a side."""
    check = load(cutlass_modules.host_side("bf16")).host_side
    buffer = torch.empty(64 << 20, dtype=torch.uint8, device="cuda")
    assert check(buffer, 2, 128, 32, 4096, 7168, 64, 148, 8, 1) == -1
    assert check(buffer, 2, 128, 32, 4096, 7168, 64, 148, 1, 1) == -1


# ---------------------------------------------------------------- argument walker


@pytest.fixture
def walker(load) -> Any:
    return load(cutlass_modules.argument_walker())


def walk(module: Any, x: mx.GroupedMXFP8, w: mx.ExpertWeights, suffix: str = "") -> torch.Tensor:
    out = poisoned_product(x.groups.num_tokens, w.n, torch.float32, "cuda")
    size = module[f"walker_workspace_size{suffix}"](w.num_experts, w.n, w.k, x.groups.num_tokens)
    workspace = torch.full((size,), 0xFF, dtype=torch.uint8, device="cuda")
    cutlass_modules.call(module[f"argument_walker{suffix}"], x, w, out, workspace)
    return out


@pytest.mark.sanitizer
@pytest.mark.parametrize("case", RAGGED)
@pytest.mark.parametrize(("n", "k"), [(136, 96), (256, 128), (72, 2880)])
def test_walker_agrees_with_triton(walker, case: str, n: int, k: int, rng: torch.Generator) -> None:
    """The arguments that prepare wrote on the device, multiplied with FMAs, are the Triton
    backend's product."""
    counts, num_tokens = RAGGED[case]
    x, w = operands(counts, num_tokens, n, k, rng, "cuda")
    if num_tokens:
        assert agree(walk(walker, x, w), triton_product(x, w))


@pytest.mark.parametrize("seed", range(8))
def test_walker_agrees_on_random_groups(walker, seed: int) -> None:
    """Many experts, many of them empty, up to the 4096 that one prepare launch serves."""
    generator = torch.Generator().manual_seed(seed)
    num_experts = [1, 7, 64, 129, 256, 512, 1000, 4096][seed]
    counts = torch.randint(0, 5, (num_experts,), generator=generator)
    counts *= torch.randint(0, 2, (num_experts,), generator=generator)
    counts[seed % num_experts] += 131
    x, w = operands(counts.tolist(), int(counts.sum()) + seed, 16, 64, generator, "cuda")
    assert agree(walk(walker, x, w), triton_product(x, w))


def test_walker_follows_changing_counts_under_a_graph(walker, rng: torch.Generator) -> None:
    """One captured launch of prepare and walker serves other counts: nothing of them is kept on the
    host."""
    counts = torch.tensor([7, 0, 130, 3], dtype=torch.int32, device="cuda")
    num_tokens, n, k = 160, 136, 96
    _, w = operands(counts.tolist(), num_tokens, n, k, rng, "cuda")
    tokens = torch.randn(num_tokens, k, device="cuda")
    out = torch.empty(num_tokens, n, device="cuda")
    workspace = torch.empty(walker.walker_workspace_size(4, n, k, num_tokens), dtype=torch.uint8, device="cuda")

    def step() -> mx.GroupedMXFP8:
        x = mx.quantize_grouped(tokens, mx.GroupLayout.from_counts(counts, num_tokens))
        cutlass_modules.call(walker.argument_walker, x, w, out, workspace)
        return x

    step()
    graph, x = captured(step)
    for now in ([7, 0, 130, 3], [0, 0, 0, 160], [40, 40, 40, 40], [0, 0, 0, 0], [1, 128, 0, 31]):
        counts.copy_(torch.tensor(now))
        out.fill_(torch.nan)
        graph.replay()
        assert agree(out, triton_product(x, w)), now


def test_walker_catches_seeded_faults(load, tmp_path: Path, rng: torch.Generator) -> None:
    """Each fault in the shared code changes what the walker computes; without one it agrees."""
    module = load(cutlass_modules.mutants(cutlass_modules.argument_walker(), tmp_path))
    x, w = operands([5, 0, 130, 34], 640, 136, 96, rng, "cuda")
    x.values.view(torch.uint8)[169:] = 0x38  # finite, so that a product of rows without an expert shows
    expected = triton_product(x, w)
    for number, fault in enumerate(cutlass_modules.OPERAND_FAULTS):
        assert agree(walk(module, x, w, f"_{number}"), expected) == (fault == cutlass_modules.CONTROL), fault


# ---------------------------------------------------------------- tile scheduler


def count_tiles(
    module: Any, counts: Sequence[int], n: int, config: tuple[int, int], cluster: tuple[int, int], sm_count: int,
    suffix: str = "",
) -> tuple[torch.Tensor, int]:  # fmt: skip
    """How often each CTA tile, (E, weight tiles, token tiles), is handed out, and how many tiles
    lie beyond."""
    cta_group, token_tile = config
    num_tokens = sum(counts)
    groups = layout(counts, num_tokens + 300, device="cuda")
    along_n, along_tokens = cluster
    weight_tiles = round_up(ceil_div(n, 128), along_n)
    token_tiles = round_up(ceil_div(max(counts), token_tile), along_tokens)
    tiles = torch.zeros(len(counts), weight_tiles, max(token_tiles, 1), dtype=torch.int32, device="cuda")
    outside = torch.zeros(1, dtype=torch.int32, device="cuda")
    workspace = torch.empty(len(counts) * 512 + 4096, dtype=torch.uint8, device="cuda")
    module[f"tile_scheduler{suffix}"](
        groups.tokens_per_expert, groups.expert_offsets, groups.scale_offsets, workspace, tiles, outside, cta_group,
        token_tile, n, 256, groups.num_tokens, groups.scale_rows, sm_count, along_n, along_tokens,
    )  # fmt: skip
    return tiles, int(outside)


def expected_tiles(counts: Sequence[int], n: int, token_tile: int, tiles: torch.Tensor) -> torch.Tensor:
    """True where a tile holds output."""
    _, weight_tiles, token_tiles = tiles.shape
    rows = torch.arange(weight_tiles, device="cuda")[:, None] * 128 < n
    per_expert = torch.tensor(list(counts), device="cuda")[:, None, None]
    return rows & (torch.arange(token_tiles, device="cuda") * token_tile < per_expert)


SCHEDULED = [
    *(((1, 64), cluster) for cluster in ((1, 1), (4, 1))),
    ((1, 192), (2, 2)),
    *(((2, 128), cluster) for cluster in ((2, 1), (4, 1), (4, 2))),
]


@pytest.mark.parametrize(("config", "cluster"), SCHEDULED, ids=str)
def test_every_output_tile_is_handed_out_once(load, config: tuple[int, int], cluster: tuple[int, int]) -> None:
    """Whatever the counts: empty experts first, last and in rows, clusters larger than an expert,
    one expert alone."""
    module = load(cutlass_modules.tile_scheduler())
    assert config[1] in TOKEN_TILES
    generator = torch.Generator().manual_seed(sum(config))
    cases = [[0], [1], [0, 0, 0], [0, 5, 0], [300], [1] * 40, [0] * 33 + [129] + [0] * 31 + [64], [64, 128, 192, 256]]
    for _ in range(12):
        experts = int(torch.randint(1, 300, (1,), generator=generator))
        random = torch.randint(0, 400, (experts,), generator=generator)
        cases.append((random * torch.randint(0, 2, (experts,), generator=generator)).tolist())
    for counts, n, sm_count in itertools.product(cases, (8, 136, 512, 2880), (8, 132, 148)):
        tiles, outside = count_tiles(module, counts, n, config, cluster, sm_count)
        needed = expected_tiles(counts, n, config[1], tiles)
        where = (counts, n, sm_count)
        assert outside == 0, where
        assert torch.equal(tiles[needed], torch.ones_like(tiles[needed])), where
        # Beyond the output there is only what rounds up to whole clusters, once too.
        assert int(tiles.max()) <= 1, where
        assert not tiles[torch.tensor(counts, device="cuda") == 0].any(), where


def test_tile_scheduler_catches_counted_padding(load, tmp_path: Path) -> None:
    """An expert's padding rows taken for tokens: tiles are handed out that hold no output."""
    faults = cutlass_modules.SCHEDULER_FAULTS
    module = load(cutlass_modules.mutants(cutlass_modules.tile_scheduler(), tmp_path, faults))
    counts, n, config, cluster = [5, 0, 130, 34], 136, (1, 64), (1, 1)
    for number, fault in enumerate(cutlass_modules.FAULTS):
        if fault in faults:
            tiles, _ = count_tiles(module, counts, n, config, cluster, 132, f"_{number}")
            right = torch.equal(tiles.bool(), expected_tiles(counts, n, config[1], tiles))
            assert right == (fault == cutlass_modules.CONTROL), fault
