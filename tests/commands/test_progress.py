"""Progress bars on a terminal and off it, with log lines meanwhile."""

from __future__ import annotations

import io
import logging
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hybrid_mxfp8.commands import cli, warmup
from hybrid_mxfp8.cutlass_kernels.grouped_gemm import source
from hybrid_mxfp8.cutlass_kernels.jit import build as jit

NAMES = ("1sm_128x64x128", "1sm_128x128x128", "2sm_256x64x128")


def replace_stderr(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> io.StringIO:
    """By a terminal, or a file."""
    stderr = io.StringIO()
    stderr.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", stderr)
    return stderr


def screen(written: str) -> list[str]:
    """What a terminal shows in the end: a carriage return goes back to the line's start."""
    lines = []
    for text in written.split("\n"):
        line = ""
        for over in text.split("\r"):
            line = over + line[len(over) :]
        lines.append(line.rstrip())
    return [line for line in lines if line]


@pytest.mark.parametrize("terminal", [True, False])
def test_log_lines_stand_alone_and_bars_are_gone(
    terminal: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three builds, each with a line in the log, and of a checkpoint, with none."""
    stderr, logger = replace_stderr(monkeypatch, terminal), logging.getLogger("hybrid_mxfp8")
    monkeypatch.setattr(jit, "build", lambda built: logger.warning("compiling %s", built.name))
    sources = [source(name, torch.bfloat16, "10.0a") for name in NAMES]
    assert warmup.build_all(sources, jobs=1) == []
    built = len(stderr.getvalue())
    save_file({"experts.w": torch.ones(2, 8, 64)}, tmp_path / "in.safetensors")
    words = ["quantize", str(tmp_path / "in.safetensors"), str(tmp_path / "out.safetensors"), "--experts", "*"]
    assert cli.main([*words, "--device", "cpu"]) == 0
    said = stderr.getvalue()
    assert screen(said) == [f"compiling {s.name}" for s in sources]
    assert ("|" in said[:built], "|" in said[built:]) == (terminal, terminal)
