"""What the host decides for the Hopper grouped GEMM: tiles that fit, a workspace that is enough."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernels import hopper_workspace
from stand_ins import pretend_capability

from hybrid_mxfp8.core.formats import ceil_div
from hybrid_mxfp8.dispatch.problem import Problem
from hybrid_mxfp8.triton_kernels import backend
from hybrid_mxfp8.triton_kernels.gemm import hopper_config
from hybrid_mxfp8.triton_kernels.gemm.hopper_config import (
    MAX_TOKENS,
    SHARED_MEMORY,
    HopperGemmConfig,
    WorkspaceLayout,
    hopper_takes,
    largest_batches,
    select_hopper_config,
    tiles_at_once,
)
from hybrid_mxfp8.triton_kernels.gemm.hopper_fp8_config import (
    MAX_EXPERTS,
    HopperFp8Config,
    hopper_fp8_takes,
    select_hopper_fp8_config,
)

AVERAGES = (0.1, 1, 16, 17, 32, 33, 56, 57, 128, 129, 4096)


def test_the_choice_fits_the_chip_and_grows_with_the_tokens() -> None:
    configs = {average: select_hopper_config(int(average * 40), 40) for average in AVERAGES}
    for average, config in configs.items():
        assert config.is_valid()
        assert config.block_t >= min(average, 256) or average < 1
    tiles = [config.block_t for config in configs.values()]
    assert tiles == sorted(tiles)


@pytest.mark.parametrize(
    "config",
    [
        HopperGemmConfig(8, 8, 128, 4),  # no such tile
        HopperGemmConfig(64, 128, 128, 4),  # few tokens are more than all
        HopperGemmConfig(64, 64, 32, 4),  # narrower than a column group
        HopperGemmConfig(64, 16, 128, 1),  # nothing to overlap
        HopperGemmConfig(256, 64, 64, 6),  # 242 KB of shared memory
        HopperFp8Config(16, 6),  # no such tile
        HopperFp8Config(128, 2),  # a warpgroup's stage, and the next, leave none for the other
        HopperFp8Config(128, 7),  # 238 KB of shared memory
    ],
)
def test_what_does_not_fit_is_invalid(config: HopperGemmConfig | HopperFp8Config) -> None:
    assert not config.is_valid()


@pytest.mark.parametrize("squares", [False, True])
def test_the_fp8_kernel_has_three_tiles(squares: bool) -> None:
    """Wider ones beyond 16 and 40 tokens an expert on average."""
    for num_tokens, block_t in ((0, 32), (1, 32), (160, 32), (161, 64), (400, 64), (401, 128), (40960, 128)):
        config = select_hopper_fp8_config(num_tokens, 10, squares)
        assert config.is_valid()
        assert (config.block_t, config.squares) == (block_t, squares)


def test_stages_are_counted_in_full() -> None:
    """5 stages of 128x64 weights, 256x64 bf16 tokens, one scale tile, two barriers; of FP8, 6 of
    128x128 weights and tokens, two scale tiles and these in fp32, 128 bytes that say which tile it
    is, three barriers."""
    config = HopperGemmConfig(256, 64, 64, 5)
    assert config.shared_memory == 5 * (8192 + 32768 + 512 + 16) <= SHARED_MEMORY
    fp8 = HopperFp8Config(128, 6)
    assert fp8.shared_memory == 6 * (2 * 16384 + 2 * 512 + 2 * 512 + 128 + 24) <= SHARED_MEMORY


@given(st.lists(st.integers(0, 300), min_size=1, max_size=12), st.sampled_from([16, 32, 64, 128, 256]))
def test_the_list_of_tiles_holds_any_layout(counts: list[int], block_t: int) -> None:
    needed = sum(ceil_div(count, block_t) for count in counts)
    config = HopperGemmConfig(block_t, 16, 64, 2)
    assert needed <= WorkspaceLayout.of(sum(counts), len(counts), 64, config).max_tiles


@pytest.mark.parametrize(("t", "e", "k"), list(itertools.product((1, 17, 300), (1, 9), (32, 64, 96, 2880))))
def test_the_workspace_is_cut_without_overlap(t: int, e: int, k: int) -> None:
    layout = WorkspaceLayout.of(t, e, k, HopperGemmConfig(16, 16, 128, 2))
    workspace = torch.zeros(layout.size, dtype=torch.uint8)
    words, expanded = hopper_workspace(layout, workspace)
    words.fill_(-1)
    assert not expanded.view(torch.int16).any()
    assert expanded.shape == (t, ceil_div(k, 64) * 64)
    assert (expanded.data_ptr() - workspace.data_ptr()) % 256 == 0
    assert expanded.data_ptr() + expanded.nbytes == workspace.data_ptr() + layout.size


@given(st.integers(1, 200), st.integers(1, 60))
def test_what_the_first_programs_start_with(programs: int, row_tiles: int) -> None:
    """Token tile of each program's first tile, as the kernel deals them out."""
    first = {program // row_tiles for program in range(programs)}
    assert first == set(range(tiles_at_once(programs, row_tiles)))


def test_what_32_bits_do_not_reach_is_left_to_the_other_kernel() -> None:
    assert hopper_takes(8192, 384, 7168, 7168)
    assert not hopper_takes(8192, 300_000, 7168, 64)  # rows of weights
    assert not hopper_takes(8192, 1, 2**22, 64)  # outputs of a tile
    assert not hopper_takes(2**31 - 1, 1, 128, 64)
    assert hopper_takes(MAX_TOKENS, 1, 128, 64)
    assert not hopper_takes(MAX_TOKENS + 1, 1, 128, 64)
    assert hopper_fp8_takes(8192, MAX_EXPERTS, 4096, 7168)
    assert not hopper_fp8_takes(8192, MAX_EXPERTS + 1, 4096, 7168)
    assert not hopper_fp8_takes(8192, 1, 2**22, 64)  # outputs of a tile


def test_other_devices_need_no_workspace() -> None:
    problem = Problem(4, 128, 128, 32, torch.bfloat16, torch.device("cpu"))
    assert backend.workspace_size(problem) == backend.workspace_bound(problem) == 0


@pytest.mark.parametrize(("value", "why"), [("1", "in FP8: "), ("bf16", "in bf16: HYB"), ("0", "portable kernel: HYB")])
def test_why_that_kernel(value: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(4, 64, 128, 8, torch.bfloat16, pretend_capability(monkeypatch, (9, 0)), 128)
    monkeypatch.setenv("HYBRID_MXFP8_HOPPER_GEMM", value)
    assert why in backend.explain(problem)


@given(st.data())
def test_the_workspace_of_the_largest_batch_suffices_for_smaller_ones(data: st.DataObject) -> None:
    """Among them those where the tile changes. It is what one of them needs, no more."""
    num_experts, k = data.draw(st.integers(1, 5000)), data.draw(st.sampled_from([32, 96, 2880]))
    edges = [average * num_experts + more for average in hopper_config.AVERAGES for more in (-1, 0, 1)]
    rows = st.integers(0, 200 * num_experts) | st.sampled_from(edges)
    least, most = sorted([data.draw(rows), data.draw(rows)])
    with pytest.MonkeyPatch.context() as patch:
        gpu = pretend_capability(patch, (9, 0))
        problem = Problem(num_experts, data.draw(st.sampled_from([8, 4096])), k, most, torch.bfloat16, gpu)
        bound = backend.workspace_bound(problem)
        sizes = {t: backend.workspace_size(problem._replace(num_tokens=t)) for t in (least, most, *edges)}
        assert bound >= sizes[least]
        assert bound in {size for t, size in sizes.items() if t <= most}


def test_a_smaller_batch_may_need_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last one with tiles of 64 tokens has a longer list than the first with tiles of 128."""
    last = hopper_config.AVERAGES[0] * 4096
    problem = Problem(4096, 8, 64, last, torch.bfloat16, pretend_capability(monkeypatch, (9, 0)))
    small, larger = backend.workspace_size(problem), problem._replace(num_tokens=last + 1)
    assert small > backend.workspace_size(larger)
    assert backend.workspace_bound(larger) == small


def test_the_largest_batch_of_each_configuration() -> None:
    few, more = (10 * average for average in hopper_config.AVERAGES)
    assert largest_batches(few, 10) == (few,)
    assert largest_batches(few + 1, 10) == (few, few + 1)
    assert largest_batches(5000, 10) == (few, more, 5000)
    assert largest_batches(2**31 - 1, 0) == (*hopper_config.AVERAGES, MAX_TOKENS)
    for end in largest_batches(5000, 10)[:2]:
        assert select_hopper_config(end, 10) != select_hopper_config(end + 1, 10)
