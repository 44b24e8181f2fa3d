"""Environment variables: blanks, a leading ~, one before another, and the defaults."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hybrid_mxfp8 import env
from hybrid_mxfp8.dispatch.registry import requested


@pytest.fixture(autouse=True)
def _unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*env.VARIABLES, "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/h")
    monkeypatch.setenv("TMPDIR", "/t")


@pytest.mark.parametrize(
    ("variables", "read", "expected"),
    [
        ({}, env.pdl, True),
        ({}, env.hopper_gemm, "1"),
        ({"HYBRID_MXFP8_HOPPER_GEMM": "bf16 "}, env.hopper_gemm, "bf16"),
        ({}, env.trust_cache, False),
        ({}, env.cuda_home, None),
        ({}, env.variables_set, {}),
        ({}, env.cache_dir, Path("/h/.cache/hybrid_mxfp8")),
        ({"HYBRID_MXFP8_PDL": "0"}, env.variables_set, {"HYBRID_MXFP8_PDL": "0"}),
        ({"HYBRID_MXFP8_PDL": " 0 "}, env.pdl, False),
        ({"HYBRID_MXFP8_BACKEND": " triton"}, env.backend, "triton"),
        ({"HYBRID_MXFP8_CONFIG": " 1sm_128x256x128 "}, env.config, "1sm_128x256x128"),
        ({"HYBRID_MXFP8_CACHE_DIR": "~/c"}, env.cache_dir, Path("/h/c")),
        ({"HYBRID_MXFP8_CACHE_DIR": "c d"}, env.cache_dir, Path("c d").absolute()),
        ({"HYBRID_MXFP8_CACHE_DIR": "~nosuchuser/c"}, env.cache_dir, Path("~nosuchuser/c").absolute()),
        ({"HOME": ""}, env.cache_dir, Path("/.cache/hybrid_mxfp8")),
        ({"XDG_CACHE_HOME": "/x"}, env.cache_dir, Path("/x/hybrid_mxfp8")),
        ({"XDG_CACHE_HOME": "relative"}, env.cache_dir, Path("/h/.cache/hybrid_mxfp8")),
        ({"CUDA_PATH": "~/p"}, env.cuda_home, ("CUDA_PATH", Path("/h/p"))),
        ({"CUDA_PATH": "/path", "CUDA_HOME": "/home"}, env.cuda_home, ("CUDA_HOME", Path("/home"))),
        ({"PATH": "/a::/b"}, env.search_path, [Path("/a"), Path("/b")]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else getattr(value, "__name__", ""),
)
def test_read(
    variables: dict[str, str], read: Callable[[], object], expected: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert read() == expected


def test_without_a_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a container that runs under a number which no password file knows."""
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.setattr(env.tempfile, "gettempdir", lambda: "/t")
    assert env.cache_dir() == Path(f"/t/hybrid_mxfp8-{os.getuid()}")


def test_a_childs_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/a")
    found = env.child_environment(EXTRA="1")
    assert (found["PATH"], found["EXTRA"], found["HOME"]) == ("/a", "1", "/h")


@pytest.mark.parametrize("value", ["2", "true", "on", "-1", "0 1"])
@pytest.mark.parametrize("read", [env.pdl, env.hopper_gemm, env.trust_cache], ids=lambda read: read.__name__)
def test_wrong_switch(read: Callable[[], object], value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"HYBRID_MXFP8_{read.__name__.upper()}"
    monkeypatch.setenv(name, value)
    allowed = "0, 1 or bf16" if read is env.hopper_gemm else "0 or 1"
    with pytest.raises(ValueError, match=f"^{name}: must be {allowed}, got '{value}'$"):
        read()


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("HYBRID_MXFP8_BACKND", "triton", "no such variable, did you mean HYBRID_MXFP8_BACKEND?"),
        ("HYBRID_MXFP8_CACHEDIR", "/c", "no such variable, did you mean HYBRID_MXFP8_CACHE_DIR?"),
        ("HYBRID_MXFP8_LOG", "loud", "must be one of debug, info, warning, error, got 'loud'"),
        ("HYBRID_MXFP8_TEST_CONFIGS", "all", None),  # the tests' own
    ],
)
def test_a_wrong_variable_is_named_once(
    variable: str, value: str, said: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever names the backend."""
    monkeypatch.setenv(variable, value)
    env._start_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="hybrid_mxfp8"):
        requested("reference"), requested(None)
    assert [record.getMessage() for record in caplog.records] == ([] if said is None else [f"{variable}: {said}"])


LOGS = """
import logging, sys, torch, hybrid_mxfp8 as mx
if sys.argv[1:] == ["configured"]:
    logging.basicConfig(format="mine: %(message)s")
mx.quantize_grouped(torch.ones(4, 64), torch.tensor([1, 3]))
"""


@pytest.mark.parametrize(
    ("level", "words", "begins"),
    [
        ("", [], []),
        ("warning", [], []),
        ("Info", [], ["INFO:hybrid_mxfp8:quantize on cpu uses backend"]),
        ("info", ["configured"], ["mine: quantize on cpu uses backend"]),
    ],
)
def test_the_log_level(level: str, words: list[str], begins: list[str]) -> None:
    """Lines go to stderr where the program has not configured logging, and to nothing twice."""
    variables = {"HYBRID_MXFP8_LOG": level, "HYBRID_MXFP8_BACKEND": "", "HOME": os.environ.get("HOME", "/h")}
    command, given = [sys.executable, "-c", LOGS, *words], env.child_environment(**variables)
    lines = subprocess.run(command, env=given, capture_output=True, text=True, check=True).stderr.splitlines()
    assert len(lines) == len(begins)
    assert all(line.startswith(begin) for line, begin in zip(lines, begins, strict=True))
