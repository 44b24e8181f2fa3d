"""What gets installed: the rooms below hybrid_mxfp8 with their CUDA sources, nothing beside it, and no work at import."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = {"hybrid_mxfp8": "hybrid_mxfp8", "triton_kernels": "hybrid_mxfp8/triton_kernels"}
ROOMS["cutlass_kernels"] = "hybrid_mxfp8/cutlass_kernels"

REPORT_IMPORTS = """
import json, sys
import torch
before = set(sys.modules)
import hybrid_mxfp8
print(json.dumps([sorted(set(sys.modules) - before), torch.cuda.is_initialized(), "triton" in sys.modules]))
"""

IMPORT_WITHOUT_TRITON = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("triton", "tvm_ffi", "tqdm", "numpy"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
import hybrid_mxfp8
print(hybrid_mxfp8.__version__)
"""


def python(code: str, cwd: Path, **environment: str) -> str:
    """What a fresh Python prints, started in another folder than the repository's."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={"PATH": "/usr/bin:/bin", **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of what is in the repository, since a build leaves its folders beside its sources."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    names = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in names.stdout.splitlines():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "-w", str(out), str(source)], check=True, capture_output=True)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def contents(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def test_wheel_holds_every_file_of_the_rooms(contents: set[str]) -> None:
    expected = {
        f"{inside}/{path.relative_to(ROOT / room).as_posix()}"
        for room, inside in ROOMS.items()
        for pattern in ("*.py", "*.cu", "*.cuh", "py.typed")
        for path in (ROOT / room).rglob(pattern)
    }
    assert "hybrid_mxfp8/py.typed" in expected
    assert contents == expected


def test_wheel_has_one_top_level_name(contents: set[str]) -> None:
    """``triton_kernels`` is another package's import name, which vLLM would take from us."""
    assert {name.partition("/")[0] for name in contents} == {"hybrid_mxfp8"}


def test_wheel_imports_from_another_folder(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", str(target), str(wheel)]
    subprocess.run(pip, check=True, capture_output=True)
    where = "import hybrid_mxfp8, hybrid_mxfp8.cutlass_kernels as c; print(hybrid_mxfp8.__file__); print(c.__file__)"
    for path in python(where, tmp_path, PYTHONPATH=str(target)).split():
        assert Path(path).is_relative_to(target)


def test_installation_claims_no_foreign_name(tmp_path: Path) -> None:
    """Here the package is installed editable or as a wheel; either way no folder of ours answers to these names."""
    names = ("triton_kernels", "cutlass_kernels", "tests", "bench")
    where = "import importlib.util as u, json; print(json.dumps([str(u.find_spec(n)) for n in {names!r}]))"
    for found in json.loads(python(where.format(names=names), tmp_path)):
        assert str(ROOT) not in found


def test_import_brings_nothing_but_its_own_modules(tmp_path: Path) -> None:
    """No Triton, no compiler, no CUDA context: only modules of this package, few enough to load in no time."""
    new, cuda, triton = json.loads(python(REPORT_IMPORTS, tmp_path))
    assert all(name.startswith("hybrid_mxfp8") for name in new), new
    assert not [name for name in new if re.search(r"triton_kernels|cutlass_kernels|demo|cli", name)]
    assert len(new) < 25
    assert not cuda
    assert not triton


def test_import_needs_nothing_but_torch(tmp_path: Path) -> None:
    assert python(IMPORT_WITHOUT_TRITON, tmp_path).strip()


def test_linter_versions_agree() -> None:
    """pre-commit, the Makefile and the dev extra pin the same ruff and mypy."""
    pins = [
        dict(re.findall(r"\b(ruff|mypy)==([\d.]+)", (ROOT / name).read_text()))
        for name in ("pyproject.toml", "Makefile")
    ]
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    ruff, mypy = re.search(r"rev: v([\d.]+)", hooks), re.search(r"mypy==([\d.]+)", hooks)
    assert ruff is not None
    assert mypy is not None
    assert pins == [{"ruff": ruff[1], "mypy": mypy[1]}] * 2
