"""How time is measured.

Device time: each contender's calls are captured in one CUDA graph that walks through rotating
input sets, together larger than the L2 cache, so that a call finds its operands in memory as a
layer of a model does. A sample replays that graph twice and times the second: the first keeps the
GPU busy while the host queues the second, and leaves the clock and the caches as steady work
does. Contenders take turns, round after round, and a ratio is the median of the rounds' ratios,
so a drift of the clock meets all alike.

Host time: the wall time of eager calls with no sync in between, few enough that the launch queue
never fills.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from .work import Work

Call = Callable[[int], object]
"""One call on input set i."""

L2_MULTIPLE = 2
"""Input sets together exceed L2 by this factor, where the largest number of sets allows."""
MAX_SETS = 1024
WINDOW_US = 2000.0
"""A graph should run about this long, so that what surrounds it does not count."""
MAX_CALLS = 1024
FASTEST_BYTES_PER_US = 8.0e6
FASTEST_FLOPS_PER_US = 1.0e9
"""Both only for the guess of a call's time before anything has run."""
SHORTEST_CALL_US = 1.5

HOST_CALLS = 20
HOST_BATCHES = 15
HOST_BUDGET_US = 60e3
"""Device time that the eager calls of one contender may take; slow ones get fewer calls."""


@dataclass(frozen=True)
class Plan:
    """How one case is timed.

    Attributes:
        sets: rotating input sets.
        calls: calls in one graph, a multiple of ``sets``.
        budget_us: device time that all rounds together should take.
        min_rounds: fewest rounds, whatever the budget.
        max_rounds: most rounds.
    """

    sets: int
    calls: int
    budget_us: float
    min_rounds: int
    max_rounds: int


@dataclass(frozen=True)
class Timing:
    """Time of one call: median and 10th and 90th percentile over the rounds, in µs."""

    median_us: float
    p10_us: float
    p90_us: float
    samples_us: tuple[float, ...]


@dataclass(frozen=True)
class Result:
    """A contender's timing, or why there is none."""

    timing: Timing | None
    host_us: float | None = None
    failure: str | None = None


class Device(Protocol):
    """The few things that timing needs of a GPU; tests put a clockwork in its place."""

    def capture(self, calls: Callable[[], None]) -> Callable[[], None]:
        """Record ``calls`` in a graph; returns what replays it."""

    def sample(self, replay: Callable[[], None]) -> Callable[[], float]:
        """Queue an untimed and a timed replay; returns what reads the µs once all is idle."""

    def synchronize(self) -> None:
        """Wait until the device is idle."""

    @property
    def failures(self) -> tuple[type[Exception], ...]:
        """What a call that can't run here raises."""


class CudaDevice:
    """The current GPU."""

    def capture(self, calls: Callable[[], None]) -> Callable[[], None]:
        """See :class:`Device`."""
        import torch

        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            calls()
        return graph.replay

    def sample(self, replay: Callable[[], None]) -> Callable[[], float]:
        """See :class:`Device`."""
        import torch

        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        replay()
        start.record()
        replay()
        end.record()
        return lambda: 1000.0 * float(start.elapsed_time(end))

    def synchronize(self) -> None:
        """See :class:`Device`."""
        import torch

        torch.cuda.synchronize()

    @property
    def failures(self) -> tuple[type[Exception], ...]:
        """See :class:`Device`."""
        from triton.errors import TritonError

        # NotImplementedError, BackendUnavailableError and torch's out-of-memory error are
        # RuntimeErrors.
        wrong = (TypeError, ValueError, AttributeError, ImportError, AssertionError)
        return (RuntimeError, OSError, TritonError, *wrong)


def num_sets(bytes_per_set: int, l2_bytes: int) -> int:
    """Sets that together exceed L2 by ``L2_MULTIPLE``, at least 2 unless one alone does."""
    wanted = L2_MULTIPLE * l2_bytes
    if bytes_per_set >= wanted:
        return 1
    return max(2, min(-(-wanted // max(bytes_per_set, 1)), MAX_SETS))


def plan(sets: int, job: Work, quick: bool) -> Plan:
    """Calls a graph and rounds, from a guess of the time that one call of ``job`` takes."""
    guess_us = max(job.bytes / FASTEST_BYTES_PER_US, job.flops / FASTEST_FLOPS_PER_US, SHORTEST_CALL_US)
    passes = max(1, round(min(WINDOW_US / guess_us, MAX_CALLS) / sets))
    if quick:
        return Plan(sets, passes * sets, 150e3, 5, 20)
    return Plan(sets, passes * sets, 300e3, 5, 40)


def summarize(samples_us: Sequence[float]) -> Timing:
    """Median and spread."""
    p10, median, p90 = np.percentile(samples_us, (10, 50, 90)).tolist()
    return Timing(median, p10, p90, tuple(samples_us))


def ratio(baseline: Timing, contender: Timing) -> float:
    """How many times as fast a contender is: the median of baseline over contender."""
    return statistics.median(b / c for b, c in zip(baseline.samples_us, contender.samples_us, strict=True))


def host_calls(device_us: float) -> tuple[int, int]:
    """(calls a batch, batches) for eager calls that take the device this long."""
    affordable = max(5, int(HOST_BUDGET_US / max(device_us, 1e-9)))
    calls = min(HOST_CALLS, max(3, affordable // 3))
    return calls, min(HOST_BATCHES, max(1, affordable // calls))


def host_us(
    call: Call,
    sets: int,
    device_us: float,
    synchronize: Callable[[], None],
) -> float:
    """Median over batches of an eager call's mean wall time, in µs; no garbage is collected."""
    batches = []
    calls, wanted = host_calls(device_us)
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(wanted):
            synchronize()
            start = time.perf_counter()
            for i in range(calls):
                call(i % sets)
            batches.append((time.perf_counter() - start) / calls * 1e6)
    finally:
        if collecting:
            gc.enable()
    synchronize()
    return statistics.median(batches)


def measure(
    calls: Mapping[str, Call],
    plan: Plan,
    device: Device,
    *,
    host: Sequence[str] = (),
) -> dict[str, Result]:
    """Time the contenders against one another.

    Args:
        calls: name to call; a call may raise ``device.failures``, which drops that contender alone.
        plan: how.
        device: where.
        host: names whose eager host time is wanted too.
    """
    results: dict[str, Result] = {}
    replays: dict[str, Callable[[], None]] = {}
    host_times: dict[str, float] = {}
    for name, call in calls.items():
        try:
            # Compiles, and lets libraries allocate what they keep, before capture.
            for i in range(min(plan.sets, 2)):
                call(i)
            device.synchronize()
            replays[name] = device.capture(_walk(call, plan))
            read = device.sample(replays[name])
            device.synchronize()
            if name in host:
                host_times[name] = host_us(call, plan.sets, read() / plan.calls, device.synchronize)
        except device.failures as error:
            replays.pop(name, None)
            results[name] = Result(None, failure=one_line(error))
            # A broken context fails here again, and then there is nothing left to measure.
            device.synchronize()

    samples: dict[str, list[float]] = {name: [] for name in replays}
    names = list(replays)
    rounds = done = 0
    while names and (done == 0 or done < rounds):
        turn = done % len(names)
        readers = {name: device.sample(replays[name]) for name in names[turn:] + names[:turn]}
        device.synchronize()
        for name, read in readers.items():
            samples[name].append(read() / plan.calls)
        done += 1
        if done == 1:
            # Each sample replays twice.
            round_us = 2 * plan.calls * sum(s[0] for s in samples.values())
            rounds = max(plan.min_rounds, min(int(plan.budget_us / max(round_us, 1e-9)), plan.max_rounds))
    for name in names:
        results[name] = Result(summarize(samples[name]), host_times.get(name))
    return {name: results[name] for name in calls}


def _walk(call: Call, plan: Plan) -> Callable[[], None]:
    def walk() -> None:
        for i in range(plan.calls):
            call(i % plan.sets)

    return walk


def one_line(error: BaseException) -> str:
    """Type and message of an error, shortened."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
