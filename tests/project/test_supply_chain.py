"""What runs beside the main job: no network, no file outside the places that were named, no code
out of data.

Python's own audit events tell of every file that is opened to be written, every socket and every
process. What compiled libraries do by themselves they do not tell, so the main job runs where the
system lets no file grow.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from audit import AUDIT
from fake_toolkit import FakeToolkit

ROOT = Path(__file__).parents[2]
PACKAGES = ("hybrid_mxfp8", "triton_kernels", "cutlass_kernels")

# ---------------------------------------------------------------- what the source says

FORBIDDEN_MODULES = {
    # Code out of data; native code by hand; other programs.
    *("pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml", "runpy", "code"),
    *("ctypes", "cffi", "subprocess"),
    # The network.
    *("socket", "ssl", "http", "urllib", "ftplib", "smtplib", "xmlrpc", "asyncio", "webbrowser"),
    *("requests", "httpx", "aiohttp", "huggingface_hub"),
}
FORBIDDEN_CALLS = {
    *("eval", "exec", "compile", "__import__", "importlib.import_module", "breakpoint", "input"),
    *("torch.load", "torch.hub.load", "torch.jit.load", "torch.package.PackageImporter"),
    *("torch.utils.cpp_extension.load", "numpy.load", "np.load", "os.system", "os.popen", "os.startfile"),
}
ALLOWED = {
    "ctypes": {"cutlass_kernels/verify.py"},  # NVML's version of the driver, on a GPU
    # nvcc: a build; its version. This Python: a module tried out.
    "subprocess": {
        *(f"cutlass_kernels/{name}.py" for name in ("jit/build", "jit/toolchain", "verify")),
        "hybrid_mxfp8/dispatch/launcher.py",  # the C compiler
    },
    # Each of a module of this package, or of the checkout's bench.
    "importlib.import_module": {
        *(f"hybrid_mxfp8/{name}.py" for name in ("commands/bench", "commands/cli", "dispatch/registry")),
        "triton_kernels/backend.py",
    },
    "exec": {"hybrid_mxfp8/dispatch/trace.py"},  # lines that it wrote itself, of arithmetic on numbers
}


def offences(source: str) -> set[str]:
    """What a file imports or calls that its package should not, but for places that are listed."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            found |= FORBIDDEN_CALLS & {called}
            if any(k.arg in ("shell", "allow_pickle", "trust_remote_code") for k in node.keywords):
                found.add(f"{called}({', '.join(str(k.arg) for k in node.keywords)})")
        found |= FORBIDDEN_MODULES & {name.partition(".")[0] for name in names} | FORBIDDEN_CALLS & set(names)
    return found


def test_source_runs_no_data_and_calls_nobody() -> None:
    places: dict[str, set[str]] = {}
    files = [file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))]
    assert len(files) > 50
    for file in files:
        for offence in offences(file.read_text()):
            places.setdefault(offence, set()).add(file.relative_to(ROOT).as_posix())
    assert {offence: files for offence, files in places.items() if files - ALLOWED.get(offence, set())} == {}


# ---------------------------------------------------------------- what happens

# The dependencies' own imports are theirs; all from here on is this package's.
IMPORTS = "import torch, numpy, safetensors.torch, tqdm, triton, filelock, tvm_ffi\n"

MAIN_JOB = """
import hybrid_mxfp8 as mx
from hybrid_mxfp8.commands import cli

g = torch.Generator().manual_seed(1)
x, w = torch.randn(12, 64, generator=g).bfloat16(), torch.randn(3, 16, 64, generator=g).bfloat16()
for backend in ("reference", "triton", None):
    groups = mx.GroupLayout.from_counts(torch.tensor([5, 0, 7], dtype=torch.int32), 12)
    xq, wq = mx.quantize_grouped(x, groups, backend=backend), mx.quantize_weights(w, backend=backend)
    y = mx.grouped_gemm(xq, wq, backend=backend)
    assert mx.calc_diff(y, torch.cat([x[:5] @ w[0].T, x[5:] @ w[2].T])) < 2e-3
mx.backends(), mx.explain(xq, wq)
w13 = mx.quantize_weights(torch.randn(3, 64, 64, generator=g))
w2 = mx.quantize_weights(torch.randn(3, 64, 32, generator=g))
mx.moe_forward(x, w13, w2, torch.tensor([[0, 1]] * 12, dtype=torch.int32), torch.full((12, 2), 0.5))
assert cli.main(["doctor", "--json"]) == 0
"""

CHECKPOINTS = """
from hybrid_mxfp8.checkpoint import reader as checkpoint
checkpoint.save_experts("named/saved.safetensors", {"w": wq})
checkpoint.load_experts("named/saved.safetensors", "w")
assert cli.main(["quantize", "in.safetensors", "named/out.safetensors", "--experts", "*", "--device", "cpu"]) == 0
"""

NO_FILE_GROWS = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # a write of one byte ends the process, whoever writes
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
"""


@pytest.fixture
def places(tmp_path: Path) -> Path:
    """An empty home, an empty folder for temporary files, and one to work in."""
    for name in ("home", "tmp", "work/named"):
        (tmp_path / name).mkdir(parents=True)
    return tmp_path


def run(code: str, places: Path, **environment: str) -> str:
    """What a fresh Python prints, with nothing of this process's environment but what it must have,
    and no GPU: with one PyTorch opens NVML through ctypes, and the CUDA driver makes a cache of its
    own in the home folder."""
    given = {"PATH": "/usr/bin:/bin", "HOME": str(places / "home"), "TMPDIR": str(places / "tmp")}
    given |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    given |= dict.fromkeys(("TRITON_INTERPRET", "PYTHONDONTWRITEBYTECODE"), "1")
    given |= {name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ}  # where packages may be
    how: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 300}
    done = subprocess.run([sys.executable, "-c", code], cwd=places / "work", env=given | environment, **how)
    assert done.returncode == 0, done.stderr
    return done.stdout


def audited(code: str, places: Path, **environment: str) -> list[tuple[str, str]]:
    printed = run(f"{AUDIT}{IMPORTS}sys.addaudithook(audit)\n{code}\nreport()", places, **environment)
    events: list[tuple[str, str]] = [(event, what) for event, what in json.loads(printed.splitlines()[-1])]
    return events


def below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def test_the_main_job_touches_nothing(places: Path, interpreter: None) -> None:
    """No event of any kind, and no byte by a compiled library, which no event would tell of."""
    assert audited(NO_FILE_GROWS + MAIN_JOB, places) == []
    assert below(places) == {"home", "tmp", "work", "work/named"}


def test_checkpoints_write_what_was_named(places: Path, interpreter: None) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({"a.experts.w": torch.ones(2, 8, 32)}, places / "work" / "in.safetensors")
    events = audited(MAIN_JOB + CHECKPOINTS, places)
    named = places / "work" / "named"
    assert {event for event, _ in events} == {"open", "os.mkdir", "os.rename", "os.remove"}
    for event, what in events:
        assert Path(what).parent == named or (event, Path(what)) == ("os.mkdir", named), (event, what)
    assert {name for name in below(places) if "/named/" in name or name.startswith(("home/", "tmp/"))} == {
        "work/named/saved.safetensors",
        "work/named/out.safetensors",
    }


# ---------------------------------------------------------------- a build

BUILD = """
from hybrid_mxfp8.cutlass_kernels.jit import build as jit
from pathlib import Path
source = jit.Source("toy", Path(os.environ["TOY"]), "9.0", definitions=(("ANSWER", "42"),), include=())
assert jit.load(source).answer() == 42
"""


def test_a_build_writes_to_the_cache_alone(toolkit: FakeToolkit, places: Path) -> None:
    """It starts nvcc and nothing else, and leaves no file in the home or among temporary ones."""
    settings = {name: os.environ[name] for name in ("CUDA_HOME", "HYBRID_MXFP8_CUTLASS_DIR")}
    settings |= {"HYBRID_MXFP8_CACHE_DIR": str(toolkit.folder / "cache"), "TOY": str(toolkit.folder / "toy.cu")}
    events = audited(BUILD, places, **settings)
    started = [what for event, what in events if event == "subprocess.Popen"]
    assert len(started) == 3
    assert all(str(toolkit.folder / "cuda" / "bin" / "nvcc") in what for what in started)
    assert not [event for event, _ in events if event.partition(".")[0] in ("socket", "pickle")]
    written = [what for event, what in events if event == "open" or event.startswith("os.")]
    assert written
    outside = [what for what in written if not Path(what).is_relative_to(toolkit.folder / "cache")]
    assert outside == []
    assert below(places) == {"home", "tmp", "work", "work/named"}


# ---------------------------------------------------------------- versions


def test_bounds_are_what_was_tested() -> None:
    """pyproject's lower bounds, `make test-oldest` and the page's first column say the same."""

    def versions(file: str, pattern: str) -> dict[str, str]:
        return dict(re.findall(pattern, (ROOT / file).read_text(), re.MULTILINE))

    oldest = versions("docs/compatibility.md", r"^\| ([\w-]+) \| (\d[\d.]*) \|")
    bounds = versions("pyproject.toml", r'^ *(?:transformers = \[)?"([\w-]+)>=([\d.]+)')
    pins = versions(".ci/oldest.txt", r"^([\w-]+)==([\d.]+)$")
    assert oldest.keys() - pins.keys() == {"torch", "triton"}
    for name, version in oldest.items():
        assert f"{version}.".startswith(f"{bounds[name]}."), name
        assert pins.get(name, version) == version
