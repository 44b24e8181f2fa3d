"""The fifth-generation tensor core: tensor memory, cp, block-scaled mma, commit, ld and st.

cp, mma and commit run asynchronously, in the order of their issue, in a pipe of the CTA that issues
them (PTX ISA, tcgen05 memory
consistency: pipelined instructions); ld and st are warps' own and go on until their wait. With
    cta_group::2 the even CTA of
a pair issues, and cp and mma act on both: each CTA holds half of A's rows and of D's, half of B's,
its own rows' scales of A and all scales of B (cute/atom/mma_traits_sm100.hpp, MMA_Traits of
SM100_MMA_MXF8F6F4_2x1SM_SS).

No hardware has confirmed what stands here; it follows the headers that are cited.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ptx.barriers import find
from ptx.errors import Fault
from ptx.formats import E4M3, E8M0
from ptx.instructions import Closure, instruction, unknown
from ptx.loads import need_all, own_offset
from ptx.memory import OFFSET_MASK, RANK_SHIFT, SHARED_BASE
from ptx.operands import Operands, same
from ptx.parser import Address, Immediate, Instruction, Register
from ptx.races import Access, Clock, Races, Shadow, join
from ptx.tma import swizzle
from ptx.warp import FULL, LANES, Wait, Warp, lanes_of, lowest

if TYPE_CHECKING:
    from ptx.cta import Cta

COLUMNS = 512
DATA_PATHS = 128
QUADRANT = 32
"""Lanes of tensor memory that a warp reaches: those from 32 * (its index modulo 4) on."""

MMA_K = 32
"""Elements of K of one MMA of one-byte elements, which share one scale a row."""


class TensorMemory:
    """128 lanes by 512 columns of 32 bits. Races are seen by quadrant and column."""

    def __init__(self, races: Races, name: str) -> None:
        self.data = np.zeros((DATA_PATHS, COLUMNS), np.uint32)
        self.valid = np.zeros((DATA_PATHS, COLUMNS), bool)
        self.shadow = Shadow(races, DATA_PATHS // QUADRANT * COLUMNS, name, readers=12)
        self.allocated: dict[int, int] = {}
        self.permitted = True

    def allocate(self, columns: int) -> int | None:
        """The first of so many free columns; None if there are none."""
        start = 0
        for taken, count in sorted(self.allocated.items()):
            if start + columns <= taken:
                break
            start = taken + count
        if start + columns > COLUMNS:
            return None
        self.allocated[start] = columns
        self.valid[:, start : start + columns] = False
        return start

    def check(self, column: int, count: int, what: str) -> None:
        """That columns belong to one allocation."""
        if not any(start <= column and column + count <= start + n for start, n in self.allocated.items()):
            raise Fault(f"{what}: columns {column} to {column + count} of tensor memory are not allocated")

    def cells(self, column: int, count: int, quadrants: list[int] | range = range(4)) -> np.ndarray:
        """Cells of the shadow."""
        return (COLUMNS * np.array(quadrants)[:, None] + column + np.arange(count)).reshape(-1)


@dataclass(frozen=True)
class Operation:
    """What waits in a pipe: what its issuer knew, and what it does."""

    known: Clock
    who: str
    run: Callable[[Access], None]


class Pipe:
    """The tcgen05 operations that a CTA has issued and the tensor core not yet run, in order."""

    def __init__(self, races: Races, name: str) -> None:
        self.races, self.name = races, name
        self.queue: deque[Operation] = deque()
        self.agent = races.agents()
        self.time = 1
        self.clock: Clock = {}

    def issue(self, warp: Warp, lane: int, line: int, what: str, run: Callable[[Access], None]) -> None:
        """Append an operation."""
        self.queue.append(Operation(warp.release(1 << lane), f"{self.name} line {line} ({what})", run))
        warp.cta.launch.issued(self)

    def step(self) -> None:
        """Run the oldest operation."""
        operation = self.queue.popleft()
        join(self.clock, operation.known)
        event = self.races.event(self.agent, self.time, operation.who)
        operation.run(Access(self.clock, event, self.agent))

    def publish(self) -> Clock:
        """What a commit tells: all operations before it are complete."""
        clock = {**self.clock, self.agent: self.time}
        self.time += 1
        return clock


def _paired(ins: Instruction) -> bool:
    if "cta_group::1" not in ins.parts and "cta_group::2" not in ins.parts:
        raise unknown(ins)
    return "cta_group::2" in ins.parts


def _ctas(warp: Warp, paired: bool, what: str) -> list[Cta]:
    """The CTAs that an operation acts on."""
    if not paired:
        return [warp.cta]
    if warp.cta.rank % 2:
        raise Fault(f"{what}: expected the even CTA of the pair to issue, got rank {warp.cta.rank}")
    return warp.cta.cluster.pair(warp.cta)


# ---------------------------------------------------------------- allocation


@instruction("tcgen05.alloc")
def alloc(operands: Operands, ins: Instruction) -> Closure:
    """Columns, whose address goes to shared memory; waits while there are none."""
    _paired(ins)
    address, columns = operands.address(ins.operands[0]), operands.value(ins.operands[1], "u32")

    def execute(warp: Warp, mask: int) -> Any:
        need_all(mask, ins)
        count, memory = same(columns(warp), mask, ins.name), warp.cta.tensor
        if count not in (32, 64, 128, 256, 512):
            raise Fault(f"tcgen05.alloc: expected a power of two from 32 to 512 columns, got {count}")
        if not memory.permitted:
            raise Fault("tcgen05.alloc: the permit to allocate was given up before")
        offset = own_offset(warp.cta, same(address(warp), mask, ins.name), 4, "tcgen05.alloc")

        def take(start: int) -> None:
            data = np.array([start], np.uint32).view(np.uint8)
            warp.cta.shared.store(slice(offset, offset + 4), data, warp.access(mask), 63)

        start = memory.allocate(count)
        if start is not None:
            return take(start)
        found: list[int] = []

        def ready() -> bool:
            start = memory.allocate(count)
            found.extend([] if start is None else [start])
            return bool(found)

        return Wait(ready, lambda: take(found[0]), f"{count} columns of tensor memory")

    return execute


@instruction("tcgen05.dealloc")
def dealloc(operands: Operands, ins: Instruction) -> Closure:
    """What one alloc gave is given back."""
    address, columns = operands.value(ins.operands[0], "u32"), operands.value(ins.operands[1], "u32")

    def execute(warp: Warp, mask: int) -> None:
        need_all(mask, ins)
        start, count = same(address(warp), mask, ins.name), same(columns(warp), mask, ins.name)
        memory = warp.cta.tensor
        if memory.allocated.get(start) != count:
            raise Fault(f"tcgen05.dealloc: {count} columns from {start} on were not allocated: {memory.allocated}")
        memory.shadow.write(memory.cells(start, count), warp.access(mask))  # nobody may use them any more
        del memory.allocated[start]

    return execute


@instruction("tcgen05.relinquish_alloc_permit")
def relinquish(operands: Operands, ins: Instruction) -> Closure:
    """This CTA allocates no more."""

    def execute(warp: Warp, mask: int) -> None:
        need_all(mask, ins)
        warp.cta.tensor.permitted = False

    return execute


# ---------------------------------------------------------------- descriptors


@dataclass(frozen=True)
class SharedDescriptor:
    """A matrix in shared memory, K-major: cute/arch/mma_sm100_desc.hpp, SmemDescriptor."""

    start: int
    leading: int
    stride: int
    layout: int

    @classmethod
    def decode(cls, raw: int) -> SharedDescriptor:
        """From 64 bits."""
        version, base, mode = raw >> 46 & 3, raw >> 49 & 7, raw >> 52 & 1
        layout = raw >> 61
        if version != 1 or mode or (base and layout):  # without a swizzle there is no pattern to be offset in
            raise Fault(
                f"shared memory descriptor {raw:#x}: expected version 1 without base offset, got {version}, {base}"
            )
        return cls((raw & 0x3FFF) << 4, (raw >> 16 & 0x3FFF) << 4, (raw >> 32 & 0x3FFF) << 4, layout)


@functools.lru_cache(maxsize=4096)
def matrix_cells(descriptor: SharedDescriptor, rows: int, width: int) -> np.ndarray:
    """(rows, width) offsets of bytes. Atoms are 8 rows high (PTX ISA, shared memory layout,
    K-major).

    SWIZZLE_128B (2): rows of 128 bytes, atoms ``stride`` apart, XORed as TMA does, on addresses.
        SWIZZLE_NONE (0): atoms of 8 rows
    by 16 bytes, ``leading`` apart along K and ``stride`` along the rows.
    """
    row, byte = np.arange(rows)[:, None], np.arange(width)[None, :]
    if descriptor.layout == 2:
        linear = descriptor.start + row // 8 * descriptor.stride + row % 8 * 128 + byte
        return swizzle(linear, 3) - SHARED_BASE
    if descriptor.layout == 0:
        linear = descriptor.start + row // 8 * descriptor.stride + row % 8 * 16
        return linear + byte // 16 * descriptor.leading + byte % 16 - SHARED_BASE
    raise Fault(f"shared memory descriptor: layout {descriptor.layout} is not implemented")


def _matrix(cta: Cta, raw: int, rows: int, width: int, access: Access, what: str) -> np.ndarray:
    cells = matrix_cells(SharedDescriptor.decode(raw), rows, width)
    if cells.min() < 0 or cells.max() >= cta.shared.size:
        raise Fault(f"{what}: the descriptor {raw:#x} reaches outside of shared memory")
    return cta.shared.async_load(cells, access, what)


@dataclass(frozen=True)
class InstructionDescriptor:
    """What an MMA computes: cute/arch/mma_sm100_desc.hpp, InstrDescriptorBlockScaled."""

    m: int
    n: int
    a_scale: int
    b_scale: int

    @classmethod
    def decode(cls, raw: int) -> InstructionDescriptor:
        """From 32 bits; e4m3 operands, K-major, not negated, e8m0 scales, dense."""
        sparse, formats, negated, major = raw >> 2 & 1, raw >> 7 & 63, raw >> 13 & 3, raw >> 15 & 3
        if sparse or formats or negated or major or not raw >> 23 & 1 or raw >> 31:
            raise Fault(f"instruction descriptor {raw:#x}: expected dense K-major e4m3 with e8m0 scales and K = 32")
        return cls((raw >> 24 & 31) << 4, (raw >> 17 & 63) << 3, raw >> 29 & 3, raw >> 4 & 3)


# ---------------------------------------------------------------- cp, mma, commit


def _single(mask: int, ins: Instruction) -> int:
    if mask & (mask - 1):
        raise Fault(f"{ins.parts[0]}.{ins.parts[1]}: expected one thread to issue, got lanes {mask:#010x}")
    return lowest(mask)


@instruction("tcgen05.cp")
def copy(operands: Operands, ins: Instruction) -> Closure:
    """32x128b.warpx4: 32 rows of 16 bytes from shared memory to 4 columns, the same in all four
    quadrants."""
    if "32x128b" not in ins.parts or "warpx4" not in ins.parts:
        raise unknown(ins)
    paired = _paired(ins)
    address, matrix = operands.address(ins.operands[0]), operands.value(ins.operands[1], "u64")

    def execute(warp: Warp, mask: int) -> None:
        lane = _single(mask, ins)
        where, raw = int(address(warp)[lane]) & 0xFFFFFFFF, int(matrix(warp)[lane])
        column = where & 0xFFFF
        if where >> 16 & 0x3FFF:
            raise Fault(f"tcgen05.cp: expected a destination from lane 0 on, got {where:#x}")
        ctas = _ctas(warp, paired, "tcgen05.cp")

        def run(access: Access) -> None:
            for cta in ctas:
                cta.tensor.check(column, 4, "tcgen05.cp")
                rows = np.ascontiguousarray(_matrix(cta, raw, 32, 16, access, "tcgen05.cp")).view(np.uint32)
                cta.tensor.shadow.write(cta.tensor.cells(column, 4), access)
                cta.tensor.data[:, column : column + 4] = np.tile(rows, (4, 1))
                cta.tensor.valid[:, column : column + 4] = True

        warp.cta.pipe.issue(warp, lane, ins.line, "cp", run)

    return execute


def scales(cta: Cta, column: int, rows: int, byte: int, access: Access, what: str) -> np.ndarray:
    """e8m0 scales of rows: row r at lane r % 32 of column r / 32, one of its four bytes, the same
    in each quadrant.

    cute/atom/mma_traits_sm100.hpp, tmem_sf_frg: scale factors lie in 32 lanes by columns of four
    and are broadcast to the quadrants, which tcgen05.cp's warpx4 does.
    """
    columns = -(-rows // QUADRANT)
    cta.tensor.check(column, columns, what)
    words = cta.tensor.data[:, column : column + columns]
    used = np.arange(columns)[None, :] * QUADRANT + np.arange(QUADRANT)[:, None] < rows  # (32, columns)
    quadrants = words.reshape(4, QUADRANT, columns)
    if not cta.tensor.valid[:, column : column + columns].reshape(4, QUADRANT, columns)[:, used].all():
        raise Fault(f"{what}: reads scales in columns from {column} on that nobody wrote")
    if (quadrants[:, used] != quadrants[0][used]).any():
        raise Fault(f"{what}: the four quadrants hold different scales in columns from {column} on")
    cta.tensor.shadow.read(cta.tensor.cells(column, columns), access)
    words = quadrants[0].T.reshape(-1)[:rows]
    return E8M0[words >> np.uint32(8 * byte) & np.uint32(255)]


@instruction("tcgen05.mma")
def mma(operands: Operands, ins: Instruction) -> Closure:
    """D = A * B^T (+ D), rows of A and B scaled; K = 32, one fp32 rounding of the exact sum.

    The order and the precision of the hardware's own sum are not known; a rounding a step is what
    the bound of the runs allows.
    """
    kind = [part for part in ins.parts if part.startswith("kind::")]
    if kind != ["kind::mxf8f6f4"] or "block_scale" not in ins.parts or len(ins.operands) != 7:
        raise unknown(ins)
    paired = _paired(ins)
    d_at, a_at, b_at, what_at = (
        operands.address(ins.operands[0]),
        *(operands.value(o, k) for o, k in zip(ins.operands[1:4], ("u64", "u64", "u32"), strict=True)),
    )
    a_scales_at, b_scales_at = operands.address(ins.operands[4]), operands.address(ins.operands[5])
    accumulates = operands.mask(ins.operands[6])

    def execute(warp: Warp, mask: int) -> None:
        lane = _single(mask, ins)
        d, a_scale, b_scale = (int(x(warp)[lane]) & 0xFFFFFFFF for x in (d_at, a_scales_at, b_scales_at))
        a_raw, b_raw = int(a_at(warp)[lane]), int(b_at(warp)[lane])
        shape = InstructionDescriptor.decode(int(what_at(warp)[lane]))
        add = bool(accumulates(warp) >> lane & 1)
        ctas = _ctas(warp, paired, "tcgen05.mma")
        if shape.m != DATA_PATHS * len(ctas):
            raise Fault(f"tcgen05.mma: expected M = {DATA_PATHS * len(ctas)} for {len(ctas)} CTAs, got {shape.m}")
        # The instruction descriptor chooses the byte. CUTLASS repeats it in the addresses' highest
        # bits, Triton leaves those 0.
        if (a_scale | b_scale) >> 30 and (a_scale >> 30, b_scale >> 30) != (shape.a_scale, shape.b_scale):
            raise Fault(
                f"tcgen05.mma: the scales' addresses choose bytes {a_scale >> 30} and {b_scale >> 30}, the instruction "
                f"descriptor {shape.a_scale} and {shape.b_scale}"
            )
        if d >> 16:
            raise Fault(f"tcgen05.mma: expected an accumulator from lane 0 on, got {d:#x}")

        def run(access: Access) -> None:
            b = np.concatenate(
                [_matrix(cta, b_raw, shape.n // len(ctas), MMA_K, access, "tcgen05.mma, B") for cta in ctas]
            )
            b_values = E4M3[b]
            for cta in ctas:
                a_values = E4M3[_matrix(cta, a_raw, DATA_PATHS, MMA_K, access, "tcgen05.mma, A")]
                a_factor = scales(cta, a_scale & 0xFFFF, DATA_PATHS, shape.a_scale, access, "tcgen05.mma, scales of A")
                b_factor = scales(cta, b_scale & 0xFFFF, shape.n, shape.b_scale, access, "tcgen05.mma, scales of B")
                _accumulate(cta, d, shape.n, (a_values @ b_values.T) * a_factor[:, None] * b_factor, add, access)

        warp.cta.pipe.issue(warp, lane, ins.line, "mma", run)

    return execute


def _accumulate(cta: Cta, column: int, n: int, product: np.ndarray, add: bool, access: Access) -> None:
    memory, columns = cta.tensor, slice(column, column + n)
    memory.check(column, n, "tcgen05.mma")
    if add:
        if not memory.valid[:, columns].all():
            raise Fault("tcgen05.mma: accumulates onto columns that nobody wrote")
        product += memory.data[:, columns].view(np.float32)
    memory.shadow.write(memory.cells(column, n), access)
    with np.errstate(over="ignore"):
        memory.data[:, columns] = product.astype(np.float32).view(np.uint32)
    memory.valid[:, columns] = True


@instruction("tcgen05.commit")
def commit(operands: Operands, ins: Instruction) -> Closure:
    """Arrives on an mbarrier once all operations before it are complete; multicast, at the same
    offset in several CTAs."""
    if "arrive::one" not in ins.name:
        raise unknown(ins)
    address = operands.address(ins.operands[0])
    multicast = any(part.startswith("multicast") for part in ins.parts)
    targets = operands.value(ins.operands[1], "b16") if multicast else None

    def execute(warp: Warp, mask: int) -> None:
        lane = _single(mask, ins)
        where = int(address(warp)[lane])
        ranks = lanes_of(int(targets(warp)[lane])) if targets else [where >> RANK_SHIFT]

        def run(access: Access) -> None:
            clock = warp.cta.pipe.publish()
            for rank in ranks:
                what = f"line {ins.line}: tcgen05.commit"
                cta = warp.cta.cluster.cta(rank, what)
                offset = cta.shared.offset(where & OFFSET_MASK, 8, what)
                if offset in cta.invalidated and offset not in cta.mbarriers:
                    place = f"{cta.shared.name}, mbarrier at {offset}"
                    warp.races.report("arrive/invalidate", place, access.event, cta.invalidated[offset])
                    continue
                find(warp, rank << RANK_SHIFT | where & OFFSET_MASK, clock, what).arrive(1, 0, clock)

        warp.cta.pipe.issue(warp, lane, ins.line, "commit", run)

    return execute


# ---------------------------------------------------------------- ld, st, wait


class Loaded:
    """What tcgen05.ld has put into a register, until it is used.

    CUTLASS uses registers without a tcgen05.wait::ld and leaves that to ptxas, which adds the wait.
    So the first use is a wait of its own; a move is none.
    """

    __slots__ = ("data", "time", "warp")

    def __init__(self, warp: Warp, data: np.ndarray) -> None:
        self.warp, self.data, self.time = warp, data, warp.time[warp.loads]

    def view(self, dtype: Any) -> np.ndarray:
        """The value, used."""
        self.warp.acquire(FULL, {self.warp.loads: self.time})
        return self.data.view(dtype)

    def astype(self, dtype: Any) -> np.ndarray:
        """The same, converted."""
        return self.view(np.uint32).astype(dtype)

    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        return self.view(np.uint32)


def _places(shape: str, count: int, split: int) -> tuple[np.ndarray, np.ndarray]:
    """(registers, 32 lanes) data path and column of what each lane's register holds, from the
    address on.

    cute/atom/copy_traits_sm100.hpp. 32dp32b: lane t holds path t, register i column i. 16dp256b:
    lanes in fours hold a path, a lane two neighbouring columns; registers go first over these two,
    then over the paths 8 apart, then over 8 columns. 16x32bx2: lanes 16 to 31 hold the paths of 0
    to 15 again, ``split`` columns further.
    """
    i = np.arange(count)[:, None]
    if shape == "32x32b":
        return np.broadcast_to(LANES, (count, 32)), np.broadcast_to(i, (count, 32))
    if shape == "16x32bx2":
        return np.broadcast_to(LANES % 16, (count, 32)), i + split * (LANES // 16)
    if shape == "16x256b":
        return LANES // 4 + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * (LANES % 4) + i % 2
    raise Fault(f"tcgen05 shape {shape} is not implemented")


@instruction("tcgen05.ld", "tcgen05.st")
def load_store(operands: Operands, ins: Instruction) -> Closure:
    """Between a warp's quadrant of tensor memory and registers; in flight until tcgen05.wait."""
    shape = next((part for part in ins.parts if part in ("32x32b", "16x256b", "16x32bx2")), "")
    if not shape or ins.parts[-1] != "b32" or "pack::16b" in ins.parts or "unpack::16b" in ins.parts:
        raise unknown(ins)
    stores = ins.parts[1] == "st"
    address_of = ins.operands[0 if stores else 1]
    items = operands.items(ins.operands[-1 if stores else 0])
    assert isinstance(address_of, Address)
    address = operands.address(address_of)
    split = next((o.value for o in ins.operands if isinstance(o, Immediate)), 0)
    paths, columns = _places(shape, len(items), split)
    width = int(columns.max()) + 1
    repeats = next(int(part[1:]) for part in ins.parts if part[0] == "x" and part[1:].isdigit())
    if len(items) != repeats * {"32x32b": 1, "16x32bx2": 1, "16x256b": 4}[shape]:
        raise Fault(f"line {ins.line}: {ins.name} does not take {len(items)} registers")
    values = [operands.value(item, "b32") for item in items] if stores else []
    registers = [item.index for item in items if isinstance(item, Register)]
    what = f"tcgen05.{ins.parts[1]}"

    def execute(warp: Warp, mask: int) -> None:
        need_all(mask, ins)
        where, memory = same(address(warp), mask, ins.name), warp.cta.tensor
        first, column = where >> 16 & 0xFFFF, where & 0xFFFF
        own = QUADRANT * (warp.index % 4)
        if first not in ((own, own + 16) if shape != "32x32b" else (own,)):
            raise Fault(f"{what}: warp {warp.index} reaches lanes {own} to {own + 31}, got an address of lane {first}")
        memory.check(column, width, what)
        cells = memory.cells(column, width, [warp.index % 4])
        if stores:
            memory.shadow.write(cells, warp.asynchronous(warp.stores, what))
            data = np.stack([value(warp) for value in values])
            memory.data[first + paths, column + columns] = data
            memory.valid[first + paths, column + columns] = True
            if (memory.data[first + paths, column + columns] != data).any():
                raise Fault(f"{what}: lanes store different values to one place")
            return
        if not memory.valid[first + paths, column + columns].all():
            raise Fault(f"{what}: reads tensor memory that nobody wrote")
        memory.shadow.read(cells, warp.asynchronous(warp.loads, what))
        for index, row in zip(registers, memory.data[first + paths, column + columns], strict=True):
            warp.registers[index] = Loaded(warp, row)
        warp.time[warp.loads] += 1

    return execute


@instruction("tcgen05.wait::ld", "tcgen05.wait::st")
def wait(operands: Operands, ins: Instruction) -> Closure:
    """The warp's loads, or stores, are complete."""
    loads = ins.parts[1] == "wait::ld"

    def execute(warp: Warp, mask: int) -> None:
        need_all(mask, ins)
        warp.wait_for(warp.loads if loads else warp.stores)

    return execute


@instruction("tcgen05.fence::before_thread_sync", "tcgen05.fence::after_thread_sync")
def fence(operands: Operands, ins: Instruction) -> Closure:
    """Orders tcgen05 operations around a barrier, which orders them here by itself."""
    return lambda warp, mask: None
