"""The accuracy report: its formats on values whose fate is known, its figures, and the command end to end."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch

from hybrid_mxfp8 import calc_diff, signal_to_noise_db
from hybrid_mxfp8.commands import cli
from hybrid_mxfp8.commands.accuracy import command, formats, measure, transformers_model
from hybrid_mxfp8.commands.demo import workload
from hybrid_mxfp8.commands.demo.measure import per_tensor_fp8

NAMES = ["bf16", "MXFP8 rceil", "MXFP8 floor", "MXFP8 even", "FP8 per row", "FP8 per tensor"]
BY_NAME = {form.name: form for form in formats.FORMATS}
needs_transformers = pytest.mark.skipif(not transformers_model.installed(), reason="needs transformers")


@pytest.fixture
def operands() -> workload.Operands:
    """Three experts, the second without tokens."""
    rng = torch.Generator().manual_seed(1)
    x, w = torch.randn(12, 128, generator=rng), torch.randn(3, 16, 128, generator=rng)
    return workload.Operands("small", x, w, rows=(5, 0, 7))


# ---------------------------------------------------------------- formats


def test_formats_are_those_of_the_table() -> None:
    assert list(BY_NAME) == NAMES
    assert [form.bits(256) for form in formats.FORMATS] == [16, 8.25, 8.25, 8.25, 8.125, 8]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # 500 in a block: floor keeps scale 1 and clips it; rceil and even double the scale, where 500 lies on the grid's 512.
        ("MXFP8 floor", [448.0, 1.125]),
        ("MXFP8 rceil", [512.0, 1.125]),
        ("MXFP8 even", [512.0, 1.125]),
        ("bf16", [500.0, 1.125]),
    ],
)
def test_an_element_above_448(name: str, expected: list[float]) -> None:
    x = torch.zeros(1, 32)
    x[0, 0], x[0, 1] = 500.0, 1.125
    assert BY_NAME[name].through(x)[0, :2].tolist() == expected


def test_scales_are_of_rows_and_of_tensors() -> None:
    """448 in the first row sets that row's scale to 1; 2**-12 is then lost where it shares the scale, below half of 2**-9."""
    x = torch.zeros(2, 32)
    x[0, 0], x[1, 0] = 448.0, 2.0**-12
    assert BY_NAME["FP8 per row"].through(x)[:, 0].tolist() == [448.0, 2.0**-12]
    assert BY_NAME["FP8 per tensor"].through(x)[:, 0].tolist() == [448.0, 0.0]


def test_per_tensor_is_the_demos() -> None:
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(BY_NAME["FP8 per tensor"].through(x), per_tensor_fp8(x))


@pytest.mark.parametrize("name", NAMES)
def test_zeros_stay_zeros(name: str) -> None:
    assert torch.equal(BY_NAME[name].through(torch.zeros(3, 64)), torch.zeros(3, 64))
    assert BY_NAME[name].through(torch.zeros(0, 64)).shape == (0, 64)


# ---------------------------------------------------------------- figures


def test_scores_are_of_experts_with_tokens(operands: workload.Operands) -> None:
    scores = measure.score(operands)
    assert [s.format.name for s in scores] == NAMES
    for s in scores:
        assert len(s.experts) == 2
        x, w = s.format.through(operands.x), s.format.through(operands.w[2])
        truth = operands.x[5:].double() @ operands.w[2].double().T
        assert s.experts[1].x_db == pytest.approx(signal_to_noise_db(operands.x[5:], x[5:]))
        assert s.experts[1].w_db == pytest.approx(signal_to_noise_db(operands.w[2], w))
        assert s.experts[1].product_diff == pytest.approx(calc_diff(truth, x[5:].double() @ w.double().T), rel=1e-6)
        assert s.worst_db == min(q.product_db for q in s.experts)
        assert s.worst_diff == max(q.product_diff for q in s.experts)
        assert s.mean("x_db") == pytest.approx((s.experts[0].x_db + s.experts[1].x_db) / 2)


def test_scores_need_a_token(operands: workload.Operands) -> None:
    nobody = workload.Operands("empty", operands.x[:0], operands.w, (0, 0, 0))
    with pytest.raises(ValueError, match="empty must have at least one token"):
        measure.score(nobody)


def test_rounding_up_beats_the_others_on_normal_data(operands: workload.Operands) -> None:
    """Nothing saturates with rceil; floor clips what exceeds 448 * 2**(b - 127), and even does that more rarely."""
    db = {s.format.name: s.mean("product_db") for s in measure.score(operands)}
    assert db["bf16"] > 45 > db["MXFP8 rceil"] > db["MXFP8 even"] > db["MXFP8 floor"] > 20


def test_a_large_channel_spoils_its_own_block_alone_in_mxfp8() -> None:
    """2**24 times the rest, which then is below half of e4m3's smallest, 2**-10 / 448 of the largest: FP8 loses all of it."""
    x = torch.randn(16, 128, generator=torch.Generator().manual_seed(2))
    first, last = measure.channel_effect(x, [1.0, 2.0**24])
    for name in NAMES[:4]:
        assert last.db[name] == pytest.approx(first.db[name], abs=1e-9)
    for name in NAMES[4:]:
        assert first.db[name] > 30
        assert last.db[name] < 1


def test_the_channel_reaches_the_ratio_it_says() -> None:
    seen = []

    def through(x: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return x

    x = torch.randn(16, 96, generator=torch.Generator().manual_seed(3))
    x[:, 40] *= 3
    (effect,) = measure.channel_effect(x, [10.0], [formats.Format("same", "bf16", lambda k: 32.0, through)])
    rest = torch.cat([seen[0][:, :32], seen[0][:, 64:]], dim=1)
    ratio = seen[0][:, 40].square().mean().sqrt() / rest.square().mean().sqrt()
    assert float(ratio) == pytest.approx(10, rel=1e-5)
    assert effect.db == {"same": math.inf}


# ---------------------------------------------------------------- transformers


TINY = {
    **transformers_model.SIZES,
    "vocab_size": 64,
    "hidden_size": 64,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "num_experts": 4,
}


@needs_transformers
def test_the_model_with_nothing_quantized_is_the_librarys() -> None:
    """The replaced experts give the logits of transformers' own forward, so what they multiply is what it multiplies."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**TINY)).float().eval()
    ids = torch.randint(0, 64, (1, 20))
    layers = [layer.mlp.experts for layer in model.model.layers]
    seen: list[workload.Operands] = []
    with torch.no_grad():
        theirs = model(ids).logits
        mine = transformers_model._logits(model, layers, lambda x: x, ids, seen)
    assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-6)
    assert [(o.x.shape, o.w.shape, sum(o.rows)) for o in seen] == [
        ((40, 64), (4, 64, 64), 40),
        ((40, 32), (4, 64, 32), 40),
    ] * 2


@needs_transformers
def test_model_report_is_repeatable_and_says_that_it_is_random() -> None:
    state = torch.random.get_rng_state()
    first, second = (transformers_model.report(TINY, 24) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert first.logits_db == second.logits_db
    assert list(first.logits_db) == NAMES
    assert first.logits_db["bf16"] > first.logits_db["MXFP8 rceil"] > 15
    assert "RANDOM weights" in first.workload.source
    assert not first.workload.real
    assert [o.name for o in first.workload.gemms] == ["gate and up", "down"]


# ---------------------------------------------------------------- the command


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, operands: workload.Operands) -> workload.Workload:
    """In place of the demo's workload, and a tiny transformers model in place of the small one."""
    found = workload.Workload("SYNTHETIC: three experts", False, (operands, operands))
    monkeypatch.setattr(command, "load", lambda synthetic, experts, rows: found)
    monkeypatch.setattr(transformers_model, "SIZES", TINY)
    monkeypatch.setattr(transformers_model, "TOKENS", 24)
    return found


def test_command_prints_every_format_and_writes_what_it_measured(
    small: workload.Workload, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "accuracy.json"
    assert cli.main(["accuracy", "--no-transformers", "--json", str(path)]) == 0
    said = capsys.readouterr().out
    assert "SYNTHETIC" in said
    assert "On synthetic numbers, products keep" in said
    record = json.loads(path.read_text())
    (written,) = record["workloads"]
    assert [gemm["name"] for gemm in written["gemms"]] == ["small", "small"]
    assert list(written["gemms"][0]["formats"]) == NAMES
    scores = {s.format.name: s for s in measure.score(small.gemms[0])}
    for name in NAMES:
        found = written["gemms"][0]["formats"][name]
        assert [q["product_db"] for q in found] == [q.product_db for q in scores[name].experts]
        assert f"{scores[name].mean('product_db'):.1f}" in next(x for x in said.splitlines() if x.startswith(name))
    assert [effect["ratio"] for effect in record["channel"]] == list(command.RATIOS)


@needs_transformers
def test_command_measures_a_transformers_model(small: workload.Workload, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["accuracy"]) == 0
    said = capsys.readouterr().out
    assert "RANDOM weights" in said
    assert "logits dB" in said


def test_command_says_that_a_model_could_be_measured(
    small: workload.Workload, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(transformers_model, "installed", lambda: False)
    assert cli.main(["accuracy"]) == 0
    assert "pip install transformers" in capsys.readouterr().out


def test_figures_that_are_infinite_are_null_in_json() -> None:
    """JSON has no infinity; a format that loses nothing has one."""
    x = torch.ones(4, 32)
    part = command.Part("ones", workload.Workload("ones", False, ()), [])
    gemm = workload.Operands("ones", x, torch.ones(1, 8, 32), (4,))
    record = command.as_json([command.Part("ones", part.workload, [(gemm, measure.score(gemm))])], [])
    (quality,) = record["workloads"][0]["gemms"][0]["formats"]["bf16"]
    assert quality["x_db"] is None
    json.dumps(record, allow_nan=False)


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib")
@pytest.mark.parametrize("ending", ["png", "svg"])
def test_picture(small: workload.Workload, ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"accuracy.{ending}"
    assert cli.main(["accuracy", "--no-transformers", "--plot", str(path)]) == 0
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG" if ending == "png" else b"<?xml")
    assert len(content) > 20_000


def test_picture_without_matplotlib_is_a_word_before_any_work(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "matplotlib" else find(name, *rest)
    )
    assert cli.main(["accuracy", "--plot", str(tmp_path / "a.png")]) == 2
    assert "needs matplotlib: pip install matplotlib" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--plot", "a.gif"], "--plot: must end in .png, .svg, .pdf, got a.gif"),
        (["--plot", "absent/a.png"], "absent/a.png: there is no folder absent"),
        (["--json", "absent/a.json"], "absent/a.json: there is no folder absent"),
    ],
)
def test_files_that_cannot_be_written_are_refused_before_any_work(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["accuracy", *words]) == 2
    assert capsys.readouterr().err == message + "\n"
