"""The doctor: its facts, in words and as JSON, also where nothing is installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hybrid_mxfp8.commands import cli, doctor

USE = """
import sys
import torch
import hybrid_mxfp8 as mx
w13q, w2q = (mx.quantize_weights(torch.ones(2, *size)) for size in ((64, 32), (32, 32)))
y = mx.moe_forward(torch.ones(3, 32), w13q, w2q, torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1))
assert y.shape == (3, 32)
from hybrid_mxfp8.commands.cli import main
sys.exit(main(["doctor"]))
"""


def test_facts_are_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["versions"]["torch"].startswith(torch.__version__)
    assert len(facts["gpus"]) == torch.cuda.device_count()
    assert list(facts["backends"]) == ["cutlass", "triton", "reference"]
    assert facts["backends"]["reference"]["available"] is True
    assert all(answer["reason"].splitlines() == [answer["reason"]] for answer in facts["backends"].values())


def words(fact: Any) -> list[str]:
    """All strings of a fact, but for the names in dicts."""
    parts = fact.values() if isinstance(fact, dict) else fact if isinstance(fact, list) else []
    return [fact] if isinstance(fact, str) else [word for part in parts for word in words(part)]


def test_every_fact_is_in_the_page() -> None:
    found = {"version": "", "path": "/some/nvcc", "problem": "does not run"}
    facts = doctor.examine() | {
        "gpus": [{"name": "GPU of a test", "compute_capability": "12.3"}],
        "compilers": [{"origin": "PATH", **found}],
        "cutlass_headers": [{"origin": f"carrier-{v}", **found, "version": f"4.{v}.0"} for v in (8, 2)],
        "cutlass_used": "carrier-8",
        "environment": {"HYBRID_MXFP8_PDL": "0"},
        "host_compiler": "g++ of a test",
        "launcher": "built, of a test",
        "cached": [{"kind": "verification", "bytes": 2048, "about": "grouped_gemm_of_a_test: right on a GPU"}],
        "modules_problem": "a problem of a test",
        "settings_problems": ["PDL: wrong in a test"],
    }
    page = doctor.render(facts)
    expected = [*words(facts), *facts["backends"], "HYBRID_MXFP8_PDL", "? from PATH", "GPU, 2.00 KiB"]
    assert not [word for word in expected if word not in page]
    page = doctor.render(facts | {"gpus": [], "compilers": [], "cutlass_headers": [], "environment": {}})
    assert ("none that PyTorch sees" in page, page.count("not found")) == (True, 2)


@pytest.mark.parametrize("asked", ["", "reference"])
@pytest.mark.parametrize("missing", [True, False])
def test_works_without_triton(missing: bool, asked: str, tmp_path: Path) -> None:
    """A whole layer, and the command, which gives the reason: it is missing, or broken."""
    before = "import sys; sys.modules['triton'] = sys.modules['tqdm'] = None\n" if missing else ""
    reason = "is not installed: pip install triton" if missing else "can't be imported: GLIBCXX_3.4.99 not found"
    broken = tmp_path / "packages" / "triton" / "__init__.py"
    broken.parent.mkdir(parents=True)
    broken.write_text("raise ImportError('GLIBCXX_3.4.99 not found')")
    path = os.pathsep.join([str(broken.parents[1]), os.environ.get("PYTHONPATH", "")])
    variables = {"PYTHONPATH": path, "HYBRID_MXFP8_BACKEND": asked}
    program = [sys.executable, "-c", before + USE]
    done = subprocess.run(program, cwd=tmp_path, env=os.environ | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"riton {reason}" in done.stdout


def test_tools_are_listed_and_those_used_are_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The chosen headers before any package's, if they are there."""
    (tmp_path / "cutlass").mkdir()
    monkeypatch.setenv("HYBRID_MXFP8_CUTLASS_DIR", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "absent"))
    packages = doctor.tools()["cutlass_headers"]
    assert doctor.tools()["cutlass_used"] == ""
    assert " (used)" not in doctor.render(doctor.examine())
    (tmp_path / "cutlass" / "version.h").write_text("#define CUTLASS_MAJOR 4\n#define CUTLASS_MINOR 9\n")
    facts = doctor.examine()
    chosen = {"origin": "HYBRID_MXFP8_CUTLASS_DIR", "path": str(tmp_path), "version": "4.9.0", "problem": ""}
    assert facts["cutlass_headers"] == [chosen, *packages]
    assert doctor.render(facts).count(" (used)") == 1
    nvcc = str(tmp_path / "absent" / "bin" / "nvcc")
    assert facts["compilers"][0] == {
        "origin": "CUDA_HOME", "path": nvcc, "version": "", "problem": "No such file or directory"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("asked", "able", "said"),
    [
        ("auto", ("triton", "reference"), "auto, which is triton here"),
        ("triton", ("triton", "reference"), "triton"),
        ("cutlass", ("reference",), "cutlass, which can't run here: because of a test"),
    ],
)
def test_the_last_line_says_what_the_default_comes_to(asked: str, able: tuple[str, ...], said: str) -> None:
    facts = doctor.examine() | {"default_backend": asked}
    facts["backends"] = {name: {"available": name in able, "reason": "because of a test"} for name in facts["backends"]}
    page = doctor.render(facts)
    assert page.splitlines()[-1] == f"Calls that name no backend use: {said}"


def test_wrong_values_in_the_environment_are_told_not_raised(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = {"BACKEND": "one of auto, cutlass, triton, reference", "HOPPER_GEMM": "0, 1 or bf16"}
    expected |= dict.fromkeys(("PDL", "VERIFY", "TRUST_CACHE"), "0 or 1")
    for variable in (*expected, "CONFIG"):
        monkeypatch.setenv(f"HYBRID_MXFP8_{variable}", "tritom")
    assert cli.main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert all(f"HYBRID_MXFP8_{name}: must be {what}, got 'tritom'" in said for name, what in expected.items())
    assert "HYBRID_MXFP8_CONFIG: config: expected one of 1sm_128x64x128" in said


def test_cache_counts_bytes_and_creates_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It can't be written below a file, nor where the system says so."""
    folder = tmp_path / "not" / "there"
    assert doctor.cache(folder) == {"path": str(folder), "exists": False, "writable": True, "bytes": 0}
    assert not folder.parent.exists()
    (folder / "module").mkdir(parents=True)
    (folder / "module" / "a.so").write_bytes(b"x" * 100)
    (folder / "b.log").write_bytes(b"x" * 11)
    assert doctor.cache(folder) == {"path": str(folder), "exists": True, "writable": True, "bytes": 111}
    assert doctor.cache(folder / "b.log" / "below")["writable"] is False
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert doctor.cache(folder)["writable"] is False
