"""The choice of a backend: precedence, errors, logging, threads, and what it says about itself."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable
from unittest.mock import Mock

import cases
import pytest
import torch
from jobs import together
from stand_ins import pretend_capability, replace_backend

import hybrid_mxfp8 as mx
from hybrid_mxfp8 import env
from hybrid_mxfp8.core.checks import resolve_device
from hybrid_mxfp8.dispatch import registry
from hybrid_mxfp8.dispatch.problem import Problem
from hybrid_mxfp8.dispatch.registry import _log_choice, backend_of, choose, choose_quantizer

CPU = torch.device("cpu")
PROBLEM = Problem(4, 64, 96, 100, torch.bfloat16, CPU)


def answering(monkeypatch: pytest.MonkeyPatch, **answers: tuple[bool, str]) -> None:
    """Make backends answer this, on hardware that is theirs."""
    for name, answer in answers.items():
        says = Mock(return_value=answer)
        replace_backend(monkeypatch, name, made_for=lambda device: True, available=says, can_run=says)


@pytest.fixture
def all_available(monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, cutlass=(True, "yes"), triton=(True, "yes"))


@pytest.mark.parametrize(
    ("argument", "override", "variable", "expected"),
    [
        (None, None, None, "cutlass"),
        (None, None, "triton", "triton"),
        (None, None, "auto", "cutlass"),
        (None, None, "", "cutlass"),
        (None, None, " Reference ", "reference"),
        (None, " REFERENCE ", None, "reference"),
        ("Reference", None, None, "reference"),
        (None, "reference", "triton", "reference"),
        (None, "auto", "triton", "cutlass"),
        ("triton", "reference", "reference", "triton"),
        ("auto", "reference", "triton", "cutlass"),
    ],
)
def test_precedence(
    all_available: None, monkeypatch: pytest.MonkeyPatch, argument: str | None, override: str | None,
    variable: str | None, expected: str,
) -> None:  # fmt: skip
    """backend= beats use_backend() beats HYBRID_MXFP8_BACKEND beats auto."""
    if variable is not None:
        monkeypatch.setenv("HYBRID_MXFP8_BACKEND", variable)
    with mx.use_backend(override) if override else contextlib.nullcontext():
        assert choose(PROBLEM, argument).name == expected


def test_use_backend_nests_and_ends_with_an_error(all_available: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYBRID_MXFP8_BACKEND", "triton")
    with mx.use_backend(None):  # auto, whatever the variable says
        with contextlib.suppress(KeyError), mx.use_backend("reference"):
            assert choose(PROBLEM).name == "reference"
            raise KeyError
        assert choose(PROBLEM).name == "cutlass"
    assert choose(PROBLEM).name == "triton"


def test_use_backend_holds_in_its_own_thread_alone(all_available: None) -> None:
    blocks = mx.use_backend("triton"), mx.use_backend("reference"), contextlib.nullcontext()
    inside = threading.Barrier(3)

    def work(i: int) -> str:
        with blocks[i]:
            inside.wait(20)  # all are inside their blocks now
            chosen = choose(PROBLEM).name
            inside.wait(20)
        return chosen

    assert together(3, work) == ["triton", "reference", "cutlass"]


@pytest.mark.parametrize("how", ["argument", "use_backend", "environment"])
def test_a_named_backend_never_falls_back(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
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
    cause = "HYBRID_MXFP8_BACKEND: " if how == "environment" else ""
    message = f"^{cause}backend triton: no such luck: buy one$"
    for call in calls:
        override = mx.use_backend("triton") if how == "use_backend" else contextlib.nullcontext()
        with override, pytest.raises(mx.BackendUnavailableError, match=message):
            call()
    assert bool(torch.isnan(out).all())


@pytest.mark.parametrize(
    ("cutlass", "message"),
    [
        ((True, "yes"), ", which quantizes with the triton kernel: no such luck: buy one"),
        ((False, "not here: go there"), ": not here: go there"),
    ],
)
def test_cutlass_that_cannot_quantize_says_so(
    cutlass: tuple[bool, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In its own name, which is the one that the user wrote, and with its own reason first."""
    answering(monkeypatch, triton=(False, "no such luck: buy one"), cutlass=cutlass)
    message = f"^backend cutlass{message}$"
    for call in (
        lambda: mx.quantize_grouped(torch.ones(7, 64), cases.layout([3, 4]), backend="cutlass"),
        lambda: mx.quantize_weights(torch.ones(2, 8, 64), backend="cutlass"),
    ):
        with pytest.raises(mx.BackendUnavailableError, match=message):
            call()


def test_cutlass_quantizes_with_triton(all_available: None) -> None:
    assert choose_quantizer(CPU, "cutlass").name == "triton"
    assert choose_quantizer(CPU).name == "triton"
    assert choose_quantizer(CPU, "reference").name == "reference"


YES = (True, "yes")
CHOSEN: dict[str, tuple[dict[str, tuple[bool, str]], Callable[[], object], str]] = {
    "automatic": ({"cutlass": YES}, lambda: choose(PROBLEM), "INFO: grouped_gemm on cpu uses backend cutlass (yes)"),
    "fallback": (
        {"cutlass": (False, "no nvcc: install one"), "triton": YES},
        lambda: choose(PROBLEM),
        "WARNING: grouped_gemm on cpu falls back to backend triton (cutlass: no nvcc: install one)",
    ),
    "no quantizer": (
        {"triton": (False, "gone")},
        lambda: choose_quantizer(CPU),
        "WARNING: quantize on cpu falls back to backend reference (triton: gone)",
    ),
    "named": ({"triton": YES}, lambda: choose(PROBLEM, "triton"), ""),
    # A CPU that uses Triton's interpreter or the reference misses nothing.
    "hardware that is not there": ({}, lambda: choose(PROBLEM), "INFO: grouped_gemm on cpu uses backend "),
}


@pytest.mark.parametrize("what", CHOSEN)
def test_a_choice_is_logged_once(what: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    _log_choice.cache_clear()
    answers, call, expected = CHOSEN[what]
    answering(monkeypatch, **answers)
    with caplog.at_level(logging.DEBUG, "hybrid_mxfp8"):
        for _ in range(3):
            call()
    logged = [f"{r.levelname}: {r.getMessage()}" for r in caplog.records if r.name == "hybrid_mxfp8"]
    assert len(logged) == bool(expected)
    assert all(line.startswith(expected) for line in logged)


def test_backends_says_for_each_whether_and_why() -> None:
    answers = mx.backends("cpu")
    assert list(answers) == ["cutlass", "triton", "reference"]
    assert answers["cutlass"] == (False, "needs a GPU of compute capability 10.0 or 10.3")
    assert answers["reference"] == (True, "always")
    assert answers["triton"][0] == env.triton_interpret()
    assert all(reason and "\n" not in reason for _, reason in answers.values())
    assert [ok for ok, _ in mx.backends("meta").values()] == [False, False, True]


@pytest.mark.parametrize("value", [None, (7, 5), (8, 0), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)])
def test_answers_of_triton_by_capability(monkeypatch: pytest.MonkeyPatch, value: tuple[int, int] | None) -> None:
    """A GPU that is too old misses nothing: no warning that it falls back."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    triton, device = backend_of("triton"), pretend_capability(monkeypatch, value)
    ok, reason = triton.available(device)
    assert ok is triton.made_for(device) is (value is not None and value >= (8, 9))
    assert ("set TRITON_INTERPRET=1" if value is None else f"{value[0]}.{value[1]}") in reason


def test_triton_refuses_rocm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.0")
    ok, reason = backend_of("triton").available(pretend_capability(monkeypatch, (9, 4)))
    assert not ok
    assert "ROCm" in reason


def test_devices_are_counted_from_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [resolve_device(f"cuda:{index}").index for index in range(2)] == [0, 1]
    with pytest.raises(ValueError, match=r"^device: there are 2 GPUs that this PyTorch can use, got 'cuda:2'"):
        resolve_device("cuda:2")


def test_explain() -> None:
    xq = mx.quantize_grouped(torch.ones(7, 64), cases.layout([3, 4]), backend="reference")
    wq = mx.quantize_weights(torch.ones(2, 8, 64), backend="reference")
    assert mx.explain(xq, wq, backend="reference") == "reference, asked for: one float64 matmul an expert"
    moved = cases.aligned_bytes(7 * 64 + 1)[1:].view(torch.float8_e4m3fn).view(7, 64)
    assert "16-byte boundaries" in mx.explain(mx.GroupedMXFP8(moved, xq.scales, xq.groups), wq)
    text = mx.explain(xq, wq)
    assert "boundaries" not in text
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
        replace_backend(monkeypatch, name, workspace_size=lambda problem: size, workspace_bound=lambda problem: bound)

    wq = mx.quantize_weights(torch.ones(2, 8, 64), backend="reference")
    assert mx.grouped_gemm_workspace_size(wq, 7) == 0
    needing("reference", 1000, 2000)
    needing("cutlass", 0, 5000)  # not available here
    xq = mx.quantize_grouped(torch.ones(7, 64), cases.layout([3, 4]), backend="reference")
    assert mx.grouped_gemm_workspace_size(wq, 7, backend="reference") == 2000
    assert mx.grouped_gemm_workspace_size(wq, 7) == 2000
    aligned = cases.aligned_bytes(2000)
    for size in (2000, 1000):
        mx.grouped_gemm(xq, wq, workspace=aligned[:size], backend="reference")
    with pytest.raises(ValueError, match=r"^workspace: must have at least 1000 bytes, got 999$"):
        mx.grouped_gemm(xq, wq, workspace=aligned[:999], backend="reference")


@pytest.mark.parametrize(
    ("installed", "reason"),
    [(False, "Triton is not installed: pip install triton"), (True, "triton can't be imported: too old")],
)
def test_a_triton_that_is_missing_or_broken_is_a_reason(
    monkeypatch: pytest.MonkeyPatch, installed: bool, reason: str
) -> None:
    """And the next backend runs: nothing that doesn't need Triton ends with its traceback."""
    error = ImportError("too old") if installed else ModuleNotFoundError("triton")
    monkeypatch.setattr(registry, "has_triton", lambda: installed)
    monkeypatch.setattr(registry.importlib, "import_module", Mock(side_effect=error))
    monkeypatch.setattr(registry, "_backends", {"reference": backend_of("reference")})
    cases.forget_calls()
    assert mx.backends("cpu")["triton"] == (False, reason)
    assert choose_quantizer(CPU).name == "reference"
    xq = mx.quantize_grouped(torch.ones(7, 64), torch.tensor([3, 4]))
    assert mx.grouped_gemm(xq, mx.quantize_weights(torch.ones(2, 8, 64))).shape == (7, 8)
    with pytest.raises(mx.BackendUnavailableError, match=f"^backend triton: {reason}$"):
        mx.quantize_weights(torch.ones(2, 8, 64), backend="triton")
