"""The command line: its commands, its exit codes and its errors."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from hybrid_mxfp8 import BackendUnavailableError
from hybrid_mxfp8.commands import cli


def use_command(monkeypatch: pytest.MonkeyPatch, run: object) -> None:
    """Make ``fake`` the one command, whose work is ``run``."""
    module = types.ModuleType("fake_command")
    module.add_arguments = lambda parser: parser.add_argument("--times", type=int, default=1)  # type: ignore[attr-defined]
    module.run = run  # type: ignore[attr-defined]
    monkeypatch.setattr(cli, "COMMANDS", {"fake": ("fake", "pretends")})
    monkeypatch.setitem(sys.modules, "hybrid_mxfp8.commands.fake", module)


@pytest.mark.parametrize("name", [None, *cli.COMMANDS])
def test_help(name: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    """Of all of it and of every command, whose module has the two functions."""
    if name is not None:
        module = importlib.import_module(f"hybrid_mxfp8.commands.{cli.COMMANDS[name][0]}")
        assert callable(module.run)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--help"] if name is None else [name, "--help"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: python -m hybrid_mxfp8{f' {name}' if name else ''} ")


def test_arguments_and_exit_code_pass_through(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    use_command(monkeypatch, lambda args: (seen.append(args.times), 7)[1])
    assert cli.main(["fake", "--times", "3"]) == 7
    assert cli.main(["fake"]) == 7
    assert seen == [3, 1]


def test_an_unavailable_backend_is_one_line_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(args: object) -> int:
        raise BackendUnavailableError("backend cutlass: no GPU")

    use_command(monkeypatch, run)
    assert cli.main(["fake"]) == 2
    assert capsys.readouterr().err == "python -m hybrid_mxfp8 fake: backend cutlass: no GPU\n"


@pytest.mark.parametrize("program", ["-m hybrid_mxfp8 doctor", "-m bench --list"])
def test_a_reader_that_goes_away_is_no_traceback(program: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    words, root = [sys.executable, *program.split()], Path(__file__).parents[2]
    try:
        done = subprocess.run(words, cwd=root, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")
