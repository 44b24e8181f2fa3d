"""The accuracy report: formats on values whose fate is known, figures, and the command."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hybrid_mxfp8 import calc_diff, signal_to_noise_db
from hybrid_mxfp8.commands import cli
from hybrid_mxfp8.commands.accuracy import command, measure, transformers_model
from hybrid_mxfp8.commands.demo import workload

NAMES = ["bf16", "MXFP8 rceil", "MXFP8 floor", "MXFP8 even", "FP8 per row", "FP8 per tensor"]
BY_NAME = {form.name: form for form in measure.FORMATS}
needs_transformers = pytest.mark.skipif(not transformers_model.installed(), reason="needs transformers")


@pytest.fixture
def operands() -> workload.Operands:
    """Three experts, the second without tokens."""
    rng = torch.Generator().manual_seed(1)
    x, w = torch.randn(12, 128, generator=rng), torch.randn(3, 16, 128, generator=rng)
    return workload.Operands("small", x, w, rows=(5, 0, 7))


@pytest.mark.parametrize(("name", "largest"), list(zip(NAMES, [500, 512, 448, 512, 500, 500], strict=True)))
def test_formats(name: str, largest: float) -> None:
    """500: floor keeps scale 1 and clips it; rceil and even double the scale, where it lies on the
    grid's 512. 2**-12: lost where it shares the scale of 448 in the row above, below half of 2**-9.
    """
    x = torch.zeros(2, 32)
    x[0, 0], x[0, 1], x[1, 0] = 500.0, 1.125, 2.0**-12
    near = pytest.approx(1.125, rel=0.05) if name.startswith("FP8") else 1.125
    assert BY_NAME[name].through(x)[0, :2].tolist() == [largest, near]
    assert BY_NAME[name].through(x)[1, 0] == (0 if name == "FP8 per tensor" else 2.0**-12)
    assert torch.equal(BY_NAME[name].through(torch.zeros(3, 64)), torch.zeros(3, 64))
    assert BY_NAME[name].through(torch.zeros(0, 64)).shape == (0, 64)


def test_scores_are_of_experts_with_tokens(operands: workload.Operands) -> None:
    """Rounding up is best: floor clips what exceeds 448 * 2**(b - 127), even more rarely so."""
    scores = measure.score(operands)
    assert [(s.format.name, s.format.bits(256)) for s in scores] == list(
        zip(NAMES, [16, 8.25, 8.25, 8.25, 8.125, 8], strict=True)
    )
    for s in scores:
        first, second = s.experts
        x, w = s.format.through(operands.x), s.format.through(operands.w[2])
        truth = operands.x[5:].double() @ operands.w[2].double().T
        assert second.x_db == pytest.approx(signal_to_noise_db(operands.x[5:], x[5:]))
        assert second.w_db == pytest.approx(signal_to_noise_db(operands.w[2], w))
        assert second.product_diff == pytest.approx(calc_diff(truth, x[5:].double() @ w.double().T), rel=1e-6)
        assert s.worst_db == min(first.product_db, second.product_db)
        assert s.worst_diff == max(first.product_diff, second.product_diff)
        assert s.mean("x_db") == pytest.approx((first.x_db + second.x_db) / 2)
    db = {s.format.name: s.mean("product_db") for s in scores}
    assert db["bf16"] > 45 > db["MXFP8 rceil"] > db["MXFP8 even"] > db["MXFP8 floor"] > 20
    nobody = workload.Operands("empty", operands.x[:0], operands.w, (0, 0, 0))
    with pytest.raises(ValueError, match="empty must have at least one token"):
        measure.score(nobody)


def test_a_large_channel_spoils_its_own_block_alone_in_mxfp8() -> None:
    """2**24 times the rest, which is then below half of e4m3's smallest: FP8 loses all of it."""
    x = torch.randn(16, 128, generator=torch.Generator().manual_seed(2))
    first, last = measure.channel_effect(x, [1.0, 2.0**24])
    for name in NAMES[:4]:
        assert last.db[name] == pytest.approx(first.db[name], abs=1e-9)
    for name in NAMES[4:]:
        assert first.db[name] > 30
        assert last.db[name] < 1


TINY = {
    **transformers_model.SIZES,
    **{"vocab_size": 64, "hidden_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "num_experts": 4},
}


@needs_transformers
def test_the_model_with_nothing_quantized_is_the_librarys() -> None:
    """The replaced experts give transformers' own logits: they multiply what it multiplies."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**TINY)).float().eval()
    ids = torch.randint(0, 64, (1, 20))
    with torch.no_grad():
        theirs = model(ids).logits
    mine, seen = transformers_model.logits(model, lambda x: x, ids)
    assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-6)
    assert [(o.x.shape, o.w.shape, sum(o.rows)) for o in seen] == [
        ((40, 64), (4, 64, 64), 40),
        ((40, 32), (4, 64, 32), 40),
    ] * 2


@needs_transformers
def test_model_report_is_repeatable_and_says_that_it_is_random() -> None:
    state = torch.random.get_rng_state()
    (found, first), (_, second) = (transformers_model.report(TINY, 24) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert first == second
    assert list(first) == NAMES
    assert first["bf16"] > first["MXFP8 rceil"] > 15
    assert "RANDOM weights" in found.source
    assert not found.real
    assert [o.name for o in found.gemms] == ["gate and up", "down"]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, operands: workload.Operands) -> workload.Workload:
    """In place of the demo's workload, and a tiny transformers model in place of the small one."""
    exact = workload.Operands("exact", torch.ones(4, 32), torch.ones(1, 8, 32), (4,))
    found = workload.Workload("SYNTHETIC: three experts", False, (operands, exact))
    monkeypatch.setattr(command, "load", lambda synthetic, experts, rows: found)
    monkeypatch.setattr(transformers_model, "SIZES", TINY)
    monkeypatch.setattr(transformers_model, "TOKENS", 24)
    return found


def test_command_prints_and_writes_what_it_measured(
    small: workload.Workload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "accuracy.json"
    monkeypatch.setattr(transformers_model, "installed", lambda: False)
    assert cli.main(["accuracy", "--json", str(path)]) == 0
    said = capsys.readouterr().out
    assert "On synthetic numbers, products keep" in said
    assert "pip install transformers" in said
    record = json.loads(path.read_text())
    (written,) = record["workloads"]
    assert [gemm["name"] for gemm in written["gemms"]] == ["small", "exact"]
    assert written["gemms"][1]["formats"]["bf16"][0]["x_db"] is None, "JSON has no infinity"
    assert list(written["gemms"][0]["formats"]) == NAMES
    for s in measure.score(small.gemms[0]):
        found = written["gemms"][0]["formats"][s.format.name]
        assert [q["product_db"] for q in found] == [q.product_db for q in s.experts]
        line = next(line for line in said.splitlines() if line.startswith(s.format.name))
        assert f"{s.mean('product_db'):.1f}" in line
    assert [effect["ratio"] for effect in record["channel"]] == list(command.RATIOS)


@needs_transformers
def test_command_measures_a_transformers_model(
    small: workload.Workload, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No label of its picture lies over marks and lines: all are beside their axes."""
    matplotlib = pytest.importorskip("matplotlib.figure", reason="needs matplotlib")
    figures: list[Any] = []
    save = matplotlib.Figure.savefig
    monkeypatch.setattr(matplotlib.Figure, "savefig", lambda self, *a, **k: (save(self, *a, **k), figures.append(self)))
    assert cli.main(["accuracy", "--plot", str(tmp_path / "accuracy.png")]) == 0
    said = capsys.readouterr().out
    assert "RANDOM weights" in said
    assert "logits dB" in said
    content = (tmp_path / "accuracy.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert len(content) > 20_000
    labels = [(text, axis) for axis in figures[0].axes for text in axis.texts]
    assert len(labels) == len(NAMES) + 4 * (len(NAMES) - 1)
    assert all(text.get_window_extent().x0 > axis.bbox.x1 for text, axis in labels)


def test_picture_without_matplotlib_is_a_word_before_any_work(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None)
    assert cli.main(["accuracy", "--plot", str(tmp_path / "a.png")]) == 2
    assert "needs matplotlib: pip install matplotlib" in capsys.readouterr().err
