"""The README: its example runs, its tables are the code's, its claim is what was measured."""

from __future__ import annotations

import json
import re
from pathlib import Path

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


def test_environment_table_is_that_of_env_and_has_every_variable() -> None:
    assert env.__doc__ is not None
    rows = [line.replace("``", "`") for line in env.__doc__.splitlines() if line.startswith("|")]
    page = (ROOT / "docs" / "environment.md").read_text()
    assert rows == [line for line in page.splitlines() if line.startswith("|")]
    assert tuple(name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])) == env.VARIABLES


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
