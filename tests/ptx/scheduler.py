"""A launch: clusters one after another, warps in an order drawn from a seed, preemptible after
every instruction.

Asynchronous operations (copies, the tensor core) land at a time of the scheduler's choice:

- ``late``: when no warp can go on, so that whoever should have waited has long gone wrong;
- ``immediate``: as soon as they are issued;
- ``random``: at any time.

Races are found whatever the order; it decides which values a faulty program computes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ptx.barriers import leader_of
from ptx.cta import Cluster
from ptx.errors import Diverged, Fault, Hang
from ptx.instructions import EXIT, YIELD
from ptx.memory import GlobalMemory
from ptx.program import Program
from ptx.races import Clock, Races
from ptx.tcgen05 import Pipe
from ptx.warp import FULL, Wait, Waiting, Warp

COMPLETIONS = ("late", "immediate", "random")
QUANTA = (1, 2, 5, 20, 100, 400)
"""Instructions that a warp may run before others do."""

LOOP = 32
"""Instructions that a loop around a barrier has at most."""

PATIENCE = 64
"""Rounds in which nothing happens before a launch counts as hung."""


@dataclass
class Launch:
    """One kernel launch.

    Attributes:
        program: the kernel.
        params: its parameters, as the driver would copy them.
        memory: the buffers it may touch.
        grid: CTAs along x, y, z.
        threads: of a CTA.
        cluster: CTAs of a cluster, where ``clusters`` does not list them.
        shared_bytes: dynamic, and the static of the program.
        clusters: first CTA and shape of each cluster, for a launch that mixes shapes.
        predecessor: what griddepcontrol.wait teaches.
        completion: when asynchronous operations land.
    """

    program: Program
    params: np.ndarray
    memory: GlobalMemory
    grid: tuple[int, int, int]
    threads: int
    cluster: tuple[int, int, int] = (1, 1, 1)
    shared_bytes: int = 0
    clusters: list[tuple[tuple[int, int], tuple[int, int, int]]] | None = None
    predecessor: Clock = field(default_factory=dict)
    completion: str = "late"
    seed: int = 0
    races: Races = field(default_factory=Races)
    tensor_maps: dict[int, Any] = field(default_factory=dict)
    atomics: dict[Any, Clock] = field(default_factory=dict)
    instructions: int = 0

    def __post_init__(self) -> None:
        if self.completion not in COMPLETIONS:
            raise ValueError(f"completion: expected one of {COMPLETIONS}, got {self.completion!r}")
        needed = self.program.kernel.parameter_bytes
        if self.params.size < needed:
            raise ValueError(f"params: expected {needed} bytes, got {self.params.size}")
        self.rng = np.random.default_rng(self.seed)
        self.landing: list[Callable[[], None]] = []
        self.pipes: list[Pipe] = []
        self.events = 0
        self.leader = functools.cache(lambda mask: leader_of(mask, self.seed))
        self.shared_bytes += self.program.static_bytes

    # ---------------------------------------------------------------- what instructions tell

    def post(self, land: Callable[[], None]) -> None:
        """An asynchronous operation was issued."""
        self.events += 1
        self.landing.append(land)
        if self.completion == "immediate":
            self._settle()

    def issued(self, pipe: Pipe) -> None:
        """The same, of the tensor core."""
        self.events += 1
        if pipe not in self.pipes:
            self.pipes.append(pipe)
        if self.completion == "immediate":
            self._settle()

    def progressed(self) -> None:
        """Someone may be able to go on."""
        self.events += 1

    # ---------------------------------------------------------------- running

    def run(self) -> None:
        """All clusters.

        Raises:
            Fault: the program broke a rule, or hangs. Races are gathered in ``races``.
        """
        clusters = self.clusters
        if clusters is None:
            width, height, _ = self.cluster
            clusters = [
                ((x, y), self.cluster) for y in range(0, self.grid[1], height) for x in range(0, self.grid[0], width)
            ]
        for at in self.rng.permutation(len(clusters)):
            first, shape = clusters[int(at)]
            self._run_cluster(Cluster(self, first, shape))

    def _run_cluster(self, cluster: Cluster) -> None:
        warps = [warp for cta in cluster.ctas for warp in cta.warps]
        self.pipes = []
        idle = 0
        while live := [warp for warp in warps if not warp.done]:
            before = self.events
            for at in self.rng.permutation(len(live)):
                self._run_warp(live[int(at)])
                if self.completion == "random" and self.rng.random() < 0.3:
                    self._land_one()
            if self.events != before:
                idle = 0
                continue
            idle += 1
            if not self._land_one() and idle > PATIENCE:
                raise Hang("hang: nobody can go on\n" + "\n".join(self._waits(warp) for warp in live))
        self._settle()
        for cta in cluster.ctas:
            cta.check_end()

    def _land_one(self) -> bool:
        """Let one asynchronous operation act, any that may; whether there was one."""
        pipes = [pipe for pipe in self.pipes if pipe.queue]
        count = len(pipes) + len(self.landing)
        if not count:
            return False
        chosen = int(self.rng.integers(count)) if count > 1 else 0
        self.events += 1
        if chosen < len(pipes):
            pipes[chosen].step()
        else:
            self.landing.pop(chosen - len(pipes))()
        return True

    def _settle(self) -> None:
        while self._land_one():
            pass

    def _run_warp(self, warp: Warp) -> None:
        for waiting in [w for w in warp.waiting if w.wait.ready()]:
            warp.waiting.remove(waiting)
            warp.pc = waiting.pc
            waiting.wait.resume()
            warp.groups[waiting.pc + 1] = warp.groups.get(waiting.pc + 1, 0) | waiting.mask
            self.events += 1
        if not warp.groups:
            return
        quantum = QUANTA[int(self.rng.integers(len(QUANTA)))]
        started = self.instructions
        self._execute(warp, quantum)
        done = self.instructions - started
        warp.since_poll = 0 if warp.polling else warp.since_poll + done
        warp.polling = False
        if done == quantum and warp.since_poll > LOOP:
            self.events += 1  # it was stopped at work, not in a loop around a barrier

    def _execute(self, warp: Warp, quantum: int) -> None:
        """Up to so many instructions of a warp."""
        steps, groups, registers = self.program.steps, warp.groups, warp.registers
        for _ in range(quantum):
            pc = min(groups) if len(groups) > 1 else next(iter(groups))
            mask = groups.pop(pc)
            if warp.parked and pc in warp.parked:
                mask |= warp.parked.pop(pc)[0]
            step = steps[pc]
            self.instructions += 1
            active = mask
            if step.guard >= 0:
                held = registers[step.guard]
                if held is None:
                    self._fail(warp, step.source, mask, Fault("the guard is read before anything is written to it"))
                active = mask & (~held if step.negated else held)
            if step.run is None:
                self._branch(warp, pc, mask, active)
            elif not active:
                for register, anything in step.left.items():
                    if registers[register] is None:
                        registers[register] = anything
                groups[pc + 1] = groups.get(pc + 1, 0) | mask
            else:
                warp.pc = pc
                try:
                    answer = step.run(warp, active)
                except Diverged as fault:
                    warp.parked[pc] = mask, fault
                    if not groups:
                        self._check_parked(warp)
                        return
                    continue
                except Fault as fault:
                    self._fail(warp, step.source, active, fault)
                rest = mask
                if answer is EXIT:
                    rest = mask & ~active
                elif isinstance(answer, Wait):
                    if answer.ready():
                        answer.resume()
                        groups[pc + 1] = groups.get(pc + 1, 0) | mask
                        continue
                    rest = mask & ~active
                    warp.waiting.append(Waiting(pc, active, answer))
                if rest:
                    groups[pc + 1] = groups.get(pc + 1, 0) | rest
                if answer is YIELD:
                    return
            if not groups:
                self._check_parked(warp)
                return

    def _check_parked(self, warp: Warp) -> None:
        """Lanes may stand before an instruction that needs others only while these can still
        come."""
        if warp.parked and not warp.waiting:
            pc, (mask, fault) = next(iter(warp.parked.items()))
            warp.pc = pc
            self._fail(warp, self.program.steps[pc].source, mask, fault)

    def _branch(self, warp: Warp, pc: int, mask: int, active: int) -> None:
        groups, step = warp.groups, self.program.steps[pc]
        if mask & ~active:
            groups[pc + 1] = groups.get(pc + 1, 0) | mask & ~active
        if not active:
            return
        if step.choice is None:
            groups[step.target] = groups.get(step.target, 0) | active
            return
        chosen = step.choice(warp)
        for lane in range(32):
            if active >> lane & 1:
                target = step.targets[int(chosen[lane])]
                groups[target] = groups.get(target, 0) | 1 << lane

    def _fail(self, warp: Warp, source: Any, mask: int, fault: Fault) -> None:
        lanes = "" if mask == FULL else f" lanes {mask:#010x}"
        raise Fault(f"line {source.line}: {source.text[:120]}\n  {warp.where()}{lanes}: {fault}") from None

    def _waits(self, warp: Warp) -> str:
        code = self.program.kernel.code
        places = [f"line {code[w.pc].line} for {w.wait.what}" for w in warp.waiting]
        places += [f"line {code[pc].line} ({code[pc].text[:70]})" for pc in (*warp.groups, *warp.parked)]
        return f"  {warp.where()} waits at " + "; ".join(places)
