"""What stands in the pages of docs/, as programs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

DOCS = Path(__file__).parents[2] / "docs"


def blocks(page: str, language: str) -> list[str]:
    """A page's blocks of a language, at least one."""
    found = re.findall(rf"^```{language}\n(.*?)^```", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE)
    assert found, f"{page} has no {language} block"
    return found


def replace(page: str, mark: str, text: str) -> None:
    """Put ``text`` between the two comments with the mark, as runs that make a table do."""
    start, end = f"<!-- {mark} -->\n", f"<!-- /{mark} -->"
    before, rest = (DOCS / page).read_text().split(start)
    (DOCS / page).write_text(f"{before}{start}\n{text}\n\n{end}{rest.split(end)[1]}")


def run_python(page: str) -> dict[str, Any]:
    """All Python of a page, as one program; the names it leaves."""
    names: dict[str, Any] = {}
    exec(compile("\n".join(blocks(page, "python")), page, "exec"), names)
    return names


def check_expert_parallel(parts: list[str], folder: Path) -> None:
    """The page's program on two ranks: their sums are one rank's, but for roundings of bf16."""
    program = folder / "page.py"
    program.write_text("\n".join(blocks("expert-parallel.md", "python")))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    # The interpreter adds nothing here but a minute.
    settings = {} if torch.cuda.is_available() else {"HYBRID_MXFP8_BACKEND": "reference"}
    done = subprocess.run([*launcher, program], env=os.environ | settings, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    # Ranks that print at once may share a line.
    found = dict(re.findall(r"(rank \d, [a-z ]+): calc_diff (-?\d\.\de[+-]\d+)", done.stdout))
    assert found.keys() == {f"rank {rank}, {part}" for rank in range(2) for part in parts}
    assert max(map(float, found.values())) < 3e-5, found
