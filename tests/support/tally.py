"""Counts of what a test run tried, for the table in docs/hostile-use.md.

A test says what it did with ``tally("bad calls", 12)``. ``pytest --tally FILE --tally-label
LABEL`` adds the run's sums to a JSON file as one column, beside those of other machines; ``python
tests/tally.py`` makes the table of that file. Workers of pytest-xdist hand their sums to the
process that started them.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parents[2] / "docs"
RECORD = DOCS / "hostile_use.json"
PAGE = DOCS / "hostile-use.md"
BEGIN, END = "<!-- counts: made by tests/support/tally.py -->", "<!-- end of counts -->"

KINDS = {
    "bad calls": "wrong calls, each refused by an error that names the argument",
    "odd calls": "unusual but right calls, each with the right result",
    "guarded buffers": "buffers with guard bytes on both sides, all untouched",
    "codes": "input bit patterns quantized, equal to the reference bit for bit",
    "poisoned rows": "rows of NaN or Inf that reached no other row",
    "repeats": "repeats of a call with the same bytes as the first",
    "rearrangements": "orders and splits of experts that left an expert's bytes as they were",
    "sizes": "calls beyond 2^31 elements, 10^6 tokens or 1000 experts",
    "concurrent calls": "calls that ran beside others, on threads, streams and in processes",
    "cache faults": "faults injected into compiler, cache and file system",
    "file faults": "damaged or lying checkpoint files",
    "fuzz steps": "random calls, all backends compared",
}
"""What can be counted, in the order of the table, and what the number is a number of."""

Tally = Callable[..., None]
"""``tally(kind, n=1)``."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("tally")
    group.addoption("--tally", metavar="FILE", type=Path, help="add what this run tried to a JSON file")
    group.addoption("--tally-label", metavar="LABEL", default="CPU, interpreted", help="the column's heading")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_Plugin(), "hybrid_mxfp8_tally")


class _Plugin:
    """Sums of one process and of its workers."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.failed = 0

    @pytest.hookimpl
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.failed += report.failed

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any, error: object | None) -> None:
        self.counts.update(node.workeroutput.get("tally", {}) if hasattr(node, "workeroutput") else {})

    @pytest.hookimpl
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        config = session.config
        if hasattr(config, "workeroutput"):
            config.workeroutput["tally"] = dict(self.counts)
        elif config.getoption("--tally") and self.counts:
            add_column(config.getoption("--tally"), config.getoption("--tally-label"), self.counts, self.failed)


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Tally:
    """Count something that this test did, after it was checked: a failure is not counted."""
    counts = request.config.pluginmanager.get_plugin("hybrid_mxfp8_tally").counts  # type: ignore[union-attr]

    def add(kind: str, n: int = 1) -> None:
        assert kind in KINDS, kind
        counts[kind] += n

    return add


def add_column(path: Path, label: str, counts: dict[str, int], failed: int) -> None:
    """Write a run's sums under its label, in place of an earlier run's of the same label."""
    record = json.loads(path.read_text()) if path.exists() else {}
    record[label] = {**{kind: counts[kind] for kind in KINDS if kind in counts}, "failed tests": failed}
    path.write_text(json.dumps(record, indent=1) + "\n")


def add_to_column(path: Path, label: str, counts: dict[str, int], failed: int) -> None:
    """Add to a run's sums, as a part of it that runs by itself does."""
    column = json.loads(path.read_text()).get(label, {}) if path.exists() else {}
    sums = Counter(column)
    sums.update(counts)
    add_column(path, label, sums, column.get("failed tests", 0) + failed)


def table(record: dict[str, dict[str, int]]) -> str:
    """The markdown table of a record: a row a kind, a column a run."""
    rows = [["what", *record], ["---", *("---:" for _ in record)]]
    for kind, meaning in [*KINDS.items(), ("failed tests", "tests of the same runs that failed")]:
        if any(kind in run for run in record.values()):
            rows.append([meaning, *(f"{run[kind]:,}" if kind in run else "–" for run in record.values())])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def with_table(page: str, record: dict[str, dict[str, int]]) -> str:
    """The page with the record's table between its marks."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n\n{table(record)}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(), json.loads(RECORD.read_text())))
    sys.stdout.write(table(json.loads(RECORD.read_text())))
