"""A pytest plugin that writes down what a run did: outcomes of its tests, and which kernels it
launched.

``PYTHONPATH=tests/support pytest -p launched --launched FILE`` leaves ``{"passed": .., "skipped":
.., "failed": .., "kernels": [..]}`` there. A process that dies leaves no file, which is how its
caller tells.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import pytest

outcomes = Counter(passed=0, skipped=0, failed=0)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--launched", metavar="FILE", type=Path, help="write the outcomes and the kernels launched there")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        outcomes[report.outcome] += 1


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A kernel is compiled to be launched."""
    file: Path = session.config.getoption("--launched")
    launch = sys.modules.get("hybrid_mxfp8.triton_kernels.launch")
    kernels = {kernel.metadata.name for kernel, _ in launch._compiled.values()} if launch else set()
    file.write_text(json.dumps({**outcomes, "kernels": sorted(kernels)}))
