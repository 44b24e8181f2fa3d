"""A short, repeatable life of the state machine; that it finds seeded faults; and what it once found, as plain sequences."""

from __future__ import annotations

import importlib
import json
import os
import queue
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fuzz
import fuzz_machine
import numpy as np
import pytest
import tally as tally_plugin
import tolerances
import torch
import truth
from fuzz_machine import Machine
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # the interpreter's exp(large)

BOUNDED = settings(
    max_examples=8,
    stateful_step_count=16,
    derandomize=True,
    deadline=None,
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)
CLEAN = settings(BOUNDED, phases=[Phase.generate])
"""Without the search for a shorter sequence."""

FINDING = settings(CLEAN, max_examples=60)
"""Mostly found in one or two of them, but Hypothesis also draws on the constants of modules imported so far, so that what it
draws, derandomized or not, depends on the tests before."""


def test_random_calls(interpreter: None, tally: Callable[..., None]) -> None:
    before = Counter(fuzz_machine.COUNTS)
    run_state_machine_as_test(Machine, settings=BOUNDED)
    done = fuzz_machine.COUNTS - before
    assert done["steps"] >= 8 * 16
    assert {"quantize", "multiply", "forward", "reroute"} <= set(done)
    tally("fuzz steps", done["steps"])


# ---------------------------------------------------------------- it would find


@pytest.fixture
def reference_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Faults are seeded in the reference backend: it is quick, and the judges share no code with it."""
    monkeypatch.setattr(fuzz_machine, "BACKENDS", ["reference"])


def _unwritten_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    from hybrid_mxfp8 import reference

    right = reference.write_grouped

    def wrong(values: Any, linear: Any, offsets: Any, scale_offsets: Any, out_values: Any, out_scales: Any) -> None:
        before = out_scales.clone()
        right(values, linear, offsets, scale_offsets, out_values, out_scales)
        out_scales.copy_(torch.where(out_scales == 0, before, out_scales))

    monkeypatch.setattr(reference, "write_grouped", wrong)


def _row_beyond_the_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    from hybrid_mxfp8 import reference

    right = reference.grouped_matmul

    def wrong(*arguments: Any) -> None:
        right(*arguments)
        out, used = arguments[-1], int(arguments[2][-1])
        if used < out.shape[0] and out.shape[1]:
            out[used, 0] = 0

    monkeypatch.setattr(reference, "grouped_matmul", wrong)


def _write_past_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    from hybrid_mxfp8 import reference

    right = reference.grouped_matmul

    def wrong(*arguments: Any) -> None:
        right(*arguments)
        out = arguments[-1]
        if out.untyped_storage().nbytes() > out.numel() * out.itemsize:
            torch.as_strided(out, (1,), (1,), out.storage_offset() + out.numel()).zero_()

    monkeypatch.setattr(reference, "grouped_matmul", wrong)


def _row_of_another_token(monkeypatch: pytest.MonkeyPatch) -> None:
    from hybrid_mxfp8.reference import routing as moe_reference

    right = moe_reference.route

    def wrong(
        ids: Any, experts: int, sorted_token_ids: Any, inverse_permutation: Any, layout: Any, scratch: Any = None
    ) -> None:
        right(ids, experts, sorted_token_ids, inverse_permutation, layout, scratch)
        if scratch is not None:  # as moe_forward calls it, not as the judge does
            sorted_token_ids.copy_(sorted_token_ids.roll(1))

    monkeypatch.setattr(moe_reference, "route", wrong)


def _environment_is_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    # By name: the package has a function of this name, too.
    backends, ops = (importlib.import_module(f"hybrid_mxfp8.{name}") for name in ("backends", "ops"))

    def wrong(backend: str | None) -> str:
        return backend or backends._override.get() or "auto"

    monkeypatch.setattr(backends, "requested", wrong)
    monkeypatch.setattr(ops, "requested", wrong)


FAULTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "padding is not written": _unwritten_padding,
    "a row beyond the groups is written": _row_beyond_the_groups,
    "a byte past the end is written": _write_past_the_end,
    "a row of the MoE layer is another's": _row_of_another_token,
    "the environment is not looked at": _environment_is_not_looked_at,
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_seeded_fault_is_found(name: str, reference_alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    FAULTS[name](monkeypatch)
    with pytest.raises(AssertionError):
        run_state_machine_as_test(Machine, settings=FINDING)


def test_without_one_nothing_is_found(reference_alone: None) -> None:
    run_state_machine_as_test(Machine, settings=CLEAN)


# ---------------------------------------------------------------- the long run's own workings


def test_a_round_reports_its_find(reference_alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls that led there and the error; nothing of a clean round."""
    monkeypatch.setattr(fuzz, "EXAMPLES", 1)
    monkeypatch.setattr(fuzz, "STEPS", 2)
    results: queue.Queue[Any] = queue.Queue()
    fuzz.worker(0, 5, 2, 2, False, float("inf"), results)
    assert [(seed, find) for _, seed, _, find, _ in results.queue] == [(5, ""), (7, "")]
    assert results.queue[0][2]["steps"] >= 5
    monkeypatch.setattr(fuzz, "EXAMPLES", 10)
    _unwritten_padding(monkeypatch)
    find = fuzz.run_round(5)
    assert "state.start(" in find
    assert "AssertionError" in fuzz.signature(find)


def crash_or_hang(
    number: int, seed: int, stride: int, rounds: Any, shrink: bool, deadline: float, results: Any
) -> None:
    """In place of a worker: one dies, one never ends."""
    if number == 1:
        time.sleep(600)
    results.put((number, seed, {"examples": 1, "steps": 3}, "File x\nValueError: y", 0.5))
    results.close()
    results.join_thread()
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_crash_and_a_hang_are_finds(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(fuzz, "GRACE", 0.0)
    totals, finds = fuzz.run(2, 40, 1, False, time.time() + 3, work=crash_or_hang, method="fork")
    said = capsys.readouterr().out
    assert (totals["steps"], finds) == (3, 3)
    assert "make fuzz SEED=40 " in said
    assert f"died with status {-signal.SIGKILL} in round 42" in said
    assert "was stopped in round 41" in said


def test_totals_are_written_down(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = tmp_path / "tally.json"
    tally_plugin.add_column(record, "CPU", {"bad calls": 7, "fuzz steps": 30}, 0)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    arguments = [
        "--json",
        str(tmp_path / "totals.json"),
        "--tally",
        str(record),
        "--tally-label",
        "CPU",
        "--minutes",
        "0",
    ]
    for finds, steps, status in ((0, 500, 0), (1, 500, 1), (0, 0, 1)):
        counted = Counter(examples=20, steps=steps)
        monkeypatch.setattr(fuzz, "run", lambda *_, found=(counted, finds): found)
        assert fuzz.main([*arguments, "--seed", "9"]) == status
        assert capsys.readouterr().out.startswith("SEED=9: 0 minutes")
    assert json.loads((tmp_path / "totals.json").read_text())["seed"] == 9
    assert json.loads(record.read_text())["CPU"] == {"bad calls": 7, "fuzz steps": 1030, "failed tests": 1}


# ---------------------------------------------------------------- what it found


def test_products_that_are_subnormal_in_fp32_have_their_own_bound() -> None:
    """A fault of the judge: each of K products below 2**-126 may lose half a unit of the last place, 2**-150."""
    k = 64
    x = np.full((1, k), 0x09, np.uint8), np.zeros((1, k // 32), np.uint8)  # 1.125 * 2**-6 * 2**-127
    w = np.full((1, 8, k), 0x39, np.uint8), np.full((1, 8, k // 32), 127 - 17, np.uint8)  # 1.125 * 2**-17
    y = np.full((1, 8), k * 1.265625 * 2.0**-150)
    exact = torch.from_numpy(y)
    assert float((truth.dequantize(*x) @ truth.dequantize(w[0][0], w[1][0]).T)[0, 0]) == y[0, 0]
    lost = torch.full((1, 8), k * 2.0**-149 * 0.5)  # each product rounded to the next subnormal, or away
    assert abs(float(lost[0, 0]) - float(exact[0, 0])) > tolerances.SMALLEST[torch.float32]
    tolerances.check_gemm(lost, x, w, [1])
    with pytest.raises(AssertionError, match="times its bound"):
        tolerances.check_gemm(3 * lost, x, w, [1])


@pytest.mark.parametrize(
    ("last", "right", "wrong"),
    [
        (0.1171875, [65504.0, float("inf")], [float("-inf"), 65408.0]),  # 65519: fp16's largest is 65504
        (-30.0, [61664.0], [float("inf")]),  # 61664
        (2.0, [float("inf")], [65504.0]),  # 65760
    ],
)
def test_what_may_round_to_inf(last: float, right: list[float], wrong: list[float]) -> None:
    """A fault of the judge: sums below 65520 round to 65504, and near it the order of additions decides."""
    elements = torch.zeros(1, 32)
    elements[0, :5] = torch.tensor([448, 56, 7, 0.75, last])
    codes = truth.as_bytes(elements.to(torch.float8_e4m3fn))
    w = np.repeat(codes[None], 8, 1), np.full((1, 8, 1), 127 + 7, np.uint8)
    x = np.full((1, 32), 0x38, np.uint8), np.full((1, 1), 127, np.uint8)
    for value in right:
        tolerances.check_gemm(torch.full((1, 8), value, dtype=torch.float16), x, w, [1])
    for value in wrong:
        with pytest.raises(AssertionError, match="times its bound"):
            tolerances.check_gemm(torch.full((1, 8), value, dtype=torch.float16), x, w, [1])
