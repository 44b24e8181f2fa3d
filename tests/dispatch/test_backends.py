"""The choice of a backend: precedence, errors, logging, threads, and what the choice says about
itself."""

from __future__ import annotations

import concurrent.futures
import contextlib
import logging
import threading
from collections.abc import Callable, Iterator

import cases
import pytest
import torch
from stand_ins import pretend_capability, replace_backend

import hybrid_mxfp8 as mx
from hybrid_mxfp8 import env
from hybrid_mxfp8.core.checks import resolve_device
from hybrid_mxfp8.dispatch import registry
from hybrid_mxfp8.dispatch.problem import Problem
from hybrid_mxfp8.dispatch.registry import NAMES, _log_choice, backend_of, choose, choose_quantizer, requested

CPU = torch.device("cpu")
PROBLEM = Problem(4, 64, 96, 100, torch.bfloat16, CPU)


@pytest.fixture
def fresh_log() -> Iterator[None]:
    """Choices are logged once a process: forget which were."""
    _log_choice.cache_clear()
    yield
    _log_choice.cache_clear()


def answering(monkeypatch: pytest.MonkeyPatch, **answers: tuple[bool, str]) -> None:
    """Make backends answer this, on hardware that is theirs."""
    for name, answer in answers.items():
        replace_backend(
            monkeypatch,
            name,
            made_for=lambda device: True,
            available=lambda device, answer=answer: answer,
            can_run=lambda problem, answer=answer: answer,
        )


@pytest.fixture
def all_available(monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, cutlass=(True, "yes"), triton=(True, "yes"))


def test_order_and_names() -> None:
    assert NAMES == ("cutlass", "triton", "reference")
    assert all(name == backend_of(name).name for name in NAMES)


@pytest.mark.parametrize(
    ("argument", "override", "variable", "expected"),
    [
        (None, None, None, "cutlass"),
        (None, None, "triton", "triton"),
        (None, None, "auto", "cutlass"),
        (None, None, "", "cutlass"),
        (None, None, " Reference ", "reference"),
        (None, "reference", "triton", "reference"),
        (None, "auto", "triton", "cutlass"),
        ("triton", "reference", None, "triton"),
        ("triton", None, "reference", "triton"),
        ("auto", "reference", "triton", "cutlass"),
    ],
)
def test_precedence(
    all_available: None,
    monkeypatch: pytest.MonkeyPatch,
    argument: str | None,
    override: str | None,
    variable: str | None,
    expected: str,
) -> None:
    """backend= beats use_backend() beats HYBRID_MXFP8_BACKEND beats auto."""
    if variable is not None:
        monkeypatch.setenv("HYBRID_MXFP8_BACKEND", variable)
    if override is None:
        assert choose(PROBLEM, argument).name == expected
    else:
        with mx.use_backend(override):
            assert choose(PROBLEM, argument).name == expected


def test_use_backend_none_means_auto(all_available: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYBRID_MXFP8_BACKEND", "reference")
    with mx.use_backend(None):
        assert choose(PROBLEM).name == "cutlass"
    assert choose(PROBLEM).name == "reference"


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
    cause = "HYBRID_MXFP8_BACKEND: " if how == "environment" else ""
    for call in calls:
        override = mx.use_backend("triton") if how == "use_backend" else contextlib.nullcontext()
        with (
            override,
            pytest.raises(mx.BackendUnavailableError, match=f"^{cause}backend triton: no such luck: buy one$"),
        ):
            call()
    assert bool(torch.isnan(out).all())


@pytest.mark.parametrize("written", ["reference", "Reference", " REFERENCE "])
def test_a_name_may_be_written_as_in_the_variable(written: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one way or another, but by each of the three ways to name it."""
    assert requested(written) == "reference"
    with mx.use_backend(written):
        assert requested(None) == "reference"
    monkeypatch.setenv("HYBRID_MXFP8_BACKEND", written)
    assert requested(None) == "reference"


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


def test_cutlass_on_a_cpu_says_what_it_needs() -> None:
    with pytest.raises(
        mx.BackendUnavailableError, match=r"^backend cutlass: needs a GPU of compute capability 10\.0 or 10\.3"
    ):
        choose(PROBLEM, "cutlass")


def test_triton_on_a_cpu_without_the_interpreter_says_what_to_set() -> None:
    if env.triton_interpret():
        assert choose(PROBLEM, "triton").name == "triton"
    else:
        with pytest.raises(mx.BackendUnavailableError, match="set TRITON_INTERPRET=1"):
            choose(PROBLEM, "triton")


def test_cutlass_quantizes_with_triton(all_available: None) -> None:
    assert choose_quantizer(CPU, "cutlass").name == "triton"
    assert choose_quantizer(CPU).name == "triton"
    assert choose_quantizer(CPU, "reference").name == "reference"


def records(caplog: pytest.LogCaptureFixture) -> list[tuple[int, str]]:
    return [(record.levelno, record.getMessage()) for record in caplog.records if record.name == "hybrid_mxfp8"]


@pytest.mark.usefixtures("fresh_log", "all_available")
def test_auto_logs_its_choice_once_at_info(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "hybrid_mxfp8"):
        for _ in range(3):
            choose(PROBLEM)
    assert records(caplog) == [(logging.INFO, "grouped_gemm on cpu uses backend cutlass (yes)")]


@pytest.mark.usefixtures("fresh_log")
def test_a_fallback_is_logged_once_as_a_warning(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    answering(monkeypatch, cutlass=(False, "no nvcc: install one"), triton=(True, "yes"))
    with caplog.at_level(logging.INFO, "hybrid_mxfp8"):
        for _ in range(3):
            assert choose(PROBLEM).name == "triton"
    expected = "grouped_gemm on cpu falls back to backend triton (cutlass: no nvcc: install one)"
    assert records(caplog) == [(logging.WARNING, expected)]


@pytest.mark.usefixtures("fresh_log")
def test_a_missing_quantizer_is_logged_as_such(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    answering(monkeypatch, triton=(False, "gone"))
    with caplog.at_level(logging.INFO, "hybrid_mxfp8"):
        assert choose_quantizer(CPU).name == "reference"
    assert records(caplog) == [(logging.WARNING, "quantize on cpu falls back to backend reference (triton: gone)")]


@pytest.mark.usefixtures("fresh_log", "all_available")
def test_a_named_backend_logs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "hybrid_mxfp8"):
        choose(PROBLEM, "triton")
    assert records(caplog) == []


@pytest.mark.usefixtures("fresh_log")
def test_hardware_that_is_not_there_is_no_fallback(caplog: pytest.LogCaptureFixture) -> None:
    """A CPU that uses Triton's interpreter or the reference misses nothing: INFO, not WARNING."""
    with caplog.at_level(logging.INFO, "hybrid_mxfp8"):
        chosen = choose(PROBLEM)
    assert chosen.name == ("triton" if env.triton_interpret() else "reference")
    assert [level for level, _ in records(caplog)] == [logging.INFO]


def test_backends_says_for_each_whether_and_why() -> None:
    answers = mx.backends("cpu")
    assert list(answers) == ["cutlass", "triton", "reference"]
    assert answers["cutlass"] == (False, "needs a GPU of compute capability 10.0 or 10.3")
    assert answers["reference"] == (True, "always")
    assert answers["triton"][0] == env.triton_interpret()
    assert all(reason and "\n" not in reason for _, reason in answers.values())


@pytest.mark.parametrize("value", [(7, 5), (8, 0), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)])
def test_answers_of_triton_by_capability(monkeypatch: pytest.MonkeyPatch, value: tuple[int, int]) -> None:
    ok, reason = backend_of("triton").available(pretend_capability(monkeypatch, value))
    assert ok == (value >= (8, 9))
    assert f"{value[0]}.{value[1]}" in reason


@pytest.mark.parametrize(("value", "expected"), [((8, 0), False), ((8, 9), True), (None, False)])
def test_hardware_of_triton(value: tuple[int, int] | None, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that is too old misses nothing: no warning that it falls back."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    device = pretend_capability(monkeypatch, value)
    assert backend_of("triton").made_for(device) is expected


def test_triton_refuses_rocm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.0")
    ok, reason = backend_of("triton").available(pretend_capability(monkeypatch, (9, 4)))
    assert not ok
    assert "ROCm" in reason


def test_triton_refuses_other_devices() -> None:
    assert backend_of("triton").available(torch.device("meta"))[0] is False


def test_devices_are_counted_from_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [resolve_device(f"cuda:{index}").index for index in range(2)] == [0, 1]
    with pytest.raises(ValueError, match=r"^device: there are 2 GPUs that this PyTorch can use, got 'cuda:2'"):
        resolve_device("cuda:2")


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


def test_workspace_size(cpu_backend: str) -> None:
    wq = mx.quantize_weights(torch.ones(2, 8, 64), backend="reference")
    assert mx.grouped_gemm_workspace_size(wq, 7, backend=cpu_backend) == 0


def test_workspace_size_suffices_for_smaller_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which may go to any backend where the choice is free. A call takes what it needs itself."""

    def needing(name: str, size: int, bound: int) -> None:
        sizes = {"workspace_size": lambda problem: size, "workspace_bound": lambda problem: bound}
        replace_backend(monkeypatch, name, **sizes)

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


def broken_import(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """A kernel package that can't be imported."""

    def fail(name: str) -> object:
        raise error

    monkeypatch.setattr(registry.importlib, "import_module", fail)
    monkeypatch.setattr(registry, "_backends", {"reference": backend_of("reference")})
    registry._triton_quantizer.cache_clear()
    cases.forget_calls()


@pytest.mark.parametrize(
    ("installed", "reason"),
    [(False, "Triton is not installed: pip install triton"), (True, "triton can't be imported: too old")],
)
def test_a_triton_that_is_missing_or_broken_is_a_reason(
    monkeypatch: pytest.MonkeyPatch, installed: bool, reason: str, rng: torch.Generator
) -> None:
    """And the next backend runs: nothing that doesn't need Triton ends with its traceback."""
    monkeypatch.setattr(registry, "has_triton", lambda: installed)
    broken_import(monkeypatch, ImportError("too old") if installed else ModuleNotFoundError("triton"))
    try:
        assert mx.backends("cpu")["triton"] == (False, reason)
        assert choose_quantizer(CPU).name == "reference"
        xq = mx.quantize_grouped(torch.ones(7, 64), torch.tensor([3, 4]))
        assert mx.grouped_gemm(xq, mx.quantize_weights(torch.ones(2, 8, 64))).shape == (7, 8)
        with pytest.raises(mx.BackendUnavailableError, match=f"^backend triton: {reason}$"):
            mx.quantize_weights(torch.ones(2, 8, 64), backend="triton")
    finally:
        registry._triton_quantizer.cache_clear()
