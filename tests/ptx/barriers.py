"""mbarriers, named and cluster barriers, fences, griddepcontrol and setmaxnreg: what orders threads
and copies.

Every barrier carries clocks: who arrives publishes what it knows, who waits learns what the
completed phase has gathered. A relaxed arrival publishes only what a fence released before it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ptx.errors import Fault
from ptx.instructions import YIELD, Closure, instruction, unknown
from ptx.loads import need_all, own_offset
from ptx.memory import OFFSET_MASK, RANK_SHIFT
from ptx.operands import Operands, same
from ptx.parser import Instruction
from ptx.races import TOGETHER, Clock, join
from ptx.warp import FULL, Wait, Warp, lanes_of, lowest

MAX_TRANSACTIONS = (1 << 20) - 1
"""PTX ISA, mbarrier: the range of tx-count."""


@dataclass
class Mbarrier:
    """PTX ISA, mbarrier: a phase ends when no arrival and no transaction is outstanding.

    ``gathered`` is what arrivals have published, ``completed`` what the last complete phase had.
    ``agent`` stands for the copies that complete a phase, its time for the number of the phase.
    """

    count: int
    agent: int
    init: int
    pending: int = 0
    transactions: int = 0
    phase: int = 0
    gathered: Clock = field(default_factory=dict)
    completed: Clock = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.pending = self.count

    def arrive(self, arrivals: int, transactions: int, clock: Clock) -> None:
        """Count arrivals and change the transactions outstanding; may end the phase."""
        self.pending -= arrivals
        self.transactions += transactions
        join(self.gathered, clock)
        if self.pending < 0:
            raise Fault(f"mbarrier: expected {self.count} arrivals in a phase, got {self.count - self.pending}")
        if abs(self.transactions) > MAX_TRANSACTIONS:
            raise Fault(f"mbarrier: {self.transactions} outstanding bytes are outside of the 20 bits of tx-count")
        if self.pending == 0 and self.transactions == 0:
            self.phase += 1
            self.pending = self.count
            self.completed = {**self.gathered, self.agent: self.phase}
            self.gathered = dict(self.completed)


def find(warp: Warp, address: int, clock: Clock, what: str) -> Mbarrier:
    """The mbarrier at a shared address of the cluster, and whether its initialisation is known
    of."""
    cta = warp.cta.cluster.cta(address >> RANK_SHIFT, what)
    offset = cta.shared.offset(address & OFFSET_MASK, 8, what)
    barrier = cta.mbarriers.get(offset)
    if barrier is None:
        raise Fault(f"{what}: no mbarrier was initialised at offset {offset} of CTA {cta.index}")
    races = warp.races
    if not races.knows(clock, barrier.init):
        mine = races.event(warp.agent, warp.now, f"{warp.where()} line {warp.line}")
        races.report("use/initialise", f"{cta.shared.name}, mbarrier at {offset}", mine, barrier.init)
    return barrier


@instruction("mbarrier.init")
def init(operands: Operands, ins: Instruction) -> Closure:
    """Makes an mbarrier that expects a number of arrivals."""
    address, count = operands.address(ins.operands[0]), operands.value(ins.operands[1], "u32")

    def execute(warp: Warp, mask: int) -> None:
        addresses, counts = address(warp), count(warp)
        for lane in lanes_of(mask):
            offset = own_offset(warp.cta, int(addresses[lane]), 8, "mbarrier.init")
            if offset % 8:
                raise Fault(f"mbarrier.init: expected an address aligned to 8 bytes, got offset {offset}")
            warp.time[warp.inits] += 1
            event = warp.races.event(warp.inits, warp.time[warp.inits], f"{warp.where()} line {ins.line}", ins.line)
            learnt = {warp.inits: warp.time[warp.inits]}
            join(warp.clock, learnt)
            for clock in warp.apart.values():
                join(clock, learnt)
            warp.cta.mbarriers[offset] = Mbarrier(int(counts[lane]), warp.races.agents(), event | TOGETHER)

    return execute


@instruction("mbarrier.inval")
def invalidate(operands: Operands, ins: Instruction) -> Closure:
    """Its memory may be used otherwise again."""
    address = operands.address(ins.operands[0])

    def execute(warp: Warp, mask: int) -> None:
        for lane in lanes_of(mask):
            where = int(address(warp)[lane])
            barrier = find(warp, where, warp.view(mask), "mbarrier.inval")
            if barrier.transactions:
                raise Fault(f"mbarrier.inval: {barrier.transactions} bytes are still outstanding")
            offset = own_offset(warp.cta, where, 8, "mbarrier.inval")
            del warp.cta.mbarriers[offset]
            warp.cta.invalidated[offset] = warp.races.event(
                warp.agent, warp.now, f"{warp.where()} line {warp.line}", warp.line
            )

    return execute


@instruction("mbarrier.try_wait", "mbarrier.test_wait")
def try_wait(operands: Operands, ins: Instruction) -> Closure:
    """Whether the phase of a parity is complete.

    With a time limit the thread may be suspended, so the lanes wait; without one the answer comes
    at once, and after a no others run first.
    """
    if "parity" not in ins.parts:
        raise unknown(ins)
    put, address = operands.put_mask(ins.operands[0]), operands.address(ins.operands[1])
    parity, suspends = operands.value(ins.operands[2], "u32"), len(ins.operands) > 3
    acquires = "relaxed" not in ins.parts

    def execute(warp: Warp, mask: int) -> Any:
        where = same(address(warp), mask, "mbarrier.try_wait")
        wanted = same(parity(warp), mask, "mbarrier.try_wait")
        barrier = find(warp, where, warp.view(mask), "mbarrier.try_wait")

        def complete() -> bool:
            return barrier.phase & 1 != wanted

        def succeed() -> None:
            put(warp, mask, FULL)
            if acquires:
                warp.acquire(mask, barrier.completed)

        if complete():
            return succeed()
        if suspends:
            offset = where & OFFSET_MASK
            return Wait(
                complete,
                succeed,
                f"mbarrier at {offset:#x}: {barrier.pending} arrivals and {barrier.transactions} bytes outstanding",
            )
        put(warp, mask, 0)
        warp.polling = True
        return YIELD

    return execute


@instruction("mbarrier.arrive", "mbarrier.expect_tx", "mbarrier.complete_tx")
def arrive(operands: Operands, ins: Instruction) -> Closure:
    """Arrivals, of this CTA or another of the cluster; expected bytes."""
    if "noComplete" in ins.parts or ins.parts[1] == "complete_tx":
        raise unknown(ins)
    only_expects = ins.parts[1] == "expect_tx"
    address_at = 0 if only_expects or len(ins.operands) == 1 else 1
    address = operands.address(ins.operands[address_at])
    amount = operands.value(ins.operands[address_at + 1], "u32") if len(ins.operands) > address_at + 1 else None
    expects = "expect_tx" in ins.parts
    releases = "relaxed" not in ins.parts

    def execute(warp: Warp, mask: int) -> None:
        addresses = address(warp)
        amounts = amount(warp) if amount else None
        view = warp.view(mask)
        clock = warp.release(mask) if releases else dict(warp.fenced)
        for lane in lanes_of(mask):
            number = int(amounts[lane]) if amounts is not None else 1
            barrier = find(warp, int(addresses[lane]), view, ins.name)
            if expects:
                # The bytes count before the arrival, or the phase could end in between.
                barrier.arrive(0 if only_expects else 1, number, clock)
            else:
                barrier.arrive(number, 0, clock)
        warp.cta.launch.progressed()

    return execute


@instruction("mapa")
def map_address(operands: Operands, ins: Instruction) -> Closure:
    """The address in another CTA of the cluster that corresponds to one's own."""
    if ins.type != "u32":
        raise unknown(ins)
    put, address, rank = operands.put(ins.operands[0], "u32"), *(operands.value(o, "u32") for o in ins.operands[1:])

    def execute(warp: Warp, mask: int) -> None:
        ranks = rank(warp)
        for lane in lanes_of(mask):
            warp.cta.cluster.cta(int(ranks[lane]), "mapa")
        put(warp, mask, address(warp) & np.uint32(OFFSET_MASK) | ranks << np.uint32(RANK_SHIFT))

    return execute


# ---------------------------------------------------------------- named and cluster barriers


@dataclass
class Barrier:
    """Threads that have arrived, and what they published."""

    arrived: int = 0
    generation: int = 0
    gathered: Clock = field(default_factory=dict)
    completed: Clock = field(default_factory=dict)

    def arrive(self, threads: int, expected: int, clock: Clock, what: str) -> None:
        """Count threads; the last one completes the barrier."""
        self.arrived += threads
        join(self.gathered, clock)
        if self.arrived > expected:
            raise Fault(f"{what}: expected {expected} threads, got {self.arrived}")
        if self.arrived == expected:
            self.arrived = 0
            self.generation += 1
            self.completed, self.gathered = self.gathered, {}


@instruction("bar.sync", "bar.arrive", "barrier.sync", "barrier.arrive", "bar.cta", "barrier.cta")
def named(operands: Operands, ins: Instruction) -> Closure:
    """One of a CTA's 16 barriers, for all its threads or a number of them."""
    arrives_only = "arrive" in ins.parts
    if not arrives_only and "sync" not in ins.parts:
        raise unknown(ins)
    aligned = ins.parts[0] == "bar" or "aligned" in ins.parts
    number = operands.value(ins.operands[0], "u32")
    threads = operands.value(ins.operands[1], "u32") if len(ins.operands) > 1 else None

    def execute(warp: Warp, mask: int) -> Any:
        if aligned:
            need_all(mask, ins)
        cta = warp.cta
        index = same(number(warp), mask, ins.name)
        if index > 15:
            raise Fault(f"{ins.name}: expected a barrier from 0 to 15, got {index}")
        expected = same(threads(warp), mask, ins.name) if threads else cta.launch.threads
        if expected % 32 or not expected:
            raise Fault(f"{ins.name}: expected a multiple of 32 threads, got {expected}")
        barrier = cta.barriers[index]
        generation = barrier.generation
        barrier.arrive(mask.bit_count(), expected, warp.release(mask), f"{ins.name} {index}")
        cta.launch.progressed()
        if arrives_only:
            return None

        def resume() -> None:
            warp.acquire(mask, barrier.completed)
            warp.meet(mask)

        return Wait(
            lambda: barrier.generation != generation,
            resume,
            f"barrier {index}: {barrier.arrived} of {expected} threads have arrived",
        )

    return execute


@instruction("barrier.cluster")
def cluster(operands: Operands, ins: Instruction) -> Closure:
    """All threads of all CTAs of the cluster arrive, then wait."""
    if "arrive" in ins.parts:

        def execute(warp: Warp, mask: int) -> None:
            if "aligned" in ins.parts:
                need_all(mask, ins)
            clock = dict(warp.fenced) if "relaxed" in ins.parts else warp.release(mask)
            warp.cluster_generation = warp.cta.cluster.barrier.generation
            expected = warp.cta.launch.threads * len(warp.cta.cluster.ctas)
            warp.cta.cluster.barrier.arrive(mask.bit_count(), expected, clock, ins.name)
            warp.cta.launch.progressed()

        return execute

    def wait(warp: Warp, mask: int) -> Wait:
        if "aligned" in ins.parts:
            need_all(mask, ins)
        barrier = warp.cta.cluster.barrier
        arrived_in = warp.cluster_generation
        if arrived_in is None:
            raise Fault("barrier.cluster.wait: expected an arrival before it")

        def resume() -> None:
            warp.acquire(mask, barrier.completed)
            warp.meet(mask)

        return Wait(lambda: barrier.generation != arrived_in, resume, "the cluster's barrier")

    return wait


# ---------------------------------------------------------------- fences


@instruction("fence", "membar")
def fence(operands: Operands, ins: Instruction) -> Closure:
    """What a later relaxed arrival publishes, and what the async proxy sees."""
    if ins.parts[:2] == ("fence", "mbarrier_init"):

        def publish_inits(warp: Warp, mask: int) -> None:
            join(warp.fenced, {warp.inits: warp.time[warp.inits]})

        return publish_inits
    if ins.parts[:3] == ("fence", "proxy", "async"):

        def publish_to_async(warp: Warp, mask: int) -> None:
            warp.cta.shared.fence(warp.access(mask), lanes_of(mask))

        return publish_to_async
    if ins.parts[0] == "membar" or ins.parts[1] in ("acq_rel", "sc", "release"):

        def publish_all(warp: Warp, mask: int) -> None:
            join(warp.fenced, warp.release(mask))

        return publish_all
    if ins.parts[1] == "acquire":
        return lambda warp, mask: None
    raise unknown(ins)


# ---------------------------------------------------------------- grids and registers


@instruction("griddepcontrol")
def grid_dependency(operands: Operands, ins: Instruction) -> Closure:
    """wait: what the grid before wrote is visible to these lanes from here on. launch_dependents
    only lets others start."""
    if ins.parts[1] == "launch_dependents":
        return lambda warp, mask: None

    def wait(warp: Warp, mask: int) -> None:
        launch = warp.cta.launch
        launch.memory.show_hidden()
        warp.acquire(mask, launch.predecessor)

    return wait


@instruction("setmaxnreg")
def set_registers(operands: Operands, ins: Instruction) -> Closure:
    """Registers are handed back to the CTA's pool, or awaited from it."""
    count = operands.value(ins.operands[0], "u32")
    grows = ins.parts[1] == "inc"

    def execute(warp: Warp, mask: int) -> Any:
        need_all(mask, ins)
        wanted = same(count(warp), mask, "setmaxnreg")
        if not 24 <= wanted <= 256 or wanted % 8:
            raise Fault(f"setmaxnreg: expected a multiple of 8 from 24 to 256, got {wanted}")
        cta = warp.cta
        if wanted > warp.allotted if not grows else wanted < warp.allotted:
            raise Fault(f"setmaxnreg.{ins.parts[1]}: asked for {wanted} registers, the warp has {warp.allotted}")

        def enough() -> bool:
            return cta.free_registers >= 32 * (wanted - warp.allotted)

        def take() -> None:
            cta.free_registers -= 32 * (wanted - warp.allotted)
            warp.allotted = wanted

        if enough():
            return take()
        return Wait(enough, take, f"{32 * (wanted - warp.allotted)} registers, {cta.free_registers} are free")

    return execute


def leader_of(mask: int, seed: int) -> int:
    """The lane that elect.sync chooses."""
    lanes = lanes_of(mask)
    return lanes[np.random.default_rng((seed, mask)).integers(len(lanes))] if len(lanes) > 1 else lowest(mask)
