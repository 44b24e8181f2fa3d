"""What gets installed, each way of getting it, and no work at import."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from hybrid_mxfp8 import __version__

ROOT = Path(__file__).parents[2]
PACKAGES = {"hybrid_mxfp8": "hybrid_mxfp8"}
PACKAGES |= {name: f"hybrid_mxfp8/{name}" for name in ("triton_kernels", "cutlass_kernels")}

USE = """
import sys
import hybrid_mxfp8.triton_kernels, hybrid_mxfp8.cutlass_kernels.config as config
from hybrid_mxfp8.commands.cli import main
demo = ["demo", "--synthetic", "--experts", "1", "--max-rows", "2", "--device", "cpu"]
assert main(["doctor"]) == main(demo) == 0
try:
    main(["warmup", "--help"])
except SystemExit as leaving:
    assert leaving.code == 0
import importlib.util as util
foreign = [name for name in ("triton_kernels", "cutlass_kernels", "bench") if util.find_spec(name)]
print("at", sys.modules["hybrid_mxfp8"].__file__, config.__file__, *foreign)
"""

REPORT_IMPORTS = """
import json, sys
import torch
sys.modules.update(dict.fromkeys(("triton", "tvm_ffi", "tqdm", "numpy")))  # as if they were not installed
before = set(sys.modules)
import hybrid_mxfp8
print(json.dumps([sorted(set(sys.modules) - before), torch.cuda.is_initialized()]))
"""


def run(program: list[object], cwd: Path, **environment: str) -> str:
    """What a program prints, with nothing of ours in its environment but where caches are."""
    ours = re.compile(r"(HYBRID_MXFP8|TRITON)_(?!CACHE_DIR)|PYTHONPATH")
    clean = {name: value for name, value in os.environ.items() if not ours.match(name)}
    done = subprocess.run(list(map(str, program)), cwd=cwd, env=clean | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is in the repository, since a build leaves its folders beside its sources."""
    source = tmp_path_factory.mktemp("checkout")
    for name in run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], ROOT).splitlines():
        if (ROOT / name).is_file() and not name.startswith(("tests/", "bench/", "docs/")):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    return source


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-index", "--no-deps", "--no-build-isolation"]
    run([*pip, "-w", out, checkout], out)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture
def clean_python(tmp_path: Path) -> Path:
    """Of an environment that has this one's packages, but ours."""
    environment, dependencies = tmp_path / "environment", tmp_path / "dependencies"
    venv.create(environment, with_pip=False)
    dependencies.mkdir()
    for folder in map(Path, sys.path):
        if folder.name in ("site-packages", "dist-packages"):
            for entry in folder.iterdir():
                if "hybrid_mxfp8" not in entry.name and not (dependencies / entry.name).exists():
                    (dependencies / entry.name).symlink_to(entry)
    (site,) = environment.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(f"{dependencies}\n")
    return environment / "bin" / "python"


WAYS = {
    "in a checkout": ("", {"checkout": "checkout"}),
    "in place": ("-e {checkout}", {"elsewhere": "checkout"}),
    "as a wheel": ("{wheel}", {"elsewhere": "environment", "checkout": "checkout"}),
}
"""What pip installs; and the folder in which it is used, with where it then comes from."""


@pytest.mark.parametrize("way", WAYS)
def test_every_way_runs(way: str, clean_python: Path, checkout: Path, wheel: Path, tmp_path: Path) -> None:
    """``doctor``, ``demo`` and ``warmup``; and no name is claimed that another package may have."""
    installed, places = WAYS[way]
    if what := installed.format(checkout=checkout, wheel=wheel).split():
        # With --no-index, pip fails unless the dependencies that the package names are there.
        run([clean_python, "-m", "pip", "install", "-q", "--no-index", "--no-build-isolation", *what], tmp_path)
        assert clean_python.with_name("hybrid-mxfp8").is_file()
    folders = {"checkout": checkout, "elsewhere": tmp_path, "environment": clean_python.parents[1]}
    for where, found in places.items():
        said = run([clean_python, "-c", USE], folders[where], HYBRID_MXFP8_BACKEND="reference")
        package, config, *foreign = said.splitlines()[-1].split()[1:]
        assert all(Path(path).is_relative_to(folders[found]) for path in (package, config))
        assert where == "checkout" or not foreign
    if way == "as a wheel":
        program = clean_python.with_name("hybrid-mxfp8")
        assert run([program, "--version"], tmp_path) == f"hybrid_mxfp8 {__version__}\n"
        demo = run([program, "demo", "--experts", "1", "--max-rows", "2"], tmp_path, HYBRID_MXFP8_BACKEND="reference")
        assert "\nFAILED" not in demo


def test_wheel_holds_every_file_and_one_top_level_name(wheel: Path) -> None:
    """``triton_kernels`` is another package's import name, which vLLM would take from us."""
    expected = {
        f"{inside}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, inside in PACKAGES.items()
        for pattern in ("*.py", "*.c", "*.cu", "*.cuh", "py.typed")
        for path in (ROOT / folder).rglob(pattern)
    }
    with zipfile.ZipFile(wheel) as archive:
        contents = set(archive.namelist())
    assert {"hybrid_mxfp8/py.typed", "hybrid_mxfp8/cutlass_kernels/csrc/grouped_gemm_sm100.cu"} < expected
    assert {name for name in contents if ".dist-info/" not in name} == expected
    assert [name for name in contents if name.endswith(".dist-info/licenses/LICENSE")]


def test_import_brings_nothing_but_its_own_modules(tmp_path: Path) -> None:
    """No Triton, no compiler, no CUDA context, nothing but torch, and few modules."""
    program = [sys.executable, "-c", REPORT_IMPORTS]
    new, cuda = json.loads(run(program, tmp_path, PYTHONPATH=str(ROOT)))
    assert all(name.startswith("hybrid_mxfp8") for name in new), new
    lazy = r"triton_kernels|cutlass_kernels.(jit|grouped)|commands|checkpoint"
    assert not [name for name in new if re.search(lazy, name)]
    assert len(new) < 45
    assert not cuda


def test_ngcs_torch_is_new_enough() -> None:
    """Its builds are pre-releases, which ``>=2.10`` would replace."""
    (torch,) = re.findall(r'^    "(torch>=[^"]*)",', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    for version in ("2.10.0a0+b558c986e8.nv25.12", "2.10.0", "2.13.0+cpu"):
        assert Requirement(torch).specifier.contains(version)
    assert not Requirement(torch).specifier.contains("2.9.1")


def test_linter_versions_agree() -> None:
    """pre-commit, the Makefile and the dev extra pin the same ruff and mypy."""
    texts = [(ROOT / name).read_text() for name in ("pyproject.toml", "Makefile", ".pre-commit-config.yaml")]
    hooks = texts.pop()
    (ruff,), (mypy,) = (re.findall(pattern, hooks) for pattern in (r"rev: v([\d.]+)", r"mypy==([\d.]+)"))
    for text in texts:
        assert dict(re.findall(r"\b(ruff|mypy)==([\d.]+)", text)) == {"ruff": ruff, "mypy": mypy}
