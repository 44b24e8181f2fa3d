"""The command line: which commands it knows, its exit codes and its errors."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from hybrid_mxfp8 import BackendUnavailableError, __version__
from hybrid_mxfp8.commands import cli


def use_command(monkeypatch: pytest.MonkeyPatch, run: object) -> None:
    """Make ``fake`` the one command, whose work is ``run``."""
    module = types.ModuleType("fake_command")
    module.add_arguments = lambda parser: parser.add_argument("--times", type=int, default=1)  # type: ignore[attr-defined]
    module.run = run  # type: ignore[attr-defined]
    monkeypatch.setattr(cli, "commands", lambda: {"fake": cli.Command("fake", "fake_command", "pretends")})
    monkeypatch.setitem(sys.modules, "fake_command", module)


def test_every_listed_command_has_its_two_functions() -> None:
    known = cli.commands()
    assert {"doctor", "demo"} <= set(known)
    for command in known.values():
        module = importlib.import_module(command.module)
        assert callable(module.add_arguments)
        assert callable(module.run)


def test_a_command_whose_module_is_absent_is_not_listed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "COMMANDS", (*cli.COMMANDS, cli.Command("absent", "hybrid_mxfp8.absent", "is not there")))
    assert "absent" not in cli.commands()
    with pytest.raises(SystemExit) as stopped:
        cli.main(["absent"])
    assert stopped.value.code == 2
    assert "invalid choice: 'absent'" in capsys.readouterr().err


def test_arguments_and_exit_code_pass_through(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def run(args: types.SimpleNamespace) -> int:
        seen.append(args.times)
        return 7

    use_command(monkeypatch, run)
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


@pytest.mark.parametrize("words", [["--help"], ["demo", "--help"], ["doctor", "--help"]])
def test_help(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(words)
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    assert said.startswith(f"usage: python -m hybrid_mxfp8{' ' + words[0] if len(words) > 1 else ''} ")


def test_no_command_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main([])
    assert stopped.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


def test_module_and_script_run_from_anywhere(tmp_path: Path) -> None:
    for program in ([sys.executable, "-m", "hybrid_mxfp8"], [str(Path(sys.executable).with_name("hybrid-mxfp8"))]):
        done = subprocess.run([*program, "--version"], cwd=tmp_path, capture_output=True, text=True, check=True)
        assert done.stdout == f"hybrid_mxfp8 {__version__}\n"


def test_a_reader_that_goes_away_is_no_traceback(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        doctor = [sys.executable, "-m", "hybrid_mxfp8", "doctor"]
        done = subprocess.run(doctor, cwd=tmp_path, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")
