"""Modules are verified once a machine, by a process of its own: with stand-ins, right and wrong."""

from __future__ import annotations

import json
import logging
import shlex
from pathlib import Path

import pytest
import torch
from fake_toolkit import STRANGER, FakeToolkit, as_user
from forked import Child

from hybrid_mxfp8 import env
from hybrid_mxfp8.commands import doctor
from hybrid_mxfp8.cutlass_kernels import grouped_gemm, verify
from hybrid_mxfp8.cutlass_kernels.config import GemmConfig
from hybrid_mxfp8.cutlass_kernels.jit import build as jit
from hybrid_mxfp8.dispatch.module_cache import MANIFEST
from hybrid_mxfp8.reference import grouped_matmul

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _fresh(toolkit: FakeToolkit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(toolkit.folder)
    verify._run.cache_clear()


def run(toolkit: FakeToolkit, script: str) -> verify.Record:
    """The record that a child of this shell script makes."""
    child = ("/bin/sh", "-c", f"echo verified >> log; {script}")
    return verify.verified(jit.build(toolkit.source), CPU, child)


def children(toolkit: FakeToolkit) -> int:
    return len((toolkit.folder / "log").read_text().splitlines())


RIGHT = "echo 0.25"


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (RIGHT, "largest error 0.25 of the bound"),
        ("echo 17.5", "its largest error is 17.5 times the bound"),
        ("echo nan", "its largest error is nan times the bound"),
        ("echo inf", "its largest error is inf times the bound"),
        ("kill -ABRT $$", "ended with code -6"),
        ("exec sleep 600", "did not end in 3 s"),
        (
            "printf 'RuntimeError: CUDA error: an illegal address\\nCompile with TORCH_USE_CUDA_DSA' >&2; exit 1",
            "ended with code 1: RuntimeError: CUDA error: an illegal address",
        ),
    ],
    ids=["right", "wrong numbers", "nan", "a row without an expert", "a crash", "a hang", "an exception"],
)
def test_the_outcome_is_kept(
    toolkit: FakeToolkit, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, script: str, reason: str
) -> None:
    """For this process and others, which start no child for it."""
    if "sleep" in script:
        monkeypatch.setattr(verify, "SECONDS", 3.0)
    with caplog.at_level(logging.INFO, "hybrid_mxfp8"):
        first = run(toolkit, script)
    assert "verifying toy" in caplog.text
    assert (first["ok"], first["reason"]) == (script == RIGHT, reason)
    assert first["gpu"] == "cpu"
    verify._run.cache_clear()
    assert run(toolkit, script) == Child(run, toolkit, script).result() == first
    assert children(toolkit) == 1
    assert jit.build(toolkit.source).intact()
    module, record = doctor.cached(env.cache_dir())["cached"]
    assert (module["kind"], record["kind"]) == ("module", "verification")
    assert f"{'right' if script == RIGHT else 'wrong'} on cpu, driver " in record["about"]
    assert record["about"].endswith(reason)


@pytest.mark.parametrize("error", ["torch.OutOfMemoryError: CUDA out of memory", "No module named 'hybrid_mxfp8'"])
def test_what_passes_is_not_kept(toolkit: FakeToolkit, error: str) -> None:
    """This process goes on without the module; the next verifies it."""
    for _ in range(2):
        assert run(toolkit, f"echo {shlex.quote(error)} >&2; exit 1")["reason"] == f"ended with code 1: {error}"
    module = jit.build(toolkit.source)
    assert children(toolkit) == 1
    assert verify.find(module, CPU) is None
    assert run(toolkit, RIGHT) == verify.find(module, CPU)


def test_the_child_finds_this_package(toolkit: FakeToolkit) -> None:
    """Wherever this process has it from: what fails here is that a toy has no tile."""
    assert "KeyError: 'HYBRID_MXFP8_CTA_GROUP'" in verify.verified(jit.build(toolkit.source), CPU)["reason"]


def test_a_cache_that_cannot_be_written(toolkit: FakeToolkit) -> None:
    """Each process verifies for itself, once."""
    jit.build(toolkit.source)
    toolkit.cache.chmod(0o555)
    toolkit.folder.chmod(0o777)
    assert as_user(STRANGER, lambda: [run(toolkit, RIGHT)["ok"] for _ in range(2)]) == [True, True]
    assert children(toolkit) == 1
    toolkit.cache.chmod(0o755)


@pytest.mark.parametrize("content", [b"", b"[]", b'{"ok": 1}', b'{"ok": true}', b"[" * 100_000])
def test_a_record_is_made_again(toolkit: FakeToolkit, monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    run(toolkit, RIGHT)
    (record,) = toolkit.cache.glob(f"*/{verify.RECORD}")
    record.write_bytes(content)
    verify._run.cache_clear()
    assert run(toolkit, RIGHT)["ok"]
    assert children(toolkit) == 2
    verify._run.cache_clear()
    record.parent.chmod(0o777)  # now anybody may have written it
    assert run(toolkit, RIGHT)["ok"]
    assert children(toolkit) == 3
    verify._run.cache_clear()
    monkeypatch.setattr(verify, "driver_version", lambda: "999.1")
    assert run(toolkit, RIGHT)["driver"] == "999.1"
    assert children(toolkit) == 4


class Product:
    """The reference's product in a module's place, with a fault."""

    def __init__(self, fault: str) -> None:
        self.fault = fault

    def workspace_size(self, *shape: int) -> int:
        return 64

    def grouped_gemm(self, x, x_scales, w, w_scales, counts, offsets, scale_offsets, out, workspace, *how) -> None:
        if self.fault == "scales of experts from a common base":
            scale_offsets = torch.zeros_like(scale_offsets)
        e4m3 = torch.float8_e4m3fn
        grouped_matmul(x.view(e4m3), x_scales, offsets, scale_offsets, w.view(e4m3), w_scales, out)
        if self.fault == "an element":
            out[2, 5] *= 1.03
        if self.fault == "a row without an expert":
            out[-1] = 0
        if self.fault == "a row left out":
            out[0] = torch.nan


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_errors_are_seen(out_dtype: torch.dtype) -> None:
    config = GemmConfig(1, 64, (1, 1))
    assert verify.largest_error(Product(""), config, out_dtype, CPU) <= 1
    for fault in ("scales of experts from a common base", "an element", "a row without an expert", "a row left out"):
        assert not verify.largest_error(Product(fault), config, out_dtype, CPU) <= 1, fault


def test_the_child_reads_what_was_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    import tvm_ffi

    definitions = dict(grouped_gemm.source("2sm_256x128x128", torch.float32, "10.0a").definitions)
    (tmp_path / MANIFEST).write_text(json.dumps({"definitions": definitions}))
    monkeypatch.setattr(tvm_ffi, "load_module", lambda path: Product(""))
    verify.main(str(tmp_path), "cpu")
    assert 0 < float(capsys.readouterr().out) < 1
