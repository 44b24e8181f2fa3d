"""TMA: bulk tensor copies between global and shared memory, their swizzles, and bulk groups.

A load belongs to the mbarrier that it completes on: what it wrote is known to those who wait for
that phase. A store belongs to a bulk group of the thread that issued it: ``wait_group.read`` says
that shared memory was read, ``wait_group`` that global memory was written. A copy acts when it
lands, some time after it was issued, and knows what its issuer knew.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ptx import tensormap
from ptx.errors import Fault
from ptx.instructions import Closure, instruction, unknown
from ptx.loads import async_copy, copy_commit, copy_wait
from ptx.memory import OFFSET_MASK, RANK_SHIFT, SHARED_BASE, GlobalMemory
from ptx.operands import Operands, Value
from ptx.parser import Address, Immediate, Instruction, Operand
from ptx.races import TOGETHER, Access
from ptx.tensormap import TensorMap
from ptx.warp import Wait, Warp, lanes_of

PAIR_BIT = 1
"""With cta_group::2 the completion goes to the CTA of the pair whose rank's lowest bit is that of
the mbarrier's address: CUTLASS clears it to signal the even one (cute/arch/copy_sm100_tma.hpp,
Sm100MmaPeerBitMask)."""


def swizzle(address: np.ndarray, mode: int) -> np.ndarray:
    """Where a byte of a linear box goes; acts on addresses in shared memory.

    Modes 1 to 3 XOR the 16-byte chunk's number with that of the 128-byte row: Swizzle<1|2|3, 4, 3>.
    128B_ATOM_32B XORs 32-byte chunks, Swizzle<2, 5, 2>.
    (cute/atom/copy_traits_sm90_tma_swizzle.hpp, get_tma_swizzle_bits and _base.)
    """
    if mode == 0:
        return address
    if mode <= 3:
        return address ^ ((address >> 7 & ((1 << mode) - 1)) << 4)
    return address ^ ((address >> 7 & 3) << 5)


@functools.lru_cache(maxsize=256)
def _rows(box: tuple[int, ...]) -> list[np.ndarray]:
    """For each row of a box, its coordinate in each outer dimension."""
    count = int(np.prod(box[1:]))
    flat, coordinates = np.arange(count), []
    for extent in box[1:]:
        coordinates.append(flat % extent)
        flat = flat // extent
    return coordinates


GRANULE = 16
"""Bytes. A store that reaches past a row's end writes on to such a boundary: seen on an H200."""


def _inside(made: TensorMap, at: list[int], granule: int = 1) -> tuple[np.ndarray, np.ndarray, slice]:
    """Rows of the box that are in bounds, the addresses of their first byte inside, and those bytes
    within a row, whose end is rounded up to a granule."""
    end = -(-made.dims[0] * made.element // granule) * granule // made.element
    low, high = max(at[0], 0), min(at[0] + made.box[0], end)
    if high <= low:
        return np.zeros(0, np.int64), np.zeros(0, np.int64), slice(0)
    count = int(np.prod(made.box[1:]))
    addresses = np.full(count, made.address + low * made.element, np.int64)
    valid = np.ones(count, bool)
    for d, offset in enumerate(_rows(made.box), 1):
        coordinate = at[d] + offset
        valid &= (coordinate >= 0) & (coordinate < made.dims[d])
        addresses += coordinate * made.strides[d - 1]
    columns = slice((low - at[0]) * made.element, (high - at[0]) * made.element)
    return np.flatnonzero(valid), addresses[valid], columns


def read_box(made: TensorMap, at: list[int], memory: GlobalMemory, access: Access) -> np.ndarray:
    """The bytes of a box, out-of-bounds ones filled."""
    rows, addresses, columns = _inside(made, at)
    data = np.zeros((int(np.prod(made.box[1:])), made.box[0] * made.element), np.uint8)
    if made.fill:
        raise Fault("tensor map: fill with NaN is not implemented")
    if rows.size:
        cells = addresses[:, None] + np.arange(columns.stop - columns.start)
        data[rows, columns] = memory.read(cells, access, TOGETHER, "TMA load")
    return data.reshape(-1)


def write_box(made: TensorMap, at: list[int], data: np.ndarray, memory: GlobalMemory, access: Access) -> None:
    """Store the bytes of a box that are in bounds, and the rest of the last granule of each row."""
    rows, addresses, columns = _inside(made, at, GRANULE)
    if rows.size:
        cells = addresses[:, None] + np.arange(columns.stop - columns.start)
        taken = data.reshape(-1, made.box[0] * made.element)[rows, columns]
        memory.write(cells, taken, access, TOGETHER, "TMA store")


@functools.lru_cache(maxsize=1024)
def box_cells(offset: int, size: int, mode: int) -> np.ndarray:
    """Offsets in shared memory of a box's bytes, in the box's order."""
    return swizzle(SHARED_BASE + offset + np.arange(size), mode) - SHARED_BASE


@instruction("cp")
def copy(operands: Operands, ins: Instruction) -> Closure:
    """All forms of cp.async."""
    parts = ins.parts
    if parts[:4] == ("cp", "async", "bulk", "prefetch"):
        return lambda warp, mask: None
    if parts[:4] == ("cp", "async", "bulk", "commit_group"):
        return _commit(operands, ins)
    if parts[:4] == ("cp", "async", "bulk", "wait_group"):
        return _wait(operands, ins)
    if parts[:4] == ("cp", "async", "bulk", "tensor"):
        if "global" in parts and parts.index("global") > next(i for i, p in enumerate(parts) if p[:6] == "shared"):
            return _load(operands, ins)
        return _store(operands, ins)
    if parts[2] in ("ca", "cg"):
        return async_copy(operands, ins)
    if parts[2] == "commit_group":
        return copy_commit(operands, ins)
    if parts[2] in ("wait_group", "wait_all"):
        return copy_wait(operands, ins)
    raise unknown(ins)


def _tensor(operands: Operands, operand: Operand, ins: Instruction) -> tuple[Value, list[Value]]:
    """The map's address and the coordinates of ``[map, {coordinates}]``."""
    assert isinstance(operand, Address)
    coordinates = [operands.value(o, "s32") for o in operand.coordinates]
    if f"{len(coordinates)}d" not in ins.parts:
        raise unknown(ins, f"{len(coordinates)} coordinates")
    return operands.address(Address(operand.base, operand.offset)), coordinates


def _load(operands: Operands, ins: Instruction) -> Closure:
    destination, barrier = operands.address(ins.operands[0]), operands.address(ins.operands[2])
    map_address, coordinates = _tensor(operands, ins.operands[1], ins)
    multicast = any(part.startswith("multicast") for part in ins.parts)
    targets = operands.value(ins.operands[3], "b16") if multicast else None
    paired = "cta_group::2" in ins.parts

    def issue(warp: Warp, lane: int) -> None:
        launch, cluster, races = warp.cta.launch, warp.cta.cluster, warp.races
        described = int(map_address(warp)[lane])
        made = tensormap.fetch(warp, lane, described, warp.access(1 << lane))
        at = [int(c(warp)[lane]) for c in coordinates]
        if len(at) != made.rank:
            raise Fault(f"TMA load: expected {made.rank} coordinates for this tensor map, got {len(at)}")
        into, signalled = int(destination(warp)[lane]), int(barrier(warp)[lane])
        ranks = int(targets(warp)[lane]) if targets else 1 << (into >> RANK_SHIFT)
        known = warp.release(1 << lane)
        who = f"{warp.where()} line {ins.line} (TMA load)"
        for rank in lanes_of(ranks):
            cta = cluster.cta(rank, "TMA load")
            offset = cta.shared.offset(into & OFFSET_MASK, made.box_bytes, "TMA load")
            if (into & OFFSET_MASK) % 128:
                raise Fault(f"TMA load: expected a destination aligned to 128 bytes, got {into & OFFSET_MASK:#x}")
            told = cluster.cta(rank & ~PAIR_BIT | signalled >> RANK_SHIFT & PAIR_BIT if paired else rank, "TMA load")
            at_barrier = told.shared.offset(signalled & OFFSET_MASK, 8, "TMA load")

            def land(cta: Any = cta, offset: int = offset, told: Any = told, at_barrier: int = at_barrier) -> None:
                end = told.mbarriers.get(at_barrier)
                if end is None:
                    raise Fault(f"line {ins.line}: TMA load completes on offset {at_barrier}, which is no mbarrier")
                event = races.fresh(end.agent, end.phase + 1, who)
                access = Access(known, event, end.agent, in_order=False)
                if not races.knows(known, end.init):
                    races.report("use/initialise", f"{told.shared.name}, mbarrier at {at_barrier}", event, end.init)
                tensormap.in_use(launch, described, access)
                data = read_box(made, at, launch.memory, access)
                cells = box_cells(offset, made.box_bytes, made.swizzle)
                cta.check_no_barrier(cells, "TMA load")
                cta.shared.async_store(cells, data, access)
                end.arrive(0, -made.box_bytes, known)

            launch.post(land)

    return lambda warp, mask: [issue(warp, lane) for lane in lanes_of(mask)] and None


# ---------------------------------------------------------------- stores and bulk groups


@dataclass
class Store:
    """A store in flight."""

    read: bool = False
    written: bool = False


@dataclass
class BulkGroups:
    """One thread's bulk groups. The number of a group is the time of its copies on the two agents'
    clocks."""

    reads: int
    writes: int
    number: int = 1
    open: list[Store] = field(default_factory=list)
    committed: list[tuple[int, list[Store]]] = field(default_factory=list)


def groups_of(warp: Warp, lane: int) -> BulkGroups:
    """The groups of a thread."""
    if lane not in warp.bulk:
        warp.bulk[lane] = BulkGroups(warp.races.agents(), warp.races.agents())
    found: BulkGroups = warp.bulk[lane]
    return found


def _store(operands: Operands, ins: Instruction) -> Closure:
    if "bulk_group" not in ins.parts or ins.parts[3] == "reduce":
        raise unknown(ins)
    map_address, coordinates = _tensor(operands, ins.operands[0], ins)
    source = operands.address(ins.operands[1])

    def issue(warp: Warp, lane: int) -> None:
        launch, cta, races = warp.cta.launch, warp.cta, warp.races
        described = int(map_address(warp)[lane])
        made = tensormap.fetch(warp, lane, described, warp.access(1 << lane))
        at = [int(c(warp)[lane]) for c in coordinates]
        if len(at) != made.rank:
            raise Fault(f"TMA store: expected {made.rank} coordinates for this tensor map, got {len(at)}")
        if min(at) < 0:  # seen on an H100
            raise Fault(f"TMA store: an illegal instruction, as coordinates {at} are negative")
        offset = cta.shared.offset(int(source(warp)[lane]) & OFFSET_MASK, made.box_bytes, "TMA store")
        groups = groups_of(warp, lane)
        number, known = groups.number, warp.release(1 << lane)
        who = f"{warp.where()} line {ins.line} (TMA store)"
        store = Store()
        groups.open.append(store)

        def read() -> None:
            access = Access(known, races.fresh(groups.reads, number, who), groups.reads, in_order=False)
            tensormap.in_use(
                launch, described, access
            )  # CUTLASS rewrites maps after wait_group.read, so that must cover it
            cells = box_cells(offset, made.box_bytes, made.swizzle)
            try:
                data = cta.shared.async_load(cells, access, "TMA store").copy()
            except Fault as fault:
                raise Fault(f"line {ins.line}: {fault}") from None
            store.read = True
            launch.post(lambda: write(data))

        def write(data: np.ndarray) -> None:
            access = Access(known, races.fresh(groups.writes, number, who), groups.writes, in_order=False)
            write_box(made, at, data, launch.memory, access)
            store.written = True

        launch.post(read)

    return lambda warp, mask: [issue(warp, lane) for lane in lanes_of(mask)] and None


def _commit(operands: Operands, ins: Instruction) -> Closure:
    def execute(warp: Warp, mask: int) -> None:
        for lane in lanes_of(mask):
            groups = groups_of(warp, lane)
            groups.committed.append((groups.number, groups.open))
            groups.open, groups.number = [], groups.number + 1

    return execute


def _wait(operands: Operands, ins: Instruction) -> Closure:
    assert isinstance(ins.operands[0], Immediate)
    left, reading = ins.operands[0].value, "read" in ins.parts

    def execute(warp: Warp, mask: int) -> Any:
        waited = {
            lane: groups.committed[: len(groups.committed) - left] if left else list(groups.committed)
            for lane in lanes_of(mask)
            if (groups := groups_of(warp, lane)).committed
        }

        def ready() -> bool:
            return all(s.read if reading else s.written for g in waited.values() for _, stores in g for s in stores)

        def resume() -> None:
            for lane, finished in waited.items():
                groups = groups_of(warp, lane)
                if finished:
                    last = finished[-1][0]
                    warp.acquire(1 << lane, {groups.reads: last} | ({} if reading else {groups.writes: last}))
                if not reading:
                    groups.committed = groups.committed[len(finished) :]

        return Wait(ready, resume, f"{ins.name} {left}")

    return execute
