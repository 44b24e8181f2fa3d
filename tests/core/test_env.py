"""Environment variables: blanks, a leading ~, one before another, and the defaults."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from hybrid_mxfp8 import env


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
        ({}, env.config, None),
        ({}, env.cutlass_dir, None),
        ({}, env.cuda_home, None),
        ({}, env.in_force, {}),
        ({}, env.cache_dir, Path("/h/.cache/hybrid_mxfp8")),
        ({"HYBRID_MXFP8_PDL": "0"}, env.in_force, {"HYBRID_MXFP8_PDL": "0"}),
        ({"HYBRID_MXFP8_PDL": " 0 "}, env.pdl, False),
        ({"HYBRID_MXFP8_BACKEND": " Triton"}, env.backend, "triton"),
        ({"HYBRID_MXFP8_CONFIG": " 1sm_128x256x128 "}, env.config, "1sm_128x256x128"),
        ({"HYBRID_MXFP8_CUTLASS_DIR": "~/c"}, env.cutlass_dir, Path("/h/c")),
        ({"HYBRID_MXFP8_CACHE_DIR": "~/c"}, env.cache_dir, Path("/h/c")),
        ({"XDG_CACHE_HOME": "/x"}, env.cache_dir, Path("/x/hybrid_mxfp8")),
        ({"XDG_CACHE_HOME": "relative"}, env.cache_dir, Path("/h/.cache/hybrid_mxfp8")),
        ({"CUDA_PATH": "~/p"}, env.cuda_home, Path("/h/p")),
        ({"CUDA_PATH": "/path", "CUDA_HOME": "/home"}, env.cuda_home, Path("/home")),
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
    found = env.child_environment(path_first=[Path("/x")], EXTRA="1")
    assert (found["PATH"], found["EXTRA"], found["HOME"]) == (f"/x{os.pathsep}/a", "1", "/h")


@pytest.mark.parametrize("value", ["2", "true", "on", "-1", "0 1"])
@pytest.mark.parametrize("read", [env.pdl, env.hopper_gemm, env.trust_cache], ids=lambda read: read.__name__)
def test_wrong_switch(read: Callable[[], object], value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"HYBRID_MXFP8_{read.__name__.upper()}"
    monkeypatch.setenv(name, value)
    allowed = "0, 1 or bf16" if read is env.hopper_gemm else "0 or 1"
    with pytest.raises(ValueError, match=f"^{name}: must be {allowed}, got '{value}'$"):
        read()


def test_an_unknown_variable_is_named_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("HYBRID_MXFP8_BACKND", "triton")
    monkeypatch.setenv("HYBRID_MXFP8_TEST_CONFIGS", "all")  # the tests' own
    env._warn_of_unknown.cache_clear()
    with caplog.at_level(logging.WARNING, logger="hybrid_mxfp8"):
        env.backend(), env.backend()
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("HYBRID_MXFP8_BACKND: no such variable, of HYBRID_MXFP8_BACKEND, ")
