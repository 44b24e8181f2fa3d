"""The logic of measuring, with a clockwork in place of the GPU. Nothing here depends on real time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import triton

from hybrid_mxfp8.commands import bench as bench_command

BENCH = Path(__file__).resolve().parent.parent / "bench"
timing = bench_command.import_suite("timing", BENCH)
limits = bench_command.import_suite("limits", BENCH)
work = bench_command.import_suite("work", BENCH)


class Clockwork:
    """A device whose calls advance a clock by what they ask for, and whose speed drifts from round to round."""

    failures = (RuntimeError,)

    def __init__(self, drift: float = 1.0):
        self.now_us = 0.0
        self.drift = drift
        self.speed = 1.0
        self.order: list[object] = []
        self.broken = False

    def spend(self, us: float) -> None:
        self.now_us += us * self.speed

    def capture(self, calls):
        calls()

        # A function of its own, so that replays of two contenders differ.
        def replay():
            calls()

        return replay

    def sample(self, replay):
        replay()
        start = self.now_us
        replay()
        elapsed = self.now_us - start
        self.order.append(replay)
        return lambda: elapsed

    def synchronize(self):
        if self.broken:
            raise RuntimeError("device-side assert")
        self.speed *= self.drift


def test_time_of_a_call_is_that_of_the_graph_divided():
    device = Clockwork()
    plan = timing.Plan(sets=2, calls=4, budget_us=1000, min_rounds=3, max_rounds=10)
    results = timing.measure({"a": lambda i: device.spend(5), "b": lambda i: device.spend(20)}, plan, device)
    assert results["a"].timing.median_us == pytest.approx(5)
    assert results["b"].timing.median_us == pytest.approx(20)
    assert list(results) == ["a", "b"]


def test_calls_walk_through_the_sets():
    device = Clockwork()
    seen = []
    plan = timing.Plan(sets=3, calls=6, budget_us=0, min_rounds=1, max_rounds=1)
    device.capture = lambda calls: (seen.clear(), calls(), lambda: None)[2]
    timing.measure({"a": seen.append}, plan, device)
    assert seen == [0, 1, 2, 0, 1, 2]


def test_contenders_take_turns_and_begin_in_turn():
    device = Clockwork()
    plan = timing.Plan(sets=1, calls=1, budget_us=0, min_rounds=4, max_rounds=4)
    timing.measure({"a": lambda i: device.spend(1), "b": lambda i: device.spend(1)}, plan, device)
    samples = device.order[-8:]
    a, b = samples[0], samples[1]
    assert samples == [a, b, b, a, a, b, b, a]


def test_ratio_survives_a_drifting_clock():
    """Each round the device is 10 % slower; the ratio of contenders stays what it is."""
    device = Clockwork(drift=1.1)
    plan = timing.Plan(sets=1, calls=1, budget_us=0, min_rounds=9, max_rounds=9)
    results = timing.measure({"a": lambda i: device.spend(3), "b": lambda i: device.spend(6)}, plan, device)
    assert timing.ratio(results["b"].timing, results["a"].timing) == pytest.approx(2)
    assert results["a"].timing.p10_us < results["a"].timing.median_us < results["a"].timing.p90_us


@pytest.mark.parametrize(("budget_us", "rounds"), [(0, 5), (20 * 12, 12), (1e9, 40)])
def test_rounds_follow_the_budget_within_bounds(budget_us, rounds):
    device = Clockwork()
    plan = timing.Plan(sets=1, calls=1, budget_us=budget_us, min_rounds=5, max_rounds=40)
    result = timing.measure({"a": lambda i: device.spend(10)}, plan, device)["a"]
    assert len(result.timing.samples_us) == rounds


def test_a_failing_contender_drops_out_alone_and_says_why():
    device = Clockwork()

    def fail(i):
        raise RuntimeError("no kernel\n  image")

    plan = timing.Plan(sets=1, calls=1, budget_us=0, min_rounds=2, max_rounds=2)
    results = timing.measure({"bad": fail, "good": lambda i: device.spend(1)}, plan, device)
    assert results["bad"].timing is None
    assert results["bad"].failure == "RuntimeError: no kernel image"
    assert results["good"].timing.median_us == 1


def test_a_broken_device_ends_the_run():
    device = Clockwork()

    def crash(i):
        device.broken = True
        raise RuntimeError("illegal memory access")

    plan = timing.Plan(sets=1, calls=1, budget_us=0, min_rounds=1, max_rounds=1)
    with pytest.raises(RuntimeError, match="device-side assert"):
        timing.measure({"bad": crash}, plan, device)


def test_an_unexpected_error_is_not_swallowed():
    def fail(i):
        raise KeyError("a bug of ours")

    plan = timing.Plan(sets=1, calls=1, budget_us=0, min_rounds=1, max_rounds=1)
    with pytest.raises(KeyError):
        timing.measure({"bad": fail}, plan, Clockwork())


def test_host_time_is_the_median_batch_without_sync_inside():
    seconds = [0.0]
    log = []
    slow = iter([1.0] * 20 + [50.0] * 20 + [1.0] * 260)

    def call(i):
        log.append("c")
        seconds[0] += next(slow) * 1e-6

    us = timing.host_us(call, 4, 10.0, lambda: log.append("s"), clock=lambda: seconds[0])
    assert us == pytest.approx(1.0)
    assert "".join(log) == ("s" + "c" * 20) * 15 + "s"


@pytest.mark.parametrize(
    ("device_us", "calls", "batches"), [(2.0, 20, 15), (150.0, 20, 15), (1000.0, 20, 3), (30000.0, 3, 1)]
)
def test_slow_calls_get_fewer_host_calls(device_us, calls, batches):
    assert timing.host_calls(device_us) == (calls, batches)


def test_host_time_is_measured_only_where_asked():
    device = Clockwork()
    plan = timing.Plan(sets=1, calls=1, budget_us=0, min_rounds=1, max_rounds=1)
    ticks = iter(range(10**6))
    results = timing.measure(
        {"a": lambda i: device.spend(1), "b": lambda i: device.spend(1)},
        plan,
        device,
        host=["a"],
        clock=lambda: next(ticks) * 1e-6,
    )
    assert results["a"].host_us == pytest.approx(1 / timing.HOST_CALLS)
    assert results["b"].host_us is None


@pytest.mark.parametrize(
    ("set_bytes", "sets"), [(10**9, 1), (100 * 2**20, 1), (60 * 2**20, 2), (2**20, 100), (1000, 1024)]
)
def test_sets_exceed_the_cache(set_bytes, sets):
    """A cache of 50 MiB: together twice that, unless the sets would be too many."""
    assert timing.num_sets(set_bytes, 50 * 2**20) == sets


@pytest.mark.parametrize("sets", [1, 2, 7, 1024])
@pytest.mark.parametrize("job", [work.Work(1), work.Work(10**7), work.Work(10**10), work.Work(1, 4 * 10**12)])
def test_a_graph_holds_whole_walks(sets, job):
    plan = timing.plan(sets, job, quick=False)
    assert plan.calls % sets == 0
    assert 1 <= plan.calls <= max(timing.MAX_CALLS * 1.5, sets)


def test_a_sample_times_the_second_of_two_replays(monkeypatch):
    """The GPU's own timer, with recorders in place of events and graphs."""
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("event")

        def elapsed_time(self, end):
            return 0.25  # ms

    class Capturing:
        def __init__(self, graph):
            self.graph = graph

        def __enter__(self):
            log.append("begin")

        def __exit__(self, *error):
            log.append("end")

    class Graph:
        def replay(self):
            log.append("replay")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", Capturing)
    device = timing.CudaDevice()
    read = device.sample(device.capture(lambda: log.append("calls")))
    assert log == ["begin", "calls", "end", "replay", "event", "replay", "event"]
    assert read() == 250


def test_what_a_kernel_may_raise_is_known():
    failures = timing.CudaDevice().failures
    assert issubclass(torch.OutOfMemoryError, failures)
    assert issubclass(triton.runtime.errors.OutOfResources, failures)
    assert issubclass(triton.compiler.errors.CompilationError, failures)
    assert not issubclass(KeyboardInterrupt, failures)


def test_percentiles_by_hand():
    values = [40.0, 10.0, 30.0, 20.0, 50.0]
    assert timing.percentile(values, 0) == 10
    assert timing.percentile(values, 50) == 30
    assert timing.percentile(values, 90) == pytest.approx(46)
    assert timing.percentile([7.0], 10) == 7


def test_limits_are_the_slower_of_bytes_and_flops():
    hopper = limits.Limits(3.0, 2.5, 700.0, (9, 0))
    assert hopper.time_us(work.Work(3 * 10**9), "bf16") == pytest.approx(1000)
    assert hopper.time_us(work.Work(1, 7 * 10**11), "mxfp8") == pytest.approx(1000)
    assert hopper.time_us(work.Work(1, 7 * 10**11), "fp8") == pytest.approx(500)
    blackwell = limits.Limits(6.0, 6.0, 700.0, (10, 0))
    assert blackwell.time_us(work.Work(1, 7 * 10**11), "mxfp8") == pytest.approx(500)
    assert blackwell.time_us(work.Work(1, 7 * 10**11), "bf16") == pytest.approx(1000)


def test_datasheets_know_the_cards_and_no_others():
    assert limits.datasheet("NVIDIA H100 80GB HBM3") == (3.35, 989.4)
    assert limits.datasheet("NVIDIA H100 PCIe") == (2.0, 756.0)
    assert limits.datasheet("NVIDIA H200") == (4.8, 989.4)
    assert limits.datasheet("Some other card") == (None, None)
