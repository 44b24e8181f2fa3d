"""Loads and stores by threads: ld, st, atom, red, stmatrix, ldmatrix, and the non-bulk cp.async."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from ptx.errors import Diverged, Fault
from ptx.instructions import Closure, Wait, instruction, unknown
from ptx.memory import OFFSET_MASK, RANK_SHIFT, SHARED_BASE
from ptx.operands import PARAMETERS, UNSIGNED, Operands, dtype, same
from ptx.parser import BITS, Immediate, Instruction
from ptx.races import TOGETHER, Access, join
from ptx.warp import FULL, LANES, Warp, bools, lanes_of

if TYPE_CHECKING:
    from ptx.cta import Cta


def own_offset(cta: Cta, address: int, size: int, what: str) -> int:
    """Of a shared address that must be the CTA's own."""
    if address >> RANK_SHIFT != cta.rank:
        raise Fault(f"{what}: expected an address of this CTA (rank {cta.rank}), got {address:#x}")
    return cta.shared.offset(address & OFFSET_MASK, size, what)


def _space(ins: Instruction) -> str:
    for part in ins.parts:
        if part.split("::")[0] in ("param", "shared", "global", "local", "const"):
            return part.split("::")[0]
    return "generic"


def _width(ins: Instruction) -> int:
    return next((int(part[1:]) for part in ins.parts if part in ("v2", "v4", "v8")), 1)


def _lanes(addresses: np.ndarray, active: np.ndarray, size: int) -> int | np.ndarray:
    """Which lane touches each byte; no single one where all touch the same."""
    if active.size == 1:
        return int(active[0])
    if (addresses == addresses[0]).all():
        return TOGETHER
    return np.repeat(active[:, None], size, 1)


@instruction("ld", "ldu")
def load(operands: Operands, ins: Instruction) -> Closure:
    """From parameters, shared and global memory; vectors of up to 32 bytes."""
    kind, count, space = ins.type, _width(ins), _space(ins)
    if space in ("local", "const"):
        raise unknown(ins)
    size = BITS[kind] // 8
    puts = [operands.put(item, kind) for item in operands.items(ins.operands[0])]
    address = operands.address(ins.operands[1])
    element = UNSIGNED[BITS[kind]]
    total = size * count

    def execute(warp: Warp, mask: int) -> None:
        addresses = address(warp)
        if mask != FULL:
            addresses = addresses[bools(mask)]
        first = int(addresses[0])
        uniform = bool((addresses == first).all())
        if uniform:
            addresses = addresses[:1]
        if (addresses % total).any():
            raise Fault(f"ld: expected an address aligned to {total} bytes, got {first:#x}")
        data = _bytes(warp, mask, addresses, total, space, uniform)
        elements = data.view(element)  # (lanes, count)
        for i, put in enumerate(puts):
            lanes = np.zeros(32, element)
            if uniform:
                lanes[:] = elements[0, i]
            else:
                lanes[bools(mask)] = elements[:, i]
            put(warp, mask, lanes.view(dtype(kind)))

    return execute


def _bytes(warp: Warp, mask: int, addresses: np.ndarray, size: int, space: str, uniform: bool) -> np.ndarray:
    """(lanes, size) bytes that the lanes load."""
    first = int(addresses[0])
    launch = warp.cta.launch
    if space == "param" or (space == "generic" and PARAMETERS <= first < PARAMETERS + (1 << 16)):
        offsets = addresses - (PARAMETERS if space == "generic" else 0)
        if offsets.min() < 0 or offsets.max() + size > launch.params.size:
            raise Fault(f"ld.param: expected an offset within {launch.params.size} bytes, got {int(offsets.max())}")
        return np.ascontiguousarray(launch.params[offsets[:, None] + np.arange(size)])
    cells = addresses[:, None] + np.arange(size)
    active = np.flatnonzero(bools(mask))
    lanes = TOGETHER if uniform and active.size > 1 else _lanes(addresses, active, size)
    if space == "shared":
        for address in (int(addresses.min()), int(addresses.max())):
            own_offset(warp.cta, address, size, "ld.shared")
        cells = (cells & OFFSET_MASK) - SHARED_BASE
        return np.ascontiguousarray(warp.cta.shared.load(cells, warp.access(mask), lanes, "ld.shared"))
    return np.ascontiguousarray(launch.memory.read(cells, warp.access(mask), lanes, "ld.global"))


@instruction("st")
def store(operands: Operands, ins: Instruction) -> Closure:
    """To shared and global memory."""
    kind, count, space = ins.type, _width(ins), _space(ins)
    if space not in ("shared", "global", "generic") or "async" in ins.parts:
        raise unknown(ins)
    size = BITS[kind] // 8
    values = [operands.value(item, kind) for item in operands.items(ins.operands[1])]
    address = operands.address(ins.operands[0])
    total = size * count

    def execute(warp: Warp, mask: int) -> None:
        addresses = address(warp)
        data = np.stack([value(warp) for value in values], 1)
        if mask != FULL:
            addresses, data = addresses[bools(mask)], data[bools(mask)]
        data = np.ascontiguousarray(data).view(np.uint8)
        if (addresses % total).any():
            raise Fault(f"st: expected an address aligned to {total} bytes, got {int(addresses[0]):#x}")
        cells = addresses[:, None] + np.arange(total)
        lanes = _lanes(addresses, np.flatnonzero(bools(mask)), total)
        if space == "shared":
            for extreme in (int(addresses.min()), int(addresses.max())):
                own_offset(warp.cta, extreme, total, "st.shared")
            cells = (cells & OFFSET_MASK) - SHARED_BASE
            warp.cta.check_no_barrier(cells, "st.shared")
            warp.cta.shared.store(cells, data, warp.access(mask), lanes)
        else:
            warp.cta.launch.memory.write(cells, data, warp.access(mask), lanes, "st.global")

    return execute


# ---------------------------------------------------------------- atomics

ATOMIC: dict[str, Callable[[int, int], int]] = {
    "add": lambda old, new: old + new,
    "min": min,
    "max": max,
    "exch": lambda old, new: new,
    "or": lambda old, new: old | new,
    "and": lambda old, new: old & new,
    "inc": lambda old, limit: 0 if old >= limit else old + 1,
}


@instruction("atom", "red")
def atomic(operands: Operands, ins: Instruction) -> Closure:
    """Integers in global or shared memory, lanes one after another. Acquires and releases, as all
    of ours do (acq_rel)."""
    kind = ins.type
    name = next((part for part in ins.parts[1:] if part in ATOMIC), "")
    if not name or kind[0] == "f":
        raise unknown(ins)
    operation = ATOMIC[name]
    returns = ins.parts[0] == "atom"
    put = operands.put(ins.operands[0], kind) if returns else None
    address = operands.address(ins.operands[1 if returns else 0])
    value = operands.value(ins.operands[-1], kind)
    size, space = BITS[kind] // 8, _space(ins)

    def execute(warp: Warp, mask: int) -> None:
        addresses, values = address(warp), value(warp)
        result = np.zeros(32, dtype(kind))
        launch = warp.cta.launch
        for lane in lanes_of(mask):
            where = int(addresses[lane])
            clock = launch.atomics.setdefault((where, warp.cta.index if space == "shared" else None), {})
            warp.acquire(1 << lane, clock)
            cells = where + np.arange(size)
            if space == "shared":
                cells = (cells & OFFSET_MASK) - SHARED_BASE
                old = warp.cta.shared.load(cells, warp.access(1 << lane), lane, ins.parts[0])
            else:
                old = launch.memory.read(cells, warp.access(1 << lane), lane, ins.parts[0])
            result[lane] = old.view(dtype(kind))[0]
            new = operation(int(result[lane]), int(values[lane])) & (1 << 8 * size) - 1
            data = np.array([new], UNSIGNED[8 * size]).view(np.uint8)
            if space == "shared":
                warp.cta.shared.store(cells, data, warp.access(1 << lane), lane)
            else:
                launch.memory.write(cells, data, warp.access(1 << lane), lane, ins.parts[0])
            join(clock, warp.release(1 << lane))
        if put:
            put(warp, mask, result)

    return execute


# ---------------------------------------------------------------- matrices

# PTX ISA, stmatrix and ldmatrix: matrix j of 8 x 8 two-byte elements has its row i at the address
# that lane 8 j + i gives; lane 4 i + c holds elements 2 c and 2 c + 1 of row i in its register j,
# or of column i where .trans is given.


def _matrix_cells(warp: Warp, addresses: np.ndarray, matrix: int, transposed: bool) -> np.ndarray:
    """(32 lanes, 2 elements, 2 bytes) offsets in shared memory of one 8 x 8 matrix."""
    rows = addresses[8 * matrix : 8 * matrix + 8]
    if (rows % 16).any():
        raise Fault(f"matrix rows: expected addresses aligned to 16 bytes, got {int(rows[0]):#x}")
    for extreme in (int(rows.min()), int(rows.max())):
        own_offset(warp.cta, extreme, 16, "matrix row")
    outer, inner = LANES // 4, 2 * (LANES % 4)[:, None] + np.arange(2)
    row, column = (inner, outer[:, None]) if transposed else (outer[:, None], inner)
    starts = (rows[row] & OFFSET_MASK) - SHARED_BASE + 2 * column
    return starts[:, :, None] + np.arange(2)


@instruction("stmatrix", "ldmatrix")
def matrix(operands: Operands, ins: Instruction) -> Closure:
    """One, two or four 8 x 8 matrices of two-byte elements between registers and shared memory."""
    if "m8n8" not in ins.parts or ins.parts[-1] != "b16":
        raise unknown(ins)
    count = next(int(part[1]) for part in ins.parts if part in ("x1", "x2", "x4"))
    transposed = "trans" in ins.parts
    stores = ins.parts[0] == "stmatrix"
    where, registers = (ins.operands[0], ins.operands[1]) if stores else (ins.operands[1], ins.operands[0])
    address = operands.address(where)
    items = operands.items(registers)
    values = [operands.value(item, "b32") for item in items] if stores else []
    puts = [] if stores else [operands.put(item, "b32") for item in items]

    def execute(warp: Warp, mask: int) -> None:
        need_all(mask, ins)
        addresses = address(warp)
        for i in range(count):
            cells = _matrix_cells(warp, addresses, i, transposed)
            if stores:
                data = np.ascontiguousarray(values[i](warp)).view(np.uint8).reshape(32, 2, 2)
                warp.cta.check_no_barrier(cells, "stmatrix")
                warp.cta.shared.store(cells, data, warp.access(mask), TOGETHER)
            else:
                data = warp.cta.shared.load(cells, warp.access(mask), TOGETHER, "ldmatrix")
                puts[i](warp, mask, np.ascontiguousarray(data).reshape(32, 4).view(np.uint32)[:, 0])

    return execute


def need_all(mask: int, ins: Instruction) -> None:
    """For ``.aligned`` instructions, which all lanes of a warp execute together."""
    if mask != FULL:
        raise Diverged(f"{ins.name}: expected all lanes of the warp, got {mask:#010x}")


# ---------------------------------------------------------------- cp.async


def async_copy(operands: Operands, ins: Instruction) -> Closure:
    """Copies of 4 to 16 bytes a lane from global to shared memory; what ``src-size`` leaves is
    zeros.

    They belong to the generic proxy. A lane sees them after ``cp.async.wait_group``; the others
    after a barrier.
    """
    destination, source = operands.address(ins.operands[0]), operands.address(ins.operands[1])
    size_operand = ins.operands[2]
    if not isinstance(size_operand, Immediate):
        raise unknown(ins, "the size is no literal")
    size = size_operand.value
    used = operands.value(ins.operands[3], "u32") if len(ins.operands) > 3 else None

    def execute(warp: Warp, mask: int) -> None:
        launch, cta = warp.cta.launch, warp.cta
        agent = launch.races.agents()
        event = launch.races.event(agent, 1, f"{warp.where()} line {ins.line} (cp.async)")
        access = Access(dict(warp.release(mask)), event, agent, in_order=False)
        copies = []
        for lane in lanes_of(mask):
            into, out_of = int(destination(warp)[lane]), int(source(warp)[lane])
            count = min(int(used(warp)[lane]), size) if used else size
            copies.append((own_offset(cta, into, size, "cp.async"), out_of, count))

        def land() -> None:
            for offset, address, count in copies:
                data = np.zeros(size, np.uint8)
                if count:
                    data[:count] = launch.memory.read(address + np.arange(count), access, TOGETHER, "cp.async")
                cta.shared.store(slice(offset, offset + size), data, access, TOGETHER)
            done[0] = True

        done = [False]
        warp.copies_open.append((agent, done))
        launch.post(land)

    return execute


def copy_commit(operands: Operands, ins: Instruction) -> Closure:
    """cp.async.commit_group, for all lanes of the warp alike."""

    def execute(warp: Warp, mask: int) -> None:
        warp.copies_committed.append(warp.copies_open)
        warp.copies_open = []

    return execute


def copy_wait(operands: Operands, ins: Instruction) -> Closure:
    """cp.async.wait_group n: all but the last n groups are complete."""
    (operand,) = ins.operands or (Immediate(0),)
    count = operands.value(operand, "u32")

    def execute(warp: Warp, mask: int) -> Any:
        left = same(count(warp), mask, "cp.async.wait_group")
        groups = warp.copies_committed[: len(warp.copies_committed) - left] if left else warp.copies_committed
        pending = [copy for group in groups for copy in group]

        def resume() -> None:
            warp.acquire(mask, {agent: 1 for agent, _ in pending})
            warp.copies_committed = warp.copies_committed[len(groups) :]

        return Wait(lambda: all(done[0] for _, done in pending), resume, "cp.async.wait_group")

    return execute
