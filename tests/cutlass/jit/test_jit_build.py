"""Building and keeping modules: keys, failures, races, and caches that were built elsewhere."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import shutil
import signal
import subprocess
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import Mock

import pytest
from fake_toolkit import MODULE, FakeToolkit, answer, wait_until
from forked import Child

from hybrid_mxfp8.cutlass_kernels.jit import build as jit
from hybrid_mxfp8.cutlass_kernels.jit import toolchain
from hybrid_mxfp8.dispatch import module_cache
from hybrid_mxfp8.dispatch.module_cache import Module
from hybrid_mxfp8.errors import BackendUnavailableError


def test_second_process_finds_the_module(toolkit: FakeToolkit, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "hybrid_mxfp8"):
        assert jit.load(toolkit.source).answer() == 42
        assert caplog.text.count("compiling toy for 9.0") == 1
        assert answer(toolkit.source) == 42
        assert jit.build(toolkit.source) == jit.find(toolkit.source)
    assert caplog.text.count("compiling") == toolkit.compilations() == 1


@pytest.mark.parametrize("locks", [True, False], ids=["locks", "locks that do nothing"])
def test_eight_processes_on_a_cold_cache(
    toolkit: FakeToolkit, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, locks: bool
) -> None:
    """One compiles, seven wait. Where a network file system ignores locks all compile, and the
    first module stays, whole."""
    if not locks:
        monkeypatch.setattr(module_cache, "_locked", lambda folder: nullcontext())
    toolkit.delay(1)
    children = [Child(lambda: jit.load(toolkit.source).answer()) for _ in range(7)]
    wait_until(toolkit.compilations)
    with caplog.at_level(logging.WARNING, "hybrid_mxfp8"):
        jit.build(toolkit.source)
    assert ("waiting for another process that compiles toy" in caplog.text) == locks
    assert [child.result() for child in children] == [42] * 7
    assert (toolkit.compilations() == 1) == locks
    assert len(toolkit.modules()) == 1
    assert toolkit.leftovers() == []


def test_of_those_that_wait_one_takes_over(toolkit: FakeToolkit) -> None:
    """The one that compiles is killed; what it left goes once it is old."""
    toolkit.delay(60)
    first = Child(jit.build, toolkit.source)
    wait_until(toolkit.compilations)

    others = [Child(lambda: jit.load(toolkit.source).answer()) for _ in range(3)]
    toolkit.delay(0)
    assert first.process.pid is not None
    os.killpg(first.process.pid, signal.SIGKILL)
    assert first.result() is None
    assert [child.result() for child in others] == [42] * 3
    assert toolkit.compilations() == 2
    (left,) = toolkit.leftovers()
    os.utime(left, (0, 0))
    shutil.rmtree(jit.build(toolkit.source).folder)
    assert answer(toolkit.source) == 42
    assert toolkit.leftovers() == []


def test_failing_compiler(toolkit: FakeToolkit) -> None:
    """The error shows the compiler's first error and where the rest is; the next build works."""
    (toolkit.folder / "toy.cu").write_text(MODULE + "#error\n")
    with pytest.raises(BackendUnavailableError) as caught:
        jit.build(toolkit.source)
    message = str(caught.value)
    assert 'module.cu(7): error: identifier "answr" is undefined' in message
    log = Path(message.rpartition("all of it in ")[2].rstrip(")"))
    assert 'expected a ";"' in log.read_text()
    assert toolkit.modules() == toolkit.leftovers() == []
    (toolkit.folder / "toy.cu").write_text(MODULE)
    assert answer(toolkit.source) == 42


def test_a_library_that_does_not_load(toolkit: FakeToolkit) -> None:
    (toolkit.folder / "cuda" / "compiled.so").write_bytes(b"no library")
    with pytest.raises(BackendUnavailableError, match=r"module\.so does not load; delete its folder to rebuild"):
        jit.load(toolkit.source)


@pytest.mark.parametrize(
    ("output", "error"),
    [
        ("a\nx.cu(1): error: first\nx.cu(2): error: second", "x.cu(1): error: first"),
        ("ld: undefined reference to `cuDriverGetVersion'\ncollect2: error: ld", "collect2: error: ld"),
        ("nvcc fatal : no such file", "nvcc fatal : no such file"),
        ("killed\n\n", "killed"),
        ("", "no output"),
    ],
)
def test_first_error(output: str, error: str) -> None:
    assert jit._first_error(output) == error


def test_newest_copied_module_is_taken(toolkit: FakeToolkit, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine without a compiler: by the versions of CUTLASS, then nvcc, as numbers; what is
    damaged or no module is not, and where nothing was copied the error says what to install."""
    built = jit.build(toolkit.source).folder
    monkeypatch.setattr(toolchain, "_nvcc_candidates", lambda: iter(()))
    monkeypatch.setenv("HYBRID_MXFP8_CACHE_DIR", str(toolkit.folder / "copied"))
    stem = str(toolkit.folder / "copied" / "cutlass" / built.name.partition("-cutlass")[0])
    newest_last = ["4.8.1-nvcc13.0.88", "4.10.0-nvcc12.9.86", "4.10.0-nvcc13.0.9", "4.10.0-nvcc13.0.88"]
    for versions in (*newest_last, "4.11.0-nvcc13.0.88", "4.12.0-nvccX"):
        shutil.copytree(built, f"{stem}-cutlass{versions}")
    Path(f"{stem}-cutlass4.11.0-nvcc13.0.88", jit.LIBRARY).write_bytes(b"")
    Path(f"{stem}-cutlass4.13.0-nvcc13.0.88.lock").touch()
    assert jit.load(toolkit.source).answer() == 42
    for versions in reversed(newest_last):
        found = jit.find(toolkit.source)
        assert found == Module(Path(f"{stem}-cutlass{versions}"))
        shutil.rmtree(found.folder)
    with pytest.raises(BackendUnavailableError, match=r"no CUDA compiler.*pip install 'hybrid-mxfp8\[nvcc\]'"):
        jit.build(toolkit.source)


def test_each_change_gives_another_module(toolkit: FakeToolkit, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of contents, settings, target, headers and versions; each file of its own by name, too."""
    file, own = toolkit.folder / "toy.cu", toolkit.folder / "own"
    own.mkdir()
    (own / "own.cuh").write_text("1")
    source = toolkit.module("toy", definitions=(("A", "1"),), flags=("-G",), include=(own,))
    keys = [source.key()]
    for change in ({"name": "t"}, {"arch": "8.0"}, {"definitions": (("A", "2"),)}, {"flags": ()}, {"include": ()}):
        keys.append(dataclasses.replace(source, **change).key())
    for owner, name, value in (
        (jit, "FLAGS", ()),
        (jit, "_tvm_ffi_version", lambda: "0"),
        (jit.platform, "machine", lambda: "another"),
        (jit.platform, "system", lambda: "another"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value)
            keys.append(source.key())
    for path in (own / "own.cuh", file):
        path.write_bytes(path.read_bytes()[:-1] + b"2")  # of as many bytes
        keys.append(source.key())
    (own / "own.cuh").rename(own / "renamed.cuh")
    keys.append(source.key())
    assert len(set(keys)) == len(keys) == 13

    folders = [jit.build(source).folder]
    headers = toolkit.folder / "cutlass" / "include" / "cutlass"
    version, patched = headers / "version.h", headers / "patched.hpp"
    for changed, content in ((version, version.read_text().replace("MINOR 2", "MINOR 9")), (patched, "")):
        changed.write_text(content)
        toolchain._digest.cache_clear()  # a process reads the headers once
        folders.append(jit.build(source).folder)
    assert sorted(folder.name for folder in folders) == toolkit.modules()
    assert [re.sub(r".*(cutlass[\d.]*).*", r"\1", f.name) for f in folders] == ["cutlass4.2.0", *["cutlass4.9.0"] * 2]
    assert toolkit.compilations() == len(set(folders)) == 3


def test_without_tvm_ffi_there_is_a_key_all_the_same(toolkit: FakeToolkit, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = Mock(side_effect=jit.importlib.metadata.PackageNotFoundError)
    monkeypatch.setattr(jit.importlib.metadata, "version", missing)
    monkeypatch.setattr(jit, "_tvm_ffi_version", jit._tvm_ffi_version.__wrapped__)
    assert toolkit.source.key()


@pytest.mark.parametrize("name", ["with two  spaces", "größe-日本語", "a'b;touch evil;#", "colon:and=comma,", "-I"])
def test_paths_that_are_names_and_nothing_more(
    toolkit: FakeToolkit, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Of the folder of cache, source, headers and CUTLASS: nvcc gets it as it is."""
    folder = toolkit.folder / name
    (folder / "headers").mkdir(parents=True)
    shutil.copyfile(toolkit.folder / "toy.cu", folder / "toy.cu")
    shutil.copytree(toolkit.folder / "cutlass", folder / "cutlass")
    monkeypatch.setenv("HYBRID_MXFP8_CACHE_DIR", str(folder / "cache"))
    monkeypatch.setenv("HYBRID_MXFP8_CUTLASS_DIR", str(folder / "cutlass"))
    source = jit.Source("toy", folder / "toy.cu", "9.0", include=(folder / "headers",))
    assert answer(source) == answer(source) == 42
    assert toolkit.compilations() == 1
    words = json.loads((toolkit.folder / "cuda" / "log").read_text())
    assert {f"-I{folder / 'headers'}", f"-I{folder / 'cutlass' / 'include'}", str(folder / "toy.cu")} <= set(words)


def test_paths_that_nvcc_would_hand_to_a_shell(toolkit: FakeToolkit, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("$HOME", "`touch evil`", 'a"b', "back\\slash"):
        monkeypatch.setenv("HYBRID_MXFP8_CACHE_DIR", str(toolkit.folder / name))
        with pytest.raises(BackendUnavailableError, match="nvcc can't build from"):
            jit.build(toolkit.source)
    assert toolkit.compilations() == 0


# ---------------------------------------------------------------- with the real compiler

UNDEFINED = 'extern "C" int cuDriverGetVersion(int*);\nint ask(int* v) { return cuDriverGetVersion(v); }\n'


@pytest.fixture
def nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> jit.Source:
    """A source in a folder of a name that is nothing special to nvcc's shell."""
    monkeypatch.setenv("HYBRID_MXFP8_CACHE_DIR", str(tmp_path / "cache"))
    try:
        toolchain.find_for("9.0")
    except BackendUnavailableError as reason:
        pytest.skip(str(reason))
    file = tmp_path / "a 'b';touch evil;#é" / "toy.cu"
    file.parent.mkdir()
    file.write_text("#include <cuda_runtime.h>\n__global__ void kernel() {}\n" + MODULE)
    return jit.Source("toy", file, "9.0", (("ANSWER", "42"),), include=())


def test_a_module_needs_no_library_of_cuda(nvcc: jit.Source) -> None:
    """The runtime is linked in: a module loads where there is no toolkit, and no driver."""
    assert answer(nvcc) == 42
    listed = subprocess.run(["nm", "-D", "-u", jit.build(nvcc).library], capture_output=True, text=True, check=True)
    assert not re.search(r"\b(?:__)?cu(?:da)?[A-Z]\w*", listed.stdout)
    assert not Path("evil").exists()


def test_an_undefined_symbol_fails_the_build(nvcc: jit.Source) -> None:
    """As CUTLASS 4.3.5 has one: said at once, not when the module is loaded."""
    nvcc.file.write_text(MODULE + UNDEFINED)
    with pytest.raises(BackendUnavailableError, match="compiling toy failed") as caught:
        jit.build(nvcc)
    log = Path(str(caught.value).rpartition("all of it in ")[2].rstrip(")"))
    assert "cuDriverGetVersion" in log.read_text()
