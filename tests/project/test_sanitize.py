"""``make sanitize`` with stand-ins for compute-sanitizer, pytest and nvidia-smi."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import sanitize
from test_ci import script

RACE = """========= Error: Race reported between {kind} access at {kernel}+0x150 in {file}:{first}
=========     and Write access at {kernel}+0x1140 in {file}:{last} [66 hazards]
=========
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""
INVALID = """========= Invalid __global__ write of size 2 bytes
=========     at quantize_kernel+0x1a40 in quantize.py:210
========= ERROR SUMMARY: 1 errors
"""


@pytest.mark.parametrize("kernel", ["hopper_gemm_kernel", sanitize.CONTROL_KERNEL])
def test_what_triton_does_to_hand_out_warps_is_counted_apart(kernel: str) -> None:
    """Another line of the kernel is a race."""
    lines = sorted(line for _, line in sanitize.dispatch_lines()[kernel])
    (file,) = {name for name, _ in sanitize.dispatch_lines()[kernel]}
    report = RACE.format(kind="Read", kernel=kernel, file=file, first=lines[0], last=lines[-1])
    assert sanitize.parse(report).dispatch == {kernel: 1}
    other = sanitize.parse(RACE.format(kind="Read", kernel=kernel, file=file, first=lines[0], last=1))
    assert not other.dispatch
    assert list(other.places) == [f"Race: Read in {kernel}, {file}:{lines[0]}; Write in {kernel}, {file}:1"]


@pytest.mark.parametrize(
    ("behaviour", "said", "fault"),
    [
        ("", "========= ERROR SUMMARY: 0 errors", None),
        ("", INVALID, "- memcheck: Invalid __global__ write in quantize_kernel (1 times)"),
        ("", "", "no summary from memcheck (1 of 1)"),
        ("kill -SEGV $$", "========= ERROR SUMMARY: 0 errors", "ended with status"),
        ("sleep 60", "========= ERROR SUMMARY: 0 errors", "stopped at its time limit (1 of 1)"),
        ("kernels=[]", "========= ERROR SUMMARY: 0 errors", "**Not launched under memcheck**: "),
    ],
    ids=["clean", "an error", "no summary", "a crash", "a hang", "kernels that no test launches"],
)
def test_a_run(behaviour: str, said: str, fault: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = json.dumps(sorted(sanitize.expected_kernels((9, 0))))
    status = sanitize.ERROR_EXIT if said == INVALID else "$status"
    stand_ins = {
        "nvidia-smi": "echo 'NVIDIA H100 80GB HBM3, 9.0, 575.1'",
        "compute-sanitizer": 'case "$1" in --version) echo "Version 2025.1.0"; exit ;; esac\n'
        f'while [[ $1 == --* ]]; do shift 2; done; "$@"; status=$?\ncat <<END\n{said}\nEND\nexit {status}',
        "pytest": 'for word; do [ "$last" = --launched ] && record=$word; last=$word; done\n'
        'if [ -z "$record" ]; then echo tests/gpu/a.py::one; exit; fi\n'
        f"kernels='{kernels}'; {behaviour}\n"
        'echo "{\\"passed\\": 1, \\"skipped\\": 0, \\"failed\\": 0, \\"kernels\\": $kernels}" >$record',
    }
    for name, text in stand_ins.items():
        script(tmp_path / "bin" / name, f"#!/bin/bash\n{text}\n")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(sanitize, "PYTEST", [str(tmp_path / "bin" / "pytest")])
    words = ["--tools", "memcheck", "--out", str(tmp_path), "--limit", "2"]
    assert sanitize.main(words) == (0 if fault is None else 1)
    page = (tmp_path / "sanitizers_h100.md").read_text()
    assert "driver 575.1" in page
    assert (fault or "- memcheck: 1 tests passed, 0 errors, 0 of 1 processes failed or cut") in page


def test_marked_tests_and_kernels_are_found() -> None:
    """In every file that launches kernels; those of some capabilities alone are in the source."""
    files = (sanitize.ROOT / "tests").rglob("test_*.py")
    marked = {path.stem.removeprefix("test_") for path in files if "mark.sanitizer" in path.read_text()}
    assert marked >= {"group_layout", "grouped_gemm", "gpu_hopper", "moe_kernels", "moe", "quantize", "sglang"}
    assert set(sanitize.ONLY_ON) <= sanitize.kernels_in_source()
    assert len(sanitize.kernels_in_source()) > 10
