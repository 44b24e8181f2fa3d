"""Finding CUTLASS and nvcc: order, versions, wrappers, and what the errors say to do."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from hybrid_mxfp8.commands import cli, doctor
from hybrid_mxfp8.cutlass_kernels.jit import toolchain
from hybrid_mxfp8.errors import BackendUnavailableError


def make_cutlass(include: Path, version: str) -> None:
    (include / "cutlass").mkdir(parents=True)
    names = ("MAJOR", "MINOR", "PATCH")
    lines = [f"#define CUTLASS_{name} {number}\n" for name, number in zip(names, version.split("."), strict=True)]
    (include / "cutlass" / "version.h").write_text("".join(lines))


def make_nvcc(home: Path, version: str, dry_run: str = "") -> Path:
    """A toolkit whose nvcc answers as NVIDIA's does."""
    (home / "bin").mkdir(parents=True)
    nvcc = home / "bin" / "nvcc"
    nvcc.write_text(
        f"#!/bin/sh\ncase $1 in --version) echo 'Cuda compilation tools, release {version[:4]}, V{version}';;\n"
        f"--dryrun) echo '{dry_run or f'#$ _HERE_={home}/bin'}';; esac\n"
    )
    nvcc.chmod(0o755)
    return nvcc


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("HYBRID_MXFP8_CUTLASS_DIR", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(variable, raising=False)


def packages(site: Path, monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    """Have these found before the installed ones: the named with headers, the others without."""
    monkeypatch.syspath_prepend(str(site))
    for module, inside in toolchain.CUTLASS_PACKAGES.values():
        (site / module).mkdir(parents=True)
        (site / module / "__init__.py").write_text("raise ImportError('must not be imported')")
        if module in versions:
            make_cutlass(site / module / inside, versions[module])


def test_newest_package_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packages(tmp_path, monkeypatch, cutlass_library="4.2.0", deep_gemm="4.8.1", flashinfer="4.5.0")
    found = toolchain.find_cutlass()
    assert (found.origin, found.version, found.ragged) == ("sgl-deep-gemm", (4, 8, 1), True)
    assert [(c.origin, c.version_string, c.problem) for c in toolchain.cutlass_candidates()] == [
        ("nvidia-cutlass", "4.2.0", ""),
        ("sgl-deep-gemm", "4.8.1", ""),
        ("flashinfer-python", "4.5.0", ""),
    ]


RAGGED, OVERLAP = "ragged mainloop and overlap of its two kernels", "overlap of its two kernels"


@pytest.mark.parametrize(
    ("version", "lacks", "problem"),
    [
        ((4, 1, 9), RAGGED, "CUTLASS 4.2 or later is needed"),
        ((4, 2, 0), RAGGED, ""),
        ((4, 3, 5), RAGGED, "CUTLASS 4.3 calls cuDriverGetVersion"),
        ((4, 4, 0), OVERLAP, ""),
        ((4, 5, 3), OVERLAP, ""),
        ((4, 6, 0), "", ""),
        ((5, 0, 0), "", ""),
    ],
)
def test_what_a_version_has_and_lacks(version: tuple[int, int, int], lacks: str, problem: str) -> None:
    found = toolchain.CutlassHeaders(Path("/c"), version, "a test")
    assert found.ragged == (lacks != RAGGED)
    assert found.hint == (f"{lacks} with newer CUTLASS headers: pip install 'hybrid-mxfp8[ragged]'" if lacks else "")
    assert found.problem.startswith(problem)
    assert bool(found.problem) == bool(problem)


def test_headers_that_are_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package is passed over, and named where there is no other; a chosen folder is refused."""
    packages(tmp_path, monkeypatch, deep_gemm="4.1.9")
    said = r"no CUTLASS headers.*\(sgl-deep-gemm has 4.1.9: CUTLASS 4.2 or later.*pip install nvidia-cutlass"
    with pytest.raises(BackendUnavailableError, match=said):
        toolchain.find_cutlass()
    make_cutlass(tmp_path / "old", "4.1.9")
    for name, said in (("old", "CUTLASS 4.2 or later is needed.* has 4.1.9"), ("absent", "expected a folder")):
        monkeypatch.setenv("HYBRID_MXFP8_CUTLASS_DIR", str(tmp_path / name))
        with pytest.raises(BackendUnavailableError, match=f"HYBRID_MXFP8_CUTLASS_DIR: {said}"):
            toolchain.find_cutlass()


def test_a_chosen_folder_is_told_by_its_contents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkout or its include folder, before packages: commits may say the same version."""
    packages(tmp_path, monkeypatch, deep_gemm="4.8.1")
    assert toolchain.find_cutlass().identity == "4.8.1"
    identities = []
    for folder, header, text in (("a/include", "y", "1"), ("b/include", "y", "2"), ("c", "y", "1"), ("d", "z", "1")):
        chosen = tmp_path / folder[0]
        make_cutlass(tmp_path / folder, "4.4.0")
        (tmp_path / folder / "cute").mkdir()
        (tmp_path / folder / "cute" / header).write_text(text)
        monkeypatch.setenv("HYBRID_MXFP8_CUTLASS_DIR", str(chosen))
        identities.append(toolchain.find_cutlass().identity)
    assert all(re.fullmatch(r"4\.4\.0\+[0-9a-f]{8}", identity) for identity in identities)
    assert identities[0] == identities[2]
    assert len(set(identities)) == 3


@pytest.mark.parametrize("way", ["a wrapper", "a link"])
def test_a_toolkit_is_where_its_compiler_says_or_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """Not in the wrapper's folder; and where a link leads of one that says no folder."""
    real = make_nvcc(tmp_path / "toolkit", "13.0.88")
    found = tmp_path / "bin" / "nvcc"
    if way == "a wrapper":
        make_nvcc(tmp_path, "").write_text(f'#!/bin/sh\nexec {real} "$@"\n')
    else:
        found.parent.mkdir()
        real.write_text(real.read_text().replace("_HERE_", "_THERE_"))
        found.symlink_to(real)
    monkeypatch.setenv("PATH", f"{found.parent}:/usr/bin:/bin")
    cuda = toolchain.find_cuda()
    assert (cuda.home, cuda.version, cuda.origin) == (tmp_path / "toolkit", (13, 0, 88), "PATH")


WHEEL = "site/nvidia/cu13"


@pytest.mark.parametrize(
    ("toolkits", "variables", "found"),
    [
        ({"a": "12.9.41", "b": "13.0.88"}, {"CUDA_HOME": "a", "PATH": "b/bin:/bin"}, ("a", "CUDA_HOME")),
        ({"a": "12.9.41", WHEEL: "13.0.88"}, {"PATH": "a/bin:/bin"}, ("a", "PATH")),
        ({"a": "12.4.10", "b": "13.2.20", WHEEL: "13.0.88"}, {"PATH": "a/bin:b/bin:/bin"}, (WHEEL, "nvidia-cuda-nvcc")),
        ({"site/nvidia/cu12": "12.9.41", WHEEL: "13.0.88"}, {"PATH": "/bin"}, (WHEEL, "nvidia-cuda-nvcc")),
    ],
    ids=["CUDA_HOME", "then PATH", "the first of PATH alone, unless too old", "the newest wheel"],
)
def test_the_order_of_compilers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, toolkits, variables, found) -> None:
    """CUDA_HOME, PATH as a shell reads it, wheels, whatever package ``nvidia`` is."""
    for name, version in toolkits.items():
        make_nvcc(tmp_path / name, version)
    (tmp_path / "nvidia").mkdir()
    (tmp_path / "nvidia" / "__init__.py").touch()
    monkeypatch.setattr(toolchain, "sys", SimpleNamespace(path=[str(tmp_path), str(tmp_path / "site")]))
    monkeypatch.chdir(tmp_path)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    compiler = toolchain.find_cuda()
    assert (compiler.home, compiler.origin) == (tmp_path / found[0], found[1])


@pytest.mark.parametrize(
    ("script", "problem"),
    [
        (None, "No such file"),
        ("", "Exec format error"),
        ("#!/bin/sh\necho gcc 12", "not nvcc: gcc 12"),
        ("#!/bin/sh\n", "not nvcc: no --version"),
    ],
)
def test_cuda_home_without_compiler_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str | None, problem: str
) -> None:
    if script is not None:
        make_nvcc(tmp_path, "13.0.88").write_text(script)
    for variable in ("CUDA_PATH", "CUDA_HOME"):
        monkeypatch.setenv(variable, str(tmp_path))
        with pytest.raises(BackendUnavailableError, match=rf"^{variable}: expected a toolkit .*bin/nvcc: {problem}"):
            toolchain.find_cuda()


@pytest.mark.parametrize(
    ("dry_run", "host"),
    [
        ("#$ gcc -D__CUDA_ARCH_LIST__=750 -E -x c++", "gcc"),
        ('#$ "/my tools"/g++ -D__CUDA_ARCH_LIST__=750 -E -x c++', "/my tools/g++"),
        ("gcc: No such file or directory\nnvcc fatal   : Failed to preprocess host compiler properties.", ""),
    ],
)
def test_the_host_compiler_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], dry_run: str, host: str
) -> None:
    """By nvcc's own word; where it has none, ``doctor`` and ``warmup`` say what to install."""
    nvcc = make_nvcc(tmp_path, "13.0.88", dry_run)
    monkeypatch.setenv("PATH", f"{nvcc.parent}:/usr/bin:/bin")
    found = next(toolchain.cuda_candidates())
    assert (found.host, found.problem) == (host, "" if host else toolchain.NO_HOST_COMPILER)
    if not host:
        assert cli.main(["warmup"]) == 2
        assert f"{nvcc}: no host compiler: install g++" in capsys.readouterr().err
    assert doctor.host_compiler().startswith(host or "no host compiler: install g++")


def test_a_compiler_that_was_replaced_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In its place, also by a file of an older date."""
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    make_nvcc(tmp_path / "toolkit", "12.9.41")
    assert toolchain.find_cuda().version == (12, 9, 41)
    shutil.rmtree(tmp_path / "toolkit")
    os.utime(make_nvcc(tmp_path / "toolkit", "13.0.88"), (1, 1))
    assert toolchain.find_cuda().version == (13, 0, 88)


def test_no_compiler_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_nvcc(tmp_path / "old", "12.4.10")
    monkeypatch.setenv("PATH", f"{tmp_path / 'old' / 'bin'}:/usr/bin:/bin")
    monkeypatch.setattr(toolchain, "sys", SimpleNamespace(path=[]))
    said = r"12\.4\.10 is older than 12\.8.*pip install 'hybrid-mxfp8\[nvcc\]'"
    with pytest.raises(BackendUnavailableError, match=said):
        toolchain.find_cuda()
