"""What stands in the pages of docs/ and in examples/, as programs."""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


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


def run_python(page: str, shell: Callable[[str], None] | None = None) -> dict[str, Any]:
    """All Python of a page, block after block, as one program; the names it leaves.

    Each block prints something. One that continues another says so in the text above it. ``shell``
    gets the blocks of commands in between.
    """
    names: dict[str, Any] = {}
    parts = re.split(r"^```(python|sh)\n(.*?)^```", (DOCS / page).read_text(), flags=re.DOTALL | re.MULTILINE)
    for text, language, block in zip(parts[::3], parts[1::3], parts[2::3], strict=False):
        if language == "sh":
            if shell is not None:
                shell(block)
            continue
        assert not names or "continues" in text, f"{page}: what does this continue?\n{block}"
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(block, page, "exec"), names)
        assert printed.getvalue(), f"{page}: this prints nothing\n{block}"
        print(printed.getvalue(), end="")
    assert names, f"{page} has no python block"
    return names


def run_program(program: Path, ranks: int = 1) -> str:
    """What a program prints, on ``ranks`` processes."""
    launcher = [] if ranks == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    # The interpreter adds nothing here but a minute.
    settings = {} if torch.cuda.is_available() else {"HYBRID_MXFP8_BACKEND": "reference"}
    command = [sys.executable, *launcher, program]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def check_expert_parallel(parts: list[str], folder: Path) -> None:
    """The page's program on two ranks: their sums are one rank's, but for roundings of bf16."""
    program = folder / "page.py"
    program.write_text("\n".join(blocks("expert-parallel.md", "python")))
    # Ranks that print at once may share a line.
    found = dict(re.findall(r"(rank \d, [a-z ]+): calc_diff (-?\d\.\de[+-]\d+)", run_program(program, ranks=2)))
    assert found.keys() == {f"rank {rank}, {part}" for rank in range(2) for part in parts}
    assert max(map(float, found.values())) < 3e-5, found
