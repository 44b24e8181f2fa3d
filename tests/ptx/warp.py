"""A warp: 32 lanes with registers, grouped by program counter, and what each knows of the others.

A register is an array of 32 unsigned integers of its width; a predicate is one integer, a bit a
lane. Lanes that stand at the same instruction form a group; the group with the lowest program
counter goes first, so lanes meet again where they can, and a group that waits lets the others of
its warp go on. Instructions that need lanes together (.sync, .aligned) hold a group until the rest
has come.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ptx.errors import Fault
from ptx.races import TOGETHER, WARP_AGENTS, Access, Clock, Races, join

if TYPE_CHECKING:
    from ptx.cta import Cta

LANES = np.arange(32)
FULL = (1 << 32) - 1

_BOOLS: dict[int, np.ndarray] = {}


def bools(mask: int) -> np.ndarray:
    """32 booleans of a mask; shared, not to be written."""
    found = _BOOLS.get(mask)
    if found is None:
        found = _BOOLS[mask] = np.unpackbits(np.array([mask], "<u4").view(np.uint8), bitorder="little").astype(bool)
    return found


def bits(flags: np.ndarray) -> int:
    """The mask of 32 booleans."""
    return int.from_bytes(np.packbits(flags, bitorder="little").tobytes(), "little")


def lanes_of(mask: int) -> list[int]:
    """The lanes in a mask."""
    return [lane for lane in range(32) if mask >> lane & 1]


def lowest(mask: int) -> int:
    """The lowest lane in a mask."""
    return (mask & -mask).bit_length() - 1


@dataclass
class Wait:
    """What an instruction answers that cannot complete yet: when it can, and what is left to do
    then."""

    ready: Callable[[], bool]
    resume: Callable[[], None]
    what: str


@dataclass
class Waiting:
    """Lanes that wait at an instruction."""

    pc: int
    mask: int
    wait: Wait


class Warp:
    """One warp of a CTA."""

    def __init__(self, cta: Cta, index: int, registers: int, races: Races) -> None:
        self.cta, self.index, self.races = cta, index, races
        self.registers: list[Any] = [None] * registers
        self.groups: dict[int, int] = {0: FULL}
        self.waiting: list[Waiting] = []
        self.parked: dict[int, tuple[int, Fault]] = {}
        """Lanes that stand before an instruction which needs others too, and what is wrong if those
        never come."""
        self.pc = 0
        self.thread = LANES + 32 * index
        self.agent = races.agents(WARP_AGENTS)
        self.inits = races.agents()
        """Agent of mbarrier.init, which fence.mbarrier_init publishes alone."""
        self.loads, self.stores = races.agents(), races.agents()
        """Agents of tcgen05.ld and tcgen05.st, which run on until their wait."""
        self.time = {self.inits: 0, self.loads: 1, self.stores: 1}
        self.now = 1
        self.clock: Clock = {}
        self.apart: dict[int, Clock] = {}
        """What groups of lanes have learnt that the others have not."""
        self.fenced: Clock = {}
        """What a relaxed arrival publishes: what a fence released before it."""
        self.bulk: dict[int, Any] = {}
        """Bulk groups by lane."""
        self.polling = False
        self.since_poll = 1 << 20
        """Instructions since a barrier answered that it was not complete."""
        self.allotted = 0
        """Registers of each thread."""
        self.cluster_generation: int | None = None
        self.copies_open: list[Any] = []
        self.copies_committed: list[Any] = []

    @property
    def done(self) -> bool:
        """Whether all lanes have returned."""
        return not self.groups and not self.waiting and not self.parked

    def where(self) -> str:
        """For messages."""
        return f"CTA {self.cta.index} warp {self.index}"

    # ---------------------------------------------------------------- happens-before

    def view(self, mask: int) -> Clock:
        """What all lanes of a mask know."""
        if not self.apart:
            return self.clock
        found = self.apart.get(mask)
        if found is not None:
            return found
        covering = [clock for lanes, clock in self.apart.items() if lanes & mask == mask]
        if not covering:
            return self.clock
        merged = dict(self.clock)
        for clock in covering:
            join(merged, clock)
        return merged

    def known_by_any(self) -> Clock:
        """What some lane knows of others: what a collective instruction comes after."""
        known = dict(self.clock)
        for clock in self.apart.values():
            join(known, clock)
        return known

    def acquire(self, mask: int, clock: Clock) -> None:
        """Lanes learn what someone published."""
        if mask == FULL:
            join(self.clock, clock)
            for other in self.apart.values():
                join(other, clock)
            return
        if mask not in self.apart:
            self.apart[mask] = dict(self.view(mask))
        for lanes, other in self.apart.items():
            if lanes & mask == lanes:
                join(other, clock)

    def release(self, mask: int) -> Clock:
        """What lanes publish: all they know, and their own accesses up to now."""
        published = dict(self.view(mask))
        for lanes, clock in self.apart.items():
            if lanes & mask:  # each lane publishes what it knows
                join(published, clock)
        if mask == FULL:
            published[self.agent] = self.now
        else:
            for lane in lanes_of(mask):
                published[self.agent + 1 + lane] = self.now
        published[self.inits] = self.time[self.inits]
        self.now += 1
        return published

    def meet(self, mask: int) -> None:
        """Lanes see one another's accesses, as after bar.warp.sync."""
        if mask == FULL:
            for clock in self.apart.values():
                join(self.clock, clock)
            self.apart.clear()
            self.clock[self.agent] = self.now
            self.clock[self.inits] = self.time[self.inits]
            self.now += 1
            return
        merged = dict(self.view(mask))
        for lanes, clock in self.apart.items():
            if lanes & mask:
                join(merged, clock)
        for lane in lanes_of(mask):
            merged[self.agent + 1 + lane] = self.now
        self.now += 1
        self.apart[mask] = merged

    def access(self, mask: int, what: str = "") -> Access:
        """The lanes' accesses from the current instruction."""
        line = self.line
        event = self.races.event(self.agent, self.now, f"{self.where()} line {line}{what}", line)
        return Access(self.view(mask), event, self.agent)

    def asynchronous(self, agent: int, what: str) -> Access:
        """Accesses that go on until a wait: tcgen05.ld (``loads``) and tcgen05.st (``stores``)."""
        event = self.races.event(agent, self.time[agent], f"{self.where()} line {self.line} ({what})")
        return Access(self.view(FULL), event, agent)

    def wait_for(self, agent: int) -> None:
        """Its asynchronous accesses are complete."""
        self.acquire(FULL, {agent: self.time[agent]})
        self.time[agent] += 1

    def lane(self, mask: int) -> int:
        """How an access by these lanes is remembered."""
        return lowest(mask) if mask & (mask - 1) == 0 else TOGETHER

    @property
    def line(self) -> int:
        """Of the current instruction in the PTX."""
        return self.cta.launch.program.kernel.code[self.pc].line
