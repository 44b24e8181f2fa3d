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


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Packages that are found before the installed ones."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    return folder


def packages(site: Path, **versions: str) -> None:
    """Install the named packages with headers, and for the others modules without."""
    for module, inside in toolchain.CUTLASS_PACKAGES.values():
        (site / module).mkdir()
        (site / module / "__init__.py").write_text("raise ImportError('must not be imported')")
        if module in versions:
            make_cutlass(site / module / inside, versions[module])


def test_newest_package_wins(site: Path) -> None:
    packages(site, cutlass_library="4.2.0", deep_gemm="4.8.1", flashinfer="4.5.0")
    found = toolchain.find_cutlass()
    assert (found.origin, found.version, found.ragged) == ("sgl-deep-gemm", (4, 8, 1), True)
    assert [(c.origin, c.version_string, c.problem) for c in toolchain.cutlass_candidates()] == [
        ("nvidia-cutlass", "4.2.0", ""),
        ("sgl-deep-gemm", "4.8.1", ""),
        ("flashinfer-python", "4.5.0", ""),
    ]


@pytest.mark.parametrize(
    ("version", "ragged", "hint"),
    [
        ("4.2.0", False, "ragged mainloop and overlap of its two kernels with newer CUTLASS headers: pip install"),
        ("4.4.0", True, "overlap of its two kernels with newer CUTLASS headers: pip install 'hybrid-mxfp8[ragged]'"),
        ("4.5.3", True, "overlap of its two kernels"),
        ("4.6.0", True, ""),
        ("5.0.0", True, ""),
    ],
)
def test_what_a_version_has_and_lacks(site: Path, version: str, ragged: bool, hint: str) -> None:
    packages(site, cutlass_library=version)
    found = toolchain.find_cutlass()
    assert found.ragged is ragged
    assert found.hint.startswith(hint)
    assert bool(found.hint) == bool(hint)


@pytest.mark.parametrize(
    ("version", "problem"),
    [
        ("3.9.0", "CUTLASS 4.2 or later is needed"),
        ("4.1.9", "CUTLASS 4.2 or later is needed"),
        ("4.3.0", "CUTLASS 4.3 calls cuDriverGetVersion"),
        ("4.3.5", "CUTLASS 4.3 calls cuDriverGetVersion"),
    ],
)
def test_headers_that_are_not_used(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, problem: str
) -> None:
    """A package of these is passed over, and named where there is no other; a chosen folder is
    refused."""
    packages(site, deep_gemm=version)
    said = rf"no CUTLASS headers.*\(sgl-deep-gemm has {version}: {problem}.*pip install nvidia-cutlass"
    with pytest.raises(BackendUnavailableError, match=said):
        toolchain.find_cutlass()
    assert problem in toolchain.cutlass_candidates()[0].problem
    make_cutlass(tmp_path / "mine", version)
    monkeypatch.setenv("HYBRID_MXFP8_CUTLASS_DIR", str(tmp_path / "mine"))
    with pytest.raises(BackendUnavailableError, match=rf"HYBRID_MXFP8_CUTLASS_DIR: {problem}.* has {version}"):
        toolchain.find_cutlass()


@pytest.mark.parametrize("inside", ["include", "."])
def test_variable_beats_packages(site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: str) -> None:
    """It may name a checkout or its include folder."""
    packages(site, deep_gemm="4.8.1")
    make_cutlass(tmp_path / "mine" / inside, "4.4.0")
    monkeypatch.setenv("HYBRID_MXFP8_CUTLASS_DIR", str(tmp_path / "mine"))
    assert toolchain.find_cutlass().version == (4, 4, 0)


def test_a_chosen_folder_is_told_from_others_by_its_contents(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkouts of different commits say the same version; packages of a version are the same."""
    packages(site, deep_gemm="4.8.1")
    assert toolchain.find_cutlass().identity == "4.8.1"
    identities = []
    for name, header, text in (
        ("a", "layout.hpp", "// 1"),
        ("b", "layout.hpp", "// 2"),
        ("c", "layout.hpp", "// 1"),
        ("d", "shape.hpp", "// 1"),
    ):
        make_cutlass(tmp_path / name / "include", "4.8.1")
        (tmp_path / name / "include" / "cute").mkdir()
        (tmp_path / name / "include" / "cute" / header).write_text(text)
        monkeypatch.setenv("HYBRID_MXFP8_CUTLASS_DIR", str(tmp_path / name))
        identities.append(toolchain.find_cutlass().identity)
    assert all(re.fullmatch(r"4\.8\.1\+[0-9a-f]{8}", identity) for identity in identities)
    assert identities[0] == identities[2]
    assert len(set(identities)) == 3


def test_variable_that_names_nothing_is_an_error(site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong setting is reported, not passed over."""
    packages(site, deep_gemm="4.8.1")
    monkeypatch.setenv("HYBRID_MXFP8_CUTLASS_DIR", str(tmp_path))
    with pytest.raises(BackendUnavailableError, match=r"HYBRID_MXFP8_CUTLASS_DIR: expected a folder"):
        toolchain.find_cutlass()


def test_toolkit_is_found_through_a_wrapper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wrapper's folder is not the toolkit's."""
    real = make_nvcc(tmp_path / "toolkit", "13.0.88")
    wrapper = tmp_path / "bin" / "nvcc"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\nexec {real} "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{wrapper.parent}:/usr/bin:/bin")
    found = toolchain.find_cuda()
    assert (found.home, found.version, found.origin) == (tmp_path / "toolkit", (13, 0, 88), "PATH")


def test_cuda_home_beats_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_nvcc(tmp_path / "a", "12.9.41")
    make_nvcc(tmp_path / "b", "13.0.88")
    monkeypatch.setenv("PATH", f"{tmp_path / 'b' / 'bin'}:/usr/bin:/bin")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "a"))
    assert toolchain.find_cuda().home == tmp_path / "a"


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


def test_a_compiler_that_says_no_folder_is_where_its_link_leads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = make_nvcc(tmp_path / "toolkit", "13.0.88")
    real.write_text(real.read_text().replace("_HERE_", "_THERE_"))
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "nvcc").symlink_to(real)
    monkeypatch.setenv("PATH", f"{tmp_path / 'links'}:/usr/bin:/bin")
    assert toolchain.find_cuda().home == tmp_path / "toolkit"


def test_wheels_come_after_path(site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which an nvcc on PATH that is too old is passed over for, whatever package ``nvidia`` is."""
    make_nvcc(tmp_path / "old", "12.4.10")
    make_nvcc(site / "nvidia" / "cu13", "13.2.20")
    monkeypatch.setenv("PATH", f"{tmp_path / 'old' / 'bin'}:/usr/bin:/bin")
    (tmp_path / "cu12" / "nvidia").mkdir(parents=True)
    (tmp_path / "cu12" / "nvidia" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path / "cu12"))
    found = toolchain.find_cuda()
    assert (found.home, found.origin) == (site / "nvidia" / "cu13", "nvidia-cuda-nvcc")
    assert "12.4.10 is older than 12.8" in next(toolchain.cuda_candidates()).problem


def test_newest_wheel_and_first_of_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several compilers on PATH a shell calls the first; the others are not looked at."""
    wheels = tmp_path / "site" / "nvidia"
    for name, version in (("cu12", "12.9.41"), ("cu13", "13.0.88")):
        make_nvcc(wheels / name, version)
    for name, version in (("old", "12.4.10"), ("new", "13.2.20")):
        make_nvcc(tmp_path / name, version)
    monkeypatch.setattr(toolchain, "sys", SimpleNamespace(path=[str(tmp_path / "site")]))
    for path in ("/nowhere", f"{tmp_path / 'old' / 'bin'}:{tmp_path / 'new' / 'bin'}"):
        monkeypatch.setenv("PATH", f"{path}:/usr/bin:/bin")
        assert toolchain.find_cuda().home == wheels / "cu13"


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
    with pytest.raises(
        BackendUnavailableError, match=r"12\.4\.10 is older than 12\.8.*pip install 'hybrid-mxfp8\[nvcc\]'"
    ):
        toolchain.find_cuda()
