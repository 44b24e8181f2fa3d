"""Routing: the (token, k) slots of a batch sorted by expert, stably, with the sorted rows' layout.
No atomics decide an order.

A slot is one of a token's top-k choices: slot s belongs to token s // top_k. Its row is the number
of slots that go before it, those of smaller experts and earlier ones of its own; slots to drop sort
behind the last expert.

- few slots: one launch. Every program counts, over all slots, what goes before each of a few of its
  own, and one program more counts the experts' slots. That is S*S comparisons, spread over the
  whole GPU.
- many: three launches. Blocks of slots are counted by expert, the counts are summed over the
  blocks, and each slot's row is the start of its expert, plus those of it in earlier blocks, plus
  those before it in its own block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

from hybrid_mxfp8.core.formats import ceil_div, next_power_of_2
from hybrid_mxfp8.dispatch.buffers import Buffer
from hybrid_mxfp8.triton_kernels.dependent_launch import wait_for_predecessor
from hybrid_mxfp8.triton_kernels.group_layout import store_layout
from hybrid_mxfp8.triton_kernels.launch import INTERPRETED, VARYING, KernelLaunch
from hybrid_mxfp8.triton_kernels.numerics import loop_bound


@triton.jit
def _experts_of(ids_ptr, slot, num_slots, num_experts):
    """Each slot's expert; E for one to drop, and for slots that don't exist."""
    ids = tl.load(ids_ptr + slot, mask=slot < num_slots, other=-1)
    return tl.where((ids >= 0) & (ids < num_experts), ids, num_experts).to(tl.int32)


@triton.jit
def _store_counts_as_layout(layout_ptr, counts, num_experts, BINS: tl.constexpr):
    """The layout of (BINS,) counts, of which those from E on are not experts'."""
    counts = tl.where(tl.arange(0, BINS) < num_experts, counts, 0)
    scale_ends = tl.cumsum((counts + 127) // 128 * 128, 0)
    store_layout(layout_ptr, tl.cumsum(counts, 0), counts, scale_ends, num_experts, BINS)


@triton.jit
def _store_rows(inverse_permutation_ptr, slot, expert, row, num_slots, num_experts):
    """Write each slot's row, -1 for one that is dropped."""
    tl.store(inverse_permutation_ptr + slot, tl.where(expert < num_experts, row, -1), mask=slot < num_slots)


@triton.jit(do_not_specialize=VARYING)
def rank_kernel(
    ids_ptr,  # (S,) int32 or int64
    inverse_permutation_ptr,  # (S,) int32
    layout_ptr,  # (3E+2,) int32
    num_slots,  # S
    num_experts,
    BINS: tl.constexpr,  # power of two > E
    BLOCK: tl.constexpr,  # slots of a program
    CHUNK: tl.constexpr,  # slots that they are compared with at once
):
    """Grid (1 + cdiv(S, BLOCK),); the first program writes the layout."""
    wait_for_predecessor()
    pid = tl.program_id(0)
    if pid == 0:
        counts = tl.zeros([BINS], tl.int32)
        for first in range(0, loop_bound(num_slots), CHUNK):
            expert = _experts_of(ids_ptr, first + tl.arange(0, CHUNK), num_slots, num_experts)
            counts += tl.histogram(expert, BINS)
        _store_counts_as_layout(layout_ptr, counts, num_experts, BINS)
        return
    slot = (pid - 1) * BLOCK + tl.arange(0, BLOCK)
    expert = _experts_of(ids_ptr, slot, num_slots, num_experts)
    before = tl.zeros([BLOCK, CHUNK], tl.int32)
    for first in range(0, loop_bound(num_slots), CHUNK):
        other = first + tl.arange(0, CHUNK)
        other_expert = _experts_of(ids_ptr, other, num_slots, num_experts)
        earlier = other[None, :] < slot[:, None]
        smaller = other_expert[None, :] < expert[:, None]
        before += (smaller | ((other_expert[None, :] == expert[:, None]) & earlier)).to(tl.int32)
    _store_rows(inverse_permutation_ptr, slot, expert, tl.sum(before, 1), num_slots, num_experts)


@triton.jit(do_not_specialize=VARYING)
def count_kernel(
    ids_ptr,  # (S,) int32 or int64
    counts_ptr,  # (1 + blocks, BINS) int32; the first row is left for the totals
    num_slots,
    num_experts,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (blocks,): how many of a block's slots go to each expert."""
    wait_for_predecessor()
    block = tl.program_id(0)
    expert = _experts_of(ids_ptr, block * BLOCK + tl.arange(0, BLOCK), num_slots, num_experts)
    row = counts_ptr + (1 + block).to(tl.int64) * BINS
    tl.store(row + tl.arange(0, BINS), tl.histogram(expert, BINS))


@triton.jit(do_not_specialize=VARYING)
def sum_kernel(
    counts_ptr,  # (1 + blocks, BINS) int32
    num_blocks,
    BINS: tl.constexpr,
    EXPERTS: tl.constexpr,  # of a program
    BLOCKS: tl.constexpr,  # summed at once
):
    """Grid (BINS / EXPERTS,): each block's counts become those before it; first row: totals."""
    wait_for_predecessor()
    e = tl.program_id(0) * EXPERTS + tl.arange(0, EXPERTS)
    total = tl.zeros([EXPERTS], tl.int32)
    for first in range(0, loop_bound(num_blocks), BLOCKS):
        block = first + tl.arange(0, BLOCKS)
        mask = (block < num_blocks)[:, None]
        ptrs = counts_ptr + (1 + block).to(tl.int64)[:, None] * BINS + e[None, :]
        counts = tl.load(ptrs, mask=mask, other=0)
        tl.store(ptrs, total[None, :] + tl.cumsum(counts, 0) - counts, mask=mask)
        total += tl.sum(counts, 0)
    tl.store(counts_ptr + e, total)


@triton.jit(do_not_specialize=VARYING)
def scatter_kernel(
    ids_ptr,  # (S,) int32 or int64
    counts_ptr,  # (1 + blocks, BINS) int32, summed
    inverse_permutation_ptr,  # (S,) int32
    layout_ptr,  # (3E+2,) int32
    num_slots,
    num_experts,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Grid (1 + blocks,); the first program writes the layout."""
    wait_for_predecessor()
    pid = tl.program_id(0)
    totals = tl.load(counts_ptr + tl.arange(0, BINS))
    if pid == 0:
        _store_counts_as_layout(layout_ptr, totals, num_experts, BINS)
        return
    first_slot = (pid - 1) * BLOCK
    slot = first_slot + tl.arange(0, BLOCK)
    expert = _experts_of(ids_ptr, slot, num_slots, num_experts)
    starts = tl.cumsum(totals, 0) - totals + tl.load(counts_ptr + pid.to(tl.int64) * BINS + tl.arange(0, BINS))
    before = tl.zeros([BLOCK, CHUNK], tl.int32)
    for first in range(0, BLOCK, CHUNK):
        other = first_slot + first + tl.arange(0, CHUNK)
        other_expert = _experts_of(ids_ptr, other, num_slots, num_experts)
        before += ((other_expert[None, :] == expert[:, None]) & (other[None, :] < slot[:, None])).to(tl.int32)
    row = tl.gather(starts, expert, 0) + tl.sum(before, 1)
    _store_rows(inverse_permutation_ptr, slot, expert, row, num_slots, num_experts)


@dataclass(frozen=True)
class RouteConfig:
    """Slots of a program and of a comparison, whether one launch is all, and its warps."""

    block: int
    chunk: int
    one_launch: bool
    num_warps: int


ONE_LAUNCH_MAX_SLOTS = 2048  # they take 3.5 and 5.2 µs for 128 and 256 experts on an H200; three launches 4.3 and 4.5


def select_route_config(num_slots: int, interpreted: bool = False) -> RouteConfig:
    """Tiles of the routing kernels; pure.

    Histograms are of at least as many slots as a program has threads, so that they hold none twice.
    The rank kernel's programs are small, so that few slots still spread over many SMs. The scatter
    kernel compares the slots of a block with each other. Small blocks are more rows to sum, and
    still take less: 8192, 16384 and 65536 slots of 128 experts 5.1, 5.2 and 10.8 µs on an H200, in
    blocks of 256 8.4, 8.5 and 19.9. In the interpreter a program costs milliseconds: few, large
    ones.
    """
    if num_slots <= ONE_LAUNCH_MAX_SLOTS:
        chunk = next_power_of_2(min(max(num_slots, 128), 1024))
        return RouteConfig(256 if interpreted else 8, chunk, True, 4)
    return RouteConfig(1024, 1024, False, 8) if interpreted else RouteConfig(64, 16, False, 2)


def _bins(num_experts: int) -> int:
    """The experts and one more for slots to drop, in a power of two, at least a warp of them."""
    return max(next_power_of_2(num_experts + 1), 32)


def scratch_elements(num_slots: int, num_experts: int) -> int:
    """int32 elements of ``scratch`` that :func:`route` needs; never more for fewer slots."""
    config = select_route_config(num_slots, INTERPRETED)
    return 0 if config.one_launch else (1 + ceil_div(num_slots, config.block)) * _bins(num_experts)


def route(
    topk_ids: Buffer,
    inverse_permutation: Buffer,
    layout: Buffer,
    scratch: Buffer,
    num_experts: int,
) -> tuple[KernelLaunch, ...]:
    """The launches of ``reference.route``, with :func:`scratch_elements` of ``scratch``."""
    num_slots = topk_ids.shape[0] * topk_ids.shape[1]
    config = select_route_config(num_slots, INTERPRETED)
    bins = _bins(num_experts)
    blocks = ceil_div(num_slots, config.block)
    slots: dict[str, Any] = {"ids_ptr": topk_ids, "num_slots": num_slots, "num_experts": num_experts}
    outputs: dict[str, Any] = {"inverse_permutation_ptr": inverse_permutation, "layout_ptr": layout}
    tile = {"BINS": bins, "BLOCK": config.block, "num_warps": config.num_warps}
    if config.one_launch:
        return (KernelLaunch.of(rank_kernel, 1 + blocks, **slots, **outputs, **tile, CHUNK=config.chunk),)
    experts = 4
    return (
        KernelLaunch.of(count_kernel, blocks, counts_ptr=scratch, **slots, **tile),
        KernelLaunch.of(
            sum_kernel, bins // experts, counts_ptr=scratch, num_blocks=blocks,
            BINS=bins, EXPERTS=experts, BLOCKS=256, num_warps=config.num_warps,
        ),
        KernelLaunch.of(scatter_kernel, 1 + blocks, counts_ptr=scratch, **slots, **outputs, **tile, CHUNK=config.chunk),
    )  # fmt: skip
