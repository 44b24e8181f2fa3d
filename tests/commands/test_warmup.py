"""The warm-up: what it is asked for, how much it does at a time, and what it says of failures."""

from __future__ import annotations

import argparse
import threading

import pytest
import torch

from hybrid_mxfp8.commands import warmup
from hybrid_mxfp8.cutlass_kernels.config import MODULES
from hybrid_mxfp8.cutlass_kernels.grouped_gemm import source
from hybrid_mxfp8.cutlass_kernels.jit import build as jit
from hybrid_mxfp8.cutlass_kernels.jit import toolchain
from hybrid_mxfp8.errors import BackendUnavailableError


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    warmup.add_arguments(parser)
    return parser.parse_args(words)


@pytest.fixture
def built(toolkit: object, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of what gets built, instead of building; there is no GPU."""
    names: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(jit, "build", lambda source: names.append(source.name))
    return names


def test_options_choose(built: list[str]) -> None:
    words = "--arch 10.0a --arch 10.3a --configs 2sm_256x128x128_4x1,1sm_128x64x128 --out-dtypes fp32,fp16 --jobs 1"
    assert warmup.run(parse(*words.split())) == 0
    assert len(built) == 8
    assert "grouped_gemm_2sm_256x128x128_fp32_sm103a" in built
    assert "grouped_gemm_1sm_128x64x128_fp16_sm100a" in built


def test_a_variable_that_means_nothing_is_named(built: list[str], monkeypatch, capsys) -> None:
    monkeypatch.setenv("HYBRID_MXFP8_TRUST_CACHE", "yes")
    assert (warmup.run(parse()), built) == (2, [])
    assert capsys.readouterr().err == "warmup: HYBRID_MXFP8_TRUST_CACHE: must be 0 or 1, got 'yes'\n"


def test_by_default_every_configuration_in_bf16_that_is_not_there(built: list[str], monkeypatch, capsys) -> None:
    """A failure is told, and old headers; the rest is built."""

    def build(source: jit.Source) -> None:
        if "1sm_128x64" in source.name:
            raise BackendUnavailableError("compiling it failed: out of memory")
        built.append(source.name)

    there = source("2sm_256x64x128", torch.bfloat16, "10.0a").name
    monkeypatch.setattr(jit, "build", build)
    monkeypatch.setattr(jit, "find", lambda source: source if source.name == there else None)
    assert warmup.run(parse("--arch", "10.0a", "--jobs", "2")) == 1
    rest = set(MODULES) - {"2sm_256x64x128", "1sm_128x64x128"}
    assert sorted(built) == sorted(f"grouped_gemm_{module}_bf16_sm100a" for module in rest)
    said = capsys.readouterr().out
    assert toolchain.find_cutlass().hint in said.splitlines()
    assert "1 of 8 modules are in" in said
    failed = "grouped_gemm_1sm_128x64x128_bf16_sm100a: compiling it failed: out of memory"
    assert said.endswith(f"6 built, 1 failed\n{failed}\n")


def test_no_more_than_the_jobs_run_at_a_time(monkeypatch) -> None:
    running, most, lock = 0, 0, threading.Lock()
    both = threading.Barrier(2, timeout=10)

    def build(source: jit.Source) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        both.wait()  # eight builds, two at a time, meet in pairs
        with lock:
            running -= 1

    monkeypatch.setattr(jit, "build", build)
    sources = [source(m, torch.bfloat16, "10.0a") for m in MODULES]
    assert warmup.build_all(sources, jobs=2) == []
    assert most == 2


@pytest.mark.parametrize(("cpus", "gigabytes", "jobs"), [(16, 128, 16), (16, 24, 4), (2, 24, 2), (8, 3, 1)])
def test_memory_bounds_the_jobs(monkeypatch, cpus: int, gigabytes: int, jobs: int) -> None:
    """A compiler takes up to 5 GB; this machine's is read."""
    assert 2**20 < warmup.available_memory() < 2**50
    monkeypatch.setattr(warmup.os, "sched_getaffinity", lambda pid: set(range(cpus)), raising=False)
    monkeypatch.setattr(warmup, "available_memory", lambda: gigabytes * 2**30)
    assert warmup.default_jobs() == jobs


def test_no_gpu_means_b200(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert warmup.default_arch() == "10.0a"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, arch in (((10, 3), "10.3a"), ((10, 0), "10.0a"), ((9, 0), "10.0a")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
        assert warmup.default_arch() == arch


def test_what_runs_here_is_verified(built: list[str], monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Modules for the GPU and its family; a wrong one fails the command."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (10, 3))
    monkeypatch.setattr(jit, "find", lambda source: source)
    records = {"sm103a": {"ok": True, "reason": "fine"}, "sm100f": {"ok": False, "reason": "a crash"}}
    monkeypatch.setattr(warmup.verify, "verified", lambda module, device: records[module.name.rpartition("_")[2]])
    words = ["--arch", "10.0a", "--arch", "10.3a", "--arch", "10.0f", "--configs", "1sm_128x64x128"]
    assert warmup.run(parse(*words)) == 1
    said = capsys.readouterr().out.splitlines()[-3:]
    name = "grouped_gemm_1sm_128x64x128_bf16"
    assert said == [f"{name}_sm103a: verified, fine", f"{name}_sm100f: failed, a crash", f"{name}_sm100f: a crash"]
