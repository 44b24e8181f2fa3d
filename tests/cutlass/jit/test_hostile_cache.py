"""The cache in hostile hands: what others own or can write is not loaded, and nothing that happens
to a build or to the file system leaves a wrong module behind.

Owners are changed for real where the tests run as root, as they do in a container.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import re
import shutil
import signal
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_toolkit import STRANGER, FakeToolkit, answer, as_user
from forked import Child

from hybrid_mxfp8 import env
from hybrid_mxfp8.commands import doctor
from hybrid_mxfp8.cutlass_kernels import grouped_gemm
from hybrid_mxfp8.cutlass_kernels.jit import build as jit
from hybrid_mxfp8.dispatch import module_cache
from hybrid_mxfp8.dispatch.module_cache import LIBRARY, MANIFEST, Module
from hybrid_mxfp8.errors import BackendUnavailableError


@pytest.fixture
def as_root() -> None:
    if os.geteuid() != 0:
        pytest.skip("gives files to another user: only root can")


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Mode and contents of everything below."""
    return {
        str(path): (path.lstat().st_mode, path.read_bytes() if path.is_file() else b"") for path in folder.rglob("*")
    }


def give(path: Path) -> None:
    os.chown(path, STRANGER, -1, follow_symlinks=False)


def link_away(cache: Path) -> None:
    """The cache folder becomes a link to where it is now."""
    to = cache.with_name("elsewhere")
    cache.rename(to)
    cache.symlink_to(to)


# ---------------------------------------------------------------- whose files

OTHERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "of another": (give, r"belongs to user 12345, not to user \d+, who runs this, or to root"),
    "open to all": (lambda path: path.chmod(path.stat().st_mode | 0o002), r"can be written by everyone \(mode 0757\)"),
    "open to a group": (
        lambda path: path.chmod(path.stat().st_mode | 0o020),
        r"can be written by group \d+ \(mode 0775\)",
    ),
}
"""How others can write a file or folder, and how a folder's problem is said."""


@pytest.mark.parametrize(
    ("where", "how"), [*itertools.product(("cache", "modules", "target"), OTHERS), ("link", "of another")]
)
def test_a_cache_that_others_can_write_is_not_loaded(
    toolkit: FakeToolkit, monkeypatch: pytest.MonkeyPatch, as_root: None, where: str, how: str
) -> None:
    """By any way in, the folder, that of the modules in it, a link's target or the link: nothing is
    loaded or written, and each says why and what to do; one word trusts it."""
    jit.build(toolkit.source)
    cache = toolkit.folder / "cache"
    if where in ("target", "link"):
        link_away(cache)
    change, problem = OTHERS[how]
    change({"modules": toolkit.cache, "target": cache.resolve()}.get(where, cache))
    before = snapshot(toolkit.folder)
    named = {"modules": r"\S*/cache/cutlass", "link": r"the link \S*/cache"}.get(where, r"\S*/cache")
    what_to_do = r".*chown, chmod go-w.*HYBRID_MXFP8_CACHE_DIR.*TRUST_CACHE=1"
    message = f"the cache is not loaded: {named} {problem}{what_to_do}"
    for call in (jit.find, jit.build, jit.load, jit.built_elsewhere):
        with pytest.raises(BackendUnavailableError, match=message):
            call(toolkit.source)
    facts = doctor.examine()
    ok, reason = grouped_gemm.availability((10, 0))
    assert not ok
    assert facts["cached"] == []
    for said in (reason, facts["modules_problem"], doctor.render(facts)):
        assert "the cache is not loaded" in said
    assert snapshot(toolkit.folder) == before

    monkeypatch.setenv("HYBRID_MXFP8_TRUST_CACHE", "1")
    assert answer(toolkit.source) == 42
    assert toolkit.compilations() == 1


@pytest.mark.parametrize("file", ["", LIBRARY, MANIFEST])
@pytest.mark.parametrize("how", OTHERS)
def test_a_planted_module_is_built_anew(
    toolkit: FakeToolkit, as_root: None, how: str, file: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A library that would not even load, with metadata to match, in a cache that is in order."""
    built = jit.build(toolkit.source)
    built.library.write_bytes(b"planted")
    module_cache.write_manifest(built.folder, **built.manifest())
    assert built.intact(), "a planted module that is this user's own would be loaded"
    OTHERS[how][0](built.folder / file)
    assert not built.intact()
    with caplog.at_level(logging.WARNING, "hybrid_mxfp8"):
        assert jit.find(toolkit.source) is None
    assert "not loaded: " in caplog.text
    assert answer(toolkit.source) == 42
    assert toolkit.compilations() == 2
    assert toolkit.leftovers() == []


def test_what_root_built_is_everybodys(toolkit: FakeToolkit) -> None:
    """The user that an image runs as loads its modules; to add one fails and says what to do."""
    jit.build(toolkit.source)
    toolkit.cache.chmod(0o555)

    def use() -> int:
        with pytest.raises(BackendUnavailableError, match=r"cache folder .*cannot be written.*HYBRID_MXFP8_CACHE_DIR"):
            jit.build(toolkit.module("other"))
        return int(jit.load(toolkit.source).answer())

    assert as_user(STRANGER, use) == 42
    toolkit.cache.chmod(0o755)


def test_what_a_user_built_is_that_users(toolkit: FakeToolkit, as_root: None) -> None:
    folder = jit.build(toolkit.source).folder
    for path in (toolkit.folder / "cache", toolkit.cache, *folder.iterdir(), folder):
        give(path)
    assert as_user(STRANGER, lambda: jit.load(toolkit.source).answer()) == 42
    refused = as_user(STRANGER + 1, lambda: jit.load(toolkit.source).answer())
    assert "belongs to user 12345, not to user 12346" in refused


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o022, 0o077])
def test_what_a_build_makes_is_its_own(toolkit: FakeToolkit, umask: int) -> None:
    """Whatever the umask, nobody else can write any of it, or hold a lock for ever."""
    Child(lambda: (os.umask(umask), jit.build(toolkit.source))).result()
    assert len(toolkit.modules()) == 1
    made = [toolkit.folder / "cache", *(toolkit.folder / "cache").rglob("*")]
    assert len(made) == 6
    for path in made:
        assert not path.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH), path
    (lock,) = toolkit.cache.glob("*.lock")
    assert stat.S_IMODE(lock.stat().st_mode) & 0o077 == 0


def test_a_link_and_a_sticky_folder_are_fine(toolkit: FakeToolkit, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home on another disk; and /tmp, where all can make files and none can replace another's."""
    jit.build(toolkit.source)
    link_away(toolkit.folder / "cache")
    assert answer(toolkit.source) == 42
    shared = toolkit.folder / "tmp"
    shared.mkdir()
    shared.chmod(0o1777)
    for folder in (shared, shared / "mine"):
        monkeypatch.setenv("HYBRID_MXFP8_CACHE_DIR", str(folder))
        assert answer(toolkit.source) == answer(toolkit.source) == 42
    assert toolkit.compilations() == 3


def test_a_file_server_that_gives_files_to_nobody(
    toolkit: FakeToolkit, monkeypatch: pytest.MonkeyPatch, as_root: None
) -> None:
    """Root's new folder is nobody's where the server squashes root: said before compiling."""
    make = Path.mkdir

    def squash(path: Path, *args: Any, **kwargs: Any) -> None:
        make(path, *args, **kwargs)
        os.chown(path, 65534, 65534)

    monkeypatch.setattr(Path, "mkdir", squash)
    with pytest.raises(BackendUnavailableError, match="belongs to user 65534, not to user 0"):
        jit.build(toolkit.source)
    assert toolkit.compilations() == 0


def test_the_switch_is_a_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYBRID_MXFP8_TRUST_CACHE", "yes")
    assert "HYBRID_MXFP8_TRUST_CACHE: must be 0 or 1" in doctor.examine()["modules_problem"]


# ---------------------------------------------------------------- builds that end early

STEPS: dict[str, tuple[Any, str, Callable[[Any], bool]]] = {
    "making the private folder": (Path, "mkdir", lambda path: path.name.startswith(module_cache.BUILDING)),
    "compiling": (subprocess, "run", lambda command: "-o" in command),
    "writing the metadata": (Path, "write_text", lambda path: True),
    "setting the modes": (Path, "chmod", lambda path: path.name == LIBRARY),
    "putting the module in place": (os, "rename", lambda path: True),
    "cleaning up": (shutil, "rmtree", lambda path: True),
}
"""What a build does to the disk, one after the other: a function, and which first arguments are of
such a call. Others pass: the folders of the cache, nvcc's version."""


def before(step: str, patch: pytest.MonkeyPatch, event: Callable[[], None]) -> None:
    """Let something happen just before a step, when those above have been done."""
    module, name, ours = STEPS[step]
    real = getattr(module, name)

    def stumble(*args: Any, **kwargs: Any) -> Any:
        if ours(args[0]):
            event()
        return real(*args, **kwargs)

    patch.setattr(module, name, stumble)


@pytest.mark.parametrize("step", STEPS)
def test_killed_before_any_step(toolkit: FakeToolkit, step: str) -> None:
    """The next build makes the module, or finds it whole, and removes what is old enough."""

    def run() -> None:
        before(step, pytest.MonkeyPatch(), lambda: os.kill(os.getpid(), signal.SIGKILL))
        jit.build(toolkit.source)

    assert Child(run).result() is None
    assert len(toolkit.modules()) == (step == "cleaning up")
    for left in toolkit.leftovers():
        os.utime(left, (0, 0))
    assert answer(toolkit.source) == 42
    assert toolkit.leftovers() == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.ESTALE])
@pytest.mark.parametrize("step", [step for step in STEPS if step != "cleaning up"])
def test_a_file_system_that_fails_at_any_step(toolkit: FakeToolkit, step: str, code: int) -> None:
    """A clear error, nothing left, and a module once it works again."""

    def fail() -> None:
        raise OSError(code, os.strerror(code), "somewhere")

    with pytest.MonkeyPatch.context() as patch:
        before(step, patch, fail)
        with pytest.raises(BackendUnavailableError, match="HYBRID_MXFP8_CACHE_DIR") as caught:
            jit.build(toolkit.source)
    assert f"cannot be written ({os.strerror(code)})" in str(caught.value)
    assert toolkit.modules() == toolkit.leftovers() == []
    assert jit.build(toolkit.source).intact()


# ---------------------------------------------------------------- places


PLACES = {
    "below a file": "toy.cu/cache",
    "a file": "toy.cu",
    "a link to itself": "loop",
    "a link to nothing": "dangling",
    "too long a name": "x" * 300,
    "too long a path": "y/" * 2500,
    "a device": os.devnull,
    "below /proc": "/proc/cache",  # whose mkdir answers as if /proc were not there
}


@pytest.mark.parametrize("place", PLACES)
def test_places_that_cannot_be_a_cache(toolkit: FakeToolkit, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    for link, target in (("loop", "loop"), ("dangling", "absent/target")):
        (toolkit.folder / link).symlink_to(target)
    monkeypatch.setenv("HYBRID_MXFP8_CACHE_DIR", str(toolkit.folder / PLACES[place]))
    with pytest.raises(BackendUnavailableError, match=r"(cannot|can) be written .*HYBRID_MXFP8_CACHE_DIR"):
        jit.load(toolkit.source)
    assert doctor.cached(env.cache_dir())["cached"] == []


# ---------------------------------------------------------------- damage


def rewrite(name: str, change: Callable[[bytes], bytes]) -> Callable[[Module], object]:
    return lambda built: (built.folder / name).write_bytes(change((built.folder / name).read_bytes()))


DAMAGE: dict[str, Callable[[Module], object]] = {
    "empty metadata": rewrite(MANIFEST, lambda _: b""),
    "no UTF-8": rewrite(MANIFEST, lambda _: b'{"name": "\xff\xfe"}'),
    "a list": rewrite(MANIFEST, lambda _: b"[]"),
    "nested without end": rewrite(MANIFEST, lambda _: b"[" * 100_000),
    "digest of another type": rewrite(MANIFEST, lambda text: re.sub(rb'("[0-9a-f]{64}")', rb"[\1]", text)),
    "another digest": rewrite(MANIFEST, lambda text: re.sub(rb"[0-9a-f]{64}", b"0" * 64, text)),
    "metadata is a folder": lambda b: ((b.folder / MANIFEST).unlink(), (b.folder / MANIFEST).mkdir()),
    "library is a folder": lambda b: (b.library.unlink(), b.library.mkdir()),
    "library is missing": lambda b: b.library.unlink(),
    "a flipped bit": rewrite(LIBRARY, lambda data: data[:5000] + bytes([data[5000] ^ 1]) + data[5001:]),
    "the module is a file": lambda b: (shutil.rmtree(b.folder), b.folder.touch()),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_damage_is_seen_and_mended(toolkit: FakeToolkit, how: str) -> None:
    built = jit.build(toolkit.source)
    DAMAGE[how](built)
    assert not built.intact()
    assert [entry["about"] for entry in doctor.cached(env.cache_dir())["cached"]] == [f"{built.folder.name}, damaged"]
    assert answer(toolkit.source) == 42
    assert toolkit.compilations() == 2
    modules = [entry["about"] for entry in doctor.cached(env.cache_dir())["cached"] if entry["kind"] == "module"]
    assert modules == [f"toy for {toolkit.source.arch}, CUTLASS 4.2.0, nvcc 13.0.88"]
    assert toolkit.leftovers() == [] or how == "the module is a file"


def test_a_manifest_that_says_too_little_is_listed_as_damaged(toolkit: FakeToolkit) -> None:
    built = jit.build(toolkit.source)
    rewrite(MANIFEST, lambda text: text.replace(b'"nvcc"', b'"other"'))(built)
    assert [entry["about"] for entry in doctor.cached(env.cache_dir())["cached"]] == [f"{built.folder.name}, damaged"]
