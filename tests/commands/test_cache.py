"""The cache command: what it lists, what it removes, and what it leaves alone."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import filelock
import pytest

from hybrid_mxfp8.commands import cli, doctor

MODULE = "grouped_gemm_1sm_128x64x128_bf16_sm100a-0123456789abcdef-cutlass4.8.1+c12e0bec-nvcc13.0.88"
FAILED = MODULE.replace("0123", "4567")
BUILDING = MODULE.replace("0123", "89ab")
MANIFEST = {"name": "grouped_gemm", "arch": "10.0a", "cutlass": "4.8.1", "nvcc": "13.0.88"}
MANIFEST["sha256"] = hashlib.sha256(b"x" * 3000).hexdigest()
LAUNCHER = {"compiler": "/usr/bin/gcc", "sha256": hashlib.sha256(b"y" * 16).hexdigest()}
RECORD = {"ok": True, "reason": "largest error 0.2", "gpu": "B200", "driver": "580.1", "date": "2026-11-01"}

OURS = {
    f"cutlass/{MODULE}/module.so": "x" * 3000,
    f"cutlass/{MODULE}/build.json": json.dumps(MANIFEST),
    f"cutlass/{MODULE}.lock": "",
    f"cutlass/{MODULE}.verified-01234567/record.json": json.dumps(RECORD),
    f"cutlass/{MODULE}.verified-01234567.lock": "",
    f"cutlass/{FAILED}.log": "error",
    f"cutlass/.building-{FAILED}-0123456789abcdef/module.so": "half",
    f"cutlass/{FAILED}.lock": "",
    "launcher/0123456789abcdef/module.so": "y" * 16,
    "launcher/0123456789abcdef/build.json": json.dumps(LAUNCHER),
    "launcher/0123456789abcdef.lock": "",
}
OTHERS = {
    "notes.txt": "mine",
    f"{MODULE}/module.so": "not below cutlass",
    "cutlass/include/cutlass/version.h": "a checkout of CUTLASS",
    f"cutlass/{MODULE}-of-mine/module.so": "another name",
    "launcher/launcher.so": "another name",
    "ptx/triton/kernel.ptx": "the emulator's",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    for name, text in {**OURS, **OTHERS}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    monkeypatch.setenv("HYBRID_MXFP8_CACHE_DIR", str(folder))
    return folder


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_list_says_what_each_entry_is(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["cache", "list"]) == 0
    page = capsys.readouterr().out
    size = len(OURS[f"cutlass/{MODULE}/build.json"]) + 3000
    assert page.startswith(f"{folder}: 5 entries, ")
    for line in (
        rf"module  +{size / 1024:.2f} KiB  grouped_gemm for 10.0a, CUTLASS 4.8.1, nvcc 13.0.88",
        r"verification  +\d+ B  grouped_gemm_1sm_128x64x128_bf16_sm100a: right on B200, driver 580.1, 2026-11-01: largest",
        rf"failed build  +5 B  {re.escape(FAILED)}.log",
        r"unfinished build  +4 B  ",
        r"launcher  +\d+ B  makes kernel launches, by /usr/bin/gcc",
        rf"other files, which clear leaves: {sum(map(len, OTHERS.values()))} B",
    ):
        assert re.search(line, page), line
    kinds = [entry["kind"] for entry in doctor.cached(folder)["cached"]]
    assert kinds == ["module", "verification", "failed build", "unfinished build", "launcher"]
    assert files(folder) == {*OURS, *OTHERS}


def test_clear_removes_ours_alone(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not what lies in an entry's folder beside our files, nor what a link of our name leads to."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "module.so").touch()
    link = folder / "cutlass" / MODULE.replace("0123", "cdef")
    link.symlink_to(tmp_path / "elsewhere")
    kept = f"cutlass/{MODULE}/mine.txt"
    (folder / kept).touch()
    assert cli.main(["cache", "clear"]) == 1
    said = capsys.readouterr()
    assert said.out.startswith(f"{folder}: removed 4 entries, ")
    assert said.err == f"kept {folder / 'cutlass' / MODULE}: Directory not empty\n"
    assert {kept, *OTHERS} == files(folder) - {f"cutlass/{MODULE}.lock"}
    (folder / kept).unlink()
    assert cli.main(["cache", "clear"]) == 0
    assert files(folder) == {*OTHERS}
    assert (link / "module.so").exists()


def test_clear_waits_for_nobody(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What another process is building stays, with its lock."""
    private = folder / "cutlass" / f".building-{BUILDING}-0123456789abcdef"
    private.mkdir()
    with filelock.FileLock(folder / "cutlass" / f"{BUILDING}.lock"):
        assert cli.main(["cache", "clear"]) == 1
        said = capsys.readouterr().err
        assert f"kept {private}: is being built by another process\n" in said
        assert private.exists()
        assert (folder / "cutlass" / f"{BUILDING}.lock").exists()
    assert cli.main(["cache", "clear"]) == 0
    assert files(folder) == {*OTHERS}
    assert not private.exists()


@pytest.mark.parametrize("where", ["home", "above", "link", "open"])
def test_dangerous_folders_are_refused(
    where: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if where in ("home", "above"):
        reason = "it is the home folder, or holds it"
        monkeypatch.setenv("HOME", str(folder if where == "home" else folder / "someone"))
    elif where == "link":
        reason = "is a link"
        (folder / "cutlass").rename(tmp_path / "cutlass")
        (folder / "cutlass").symlink_to(tmp_path / "cutlass")
    else:
        reason = "can be written by everyone"
        (folder / "cutlass").chmod(0o777)
    before = files(tmp_path)
    assert cli.main(["cache", "clear"]) == 2
    assert reason in capsys.readouterr().err
    assert files(tmp_path) == before


@pytest.mark.parametrize("action", ["list", "clear"])
def test_a_file_is_no_cache(
    action: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("HYBRID_MXFP8_CACHE_DIR", str(tmp_path / "file"))
    assert cli.main(["cache", action]) == 2
    assert "file is no folder" in capsys.readouterr().err


def test_an_empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HYBRID_MXFP8_CACHE_DIR", str(tmp_path / "none"))
    assert cli.main(["cache", "list"]) == cli.main(["cache", "clear"]) == 0
    said = capsys.readouterr().out.replace(str(tmp_path / "none"), "")
    assert said == ": 0 entries, 0 B\n: removed 0 entries, 0 B\n"
    assert not (tmp_path / "none").exists()
