"""The choice of a backend: precedence, errors, logging, threads, and what the choice says about
itself."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import importlib
import logging
import threading
from collections.abc import Callable

import cases
import pytest
import torch

import hybrid_mxfp8 as mx
from hybrid_mxfp8 import env
from hybrid_mxfp8.dispatch.registry import BACKENDS, Problem, Support, _log_choice, choose, choose_quantizer, requested

# The package's function of that name hides the module from an ordinary import.
MODULE = importlib.import_module("hybrid_mxfp8.dispatch.registry")
CPU = torch.device("cpu")
PROBLEM = Problem(4, 64, 96, 100, torch.bfloat16, CPU)


def answering(monkeypatch: pytest.MonkeyPatch, **answers: tuple[bool, str]) -> None:
    """Make backends answer this, on hardware that is theirs."""
    for name, answer in answers.items():
        changed = dataclasses.replace(
            BACKENDS[name],
            hardware=lambda device: True,
            available=lambda device, answer=answer: answer,
            can_run=lambda problem, answer=answer: answer,
        )
        monkeypatch.setitem(BACKENDS, name, changed)


@pytest.fixture
def all_available(monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, cutlass=(True, "yes"), triton=(True, "yes"))


def test_order_and_names() -> None:
    assert list(BACKENDS) == ["cutlass", "triton", "reference"]
    assert all(name == backend.name for name, backend in BACKENDS.items())


@pytest.mark.parametrize(
    ("argument", "override", "variable", "expected"),
    [
        (None, (), None, "cutlass"),
        (None, (), "triton", "triton"),
        (None, (), "auto", "cutlass"),
        (None, (), "", "cutlass"),
        (None, (), " Reference ", "reference"),
        (None, ("reference",), "triton", "reference"),
        (None, ("auto",), "triton", "cutlass"),
        (None, (None,), "triton", "cutlass"),
        ("triton", ("reference",), None, "triton"),
        ("triton", (), "reference", "triton"),
        ("auto", ("reference",), "triton", "cutlass"),
    ],
)
def test_precedence(
    all_available: None, monkeypatch: pytest.MonkeyPatch, argument: str | None, override: tuple[str | None, ...],
    variable: str | None, expected: str,
) -> None:  # fmt: skip
    """backend= beats use_backend() beats HYBRID_MXFP8_BACKEND beats auto."""
    if variable is not None:
        monkeypatch.setenv("HYBRID_MXFP8_BACKEND", variable)
    with mx.use_backend(*override) if override else contextlib.nullcontext():
        assert choose(PROBLEM, argument).name == expected


def test_use_backend_nests_and_ends_with_an_error(all_available: None) -> None:
    with mx.use_backend("triton"):
        with contextlib.suppress(KeyError), mx.use_backend("reference"):
            assert choose(PROBLEM).name == "reference"
            raise KeyError
        assert choose(PROBLEM).name == "triton"
    assert choose(PROBLEM).name == "cutlass"


def test_use_backend_holds_in_its_own_thread_alone(all_available: None) -> None:
    inside, done = threading.Barrier(3), threading.Barrier(3)

    def work(name: str) -> str:
        with mx.use_backend(name):
            inside.wait(20)  # both threads are inside their blocks now
            chosen = choose(PROBLEM).name
            done.wait(20)
        return chosen

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(work, name) for name in ("triton", "reference")]
        inside.wait(20)
        assert choose(PROBLEM).name == "cutlass"
        done.wait(20)
        assert [future.result() for future in futures] == ["triton", "reference"]


def test_an_unknown_name_in_the_environment_lists_the_valid_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of arguments are in ops/test_bad_calls.py."""
    monkeypatch.setenv("HYBRID_MXFP8_BACKEND", "blas")
    message = "^HYBRID_MXFP8_BACKEND: must be one of auto, cutlass, triton, reference, got 'blas'$"
    with pytest.raises(ValueError, match=message):
        requested(None)


@pytest.mark.parametrize("how", ["argument", "use_backend", "environment"])
def test_a_named_backend_never_falls_back(monkeypatch: pytest.MonkeyPatch, how: str, rng: torch.Generator) -> None:
    answering(monkeypatch, triton=(False, "no such luck: buy one"))
    groups = cases.layout([3, 4])
    x, w = torch.ones(7, 64), torch.ones(2, 8, 64)
    xq = mx.quantize_grouped(x, groups, backend="reference")
    wq = mx.quantize_weights(w, backend="reference")
    out = cases.poisoned_product(7, 8, torch.bfloat16)
    argument = "triton" if how == "argument" else None
    calls: list[Callable[[], object]] = [
        lambda: mx.grouped_gemm(xq, wq, out=out, backend=argument),
        lambda: mx.quantize_grouped(x, groups, backend=argument),
        lambda: mx.quantize_weights(w, backend=argument),
        lambda: mx.explain(xq, wq, backend=argument),
        lambda: mx.grouped_gemm_workspace_size(wq, 7, backend=argument),
    ]
    if how == "environment":
        monkeypatch.setenv("HYBRID_MXFP8_BACKEND", "triton")
    for call in calls:
        override = mx.use_backend("triton") if how == "use_backend" else contextlib.nullcontext()
        with override, pytest.raises(mx.BackendUnavailableError, match=r"^backend triton: no such luck: buy one$"):
            call()
    assert bool(torch.isnan(out).all())


def test_cutlass_that_cannot_quantize_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """In its own name, which is the one that the user wrote."""
    answering(monkeypatch, triton=(False, "no such luck: buy one"))
    message = r"^backend cutlass, which quantizes with the triton kernel: no such luck: buy one$"
    for call in (
        lambda: mx.quantize_grouped(torch.ones(7, 64), cases.layout([3, 4]), backend="cutlass"),
        lambda: mx.quantize_weights(torch.ones(2, 8, 64), backend="cutlass"),
    ):
        with pytest.raises(mx.BackendUnavailableError, match=message):
            call()


def test_a_cpu_says_what_is_missing() -> None:
    message = r"^backend cutlass: needs a GPU of compute capability 10\.0 or 10\.3"
    with pytest.raises(mx.BackendUnavailableError, match=message):
        choose(PROBLEM, "cutlass")
    if not env.triton_interpret():
        with pytest.raises(mx.BackendUnavailableError, match="set TRITON_INTERPRET=1"):
            choose(PROBLEM, "triton")


def test_cutlass_quantizes_with_triton(all_available: None) -> None:
    assert choose_quantizer(CPU, "cutlass").name == "triton"
    assert choose_quantizer(CPU).name == "triton"
    assert choose_quantizer(CPU, "reference").name == "reference"


YES, NO = (True, "yes"), (False, "no luck")
LOGGED: dict[str, tuple[dict[str, tuple[bool, str]], str | None, str, list[tuple[int, str]]]] = {
    "auto": ({"cutlass": YES}, None, "grouped_gemm", [(logging.INFO, "grouped_gemm on cpu uses backend cutlass (yes)")]),
    "a fallback": (
        {"cutlass": NO, "triton": YES}, None, "grouped_gemm",
        [(logging.WARNING, "grouped_gemm on cpu falls back to backend triton (cutlass: no luck)")],
    ),
    "a missing quantizer": (
        {"triton": NO}, None, "quantize",
        [(logging.WARNING, "quantize on cpu falls back to backend reference (triton: no luck)")],
    ),
    "by name": ({"triton": YES}, "triton", "grouped_gemm", []),
}  # fmt: skip
"""What backends answer, which is asked for, for what, and what is logged."""


@pytest.mark.parametrize("name", LOGGED)
def test_a_choice_is_logged_once(name: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    answers, asked, product, expected = LOGGED[name]
    answering(monkeypatch, **answers)
    _log_choice.cache_clear()
    with caplog.at_level(logging.DEBUG, "hybrid_mxfp8"):
        for _ in range(3):
            choose(PROBLEM, asked) if product == "grouped_gemm" else choose_quantizer(CPU, asked)
    _log_choice.cache_clear()
    assert [(r.levelno, r.getMessage()) for r in caplog.records if r.name == "hybrid_mxfp8"] == expected


def test_hardware_that_is_not_there_is_no_fallback(caplog: pytest.LogCaptureFixture) -> None:
    """A CPU that uses Triton's interpreter or the reference misses nothing: INFO, not WARNING."""
    _log_choice.cache_clear()
    with caplog.at_level(logging.INFO, "hybrid_mxfp8"):
        assert choose(PROBLEM).name == ("triton" if env.triton_interpret() else "reference")
    assert [r.levelno for r in caplog.records if r.name == "hybrid_mxfp8"] == [logging.INFO]


def test_auto_takes_the_first_that_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, cutlass=(True, "yes"), triton=(True, "yes"))
    assert choose(PROBLEM).name == "cutlass"
    answering(monkeypatch, cutlass=(False, "no"))
    assert choose(PROBLEM).name == "triton"
    answering(monkeypatch, triton=(False, "no"))
    assert choose(PROBLEM).name == "reference"


def test_backends_says_for_each_whether_and_why() -> None:
    answers = mx.backends("cpu")
    assert list(answers) == ["cutlass", "triton", "reference"]
    assert answers["cutlass"] == (False, "needs a GPU of compute capability 10.0 or 10.3")
    assert answers["reference"] == (True, "always")
    assert answers["triton"][0] == env.triton_interpret()
    assert all(reason and "\n" not in reason for _, reason in answers.values())


def capability(monkeypatch: pytest.MonkeyPatch, value: tuple[int, int] | None) -> torch.device:
    """A CUDA device of this compute capability, without one."""
    monkeypatch.setattr(MODULE, "_capability", lambda device: value if device.type == "cuda" else None)
    monkeypatch.setattr(MODULE, "_interpreted", lambda: False)
    return torch.device("cuda", 0)


@pytest.mark.parametrize("value", [(7, 5), (8, 0), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)])
def test_answers_by_capability(monkeypatch: pytest.MonkeyPatch, value: tuple[int, int]) -> None:
    device = capability(monkeypatch, value)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    answers: dict[str, Support] = {name: backend.available(device) for name, backend in BACKENDS.items()}
    assert BACKENDS["triton"].hardware(device) == (value >= (8, 9)), "a GPU that is too old misses nothing: no warning"
    assert answers["triton"][0] == (value >= (8, 9))
    named = f"{value[0]}.{value[1]}"
    assert named in answers["triton"][1]
    if value not in ((10, 0), (10, 3)):
        ok, reason = answers["cutlass"]
        assert not ok
        assert reason.startswith(f"needs compute capability 10.0 or 10.3, got {named}")


def test_triton_refuses_rocm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.0")
    ok, reason = BACKENDS["triton"].available(capability(monkeypatch, (9, 4)))
    assert not ok
    assert "ROCm" in reason


def test_triton_refuses_other_devices() -> None:
    assert BACKENDS["triton"].available(torch.device("meta"))[0] is False


def test_explain(rng: torch.Generator) -> None:
    xq = mx.quantize_grouped(torch.ones(7, 64), cases.layout([3, 4]), backend="reference")
    wq = mx.quantize_weights(torch.ones(2, 8, 64), backend="reference")
    assert mx.explain(xq, wq, backend="reference") == "reference, asked for: one float64 matmul an expert"
    text = mx.explain(xq, wq)
    assert "chosen automatically" in text
    assert "cutlass: needs a GPU" in text
    assert "\n" not in text
    if env.triton_interpret():
        text = mx.explain(xq, wq, backend="triton")
        assert text.startswith("triton, asked for: ")
        assert "block_t=16" in text
        assert "3.5 tokens an expert" in text


def test_workspace_size_suffices_for_smaller_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which may go to any backend where the choice is free. A call takes what it needs itself."""

    def needing(name: str, size: int, bound: int) -> None:
        needy = dataclasses.replace(
            BACKENDS[name], workspace_size=lambda problem: size, workspace_bound=lambda problem: bound
        )
        monkeypatch.setitem(BACKENDS, name, needy)

    needing("reference", 1000, 2000)
    needing("cutlass", 0, 5000)  # not available here
    xq = mx.quantize_grouped(torch.ones(7, 64), cases.layout([3, 4]), backend="reference")
    wq = mx.quantize_weights(torch.ones(2, 8, 64), backend="reference")
    assert mx.grouped_gemm_workspace_size(wq, 7, backend="reference") == 2000
    assert mx.grouped_gemm_workspace_size(wq, 7) == 2000
    memory = torch.empty(2256, dtype=torch.uint8)
    aligned = memory[-memory.data_ptr() % 256 :]
    for size in (2000, 1000):
        mx.grouped_gemm(xq, wq, workspace=aligned[:size], backend="reference")
    with pytest.raises(ValueError, match=r"^workspace: must have at least 1000 bytes, got 999$"):
        mx.grouped_gemm(xq, wq, workspace=aligned[:999], backend="reference")


def test_missing_triton_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "_has_triton", lambda: False)
    assert mx.backends("cpu")["triton"] == (False, "Triton is not installed: pip install triton")
