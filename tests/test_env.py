"""Environment variables as they are written down: blanks, a leading ~, one before another, and what holds without them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from hybrid_mxfp8 import env

DEFAULTS: list[tuple[Callable[[], object], object]] = [
    (env.pdl, True),
    (env.hopper_gemm, True),
    (env.trust_cache, False),
    (env.config, None),
    (env.cutlass_dir, None),
    (env.cuda_home, None),
]


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in env.VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(("read", "expected"), DEFAULTS, ids=lambda value: getattr(value, "__name__", ""))
def test_unset(read: Callable[[], object], expected: object) -> None:
    assert read() is expected


@pytest.mark.parametrize(
    ("variables", "read", "expected"),
    [
        ({"HYBRID_MXFP8_PDL": " 0 "}, env.pdl, False),
        ({"HYBRID_MXFP8_CONFIG": " 1sm_128x256x128 "}, env.config, "1sm_128x256x128"),
        ({"HYBRID_MXFP8_CUTLASS_DIR": "~/c"}, env.cutlass_dir, Path("/h/c")),
        ({"CUDA_PATH": "~/p"}, env.cuda_home, Path("/h/p")),
        ({"CUDA_PATH": "/path", "CUDA_HOME": "/home"}, env.cuda_home, Path("/home")),
        ({"PATH": "/a::/b"}, env.search_path, [Path("/a"), Path("/b")]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_set(
    variables: dict[str, str], read: Callable[[], object], expected: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/h")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert read() == expected
