"""The README: its example runs, the table of variables is env.py's, links lead somewhere."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from pages import run_python

import hybrid_mxfp8 as mx
from hybrid_mxfp8 import env

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_the_example_runs_and_multiplies() -> None:
    names = run_python("../README.md")
    x, w, y = names["x"].float(), names["w"].float(), names["y"]
    truth = torch.cat([x[0:3] @ w[0].T, x[3:8] @ w[2].T, x[8:9] @ w[3].T])
    assert y.shape == (9, 512)
    assert y.dtype == torch.bfloat16
    assert mx.calc_diff(y, truth) < 1e-3


def test_environment_table_is_that_of_env() -> None:
    def table(text: str, tick: str) -> list[str]:
        rows = [line for line in text.splitlines() if line.startswith("|")]
        return [row.replace(tick, "`") for row in rows]

    assert env.__doc__ is not None
    assert table((ROOT / "docs" / "environment.md").read_text(), "`") == table(env.__doc__, "``")


def test_the_table_has_every_variable() -> None:
    assert env.__doc__ is not None
    cells = [line.split("|")[1] for line in env.__doc__.splitlines() if line.startswith("| ``")]
    assert tuple(name for cell in cells for name in re.findall(r"``(\w+)``", cell)) == env.VARIABLES


def test_every_backend_has_its_row() -> None:
    section = README.split("## Backends")[1].split("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == list(mx.backends())


def test_what_it_says_of_fp8_is_what_was_measured() -> None:
    """For all products of the run whose picture it shows: not only for few and many rows."""
    (run,) = re.findall(r"\(bench/results/(\S+-full)-moe-time\.png\)", README)
    times: dict[str, dict[str, float]] = {}
    for row in json.loads((ROOT / "bench" / "results" / f"{run}.json").read_text())["rows"]:
        if row["kind"] == "gemm":
            times.setdefault(row["case"], {})[row["contender"].partition(" (")[0]] = row["us"]
    faster = [case["torch fp8 row-wise _scaled_grouped_mm"] < case["grouped_gemm"] for case in times.values()]
    assert f"faster than that in {sum(faster)} of {len(faster)} cases" in README.replace("\n", " ")


def test_it_says_how_long_the_tests_take() -> None:
    assert re.search(r"^make test .*\d+ minutes", README, re.MULTILINE)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_relative_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)", (ROOT / page).read_text()):
        if not target.startswith("https://"):
            assert (ROOT / target).exists(), target
