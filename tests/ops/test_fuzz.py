"""A short, repeatable life of the state machine; that it finds seeded faults; and what it once
found.

``make fuzz`` is a long one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import cases
import fuzz
import fuzz_machine
import numpy as np
import pytest
import tolerances
import torch
import truth
from fuzz_machine import Machine
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from hybrid_mxfp8 import env, reference
from hybrid_mxfp8.reference import quantization

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
    assert len(done) >= 10, "few kinds of calls"


# ---------------------------------------------------------------- it would find


@pytest.fixture
def reference_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Faults are seeded in the reference backend: it is quick, and the oracles share no code with
    it."""
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
    if out.untyped_storage().nbytes() > out.numel() * out.itemsize:
        torch.as_strided(out, (1,), (1,), out.storage_offset() + out.numel()).zero_()


def _row_of_another_token(right: Callable[..., None], x: Any, row_index: Any, *arguments: Any) -> None:
    right(x, row_index if row_index is None else row_index.roll(1), *arguments)


FAULTS: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "padding is not written": (quantization, "write_grouped", _unwritten_padding),
    "a row beyond the groups is written": (reference, "grouped_matmul", _row_beyond_the_groups),
    "a byte past the end is written": (reference, "grouped_matmul", _byte_past_the_end),
    "a row of the MoE layer is another's": (reference, "quantize_rows", _row_of_another_token),
    "the environment is not looked at": (env, "backend", lambda right: ""),
}


def seed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, function, wrong = FAULTS[name]
    right = getattr(module, function)
    monkeypatch.setattr(module, function, lambda *arguments: wrong(right, *arguments))
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


# ---------------------------------------------------------------- what it found


def test_products_that_are_subnormal_in_fp32_have_their_own_bound() -> None:
    """A fault of the oracle: each of K products below 2**-126 may lose half its last place,
    2**-150."""
    k = 64
    x = np.full((1, k), 0x09, np.uint8), np.zeros((1, k // 32), np.uint8)  # 1.125 * 2**-6 * 2**-127
    w = np.full((1, 8, k), 0x39, np.uint8), np.full((1, 8, k // 32), 127 - 17, np.uint8)  # 1.125 * 2**-17
    exact = k * 1.265625 * 2.0**-150
    assert float((truth.dequantize(*x) @ truth.dequantize(w[0][0], w[1][0]).T)[0, 0]) == exact
    lost = torch.full((1, 8), k * 2.0**-149 * 0.5)  # each product rounded to the next subnormal, or away
    assert abs(float(lost[0, 0]) - exact) > tolerances.SMALLEST[torch.float32]
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
    """A fault of the oracle: sums below 65520 round to 65504, and near it the order of additions
    decides."""
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
