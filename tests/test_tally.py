"""Counting what a run tried, and the table made of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tally

pytest_plugins = ["pytester"]

TESTS = """
def test_one(tally):
    tally("bad calls", 3)

def test_two(tally):
    tally("bad calls")
    tally("codes", 65536)

def test_three(tally):
    assert False
    tally("codes")
"""


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(tally.__file__).parent))


@pytest.mark.parametrize("workers", [[], ["-n", "2"]], ids=["one process", "workers"])
def test_sums(workers: list[str], pytester: pytest.Pytester) -> None:
    if workers:
        pytest.importorskip("xdist")
    pytester.makepyfile(TESTS)
    pytester.makefile(".json", record='{"other machine": {"codes": 1, "failed tests": 0}}')
    pytester.runpytest_subprocess("-p", "tally", *workers, "--tally", "record.json", "--tally-label", "here")
    record = json.loads((pytester.path / "record.json").read_text())
    assert record == {
        "other machine": {"codes": 1, "failed tests": 0},
        "here": {"bad calls": 4, "codes": 65536, "failed tests": 1},
    }


def test_an_unknown_kind_fails(pytester: pytest.Pytester) -> None:
    pytester.makepyfile('def test_it(tally):\n    tally("good calls")\n')
    pytester.runpytest_subprocess("-p", "tally").assert_outcomes(failed=1)


def test_table_goes_between_its_marks() -> None:
    page = f"before\n{tally.BEGIN}\nold\n{tally.END}\nafter\n"
    made = tally.with_table(page, {"CPU": {"codes": 65536}, "GPU": {"bad calls": 2, "failed tests": 0}})
    assert made.startswith(f"before\n{tally.BEGIN}\n\n| what | CPU | GPU |\n| --- | ---: | ---: |\n")
    assert f"| {tally.KINDS['codes']} | 65,536 | – |\n" in made
    assert made.endswith(f"\n{tally.END}\nafter\n")
    assert "old" not in made
    assert tally.with_table(made, {"CPU": {}}) != made


def test_the_page_shows_the_record() -> None:
    page = tally.PAGE.read_text()
    assert page == tally.with_table(page, json.loads(tally.RECORD.read_text()))
