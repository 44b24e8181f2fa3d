"""``python -m hybrid_mxfp8 bench``: runs the suite of the repository's ``bench`` folder, which no wheel holds.

The folder stands beside this package in a checkout, and is found there where the package is installed in place
(``pip install -e .``).
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType

SUITE = "hybrid_mxfp8_bench"
"""What the folder is imported as: ``bench`` is a name that another package may have."""

KINDS = ("quantize", "gemm", "pipeline", "moe")
"""What ``--only`` takes."""

HOW_TO_GET_IT = (
    "the benchmark suite is not part of the installed package: clone the repository, then in it"
    " `pip install -e '.[bench]'` and `python -m hybrid_mxfp8 bench`"
)


def suite_folder() -> Path | None:
    """The repository's bench folder; None where the package stands alone."""
    folder = Path(__file__).resolve().parent.parent / "bench"
    return folder if (folder / "run.py").is_file() else None


def import_suite(module: str, folder: Path) -> ModuleType:
    """``module`` of the suite in ``folder``, without putting that folder's parent on the import path."""
    if SUITE not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            SUITE, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec is not None
        assert spec.loader is not None
        package = importlib.util.module_from_spec(spec)
        sys.modules[SUITE] = package
        spec.loader.exec_module(package)
    return importlib.import_module(f"{SUITE}.{module}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The suite's options."""
    parser.add_argument("--quick", action="store_true", help="the shapes of the targets and a few more, under a minute")
    parser.add_argument("--only", choices=KINDS, help="one kind of benchmark (default: all)")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="where JSON, markdown and plots go (default: bench/results)"
    )
    parser.add_argument("--plots", action="store_true", help="draw PNG plots too (needs matplotlib)")
    parser.add_argument("--list", action="store_true", help="print the cases and run nothing")
    parser.add_argument(
        "--from-json", type=Path, metavar="FILE", help="make the table (and plots) of an earlier run; needs no GPU"
    )
    parser.add_argument("--model", action="store_true", help="print the model of what can't be run here; needs no GPU")
    parser.add_argument(
        "--budget", type=_seconds, metavar="SECONDS", help="start no case after this long (default: 50 quick, 520 full)"
    )
    parser.add_argument("--commit", metavar="ID", help="recorded as the commit, where there is no git checkout")


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a positive number of seconds, got {text!r}")
    return value


def run(args: argparse.Namespace) -> int:
    """Run the suite with options from :func:`add_arguments`; its exit code, or 2 where there is no suite."""
    folder = suite_folder()
    if folder is None:
        print(HOW_TO_GET_IT, file=sys.stderr)
        return 2
    code = import_suite("run", folder).run(args)
    assert isinstance(code, int)
    return code
