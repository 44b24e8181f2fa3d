"""Building and keeping modules, with a compiler that takes a moment: races, kills, corruption, failures.

Hostile file systems and users are in test_cutlass_cache.py.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from cutlass_workshop import MODULE, Workshop, open_workshop

from hybrid_mxfp8.cutlass_kernels.jit import build as jit
from hybrid_mxfp8.cutlass_kernels.jit import toolchain as headers
from hybrid_mxfp8.errors import BackendUnavailableError


@pytest.fixture
def workshop(monkeypatch: pytest.MonkeyPatch) -> Iterator[Workshop]:
    with open_workshop(monkeypatch) as made:
        yield made


def wait_until(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.05)


@contextmanager
def unprivileged() -> Iterator[None]:
    """As a user whom file modes stop; root they do not."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_second_process_finds_the_module(workshop: Workshop) -> None:
    assert workshop.run()[1] == "42\n"
    code, out, err = workshop.run()
    assert (code, out) == (0, "42\n")
    assert "compiling" not in err
    assert workshop.compilations() == 1
    assert workshop.leftovers() == []


def test_racing_processes_build_once(workshop: Workshop) -> None:
    """Of two on a cold cache one compiles, the other says that it waits, and both have the module."""
    with workshop.held():
        first = workshop.start()
        wait_until(lambda: workshop.compilations() == 1)
        second = workshop.start()
        assert second.stderr is not None
        said = second.stderr.readline()
    outputs = [process.communicate(timeout=120) for process in (first, second)]
    assert [out for out, _ in outputs] == ["42\n", "42\n"]
    assert "waiting for another process that compiles toy" in said + outputs[1][1]
    assert workshop.compilations() == 1


def test_killed_build_leaves_nothing_in_the_way(workshop: Workshop) -> None:
    workshop.delay(60)
    process = workshop.start()
    wait_until(lambda: workshop.compilations() == 1)
    process.kill()
    process.communicate()
    try:
        assert workshop.modules() == []
        assert len(workshop.leftovers()) == 1
        workshop.delay(0)
        code, out, _ = workshop.run()
        assert (code, out) == (0, "42\n")
        assert workshop.leftovers() == []
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # the compiler it left behind


@pytest.mark.parametrize("damage", ["truncated", "empty", "missing", "manifest"])
def test_damaged_module_is_built_again(workshop: Workshop, damage: str) -> None:
    built = jit.build(workshop.source)
    if damage == "truncated":
        built.library.write_bytes(built.library.read_bytes()[:1000])
    elif damage == "empty":
        built.library.write_bytes(b"")
    elif damage == "missing":
        built.library.unlink()
    else:
        (built.folder / jit.MANIFEST).write_text("{")
    assert not built.intact()
    assert workshop.run()[:2] == (0, "42\n")
    assert workshop.compilations() == 2
    assert built.intact()
    assert workshop.leftovers() == []


def test_read_only_cache(workshop: Workshop) -> None:
    """A module that is there loads; one that is not cannot be built, and the error says where and what to do."""
    jit.build(workshop.source)
    workshop.cache.chmod(0o555)
    other = jit.Source("other", workshop.folder / "toy.cu", "9.0", definitions=(("ANSWER", "1"),), include=())
    with unprivileged():
        assert jit.load(workshop.source).answer() == 42
        with pytest.raises(BackendUnavailableError, match=r"cache folder .*cannot be written.*HYBRID_MXFP8_CACHE_DIR"):
            jit.build(other)
    workshop.cache.chmod(0o755)


def test_cache_folder_that_is_a_file(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYBRID_MXFP8_CACHE_DIR", str(workshop.folder / "toy.cu"))
    with pytest.raises(BackendUnavailableError, match="cannot be written"):
        jit.build(workshop.source)


def test_failing_compiler(workshop: Workshop) -> None:
    """The error shows the compiler's first error and where the rest is; a later build is not disturbed."""
    (workshop.folder / "toy.cu").write_text(MODULE + "#error\n")
    with pytest.raises(BackendUnavailableError) as caught:
        jit.build(workshop.source)
    message = str(caught.value)
    assert 'module.cu(7): error: identifier "answr" is undefined' in message
    log = Path(message.rpartition("all of it in ")[2].rstrip(")"))
    assert 'expected a ";"' in log.read_text()
    assert workshop.modules() == []
    assert workshop.leftovers() == []
    (workshop.folder / "toy.cu").write_text(MODULE)
    assert jit.load(workshop.source).answer() == 42


def test_cache_is_carried_to_a_machine_without_compiler(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = jit.build(workshop.source).folder
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setattr(headers, "_nvcc_candidates", lambda: iter(()))
    moved = workshop.folder / "elsewhere"
    shutil.copytree(folder.parent, moved / "cutlass")
    monkeypatch.setenv("HYBRID_MXFP8_CACHE_DIR", str(moved))
    assert jit.load(workshop.source).answer() == 42
    shutil.rmtree(moved)
    with pytest.raises(BackendUnavailableError, match=r"no CUDA compiler.*pip install 'hybrid-mxfp8\[nvcc\]'"):
        jit.build(workshop.source)


def test_newest_carried_module_is_taken(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """By CUTLASS's version, then nvcc's, as numbers; damaged ones and what else lies there are passed over."""
    folder = jit.build(workshop.source).folder
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setattr(headers, "_nvcc_candidates", lambda: iter(()))
    stem = folder.name.partition("-cutlass")[0]
    newest_last = ["4.8.1-nvcc13.0.88", "4.10.0-nvcc12.9.86", "4.10.0-nvcc13.0.9", "4.10.0-nvcc13.0.88"]
    for versions in (*newest_last, "4.11.0-nvcc13.0.88", "4.12.0-nvccX"):
        shutil.copytree(folder, folder.parent / f"{stem}-cutlass{versions}")
    (folder.parent / f"{stem}-cutlass4.11.0-nvcc13.0.88" / jit.LIBRARY).write_bytes(b"")
    (folder.parent / f"{stem}-cutlass4.13.0-nvcc13.0.88.lock").touch()
    for versions in reversed(newest_last):
        found = jit.find(workshop.source)
        assert found is not None
        assert found.folder.name == f"{stem}-cutlass{versions}"
        shutil.rmtree(found.folder)
    assert jit.find(workshop.source) == jit.Built(folder)


@pytest.mark.slow
def test_module_is_kept_by_all_that_goes_into_it(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Contents, definitions, flags, target, headers and versions each give another module, and the old ones stay."""
    file = workshop.folder / "toy.cu"

    def source(**changes: object) -> jit.Source:
        plain = {"name": "toy", "file": file, "arch": "9.0", "definitions": (("ANSWER", "1"),), "include": ()}
        return jit.Source(**(plain | changes))  # type: ignore[arg-type]

    names = [jit.build(source()).folder.name]
    names.append(jit.build(source(arch="8.0")).folder.name)
    names.append(jit.build(source(definitions=(("ANSWER", "2"),))).folder.name)
    names.append(jit.build(source(flags=("-DMORE",))).folder.name)
    file.write_text(MODULE + "// changed\n")
    names.append(jit.build(source()).folder.name)
    version = workshop.folder / "cutlass" / "include" / "cutlass" / "version.h"
    version.write_text(version.read_text().replace("MINOR 2", "MINOR 9"))
    names.append(jit.build(source()).folder.name)
    (version.parent / "patched.hpp").touch()
    headers._digest.cache_clear()  # a process reads the headers once
    names.append(jit.build(source()).folder.name)
    with monkeypatch.context() as patch:
        patch.setattr(jit, "_tvm_ffi_version", lambda: "0.0.1")
        names.append(jit.build(source()).folder.name)
    assert sorted(names) == workshop.modules()
    assert len(set(names)) == 8
    assert workshop.compilations() == 8
    version.write_text(version.read_text().replace("MINOR 9", "MINOR 2"))
    (version.parent / "patched.hpp").unlink()
    headers._digest.cache_clear()
    file.write_text(MODULE)
    assert jit.build(source()).folder.name == names[0]
    assert workshop.compilations() == 8


def test_build_that_was_overtaken_keeps_the_winner(workshop: Workshop) -> None:
    """Where a file system ignores the lock, the second of two renames finds the module in place."""
    built = jit.build(workshop.source)
    result = workshop.folder / "result"
    shutil.copytree(built.folder, result)
    before = built.library.stat().st_ino
    jit._put_in_place(result, built.folder, workshop.folder)
    assert built.intact()
    assert built.library.stat().st_ino == before


def test_target_needs_a_compiler_that_knows_it(workshop: Workshop) -> None:
    nvcc = workshop.folder / "cuda" / "bin" / "nvcc"
    nvcc.write_text(nvcc.read_text().replace("release 13.0, V13.0.88", "release 12.8, V12.8.61"))
    with pytest.raises(BackendUnavailableError, match=r"target 10.3a needs CUDA 12.9 or later.*12\.8\.61"):
        jit.build(jit.Source("toy", workshop.folder / "toy.cu", "10.3a", include=()))


def test_a_key_covers_all_that_the_compiler_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a compiler: each setting, and each file of its own, gives another key."""
    (tmp_path / "own.cuh").write_text("1")
    (tmp_path / "toy.cu").write_text("2")
    source = jit.Source("toy", tmp_path / "toy.cu", "9.0", (("A", "1"),), ("-G",), False, (tmp_path,))
    changed: dict[str, Any] = {"name": "t", "arch": "9.1", "definitions": (("A", "2"),), "flags": (), "tools": True}
    keys = [source.key(), *(dataclasses.replace(source, **{name: value}).key() for name, value in changed.items())]
    for owner, name, value in (
        (jit, "CUDA_FLAGS", ()),
        (jit, "_tvm_ffi_version", lambda: "0"),
        (jit.platform, "machine", lambda: "another"),
        (jit.platform, "system", lambda: "another"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value)
            keys.append(source.key())
    for file in ("own.cuh", "toy.cu"):
        (tmp_path / file).write_text("3")
        keys.append(source.key())
    (tmp_path / "own.cuh").rename(tmp_path / "renamed.cuh")
    keys.append(source.key())
    assert len(set(keys)) == len(keys)
