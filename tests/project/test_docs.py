"""The pages in docs/: Python and commands run as printed, links lead somewhere."""

from __future__ import annotations

import functools
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import moe_truth
import pages
import pytest
import torch
import transformers_models
from pages import DOCS, blocks, run_python
from safetensors.torch import save_file

import hybrid_mxfp8 as mx
from hybrid_mxfp8.checkpoint import reader as checkpoint
from hybrid_mxfp8.commands import cli

PAGES = (
    "accuracy.md",
    "checkpoints.md",
    "expert-parallel.md",
    "moe.md",
    "scale-layout.md",
    "sglang.md",
    "transformers.md",
)


def run_shell(page: str) -> None:
    """The page's commands, all of which are this package's."""
    for line in "".join(blocks(page, "sh")).splitlines():
        words = shlex.split(line)
        assert words[:3] == ["python", "-m", "hybrid_mxfp8"], line
        assert cli.main(words[3:]) == 0


def test_sglang() -> None:
    names = run_python("sglang.md")
    x, w, d = names["x"].float(), names["w"].float().view(4, 256, 128), names["d"]
    assert d.dtype == torch.bfloat16
    truth = torch.cat([x[0:5] @ w[0].T, x[5:135] @ w[2].T, x[135:136] @ w[3].T])
    assert mx.calc_diff(d, truth) < 1e-3


def test_scale_layout(tmp_path: Path) -> None:
    run_python("scale-layout.md")
    pytest.importorskip("matplotlib", reason="the picture needs the bench extra")
    picture = tmp_path / "layout.png"
    subprocess.run([sys.executable, DOCS / "scale_layout.py", picture], check=True, timeout=120)
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def _reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """For pages whose point is no kernel: the interpreter takes its time."""
    monkeypatch.setenv("HYBRID_MXFP8_BACKEND", "reference")


@pytest.mark.usefixtures("_reference")
def test_moe(monkeypatch: pytest.MonkeyPatch) -> None:
    # Inductor would need a C++ compiler on a CPU.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    names = run_python("moe.md")
    layer = moe_truth.Layer(*(names[name] for name in ("x", "w13", "w2", "ids", "weights")))
    truth = moe_truth.forward(layer)
    assert mx.signal_to_noise_db(truth, names["y"]) > 22.0
    assert torch.equal(names["out"], names["y"])
    assert torch.equal(names["compiled"], names["x"] + names["y"])


def test_expert_parallel(tmp_path: Path) -> None:
    """Two ranks on the CPU; tests/gpu runs it on two GPUs."""
    assert shlex.split(*blocks("expert-parallel.md", "sh"))[0] == "torchrun"
    pages.check_expert_parallel(["all gather", "padded", "all to all", "all tokens", "tensor parallel"], tmp_path)


@pytest.mark.usefixtures("_reference")
def test_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    transformers_models.require()
    transformers_models.make("Qwen3-MoE").save_pretrained(tmp_path / "MODEL")
    monkeypatch.chdir(tmp_path)
    names = run_python("transformers.md")
    assert names["generated"].shape[1] > 5
    assert "the experts of 2 MoE layers take" in capsys.readouterr().out
    assert names["model"].config._experts_implementation == "hybrid_mxfp8"


def save_small_fp8_model(folder: Path) -> str:
    """FP8 in blocks of 128x128: two experts, and an attention matrix whose name is returned."""
    other = "model.layers.3.self_attn.o_proj.weight"
    names = [f"model.layers.3.mlp.experts.{e}.up_proj.weight" for e in range(2)] + [other]
    tensors = {name: torch.ones(64, 128).to(torch.float8_e4m3fn) for name in names}
    tensors |= {name + "_scale_inv": torch.full((1, 1), 1e-3) for name in names}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    (folder / "config.json").write_text(json.dumps(config))
    return other


@pytest.mark.usefixtures("_reference")
def test_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rng = torch.Generator().manual_seed(0)
    shapes = {"w1": (64, 128), "w3": (64, 128), "w2": (128, 64)}
    tensors = {
        f"model.layers.0.experts.{e}.{name}.weight": torch.randn(shape, generator=rng).bfloat16()
        for e in range(4)
        for name, shape in shapes.items()
    }
    save_file(tensors, "model.safetensors")
    fp8 = save_small_fp8_model(Path("DeepSeek-V3"))
    run_shell("checkpoints.md")
    assert checkpoint.find_experts("DeepSeek-V3-MXFP8") == {"model.layers.3.mlp.experts.*.up_proj.weight": (2, 64, 128)}
    with checkpoint.Checkpoint("DeepSeek-V3-MXFP8") as converted:
        assert converted.tensor(fp8).dtype == torch.bfloat16
    names = run_python("checkpoints.md")
    assert checkpoint.find_experts("model-mxfp8.safetensors")["model.layers.0.experts.*.w1.weight"] == (4, 64, 128)
    w = torch.stack(
        [torch.cat([tensors[f"model.layers.0.experts.{e}.{name}.weight"] for name in ("w1", "w3")]) for e in range(4)]
    )
    expected = mx.quantize_weights(w, backend="reference")
    assert torch.equal(names["w13"].scales, expected.scales)
    assert torch.equal(names["w13"].values.view(torch.uint8), expected.values.view(torch.uint8))
    assert torch.equal(names["mine"].values.view(torch.uint8), expected.values.view(torch.uint8)[2:4])
    x = torch.randn(4, 128, generator=rng)
    one_each = torch.ones(4, dtype=torch.int32)
    y = names["grouped_gemm"](
        names["quantize_grouped"](x, one_each, backend="reference"), names["w13"], backend="reference"
    )
    assert mx.calc_diff(y, torch.einsum("ek,enk->en", x, w.float())) < 1e-3


def test_accuracy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="the plot needs the bench extra")
    monkeypatch.chdir(tmp_path)
    run_shell("accuracy.md")
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "accuracy.json").exists()


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)", (DOCS / page).read_text()):
        if not target.startswith("https://"):
            assert (DOCS / target).exists(), target
