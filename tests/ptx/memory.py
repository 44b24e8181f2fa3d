"""Shared and global memory, byte by byte: who may read what, and which proxy last wrote it.

Both remember which bytes were written: reading another is an error, as is any access outside the
call's own buffers. Shared memory also remembers which bytes a thread wrote (the generic proxy) that
no ``fence.proxy.async`` has published since; TMA and the tensor core (the async proxy) must not
read those.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass

import numpy as np

from ptx.errors import Fault
from ptx.races import TOGETHER, Access, Races, Shadow

SHARED_BASE = 1024
"""Where a CTA's own shared memory begins: the first 1 KB belong to the system (CUDA C++ programming
guide, "Reserved shared memory"). Kernels rely on 1024-byte alignment from there on, for swizzles
act on addresses."""

RANK_SHIFT = 24
"""An address in the cluster's shared window has the CTA's rank from this bit on:
cute/arch/copy_sm100_tma.hpp clears bit 24 to address the even CTA of a pair
(Sm100MmaPeerBitMask)."""

OFFSET_MASK = (1 << RANK_SHIFT) - 1
POISON = 0xA5


class SharedMemory:
    """One CTA's shared memory; offsets count from SHARED_BASE."""

    def __init__(self, size: int, races: Races, name: str) -> None:
        self.size, self.races, self.name = size, races, name
        self.data = np.full(size, POISON, np.uint8)
        self.valid = np.zeros(size, bool)
        self.unfenced = np.zeros(size, np.int32)
        """Per byte, the event of a generic write that no proxy fence followed."""
        self.shadow = Shadow(races, size, name)

    def offset(self, address: int, size: int, what: str) -> int:
        """Of an address without its rank."""
        offset = address - SHARED_BASE
        if offset < 0 or offset + size > self.size:
            raise Fault(
                f"{what}: {size} bytes at shared address {address:#x} are outside of the {self.size} bytes from "
                f"{SHARED_BASE:#x} on"
            )
        return offset

    def load(self, cells: slice | np.ndarray, access: Access, lanes: int | np.ndarray, what: str) -> np.ndarray:
        """Bytes that a thread reads."""
        self._check_valid(cells, what)
        self.shadow.read(cells, access, lanes)
        return self.data[cells]

    def store(self, cells: slice | np.ndarray, data: np.ndarray, access: Access, lanes: int | np.ndarray) -> None:
        """Bytes that a thread writes."""
        repeats = bool(self.valid[cells].all() and (self.data[cells] == data).all())
        self.shadow.write(cells, access, lanes, repeats=repeats)
        self.data[cells] = data
        self.valid[cells] = True
        self.unfenced[cells] = access.event | lanes

    def async_load(self, cells: slice | np.ndarray, access: Access, what: str) -> np.ndarray:
        """Bytes that TMA or the tensor core reads."""
        self._check_valid(cells, what)
        stale = self.unfenced[cells]
        if stale.any():
            event = self.races.events[int(stale.max()) >> 6]
            raise Fault(
                f"{what}: reads what {event.who} wrote through the generic proxy, with no fence.proxy.async in between"
            )
        self.shadow.read(cells, access)
        return self.data[cells]

    def async_store(self, cells: slice | np.ndarray, data: np.ndarray, access: Access) -> None:
        """Bytes that TMA writes."""
        self.shadow.write(cells, access)
        self.data[cells] = data
        self.valid[cells] = True
        self.unfenced[cells] = 0

    def fence(self, access: Access, lanes: list[int]) -> None:
        """fence.proxy.async: publishes the generic writes that the fencing lanes know of, their own
        included."""
        dirty = np.flatnonzero(self.unfenced)
        for value in map(int, np.unique(self.unfenced[dirty])):
            event = self.races.events[value >> 6]
            lane = value & TOGETHER
            own = event.agent == access.agent and (lane == TOGETHER or lane in lanes)
            if own or self.races.knows(access.clock, value):
                self.unfenced[dirty[self.unfenced[dirty] == value]] = 0

    def _check_valid(self, cells: slice | np.ndarray, what: str) -> None:
        if not self.valid[cells].all():
            raise Fault(f"{what}: reads shared memory that nobody wrote")


@dataclass
class Buffer:
    """A piece of global memory. ``shadow`` is None where the call may only read."""

    name: str
    start: int
    data: np.ndarray
    written: np.ndarray
    shadow: Shadow | None = None


class GlobalMemory:
    """The buffers of a call at their real addresses; everything else is poison.

    ``hidden`` holds what a programmatic predecessor wrote, until the first ``griddepcontrol.wait``
    shows it.
    """

    def __init__(self) -> None:
        self.buffers: list[Buffer] = []
        self.starts: list[int] = []
        self.hidden: list[tuple[Buffer, np.ndarray, np.ndarray]] = []

    def add(self, name: str, data: np.ndarray, *, written: bool, writable: bool) -> Buffer:
        """Admit a buffer of bytes; ``written`` says whether it has contents yet."""
        buffer = Buffer(name, data.ctypes.data, data, np.full(data.size, written), None)
        buffer.shadow = Shadow(Races(), 0, name) if writable else None
        at = bisect.bisect(self.starts, buffer.start)
        self.buffers.insert(at, buffer)
        self.starts.insert(at, buffer.start)
        return buffer

    def begin(self, races: Races) -> None:
        """A launch begins: all that was written before it is ordered before it."""
        for buffer in self.buffers:
            if buffer.shadow is not None:
                buffer.shadow = Shadow(races, buffer.data.size, buffer.name, readers=4)

    def snapshot(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """The contents of what may be written, before a predecessor runs."""
        return {b.name: (b.data.copy(), b.written.copy()) for b in self.buffers if b.shadow is not None}

    def withhold(self, before: dict[str, tuple[np.ndarray, np.ndarray]], races: Races, event: int) -> None:
        """As ``begin``, for a launch that may start before its predecessor has ended.

        What the predecessor wrote is taken back until the launch waits for it, and its accesses
        count as ``event``.
        """
        for buffer in self.buffers:
            if buffer.shadow is None:
                continue
            wrote = np.flatnonzero(buffer.shadow.written)
            read = np.flatnonzero(buffer.shadow.read_by.any(0))
            self.hidden.append((buffer, wrote, buffer.data[wrote].copy()))
            buffer.data[:], buffer.written[:] = before[buffer.name]
            buffer.shadow = Shadow(races, buffer.data.size, buffer.name, readers=4)
            buffer.shadow.mark(wrote, read, event)

    def show_hidden(self) -> None:
        """What the predecessor wrote is there from now on."""
        for buffer, cells, data in self.hidden:
            buffer.data[cells], buffer.written[cells] = data, True
        self.hidden.clear()

    def find(self, address: int, size: int, what: str) -> tuple[Buffer, int]:
        """The buffer that holds these bytes, and where in it they begin."""
        at = bisect.bisect(self.starts, address) - 1
        if at >= 0:
            buffer = self.buffers[at]
            offset = address - buffer.start
            if offset + size <= buffer.data.size:
                return buffer, offset
        raise Fault(f"{what}: {size} bytes at {address:#x} are in no buffer of the call{self._near(address)}")

    def read(self, cells: np.ndarray, access: Access, lanes: int | np.ndarray, what: str) -> np.ndarray:
        """Bytes at addresses, all in one buffer."""
        buffer, indices = self._locate(cells, what)
        seen = buffer.written[indices]
        if not seen.all():
            first = int(indices.reshape(-1)[int(np.argmin(seen.reshape(-1)))])
            writer = int(buffer.shadow.written[first]) if buffer.shadow is not None else 0
            if writer:
                who = buffer.shadow.races.events[writer >> 6].who  # type: ignore[union-attr]
                raise Fault(
                    f"race: {what} of {buffer.name} at byte {first}, which {who} writes, before griddepcontrol.wait"
                )
            raise Fault(f"{what}: reads {buffer.name} at byte {first}, which nobody wrote")
        if buffer.shadow is not None:
            buffer.shadow.read(indices, access, lanes)
        return buffer.data[indices]

    def write(self, cells: np.ndarray, data: np.ndarray, access: Access, lanes: int | np.ndarray, what: str) -> None:
        """Store bytes at addresses, all in one buffer."""
        buffer, indices = self._locate(cells, what)
        if buffer.shadow is None:
            raise Fault(f"{what}: writes {buffer.name}, which the call only reads")
        buffer.shadow.write(indices, access, lanes)
        buffer.data[indices] = data
        buffer.written[indices] = True

    def _locate(self, cells: np.ndarray, what: str) -> tuple[Buffer, np.ndarray]:
        low, high = int(cells.min()), int(cells.max())
        buffer, _ = self.find(low, high - low + 1, what)
        return buffer, cells - buffer.start

    def _near(self, address: int) -> str:
        distances = [(abs(address - (b.start + at)), b.name, at) for b in self.buffers for at in (0, b.data.size)]
        if not distances:
            return ""
        distance, name, at = min(distances)
        return f", {distance} bytes from the {'end' if at else 'start'} of {name}"


def aligned(size: int) -> np.ndarray:
    """Poisoned bytes, with poison of a kilobyte on both sides."""
    raw = np.full(size + 3 * 1024, POISON, np.uint8)
    start = 1024 + -(raw.ctypes.data + 1024) % 1024
    return raw[start : start + size]
