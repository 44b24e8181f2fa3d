"""The bench suite on a GPU: small cases of every kind run, are checked and get a time."""

from __future__ import annotations

import importlib

import pytest
import torch
import transformers_models

limits, report, run, shapes, timing = (
    importlib.import_module(f"hybrid_mxfp8.bench.{name}") for name in ("limits", "report", "run", "shapes", "timing")
)
Case = shapes.Case

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    "case",
    [
        Case("quantize", "test", 300, 0, 256, 7, "zipf"),
        Case("quantize", "test", 16, 0, 256, 7, variant="counts"),
        Case("quantize", "test", 300, 0, 256, 7, variant="gather"),
        Case("quantize", "test", 300, 0, 256, 7, variant="swiglu"),
        Case("gemm", "test", 64, 256, 512, 4),
        Case("gemm", "test", 64, 256, 512, 4, "one_hot"),
        Case("moe", "test", 48, 256, 512, 8, top_k=4),
    ],
    ids=lambda case: case.name,
)
def test_a_case_runs_and_is_right(case):
    capability = torch.cuda.get_device_capability()
    record = {"rows": [], "absent": [], "not_run": []}
    if case.kind == "moe":
        transformers_models.require()
    suite = run.Suite(timing.CudaDevice(), 2**20, limits.Limits(3.0, 3.0, 700.0, capability), quick=True)
    suite.add(case, record)
    suite.close()
    assert record["not_run"] == []
    ours = [row for row in record["rows"] if row["ours"]]
    assert ours
    for row in ours:
        assert row["failure"] is None
        assert row["us"] > 0
    for row in record["rows"]:
        assert row["failure"] or row["p10_us"] <= row["us"] <= row["p90_us"]


def test_ceilings_are_measured():
    capability = torch.cuda.get_device_capability()
    measured = limits.measure_limits(timing.CudaDevice(), "a card", capability, True, "cuda", 2**20, 256)
    assert min(measured.read_tb_s, measured.copy_tb_s, measured.bf16_tflop_s) > 0


def test_the_machine_is_described():
    machine = report.describe_machine("abc")
    assert tuple(machine["capability"]) == torch.cuda.get_device_capability()
    assert machine["l2_bytes"] > 0
    assert machine["commit"] == "abc"
