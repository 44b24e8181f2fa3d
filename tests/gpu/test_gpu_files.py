"""On a GPU, too, the main job opens no socket, loads no pickle, and writes to caches alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from audit import AUDIT

STARTS = ("os.posix_spawn", "os.exec", "os.spawn")

JOB = """
import torch, triton
torch.cuda.init()
torch.ones(1, device="cuda").item()
sys.addaudithook(audit)
import hybrid_mxfp8 as mx

x = torch.ones(12, 128, device="cuda", dtype=torch.bfloat16)
w = torch.ones(3, 128, 128, device="cuda", dtype=torch.bfloat16)
groups = mx.GroupLayout.from_counts(torch.tensor([5, 0, 7], dtype=torch.int32, device="cuda"), 12)
for backend in ("reference", "triton"):
    xq, wq = mx.quantize_grouped(x, groups, backend=backend), mx.quantize_weights(w, backend=backend)
    assert mx.grouped_gemm(xq, wq, backend=backend).eq(128).all()
torch.cuda.synchronize()
report()
"""


def test_the_main_job_writes_to_caches_alone(tmp_path: Path) -> None:
    """Compiles anew: Triton's cache is an empty folder of this test's."""
    for name in ("home", "tmp", "triton", "work"):
        (tmp_path / name).mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HYBRID_", "TRITON_"))}
    environment |= {"HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / "tmp")}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "triton"), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", AUDIT + JOB]
    how: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 180}
    done = subprocess.run(command, cwd=tmp_path / "work", env=environment, **how)
    assert done.returncode == 0, done.stderr
    events = [(event, what) for event, what in json.loads(done.stdout.splitlines()[-1])]
    assert not [event for event, _ in events if event.partition(".")[0] in ("socket", "urllib", "http", "pickle")]
    # Triton compiles: its own ptxas, and a C compiler and what that starts for the code that
    # launches a kernel.
    spawned = {Path(what).name for event, what in events if event in STARTS}
    assert spawned <= {"ptxas", "gcc", "cc", "clang", "ldconfig"}, spawned
    for event, what in events:
        if event == "open" or (event.startswith("os.") and event not in STARTS):
            allowed = (tmp_path / "triton", tmp_path / "tmp", Path("/dev"))
            assert any(Path(what).is_relative_to(folder) for folder in allowed), (event, what)
    assert list((tmp_path / "work").iterdir()) == []
    assert not (tmp_path / "home" / ".cache").exists()
