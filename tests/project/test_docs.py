"""The README, pages and examples run as printed, links lead somewhere, tables say what is there."""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import moe_truth
import pages
import pytest
import torch
import transformers_models
from files import FP8, same_bytes, same_experts, write_folder
from pages import DOCS, ROOT, blocks, run_program, run_python

import hybrid_mxfp8 as mx
from hybrid_mxfp8 import env
from hybrid_mxfp8.checkpoint import reader as checkpoint
from hybrid_mxfp8.commands import cli
from hybrid_mxfp8.core.formats import scale_offset

README = (ROOT / "README.md").read_text()
PAGES = sorted(path.name for path in DOCS.glob("*.md"))
PUBLIC = (
    "hybrid_mxfp8",
    "hybrid_mxfp8.checkpoint",
    "hybrid_mxfp8.checkpoint.fp8_blocks",
    "hybrid_mxfp8.compat.sglang",
    "hybrid_mxfp8.distributed",
    "hybrid_mxfp8.integrations.transformers",
)


def test_every_page_with_python_is_run() -> None:
    """Each by a test of its name."""
    with_python = [page.removesuffix(".md") for page in PAGES if "```python" in (DOCS / page).read_text()]
    assert {f"test_{page.replace('-', '_')}" for page in with_python} < globals().keys()


def run_shell(commands: str) -> None:
    """A page's commands, all of which are this package's."""
    for line in commands.splitlines():
        words = shlex.split(line)
        assert words[:3] == ["python", "-m", "hybrid_mxfp8"], line
        assert cli.main(words[3:]) == 0


@pytest.mark.parametrize(("page", "product", "counts"), [("sglang", "d", [5, 130, 1]), ("../README", "y", [3, 5, 1])])
def test_sglang(page: str, product: str, counts: list[int]) -> None:
    """And the README: a product of experts 0, 2 and 3 of four."""
    names = run_python(f"{page}.md")
    x, w, y = names["x"].float().split(counts), names["w"].float().view(4, -1, names["x"].shape[1]), names[product]
    assert y.dtype == torch.bfloat16
    assert mx.calc_diff(y, torch.cat([xe @ w[e].T for xe, e in zip(x, (0, 2, 3), strict=True)])) < 1e-3


def test_scale_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The picture labels each row of a tile where its scales lie, 16 bytes a line."""
    run_python("scale-layout.md")
    plt = pytest.importorskip("matplotlib.pyplot", reason="the picture needs the bench extra")
    monkeypatch.setattr(sys, "argv", ["scale_layout.py", str(tmp_path / "layout.png")])
    runpy.run_path(str(DOCS / "scale_layout.py"), run_name="__main__")
    tile = plt.gcf().axes[0]
    middles = {text.get_text(): text.get_position() for text in tile.texts}
    at = {row: (scale_offset(row, 0, 4), scale_offset(row, 3, 4)) for row in range(128)}
    expected = {f"row {row}": ((first + last + 1) / 2 % 16, first // 16 + 0.5) for row, (first, last) in at.items()}
    assert middles == expected
    plt.close("all")
    assert (tmp_path / "layout.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def _reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """For pages whose point is no kernel: the interpreter takes its time."""
    monkeypatch.setenv("HYBRID_MXFP8_BACKEND", "reference")


@pytest.mark.usefixtures("_reference")
def test_groups(capsys: pytest.CaptureFixture[str]) -> None:
    """Three forms of one layout, the padded batch, the router's ids, and the error as printed."""
    names = run_python("groups.md")
    printed = capsys.readouterr().out
    assert printed.startswith("[0, 3, 3, 8, 9] True\n" * 3 + "torch.Size([16, 512]) True\n")
    assert printed.endswith(*blocks("groups.md", "text"))
    assert mx.calc_diff(names["out"], names["expected"]) < 1.5e-3


@pytest.mark.usefixtures("_reference")
def test_numerics(capsys: pytest.CaptureFixture[str]) -> None:
    run_python("numerics.md")
    kept = re.findall(r"^(\w+) +(\S+) dB$", capsys.readouterr().out, re.MULTILINE)
    assert [name for name, _ in kept] == ["rceil", "floor", "even"]
    assert all(29 < float(db) < 33 for _, db in kept)


def test_environment() -> None:
    """Two backends compared; a line in the log, by the variable and by the program."""
    (command,), (compared, program) = blocks("environment.md", "sh"), blocks("environment.md", "python")
    variables = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "TRITON_INTERPRET": "0"}
    for words in (["bash", "-c", command], [sys.executable, "-c", program]):
        ran = subprocess.run(words, env=os.environ | variables, capture_output=True, text=True, check=True)
        assert re.fullmatch(r"INFO:hybrid_mxfp8:quantize on cpu uses backend .*\n", ran.stderr), ran.stderr
    assert ran.stdout.startswith("GroupedMXFP8(num_tokens=4")
    ran = subprocess.run([sys.executable, "-c", compared], capture_output=True, text=True, check=True)
    assert re.search(r"^reference, .*\ncalc_diff \S+$", ran.stdout, re.MULTILINE), ran.stdout


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
    with torch.no_grad():
        assert torch.equal(*(names[model](names["tokens"]).logits for model in ("model", "again")))


@pytest.mark.usefixtures("_reference")
def test_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    attention = "model.layers.3.self_attn.o_proj.weight"
    weights = [f"model.layers.3.mlp.experts.{e}.up_proj.weight" for e in range(2)] + [attention]
    fp8 = {name: torch.ones(64, 128).to(FP8) for name in weights}
    fp8 |= {name + "_scale_inv": torch.full((1, 1), 1e-3) for name in weights}
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    write_folder(Path("DeepSeek-V3"), {"model.safetensors": fp8}, config)
    names = run_python("checkpoints.md", run_shell)
    assert checkpoint.find_experts("DeepSeek-V3-MXFP8") == {"model.layers.3.mlp.experts.*.up_proj.weight": (2, 64, 128)}
    with checkpoint.Checkpoint("DeepSeek-V3-MXFP8") as converted:
        assert converted.tensor(attention).dtype == torch.bfloat16
    assert checkpoint.find_experts("model-mxfp8.safetensors")["model.layers.0.experts.*.w1.weight"] == (4, 64, 128)
    experts = (f"model.layers.0.experts.{e}" for e in range(4))
    parts = [[names["tensors"][f"{expert}.{name}.weight"] for name in ("w1", "w3")] for expert in experts]
    expected = mx.quantize_weights(torch.stack(list(map(torch.cat, parts))), backend="reference")
    assert same_experts(names["w13"], expected)
    assert same_bytes(names["mine"].values, expected.values[2:4])


def test_accuracy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="the plot needs the bench extra")
    monkeypatch.chdir(tmp_path)
    run_shell("".join(blocks("accuracy.md", "sh")))
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "accuracy.json").exists()


@pytest.mark.gpu
def test_example_router_to_layer() -> None:
    said = run_program(ROOT / "examples" / "router_to_layer.py")
    assert said.startswith("(32, 256) torch.bfloat16: ")
    assert float(re.findall(r"(\S+) dB", said)[0]) > 22.0


@pytest.mark.gpu
def test_example_cuda_graph() -> None:
    """Three replays, each with the bytes of an eager call; without a GPU it says so."""
    said = run_program(ROOT / "examples" / "cuda_graph.py")
    replays = "".join(f"step {step}: as eager True\n" for step in range(3))
    assert said == (replays if torch.cuda.is_available() else "needs a GPU: nothing was run\n")


def test_example_transformers_model() -> None:
    transformers_models.require()
    first, generated = run_program(ROOT / "examples" / "transformers_model.py").splitlines()
    assert first.startswith("the experts of 2 MoE layers take ")
    assert len(json.loads(generated)) == 5 + 8


def test_example_expert_parallel() -> None:
    if torch.cuda.device_count() == 1:
        pytest.skip("needs no GPU, or two")
    said = run_program(ROOT / "examples" / "expert_parallel.py", ranks=2)
    differences = dict(re.findall(r"rank (\d): calc_diff (-?\d\.\de[+-]\d+)", said))
    assert differences.keys() == {"0", "1"}
    assert max(map(float, differences.values())) < 3e-5


@pytest.mark.parametrize(
    "page", [*(f"docs/{page}" for page in PAGES), "examples/README.md", "README.md", "CONTRIBUTING.md", "CHANGELOG.md"]
)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)", (ROOT / page).read_text()):
        if not target.startswith("https://"):
            assert (ROOT / page).parent.joinpath(target).exists(), target


def test_api_page_has_every_public_name_and_no_other() -> None:
    public = [(module, name) for module in PUBLIC for name in importlib.import_module(module).__all__]
    documented = re.findall(r"^::: ([\w.]+)$", (DOCS / "api.md").read_text(), re.MULTILINE)
    assert sorted(documented) == sorted(f"{module}.{name}" for module, name in public if name != "__version__")
    for module, name in public:
        assert inspect.getdoc(getattr(importlib.import_module(module), name)), name


# ---------------------------------------------------------------- tables


def test_environment_table_is_that_of_env_and_has_every_variable() -> None:
    assert env.__doc__ is not None
    rows = [line.replace("``", "`") for line in env.__doc__.splitlines() if line.startswith("|")]
    page = (DOCS / "environment.md").read_text()
    assert rows == [line for line in page.splitlines() if line.startswith("|")]
    assert tuple(name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])) == env.VARIABLES


def test_every_backend_has_its_row_in_the_readme() -> None:
    section = README.split("## Backends")[1].split("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == list(mx.backends())


def test_what_the_readme_says_of_fp8_is_what_was_measured() -> None:
    """For all products of the run whose picture it shows: not only for few and many rows."""
    (run,) = re.findall(r"\(bench/results/(\S+-full)-moe-time\.png\)", README)
    times: dict[str, dict[str, float]] = {}
    for row in json.loads((ROOT / "bench" / "results" / f"{run}.json").read_text())["rows"]:
        if row["kind"] == "gemm":
            times.setdefault(row["case"], {})[row["contender"].partition(" (")[0]] = row["us"]
    faster = [case["torch fp8 row-wise _scaled_grouped_mm"] < case["grouped_gemm"] for case in times.values()]
    assert f"faster in {sum(faster)} of {len(faster)} cases" in README.replace("\n", " ")
