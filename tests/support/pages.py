"""What stands in the pages of docs/, as programs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent.parent / "docs"


def blocks(page: str, language: str) -> list[str]:
    """A page's blocks of a language, at least one."""
    found = re.findall(rf"^```{language}\n(.*?)^```", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE)
    assert found, f"{page} has no {language} block"
    return found


def run_python(page: str) -> dict[str, Any]:
    """All Python of a page, as one program; the names it leaves."""
    names: dict[str, Any] = {}
    exec(compile("\n".join(blocks(page, "python")), page, "exec"), names)
    return names


def run_on_ranks(page: str, ranks: int, folder: Path) -> list[str]:
    """All Python of a page, in a process for each rank; the lines that they print, sorted."""
    program = folder / "page.py"
    program.write_text("\n".join(blocks(page, "python")))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    done = subprocess.run([*launcher, program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return sorted(done.stdout.splitlines())


def check_expert_parallel(parts: list[str], folder: Path) -> None:
    """Two ranks' sums are one rank's, but for roundings of bf16."""
    lines = run_on_ranks("expert-parallel.md", 2, folder)
    names = sorted(f"rank {rank}, {part}" for rank in range(2) for part in parts)
    assert [line.split(":")[0] for line in lines] == names
    for line in lines:
        assert float(line.split("calc_diff ")[1]) < 3e-5, line
