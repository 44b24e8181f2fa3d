"""Races, found by happens-before.

Whoever acts has a vector clock: the warps, each CTA's tcgen05 pipe, every bulk copy. An access is
an event of its agent at a time of that agent's clock. Memory remembers for each cell who wrote it
last and who read it since; an access that conflicts with a remembered one, and whose agent does not
know of it, is a race, whatever the order of this very run.

The 32 lanes of a warp share a clock, for they mostly act alike, but what one lane does alone the
others know only after ``bar.warp.sync`` or a barrier. So a warp takes 33 agents: one for what all
lanes know of one another, and one a lane for what a lane that acted alone has published.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

Clock = dict[int, int]
"""Vector clock: the latest time known of each agent."""

LANE_BITS = 6
TOGETHER = 63
"""In place of a lane: several lanes at once, or an agent that has none."""

WARP_AGENTS = 33
Cells = "slice | np.ndarray"


def join(into: Clock, other: Clock) -> None:
    """``into`` learns what ``other`` knows."""
    for agent, time in other.items():
        if into.get(agent, 0) < time:
            into[agent] = time


@dataclass(frozen=True)
class Event:
    """Accesses of an agent at a time, from one place of the program."""

    agent: int
    time: int
    who: str
    line: int = 0


@dataclass(frozen=True)
class Race:
    """Two accesses that nothing orders; ``kind`` names both, like ``read/write``."""

    kind: str
    where: str
    mine: Event
    other: Event

    def __str__(self) -> str:
        mine, other = self.kind.split("/")
        return f"race in {self.where}: {self.mine.who} {mine}s what {self.other.who} {other}s, and nothing orders them"


@dataclass
class Access:
    """Who accesses memory: what it knows, and the event that its accesses count as."""

    clock: Clock
    event: int
    agent: int
    in_order: bool = True
    """Whether the agent's own earlier accesses precede this one; not those of copies that run side
    by side."""


@dataclass
class Races:
    """All events of a launch, and the races among them."""

    events: list[Event] = field(default_factory=lambda: [Event(0, 0, "before the launch")])
    found: dict[tuple[str, str, str], Race] = field(default_factory=dict)
    _agents: int = 1
    _known: dict[tuple[int, int, str], int] = field(default_factory=dict)

    def agents(self, count: int = 1) -> int:
        """The first of so many new agents."""
        first = self._agents
        self._agents += count
        return first

    def event(self, agent: int, time: int, who: str, line: int = 0) -> int:
        """The number of an event, shifted to leave room for the lane."""
        key = (agent, time, who)
        number = self._known.get(key)
        if number is None:
            number = self._known[key] = len(self.events)
            self.events.append(Event(agent, time, who, line))
        return number << LANE_BITS

    def fresh(self, agent: int, time: int, who: str) -> int:
        """As ``event``, never shared with another access of the same place and time."""
        self.events.append(Event(agent, time, who))
        return len(self.events) - 1 << LANE_BITS

    def knows(self, clock: Clock, cell: int) -> bool:
        """Whether an agent with this clock comes after a remembered access."""
        event = self.events[cell >> LANE_BITS]
        if clock.get(event.agent, 0) >= event.time:
            return True
        lane = cell & TOGETHER
        return lane != TOGETHER and clock.get(event.agent + 1 + lane, 0) >= event.time

    def report(self, kind: str, where: str, mine: int, other: int) -> None:
        """Remember a race, once for each pair of places."""
        made = Race(kind, where, self.events[mine >> LANE_BITS], self.events[other >> LANE_BITS])
        self.found.setdefault((kind, made.mine.who, made.other.who), made)


class Shadow:
    """For each cell of a memory, its last writer and its last readers.

    Args:
        races: where events are numbered and races reported.
        cells: bytes of shared or global memory, columns of tensor memory.
        name: of the memory, for messages.
        readers: how many agents' reads are remembered side by side; with more agents, the last
            ones.
    """

    def __init__(self, races: Races, cells: int, name: str, readers: int = 8) -> None:
        self.races, self.name, self.readers = races, name, readers
        self.written = np.zeros(cells, np.int32)
        self.read_by = np.zeros((readers, cells), np.int32)
        self._planes: dict[int, int] = {}

    def read(self, cells: slice | np.ndarray, access: Access, lanes: int | np.ndarray = TOGETHER) -> None:
        """An agent reads cells; ``lanes`` has one entry a cell, or is one for all."""
        self._check("read/write", self.written[cells], access, lanes)
        plane = self._planes.get(access.agent)
        if plane is None:
            plane = self._planes[access.agent] = len(self._planes) % self.readers
        self.read_by[plane][cells] = access.event | lanes

    def write(
        self, cells: slice | np.ndarray, access: Access, lanes: int | np.ndarray = TOGETHER, *, repeats: bool = False
    ) -> None:
        """An agent writes cells. ``repeats``: the bytes that are there already, which other threads
        may do at the same line."""
        seen = self.written[cells]
        if repeats:
            line = self.races.events[access.event >> LANE_BITS].line
            if all(self.races.events[int(value) >> LANE_BITS].line == line for value in np.unique(seen)):
                seen = seen[:0]
        self._check("write/write", seen, access, lanes)
        for plane in self.read_by[: len(self._planes)]:
            self._check("write/read", plane[cells], access, lanes)
        self.written[cells] = access.event | lanes

    def mark(self, written: np.ndarray, read: np.ndarray, event: int) -> None:
        """Remember accesses that were made before the launch began, without a check."""
        self.written[written] = event | TOGETHER
        self.read_by[0][read] = event | TOGETHER
        self._planes[-1] = 0

    def _check(self, kind: str, seen: np.ndarray, access: Access, lanes: int | np.ndarray) -> None:
        if seen.size == 0:
            return
        low, high = int(seen.min()), int(seen.max())
        if high == 0:
            return
        values: Iterable[int] = (low,) if low == high else map(int, np.unique(seen))
        for value in values:
            if value == 0 or self.races.knows(access.clock, value) or self._own(value, seen, access, lanes):
                continue
            self.races.report(kind, self.name, access.event, value)

    def _own(self, value: int, seen: np.ndarray, access: Access, lanes: int | np.ndarray) -> bool:
        """Whether a remembered access is the agent's own, and the same lane's."""
        if self.races.events[value >> LANE_BITS].agent != access.agent:
            return False
        if not access.in_order:
            return value >> LANE_BITS == access.event >> LANE_BITS
        lane = value & TOGETHER
        if isinstance(lanes, int):
            return lane == lanes
        return bool((lanes[seen == value] == lane).all())
