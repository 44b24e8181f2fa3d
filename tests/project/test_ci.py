"""The scripts behind make, with stand-ins for what they call: which PyTorch the environment gets,
and that no failing half of the tests is lost."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

PYTHON = """#!/bin/bash
# A base Python: says whether its torch sees a GPU, and makes environments of stand-ins.
case "$*" in
  *torch.cuda.is_available*) exit {torch_sees_no_gpu} ;;
  "-m venv "*)
    echo "venv ${{*:3}}" >>{log}
    for last; do :; done
    mkdir -p "$last/bin"
    printf '#!/bin/bash\\necho "pip $*" >>{log}\\n{pip}\\n' >"$last/bin/pip"
    printf '#!/bin/bash\\ncat >/dev/null; echo torch==2.99\\n' >"$last/bin/python"
    chmod +x "$last"/bin/* ;;
esac
"""


def script(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def checkout(tmp_path: Path) -> Path:
    """A folder with nothing but a copy of .ci."""
    shutil.copytree(ROOT / ".ci", tmp_path / "checkout" / ".ci")
    return tmp_path / "checkout"


def run(command: str, root: Path, stand_ins: Path) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": f"{stand_ins}:/usr/bin:/bin", "PYTHON": str(stand_ins / "python")}
    return subprocess.run(["bash", command], cwd=root, env=environment, capture_output=True, text=True, check=False)


# ---------------------------------------------------------------- .ci/venv


PIP = "pip install -q"
CPU, TRITON = f"{PIP} torch==2.13.0+cpu", f"{PIP} triton==3.9.*"
NEW = '[[ "$*" == *torch==* && "$*" != *index-url* ]] && exit 1; exit 0'  # a build that pip does not know


@pytest.mark.parametrize(
    ("gpu", "base_torch", "pip", "expected"),
    [
        # The machine's PyTorch fits its driver: none is installed over it, and constraints hold it.
        (True, True, "", ["venv --system-site-packages .venv", f"{PIP} --ignore-installed pytest pytest-xdist"]),
        (True, False, "", ["venv .venv", f"{PIP} torch>=2.10"]),
        (False, True, "", ["venv .venv", CPU, TRITON]),
        # Failing the first request must not end in PyPI's CUDA build.
        (False, False, NEW, ["venv .venv", CPU, f"{CPU} --index-url https://download.pytorch.org/whl/cpu", TRITON]),
    ],
)
def test_which_pytorch_an_environment_gets(
    gpu: bool, base_torch: bool, pip: str, expected: list[str], tmp_path: Path
) -> None:
    """Nothing may replace it afterwards; a second run keeps the environment."""
    root, stand_ins, log = checkout(tmp_path), tmp_path / "stand-ins", tmp_path / "log"
    script(stand_ins / "python", PYTHON.format(torch_sees_no_gpu=int(not base_torch), log=log, pip=pip))
    script(stand_ins / "nvidia-smi", f"#!/bin/bash\nexit {int(not gpu)}\n")
    script(stand_ins / "uname", "#!/bin/bash\necho Linux\n")
    for _ in range(2):
        done = run(".ci/venv", root, stand_ins)
        assert done.returncode == 0, done.stderr
    venv, *installs = re.sub(r" -c \S+", " -c FILE", log.read_text()).splitlines()
    first = installs[: len(installs) // 2]
    assert installs == first * 2
    end = len(expected)
    assert [venv, *first][: end + 1] == [*expected, f"{PIP} -c FILE -e .[test,ragged,bench,transformers]"]
    assert not [line for line in first[end - 1 :] if "torch" in line]


# ---------------------------------------------------------------- .ci/test


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize(("interpreted", "compiled"), [(0, 0), (1, 0), (0, 1), (5, 0), (0, 5), (2, 2)])
def test_either_half_fails_the_whole(tmp_path: Path, gpu: bool, interpreted: int, compiled: int) -> None:
    """Exit code 5, no tests found, is a failure. No cache is outside the checkout."""
    root = checkout(tmp_path)
    script(root / "tests" / "codegen" / "test_a.py", "")
    (root / "tests" / "gpu").mkdir()
    caches = "$HYBRID_MXFP8_CACHE_DIR $TRITON_CACHE_DIR $CUDA_CACHE_PATH $MPLCONFIGDIR"
    script(
        root / ".venv" / "bin" / "pytest",
        f'#!/bin/bash\necho "ran ${{TRITON_INTERPRET:-0}} $*"\nfor cache in {caches}; do echo "cache $cache"; done\n'
        f'[ -n "$TRITON_INTERPRET" ] && exit {interpreted}\nexit {compiled}\n',
    )
    script(tmp_path / "nvidia-smi", f"#!/bin/bash\nexit {int(not gpu)}\n")
    done = run(".ci/test", root, tmp_path)
    assert done.returncode == int(bool(interpreted or compiled))
    first, second, *rest = (line for line in done.stdout.splitlines() if line.startswith("ran"))
    assert rest == (["ran 0 -m gpu tests -q"] if gpu else [])
    assert first.startswith("ran 1 tests --ignore=tests/codegen --ignore=tests/gpu ")
    assert second.startswith("ran 0 tests/codegen -q")
    said = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("cache")]
    assert len(said) == 4 * (2 + gpu)
    assert all(Path(cache).is_relative_to(root / "build" / "cache") for cache in said)
