"""The suite's loop on a CPU: real inputs, checks and contenders of small cases, through the reference backend and
with a clockwork for the GPU's timer; then the record, its tables and its pictures."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers_models

import hybrid_mxfp8 as mx
from hybrid_mxfp8.commands import bench as bench_command

ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT / "bench"
gemm = bench_command.import_suite("bench_grouped_gemm", BENCH)
limits = bench_command.import_suite("limits", BENCH)
peers = bench_command.import_suite("peers", BENCH)
plots = bench_command.import_suite("plots", BENCH)
quantize = bench_command.import_suite("bench_quantize", BENCH)
report = bench_command.import_suite("report", BENCH)
run = bench_command.import_suite("run", BENCH)
shapes = bench_command.import_suite("shapes", BENCH)
targets = bench_command.import_suite("targets", BENCH)
Case = shapes.Case

HOPPER = limits.Limits(3.0, 2.5, 700.0, (9, 0), 3.35, 989.4)


class EveryCallTakes10Us:
    """A timer that runs what it is given once and lets each graph of ``calls`` calls take 10 µs a call."""

    failures = (RuntimeError, TypeError, ValueError, AttributeError, ImportError, OSError, AssertionError)

    def capture(self, calls):
        calls()
        return lambda: None

    def sample(self, replay):
        return lambda: 10.0

    def synchronize(self):
        pass


@pytest.fixture
def suite(monkeypatch):
    """A suite of quick plans on the CPU, where the reference backend stands for ours; seeded, as ``run.main`` seeds it."""
    torch.manual_seed(0)
    monkeypatch.setattr(gemm, "BACKENDS", ("cutlass", "reference"))
    return run.Suite(EveryCallTakes10Us(), 1000, HOPPER, quick=True, place="cpu", free_bytes=lambda: 10**9)


def empty_record():
    return {"rows": [], "absent": [], "not_run": []}


def by_contender(record):
    return {row["contender"]: row for row in record["rows"]}


@pytest.fixture(autouse=True)
def _few_calls(monkeypatch):
    timing = bench_command.import_suite("timing", BENCH)
    monkeypatch.setattr(timing, "WINDOW_US", 2.0)
    monkeypatch.setattr(timing, "MAX_SETS", 3)
    monkeypatch.setattr(timing, "HOST_CALLS", 2)
    monkeypatch.setattr(timing, "HOST_BATCHES", 2)


def test_quantize_plain(suite):
    record = empty_record()
    suite.add(Case("quantize", "test", 40, 0, 96, 5, "zipf"), record)
    rows = by_contender(record)
    assert record["not_run"] == []
    ours = rows[quantize.OURS]
    assert ours["failure"] is None
    assert ours["check"] == "40 sampled rows equal the reference bitwise"
    assert ours["ratio"] == 1
    assert ours["host_us"] > 0
    assert ours["bytes"] == 40 * 96 * 3 + 128 * 5 * 4
    assert rows["bf16 copy of the same bytes"]["bytes"] == pytest.approx(ours["bytes"], abs=512)
    assert {a["name"] for a in record["absent"]} >= {"SGLang jit_kernel.mxfp8", "FlashInfer mxfp8_quantize"}
    assert all(a["reason"] for a in record["absent"])


def test_a_warm_row_has_no_limit_and_no_ratio():
    suite = run.Suite(EveryCallTakes10Us(), 10**6, HOPPER, quick=True, place="cpu")
    record = empty_record()
    suite.add(Case("quantize", "test", 4, 0, 64, 2), record)
    rows = by_contender(record)
    assert rows[quantize.WARM]["us"] > 0
    assert [rows[quantize.WARM][column] for column in ("limit_us", "percent_of_limit", "ratio", "host_us")] == [
        None
    ] * 4
    assert rows[quantize.OURS]["percent_of_limit"] > 0


@pytest.mark.parametrize("variant", ["counts", "gather"])
def test_quantize_variants_are_right_bitwise(suite, variant):
    record = empty_record()
    suite.add(Case("quantize", "test", 33, 0, 64, 4, variant=variant), record)
    assert len(record["rows"]) == 3
    assert {row["check"] for row in record["rows"]} == {"33 sampled rows equal the reference bitwise"}


def test_gemm_and_pipeline_are_checked_and_share_weights(suite):
    record = empty_record()
    case = Case("gemm", "test", 24, 16, 64, 3)
    suite.add(case, record)
    kept = suite._store._weights
    suite.add(dataclasses.replace(case, kind="pipeline", num_tokens=12), record)
    assert suite._store._weights is kept
    assert record["not_run"] == []
    rows = {row["contender"]: row for row in record["rows"]}
    for name in (
        "grouped_gemm (reference)",
        "quantize + grouped_gemm (reference)",
        "quantize of counts + grouped_gemm (reference)",
    ):
        assert rows[name]["failure"] is None
        assert rows[name]["check"].startswith("calc_diff ")
        assert rows[name]["baseline"] == "torch bf16 _grouped_mm"
    absent = {a["name"]: a["reason"] for a in record["absent"]}
    assert "10.0" in absent["grouped_gemm (cutlass)"]
    assert "10.0" in absent["torch MXFP8 _scaled_grouped_mm"]
    suite.close()
    assert suite._store._weights is None


def test_a_wrong_result_is_not_timed(suite, monkeypatch):
    """A quantizer that writes the wrong bytes fails its row, and the others go on."""

    def wrong(x, groups, *, out, **options):
        out.values.view(torch.uint8).fill_(0x38)
        out.scales.fill_(127)

    monkeypatch.setattr(quantize.mx, "quantize_grouped", wrong)
    record = empty_record()
    suite.add(Case("quantize", "test", 8, 0, 64, 2), record)
    rows = by_contender(record)
    assert "differ from the reference" in rows[quantize.OURS]["failure"]
    assert "us" not in rows[quantize.OURS]
    assert rows["bf16 copy of the same bytes"]["us"] > 0


def test_a_wrong_product_is_not_timed(suite, monkeypatch):
    monkeypatch.setattr(gemm.mx, "grouped_gemm", lambda x, w, *, out, **options: out.zero_())
    record = empty_record()
    suite.add(Case("gemm", "test", 8, 16, 64, 2), record)
    assert "calc_diff of 8 rows" in by_contender(record)["grouped_gemm (reference)"]["failure"]


def test_a_case_that_cannot_be_prepared_is_listed_as_failed(suite, monkeypatch):
    def refuse(*arguments, **options):
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(gemm, "make_inputs", refuse)
    record = empty_record()
    suite.add(Case("gemm", "test", 8, 16, 64, 2), record)
    assert record["rows"] == []
    assert record["not_run"] == [
        {"case": "gemm 8x16x64 E2 uniform", "reason": "RuntimeError: CUDA out of memory", "failed": True}
    ]


def test_experts_are_cut_where_memory_ends_and_the_case_says_so():
    case = Case("gemm", "test", 64, 4096, 7168, 384)
    l2 = 50 * 2**20
    same, note = gemm.fit(case, l2, 80 * 10**9)
    assert same is case
    assert note == ""
    fewer, note = gemm.fit(case, l2, 30 * 10**9)
    assert fewer.num_experts == 192
    assert note.startswith("192 of 384 experts")
    assert gemm.needed_bytes(fewer, l2) <= gemm.MEMORY_SHARE * 30 * 10**9
    with pytest.raises(ValueError, match="1000 are free"):
        gemm.fit(case, l2, 1000)


def test_every_case_fits_an_80_gb_card():
    """Weights in both precisions, all sets and outputs, with nothing cut."""
    for case in shapes.cases():
        if case.kind != "quantize":
            assert gemm.fit(case, 50 * 2**20, 78 * 10**9)[0] is case
        else:
            sets = quantize.num_sets(quantize.set_bytes(case), 50 * 2**20)
            assert sets * quantize.set_bytes(case) < 10 * 10**9


def test_rows_know_their_expert():
    assert gemm.expert_of_rows([2, 0, 3], [0, 1, 2, 4]) == [0, 0, 2, 2]


def record_of(rows, **more):
    return {
        "schema": report.SCHEMA,
        "mode": "quick",
        "machine": {
            "gpu": "NVIDIA H100",
            "capability": [9, 0],
            "sms": 132,
            "driver": "580.1",
            "torch": "2.11.0",
            "triton": "3.6.0",
            "hybrid_mxfp8": "0.1.0",
            "commit": None,
            "date": "2030-01-02T03:04:05+00:00",
        },
        "method": report.METHOD,
        "limits": dataclasses.asdict(HOPPER),
        "seconds": 1.5,
        "targets": [t.as_dict() for t in targets.evaluate(rows)],
        "rows": rows,
        "absent": [{"name": "FlashInfer", "reason": "not installed"}],
        "not_run": [],
    } | more


@pytest.fixture
def measured(suite):
    """A record of a few real rows, over enough tokens for a picture."""
    record = empty_record()
    for t in (4, 8, 16):
        suite.add(Case("quantize", "test", t, 0, 64, 2), record)
        suite.add(Case("gemm", "test", t, 16, 64, 2), record)
    return record_of(record["rows"], absent=record["absent"])


def test_json_comes_back_as_it_was(measured, tmp_path):
    path = tmp_path / "sub" / "run.json"
    report.write_json(measured, path)
    # Tuples turn into lists, and that is all that may change.
    assert report.read_json(path) == json.loads(json.dumps(measured))
    assert [p.name for p in path.parent.iterdir()] == ["run.json"]


def test_json_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "other.json"
    path.write_text('{"schema": 0}')
    with pytest.raises(ValueError, match="must be a record of schema"):
        report.read_json(path)


def test_markdown_holds_every_row_and_says_where_it_was_measured(measured):
    text = report.markdown(measured)
    assert "NVIDIA H100 (compute capability 9.0, 132 SMs), driver 580.1, torch 2.11.0" in text
    assert "2030-01-02" in text
    assert "datasheet: 3.35 TB/s" in text
    for row in measured["rows"]:
        assert f"| {row['case']} | {row['contender']} |" in text
    assert text.count("not measured") == len(measured["targets"])
    assert "- FlashInfer mxfp8_quantize: not installed" in text
    widths = [line.count(" | ") for line in text.splitlines() if line.startswith("| gemm 4x")]
    assert len(set(widths)) == 1


def test_markdown_shows_a_failure(measured):
    row = measured["rows"][0] | {"failure": "RuntimeError: a | b"}
    assert "failed: RuntimeError: a \\| b" in report.markdown(record_of([row]))


def test_numbers_keep_three_digits():
    assert [report._cell(v) for v in (1243.4, 126.5, 17.84, 2.204, 0.04567, None)] == [
        "1243",
        "126",
        "17.8",
        "2.2",
        "0.0457",
        "–",
    ]


@pytest.fixture
def _matplotlib():
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install -e .[bench]")


@pytest.mark.usefixtures("_matplotlib")
def test_pictures_from_a_record_alone(measured, tmp_path):
    path = tmp_path / "run.json"
    report.write_json(measured, path)
    written = plots.draw(report.read_json(path), tmp_path, "run")
    assert [p.name for p in written] == [
        "run-quantize-time.png",
        "run-quantize-limit.png",
        "run-gemm-time.png",
        "run-gemm-limit.png",
    ]
    for picture in written:
        assert picture.read_bytes().startswith(b"\x89PNG")


def test_pictures_take_only_series_with_enough_points(measured):
    rows = [row for row in measured["rows"] if row["tokens"] != 8]
    assert plots.panels(rows, "quantize") == {}
    panels = plots.panels(measured["rows"], "gemm")
    assert list(panels) == ["N 16, K 64, E 2"]
    assert [row["tokens"] for row in panels["N 16, K 64, E 2"]["torch bf16 _grouped_mm"]] == [4, 8, 16]


def target_row(case, contender, **values):
    return {"case": case.name, "contender": contender, "us": 1.0, "ratio": 1.0, "host_us": 1.0} | values


def met(rows):
    return {t.name: t.met for t in targets.evaluate(rows) if t.met is not None}


def test_a_target_is_met_at_its_bound_and_missed_beyond():
    case = Case("quantize", "", 8192, 0, 2048, 8)
    assert met([target_row(case, quantize.OURS, us=17.8)]) == {f"{case.name}: µs": True}
    assert met([target_row(case, quantize.OURS, us=17.9)]) == {f"{case.name}: µs": False}


def test_short_jobs_are_judged_with_a_warm_cache_too():
    case = Case("quantize", "", 1024, 0, 7168, 256)
    rows = [target_row(case, quantize.OURS, us=10.5), target_row(case, quantize.WARM, us=7.9)]
    assert met(rows) == {f"{case.name}: µs": False, f"{case.name}: µs, operands in L2": True}


def test_without_rows_no_target_is_judged():
    assert met([]) == {}
    assert len(targets.evaluate([])) == 6 + 3 + 2 + 2 + 2 + 5 + 2 * (4 + 1) + 2


def test_offsets_may_cost_one_microsecond_more():
    case = Case("quantize", "", 8, 0, 4096, 128, variant="counts")
    rows = [target_row(case, quantize.FROM_COUNTS, us=3.1), target_row(case, quantize.ALONE, us=2.2)]
    assert list(met(rows).values()) == [True]
    rows[0]["us"] = 3.3
    assert list(met(rows).values()) == [False]


def test_a_layer_is_judged_by_its_ratio_and_its_memory():
    """2048x768 and its inverse, a byte and a 32nd an element: 0.516 of bf16."""
    case = Case("moe", "", 16, 768, 2048, 128, top_k=8)
    layer = "Qwen3-30B-A3B layer"
    name = f"{layer}, 16 tokens: ratio to transformers bf16 grouped_mm"
    memory = f"{layer}: memory of the experts over bf16's"
    assert met([target_row(case, "moe_forward (triton)", ratio=1.8)]) == {name: True}
    case = dataclasses.replace(case, num_tokens=1)
    rows = [target_row(case, "moe_forward (triton)", ratio=1.7)]
    assert met(rows) == {name.replace("16 tokens", "1 tokens"): False, memory: True}
    (measured,) = (t.measured for t in targets.evaluate(rows) if t.name == memory)
    assert measured == pytest.approx(33 / 64, abs=1e-3)


def test_gemm_ratio_is_that_of_our_fastest_backend():
    case = Case("gemm", "", 256, 4096, 7168, 32)
    rows = [
        target_row(case, "grouped_gemm (triton)", us=400.0, ratio=1.7),
        target_row(case, "grouped_gemm (cutlass)", us=350.0, ratio=1.95),
        target_row(case, "torch bf16 _grouped_mm", us=680.0),
    ]
    assert met(rows) == {f"{case.name}: ratio to torch bf16": True}
    rows[1] = {"case": case.name, "contender": "grouped_gemm (cutlass)", "failure": "no"}
    assert met(rows) == {f"{case.name}: ratio to torch bf16": False}


def test_fusions_and_host_time_have_targets():
    gather = Case("quantize", "", 16384, 0, 7168, 256, variant="gather")
    swiglu = Case("quantize", "", 16384, 0, 7168, 256, variant="swiglu")
    decode = Case("quantize", "", 8, 0, 4096, 128)
    rows = [
        target_row(gather, quantize.GATHER, us=102.0),
        target_row(gather, quantize.ALONE, us=100.0),
        target_row(swiglu, quantize.SWIGLU, ratio=1.59),
        target_row(decode, quantize.OURS, us=2.0, host_us=12.5),
    ]
    assert list(met(rows).values()) == [True, True, False, False]


@pytest.fixture
def small_run(monkeypatch, tmp_path):
    """``main`` with everything but the GPU: two small cases, and a card that is only described."""
    monkeypatch.setattr(gemm, "BACKENDS", ("reference",))
    monkeypatch.setattr(run, "why_not", lambda: None)
    monkeypatch.setattr(run, "CudaDevice", EveryCallTakes10Us)
    monkeypatch.setattr(run, "measure_limits", lambda *arguments: HOPPER)
    machine = record_of([])["machine"] | {"l2_bytes": 1000}
    monkeypatch.setattr(run.report, "describe_machine", lambda label: machine | {"commit": label})
    monkeypatch.setattr(run, "Suite", functools.partial(run.Suite, place="cpu", free_bytes=lambda: 10**9))
    chosen = [Case("quantize", "test", t, 0, 64, 2) for t in (4, 8, 16)] + [Case("gemm", "test", 4, 16, 64, 2)]
    monkeypatch.setattr(run, "cases", lambda quick, only: chosen)
    return lambda *options: run.main(["--quick", "--out", str(tmp_path), *options])


def test_a_run_leaves_a_record_a_table_and_says_what_it_met(small_run, tmp_path, capsys):
    assert small_run("--commit", "abc123") == 0
    said = capsys.readouterr().out
    assert "commit abc123" in said
    assert "not measured" in said
    assert {p.name for p in tmp_path.iterdir()} == {"h100-2030-01-02-quick.json", "h100-2030-01-02-quick.md"}
    record = report.read_json(tmp_path / "h100-2030-01-02-quick.json")
    assert len({row["case"] for row in record["rows"]}) == 4
    assert record["limits"]["capability"] == [9, 0]


@pytest.mark.usefixtures("_matplotlib")
def test_a_run_draws_where_asked(small_run, tmp_path):
    assert small_run("--plots") == 0
    assert len(list(tmp_path.glob("*.png"))) == 2


def test_a_run_out_of_time_names_what_it_left_out(small_run, tmp_path):
    assert small_run("--budget", "1e-9") == 0
    record = report.read_json(tmp_path / "h100-2030-01-02-quick.json")
    assert record["rows"] == []
    assert [entry["reason"] for entry in record["not_run"]] == ["the budget of 1e-09 s was used up"] * 4


def test_a_run_fails_if_one_of_ours_does(small_run, monkeypatch, capsys):
    monkeypatch.setattr(gemm.mx, "grouped_gemm", lambda x, w, *, out, **options: out.zero_())
    assert small_run() == 1
    assert "failed: gemm 4x16x64 E2 uniform: grouped_gemm (reference)" in capsys.readouterr().out


def test_a_run_that_breaks_off_keeps_its_record(small_run, monkeypatch, tmp_path):
    def interrupt(self, case, record):
        raise KeyboardInterrupt

    small = run.Suite.func
    first = small.add

    def add(self, case, record):
        return first(self, case, record) if case.num_tokens == 4 else interrupt(self, case, record)

    monkeypatch.setattr(small, "add", add)
    with pytest.raises(KeyboardInterrupt):
        small_run()
    record = report.read_json(tmp_path / "h100-2030-01-02-quick.json")
    assert {row["case"] for row in record["rows"]} == {"quantize 4x64 E2 uniform"}
    assert (tmp_path / "h100-2030-01-02-quick.md").exists()


def test_ceilings_from_times():
    """10 µs each for 2 x 64 bytes read, twice that copied, and 2 x 8^3 flops."""
    measured = limits.measure_limits(EveryCallTakes10Us(), "NVIDIA H100", (9, 0), True, "cpu", 64, 8)
    assert measured.copy_tb_s == pytest.approx(2 * measured.read_tb_s)
    assert measured.bf16_tflop_s == pytest.approx(measured.read_tb_s * 2 * 8**3 / 128)
    assert measured.datasheet_tb_s == 3.35


def test_on_a_machine_without_a_gpu_the_run_lists_its_cases(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run.main(["--quick", "--only", "gemm"]) == 0
    said = capsys.readouterr().out
    assert "Nothing was measured: no CUDA GPU here" in said
    assert "gemm 32x4096x7168 E32 uniform  [target]" in said
    assert "quantize" not in said


def test_an_earlier_run_is_rendered_without_a_gpu(measured, tmp_path, capsys):
    path = tmp_path / "run.json"
    report.write_json(measured, path)
    assert run.main(["--from-json", str(path)]) == 0
    assert "## Targets" in capsys.readouterr().out


def test_the_command_runs_the_suite_beside_the_package(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    parser = argparse.ArgumentParser()
    bench_command.add_arguments(parser)
    assert bench_command.run(parser.parse_args(["--quick", "--list"])) == 0
    assert "Nothing was measured: asked to list only" in capsys.readouterr().out


def test_the_command_says_how_to_get_the_suite(monkeypatch, capsys):
    monkeypatch.setattr(bench_command, "suite_folder", lambda: None)
    assert bench_command.run(argparse.Namespace()) == 2
    assert "clone the repository" in capsys.readouterr().err


def test_moe(suite, monkeypatch):
    """The layer beside transformers', both right; our experts take half the memory and the note says so."""
    transformers_models.require()
    moe = bench_command.import_suite("bench_moe", BENCH)
    monkeypatch.setattr(moe, "BACKENDS", ("cutlass", "reference"))
    record = empty_record()
    case = Case("moe", "test", 6, 64, 128, 5, top_k=2)
    suite.add(case, record)
    rows = by_contender(record)
    assert record["not_run"] == []
    ours, baseline = rows["moe_forward (reference)"], rows[moe.BASELINE]
    assert [ours["failure"], baseline["failure"]] == [None, None]
    assert "dB on 4 tokens against fp32" in ours["check"]
    assert float(baseline["check"].split()[0]) > 40
    assert ours["ratio"] == 1
    assert ours["note"] == "experts in 0.521 of bf16's memory"  # 64 columns: scales padded to 4 a row
    assert ours["flops"] == baseline["flops"] == 6 * 12 * 64 * 128
    assert [a["name"] for a in record["absent"]] == ["moe_forward (cutlass)"]
    wrong = moe.LayerStore().get(case, "cpu")
    inputs = moe.make_inputs(case, 1, "cpu")
    with pytest.raises(AssertionError, match="dB on 4 tokens against fp32, expected more than"):
        moe.check_layer(wrong, inputs, lambda: inputs.x[0])()


def test_moe_without_transformers_is_not_run(suite, monkeypatch):
    moe = bench_command.import_suite("bench_moe", BENCH)
    monkeypatch.setattr(moe.importlib.util, "find_spec", lambda name: None)
    record = empty_record()
    suite.add(Case("moe", "test", 6, 64, 128, 5, top_k=2), record)
    assert "transformers is not installed" in record["not_run"][0]["reason"]
    assert "pip install 'transformers>=5.7'" in record["not_run"][0]["reason"]
    assert "failed" not in record["not_run"][0]


def test_moe_fits_fewer_experts_into_less_memory():
    moe = bench_command.import_suite("bench_moe", BENCH)
    case = Case("moe", "test", 8192, 2048, 7168, 256, top_k=8)
    assert moe.fit(case, 50 * 2**20, 78 * 10**9) == (case, "")  # one layer of DeepSeek-V3 on an 80 GB card
    fitted, note = moe.fit(case, 50 * 2**20, 40 * 10**9)
    assert fitted.num_experts == 128
    assert "128 of 256 experts" in note
    with pytest.raises(ValueError, match="bytes, 1000 are free"):
        moe.fit(case, 50 * 2**20, 1000)


def test_the_command_and_the_suite_agree_on_kinds():
    assert bench_command.KINDS == shapes.KINDS


def test_bench_is_a_module_of_the_root():
    done = subprocess.run(
        [sys.executable, "-m", "bench", "--list", "--quick"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Nothing was measured" in done.stdout


def test_a_reader_that_goes_away_is_no_traceback():
    reading, writing = os.pipe()
    os.close(reading)
    try:
        listing = [sys.executable, "-m", "bench", "--list"]
        done = subprocess.run(listing, cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


def test_silu_mul_in_the_interpreter():
    """The baseline's kernel against PyTorch, in fp32 (the interpreter rounds bf16 stores differently)."""
    program = (
        "import torch\n"
        "from bench.silu_mul import silu_mul\n"
        "x = torch.randn(3, 2 * 2080)\n"
        "y = torch.full((3, 2080), float('nan'))\n"
        "silu_mul(x, y)\n"
        "gate, up = x.chunk(2, dim=1)\n"
        "torch.testing.assert_close(y, torch.nn.functional.silu(gate) * up)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_swiglu_check_tells_right_from_wrong():
    x = torch.randn(20, 128).bfloat16()
    groups = mx.GroupLayout.from_counts(torch.tensor([12, 8]), 20)
    right = mx.quantize_grouped(x, groups, activation="swiglu")
    assert "dB against fp32" in quantize.check_swiglu(x, right)()
    wrong = mx.quantize_grouped(x[:, :64].contiguous(), groups)
    with pytest.raises(AssertionError, match="signal-to-noise"):
        quantize.check_swiglu(x, wrong)()
