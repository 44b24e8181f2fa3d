"""Tensor maps: the 128 bytes that describe a tensor to TMA, in a format of our own.

The real format is not public; a kernel touches it only by ``tensormap.replace`` and TMA. host.cu
writes the same format for CUTLASS. Bit 21 of the second 64-bit word is never used: hosts clear it,
as a workaround for a driver's fault.

A map in global memory that a kernel rewrites has a version. Who uses it must have acquired that
version, by a ``fence.proxy.tensormap`` that comes after the write and before the use.
"""

from __future__ import annotations

import functools
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ptx.errors import Fault
from ptx.instructions import Closure, instruction, unknown
from ptx.loads import need_all, own_offset
from ptx.operands import PARAMETERS, Operands, same
from ptx.parser import Address, Immediate, Instruction
from ptx.races import TOGETHER, Access
from ptx.warp import Warp, lanes_of

if TYPE_CHECKING:
    from ptx.scheduler import Launch

SIZE = 128
MAGIC = 0x5AA5
LAYOUT = struct.Struct("<QI4B5I5I4Q5HB")
FIELDS = {"global_address": (0, 8), "global_dim": (16, 4), "box_dim": (36, 4), "global_stride": (56, 8)}
"""Where a field's first element lies, and the bytes of each."""

BYTE_FIELDS = {"rank": 13, "swizzle_mode": 14, "fill_mode": 15}
ELEMENT_BYTES = (1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4)
"""By CUtensorMapDataType (cuda.h)."""

SWIZZLES = ("none", "32B", "64B", "128B", "128B_ATOM_32B")
"""By CUtensorMapSwizzle (cuda.h)."""


@dataclass(frozen=True)
class TensorMap:
    """A tensor in global memory, and the box that a copy takes of it; dimension 0 is contiguous."""

    address: int
    type: int
    rank: int
    swizzle: int
    fill: int
    dims: tuple[int, ...]
    box: tuple[int, ...]
    strides: tuple[int, ...]
    """Bytes, of dimensions 1 and up."""

    @property
    def element(self) -> int:
        """Bytes of an element."""
        return ELEMENT_BYTES[self.type]

    @property
    def box_bytes(self) -> int:
        """What a copy brings to shared memory, out-of-bounds elements included."""
        return int(np.prod(self.box)) * self.element


def encode(
    address: int,
    type: int,
    dims: tuple[int, ...],
    strides: tuple[int, ...],
    box: tuple[int, ...],
    swizzle: int = 0,
) -> np.ndarray:
    """What cuTensorMapEncodeTiled writes; as host.cu."""
    five = lambda values: [*values, *[0] * (5 - len(values))]  # noqa: E731
    packed = LAYOUT.pack(
        *(address, MAGIC, type, len(dims), swizzle, 0, *five(dims), *five(box), *five(strides)[:4]),
        *(*five((1,) * len(dims)), 0),
    )
    return np.frombuffer(packed.ljust(SIZE, b"\0"), np.uint8).copy()


@functools.lru_cache(maxsize=1024)
def decode(raw: bytes) -> TensorMap:
    """Read a map and check what TMA asks of it; strides and extents beyond the rank may be
    anything."""
    fields = LAYOUT.unpack_from(raw)
    address, magic, type_, rank, swizzle, fill = fields[:6]
    if magic != MAGIC:
        raise Fault(f"tensor map: expected a map, got bytes that begin with {raw[:16].hex()}")
    dims, box, strides, element_strides = fields[6:11], fields[11:16], fields[16:20], fields[20:25]
    made = TensorMap(address, type_, rank, swizzle, fill, dims[:rank], box[:rank], strides[: rank - 1])
    if address % 16:
        raise Fault(f"tensor map: expected an address aligned to 16 bytes, got {address:#x}")
    for stride in made.strides:
        if stride % 16 or stride >= 1 << 40:
            raise Fault(f"tensor map: expected strides that are multiples of 16 below 2**40, got {made.strides}")
    if any(step != 1 for step in element_strides[:rank]):
        raise Fault(f"tensor map: expected element strides of 1, got {element_strides[:rank]}")
    if not 0 <= swizzle < len(SWIZZLES):
        raise Fault(f"tensor map: swizzle {swizzle} is not known")
    inner = made.box[0] * made.element
    if inner % 16 or inner > {0: 1 << 20, 1: 32, 2: 64}.get(swizzle, 128):
        raise Fault(f"tensor map: a box row of {inner} bytes does not suit swizzle {SWIZZLES[swizzle]}")
    return made


@dataclass
class Version:
    """The contents of a map in global memory: how often it was written, and the event of the last
    time."""

    number: int
    event: int


@dataclass(frozen=True)
class Acquired:
    """A version of a map that lanes of a warp have acquired, and the event of it."""

    number: int
    event: int
    warp: Warp
    mask: int

    def by(self, warp: Warp, lane: int) -> bool:
        """Whether this very lane did."""
        return warp is self.warp and bool(self.mask >> lane & 1)


def fetch(warp: Warp, lane: int, address: int, access: Access) -> TensorMap:
    """The map that a lane's TMA instruction uses, with the check that its contents are those last
    written."""
    launch = warp.cta.launch
    offset = address - PARAMETERS
    if 0 <= offset < launch.params.size:
        if offset % 64:
            raise Fault(f"tensor map: expected an address aligned to 64 bytes, got parameter offset {offset}")
        return decode(launch.params[offset : offset + SIZE].tobytes())
    if address % 64:
        raise Fault(f"tensor map: expected an address aligned to 64 bytes, got {address:#x}")
    version = launch.tensor_maps.get(address)
    acquired = warp.cta.acquired_maps.get(address, [])
    if version is not None and not any(
        a.number == version.number and (a.by(warp, lane) or warp.races.knows(access.clock, a.event)) for a in acquired
    ):
        seen = max((a.number for a in acquired), default=0)
        raise Fault(
            f"tensor map at {address:#x}: version {version.number} was written and version {seen} acquired; "
            "expected a fence.proxy.tensormap acquire before the use"
        )
    raw = launch.memory.read(address + np.arange(SIZE), access, lane, "tensor map")
    return decode(raw.tobytes())


def in_use(launch: Launch, address: int, access: Access) -> None:
    """A copy in flight still reads its map: whoever rewrites that must know of the copy's end."""
    if not 0 <= address - PARAMETERS < launch.params.size:
        launch.memory.read(address + np.arange(SIZE), access, TOGETHER, "tensor map")


@instruction("tensormap.replace")
def replace(operands: Operands, ins: Instruction) -> Closure:
    """Changes a field of a map in shared memory: a read and a write of all its bytes."""
    field = ins.parts[3]
    if ins.parts[4] != "shared::cta":
        raise unknown(ins)
    address = operands.address(ins.operands[0] if isinstance(ins.operands[0], Address) else Address(ins.operands[0]))
    ordinal = 0
    if len(ins.operands) == 3:
        assert isinstance(ins.operands[1], Immediate)
        ordinal = ins.operands[1].value
    if field in FIELDS:
        start, size = FIELDS[field]
        start += size * ordinal
    elif field in BYTE_FIELDS:
        start, size = BYTE_FIELDS[field], 1
    else:
        raise unknown(ins)
    value = operands.value(ins.operands[-1], "b64" if size == 8 else "b32")

    def execute(warp: Warp, mask: int) -> None:
        addresses, values = address(warp), value(warp)
        for lane in lanes_of(mask):
            offset = own_offset(warp.cta, int(addresses[lane]), SIZE, "tensormap.replace")
            cells, access = slice(offset, offset + SIZE), warp.access(1 << lane)
            raw = warp.cta.shared.load(cells, access, lane, "tensormap.replace").copy()
            number = int(values[lane]) + (field == "rank")  # the operand is the rank less one
            raw[start : start + size] = np.frombuffer(number.to_bytes(8, "little")[:size], np.uint8)
            warp.cta.shared.store(cells, raw, access, lane)

    return execute


@instruction("tensormap.cp_fenceproxy")
def copy_and_fence(operands: Operands, ins: Instruction) -> Closure:
    """Copies a map from shared to global memory and releases it to the tensormap proxy; all lanes
    together."""
    to, source = operands.address(ins.operands[0]), operands.address(ins.operands[1])

    def execute(warp: Warp, mask: int) -> None:
        need_all(mask, ins)
        launch, access = warp.cta.launch, warp.access(mask)
        # The copy comes after all lanes have, and so after what any of them has waited for.
        access.clock = warp.known_by_any()
        into, out_of = same(to(warp), mask, ins.name), same(source(warp), mask, ins.name)
        offset = own_offset(warp.cta, out_of, SIZE, "tensormap.cp_fenceproxy")
        raw = warp.cta.shared.load(slice(offset, offset + SIZE), access, TOGETHER, "tensormap.cp_fenceproxy")
        launch.memory.write(into + np.arange(SIZE), raw, access, TOGETHER, "tensormap.cp_fenceproxy")
        number = launch.tensor_maps[into].number + 1 if into in launch.tensor_maps else 1
        launch.tensor_maps[into] = Version(number, access.event | TOGETHER)

    return execute


@instruction("fence.proxy.tensormap::generic")
def acquire(operands: Operands, ins: Instruction) -> Closure:
    """acquire: uses that come after it see the map as it was written before it."""
    if "acquire" not in ins.parts:
        return lambda warp, mask: None
    address = operands.address(ins.operands[0])

    def execute(warp: Warp, mask: int) -> None:
        where, access = same(address(warp), mask, ins.name), warp.access(mask)
        version = warp.cta.launch.tensor_maps.get(where)
        if version is None:
            return
        written = warp.races.events[version.event >> 6]
        if written.agent == warp.agent:  # the lanes wrote it together, and released it
            warp.acquire(mask, {written.agent: written.time})
        if written.agent == warp.agent or warp.races.knows(access.clock, version.event):
            kept = [a for a in warp.cta.acquired_maps.get(where, []) if a.number == version.number]
            made = Acquired(version.number, access.event | warp.lane(mask), warp, mask)
            warp.cta.acquired_maps[where] = [*kept, made]

    return execute
