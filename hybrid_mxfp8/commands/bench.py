"""``python -m hybrid_mxfp8 bench``: the suite of the repository's ``bench`` folder, in no wheel."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import math
import sys
from pathlib import Path

SUITE = "hybrid_mxfp8.bench"  # the folder in a checkout, whose root is on this package's path
KINDS = ("quantize", "gemm", "moe")  # what ``--only`` takes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The suite's options."""
    add = parser.add_argument
    add("--quick", action="store_true", help="the main shapes, under a minute")
    add("--only", choices=KINDS, help="one kind of benchmark (default: all)")
    cases = "cases with this in their names, as --list prints them (default: all)"
    add("--case", default="", metavar="TEXT", help=cases)
    add("--out", type=Path, metavar="FOLDER", help="where JSON, markdown and plots go (default: bench/results)")
    add("--plots", action="store_true", help="draw PNG plots too (needs matplotlib)")
    add("--list", action="store_true", help="print the cases and run nothing")
    add("--from-json", type=Path, metavar="FILE", help="make the table (and plots) of an earlier run; needs no GPU")
    add("--model", action="store_true", help="print the model of what can't be run here; needs no GPU")
    budget = "start no case after this long (default: 50 quick, 520 full)"
    add("--budget", type=_seconds, metavar="SECONDS", help=budget)
    kernel = "SGLang's fused_moe_triton_kernels.py, to compare layers with"
    add("--sglang-kernel", type=Path, metavar="FILE", help=kernel)
    add("--commit", metavar="ID", help="recorded as the commit, where there is no git checkout")


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a positive number of seconds, got {text!r}")
    return value


def run(args: argparse.Namespace) -> int:
    """Run the suite; its exit code, or 2 where there is no suite."""
    if importlib.util.find_spec(SUITE) is None:
        how = "clone the repository, then in it `pip install -e '.[bench]'` and `python -m hybrid_mxfp8 bench`"
        print(f"the benchmark suite is not part of the installed package: {how}", file=sys.stderr)
        return 2
    code: int = importlib.import_module(f"{SUITE}.run").run(args)
    return code
