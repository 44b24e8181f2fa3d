"""A short, repeatable life of the state machine of ``make fuzz``; it finds seeded faults."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import cases
import fuzz
import fuzz_machine
import pytest
import torch
from fuzz_machine import Machine
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from hybrid_mxfp8 import reference

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # the interpreter's exp(large)

BOUNDED = settings(
    max_examples=3 if fuzz_machine.GPU else 5,
    stateful_step_count=12,
    derandomize=True,
    deadline=None,
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)
FINDING = settings(BOUNDED, max_examples=200, stateful_step_count=20, phases=[Phase.generate])
"""Mostly found in one or two, but Hypothesis also draws on the constants of modules imported so
far, so that what it draws, derandomized or not, depends on the tests before."""


def test_random_calls(kernels_run: None, device: str) -> None:
    before = Counter(fuzz_machine.COUNTS)
    run_state_machine_as_test(Machine, settings=BOUNDED)
    done = fuzz_machine.COUNTS - before
    assert done["steps"] >= BOUNDED.max_examples * BOUNDED.stateful_step_count
    assert len(done) >= 7, "few kinds of calls"


# ---------------------------------------------------------------- it would find


@pytest.fixture
def reference_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where faults are seeded: it is quick, and the oracles share no code with it."""
    monkeypatch.setattr(fuzz_machine, "BACKENDS", ["reference"])


def _unwritten_padding(right: Callable[..., None], *arguments: Any) -> None:
    before = arguments[-1].clone()
    right(*arguments)
    arguments[-1].copy_(torch.where(arguments[-1] == 0, before, arguments[-1]))


def _row_beyond_the_groups(right: Callable[..., None], *arguments: Any) -> None:
    right(*arguments)
    out, used = arguments[-1], int(arguments[2][-1])
    if used < out.shape[0] and out.shape[1]:
        out[used, 0] = 0


def _byte_past_the_end(right: Callable[..., None], *arguments: Any) -> None:
    right(*arguments)
    out = arguments[-1]
    end = out.storage_offset() + out.numel()
    if out.untyped_storage().nbytes() >= (end + 1) * out.itemsize:
        torch.as_strided(out, (1,), (1,), end).zero_()


def _row_of_another_token(right: Callable[..., None], x: Any, row_index: Any, *arguments: Any) -> None:
    right(x, row_index if row_index is None else row_index.roll(1), *arguments)


FAULTS: dict[str, tuple[str, Callable[..., Any]]] = {
    "padding is not written": ("write_grouped", _unwritten_padding),
    "a row beyond the groups is written": ("grouped_matmul", _row_beyond_the_groups),
    "a byte past the end is written": ("grouped_matmul", _byte_past_the_end),
    "a row of the MoE layer is another's": ("quantize_rows", _row_of_another_token),
}


def seed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function, wrong = FAULTS[name]
    right = getattr(reference, function)
    monkeypatch.setattr(reference, function, lambda *arguments: wrong(right, *arguments))
    cases.forget_calls()


@pytest.mark.parametrize("name", FAULTS)
def test_a_seeded_fault_is_found(name: str, reference_alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    seed(name, monkeypatch)
    with pytest.raises(AssertionError):
        run_state_machine_as_test(Machine, settings=FINDING)


def test_a_round_reports_its_find(reference_alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls that led there and the error; nothing of a clean round."""
    monkeypatch.setattr(fuzz, "EXAMPLES", 8)
    monkeypatch.setattr(fuzz, "STEPS", 5)
    assert fuzz.run_round(5) == ""
    seed("padding is not written", monkeypatch)
    find = fuzz.run_round(5)
    assert "state.start(" in find
    assert "AssertionError" in find
