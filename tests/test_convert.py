"""The ``quantize`` command: every byte of its output, what it leaves alone, what it refuses, and that it never leaves half a file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import hybrid_mxfp8 as mx
from hybrid_mxfp8 import reference
from hybrid_mxfp8.checkpoint import convert
from hybrid_mxfp8.checkpoint import reader as checkpoint
from hybrid_mxfp8.commands import cli

STACKED = "model.layers.0.mlp.experts.gate_up_proj"
MATRICES = [f"model.layers.1.mlp.experts.{e}.down_proj.weight" for e in range(3)]
OTHERS = {
    "model.embed_tokens.weight": torch.arange(60, dtype=torch.float32).reshape(12, 5).bfloat16(),
    "model.layers.0.mlp.experts.gate_up_proj_bias": torch.ones(3, 40),
    "model.layers.0.mlp.experts.scale": torch.tensor([1.5, 2.5]),
    "model.layers.0.input_layernorm.weight": torch.ones(96),
    "model.layers.0.mlp.gate.weight": torch.linspace(-1, 1, 96).reshape(3, 32).half(),
    "steps": torch.tensor(7, dtype=torch.int64),
    "mask": torch.tensor([True, False, True]),
    "attention.weight": torch.linspace(-4, 4, 64).reshape(2, 32).to(torch.float8_e4m3fn),
    "nothing": torch.empty(0, 4),
}
KEPT = ["model.layers.0.mlp.experts.gate_up_proj_bias", "model.layers.0.mlp.experts.scale"]


@pytest.fixture
def tensors(rng: torch.Generator) -> dict[str, torch.Tensor]:
    experts = {name: torch.randn(24, 64, generator=rng).half() for name in MATRICES}
    return {**OTHERS, STACKED: torch.randn(3, 40, 96, generator=rng).bfloat16(), **experts}


@pytest.fixture
def source(tensors: dict[str, torch.Tensor], tmp_path: Path) -> Path:
    path = tmp_path / "in.safetensors"
    save_file(tensors, path, metadata={"format": "pt", "author": "somebody"})
    return path


def quantize(*words: object) -> int:
    return cli.main(["quantize", *map(str, words), "--device", "cpu"])


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and a.reshape(-1).view(torch.uint8).equal(b.reshape(-1).view(torch.uint8))
    )


@pytest.mark.parametrize("rounding", ["rceil", "floor", "even"])
def test_every_tensor(source: Path, tensors: dict[str, torch.Tensor], rounding: str, tmp_path: Path) -> None:
    target = tmp_path / "out.safetensors"
    assert quantize(source, target, "--experts", "*.experts.*", "--scale-rounding", rounding) == 0
    found = load_file(target)
    for name in (STACKED, *MATRICES):
        values, scales = reference.quantize(tensors[name], rounding)
        assert same_bytes(found.pop(name), values)
        assert same_bytes(found.pop(name + "_scale_inv"), scales)
    assert found.keys() == OTHERS.keys()
    assert all(same_bytes(found[name], kept) for name, kept in OTHERS.items())
    with safe_open(target, framework="pt") as file:
        said = file.metadata()
    assert said == {"format": "pt", "author": "somebody", "mxfp8.scale_rounding": rounding, **checkpoint.METADATA}


def test_result_multiplies(source: Path, tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """From bf16 file to product: as close to the unquantized one as the format allows."""
    target = tmp_path / "out.safetensors"
    assert quantize(source, target, "--experts", "*.experts.*") == 0
    weights = checkpoint.load_experts(target, "model.layers.1.mlp.experts.*.down_proj.weight")
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(3))
    xq = mx.quantize_grouped(x, torch.tensor([2, 3, 4], dtype=torch.int32), backend="reference")
    y = mx.grouped_gemm(xq, weights, out_dtype=torch.float32, backend="reference")
    truth = torch.cat([part @ tensors[name].float().T for part, name in zip(x.split([2, 3, 4]), MATRICES, strict=True)])
    assert mx.calc_diff(y, truth) < 1e-3


@pytest.mark.parametrize("elements", [96, 96 * 7, 2**22], ids=["a row a block", "blocks with a rest", "one block"])
def test_blocks_of_rows_do_not_show(
    source: Path, elements: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert quantize(source, tmp_path / "whole.safetensors", "--experts", "*.experts.*") == 0
    monkeypatch.setattr(convert, "BLOCK_ELEMENTS", elements)
    assert quantize(source, tmp_path / "blocks.safetensors", "--experts", "*.experts.*") == 0
    assert (tmp_path / "whole.safetensors").read_bytes() == (tmp_path / "blocks.safetensors").read_bytes()


def test_progress_is_told_in_bytes_of_the_source(
    source: Path, tensors: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each block of rows, at least one, and of each tensor that is copied: together those of the file."""
    told: list[tuple[str, int]] = []
    monkeypatch.setattr(convert, "BLOCK_ELEMENTS", 32)
    options, target = convert.Options((MATRICES[0],)), tmp_path / "out.safetensors"
    with mx.use_backend("reference"):
        convert.convert_file(source, target, options, convert.Summary(), lambda *said: told.append(said))
    assert [said for said in told if said[0] == MATRICES[0]] == [(MATRICES[0], 64 * 2)] * 24
    assert sum(size for _, size in told) == sum(tensor.nbytes for tensor in tensors.values())
    assert same_bytes(load_file(target)[MATRICES[0]], reference.quantize(tensors[MATRICES[0]])[0])


def test_summary_counts_bytes_and_finds_the_worst(
    tensors: dict[str, torch.Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """bf16 to 33/32 bytes an element: 0.52. Elements of 1.0625 lie between two e4m3 values: the worst there is, 24.6 dB."""
    tensors[MATRICES[1]] = torch.full((24, 64), 1.0625, dtype=torch.float16)
    save_file(tensors, tmp_path / "in.safetensors")
    assert quantize(tmp_path / "in.safetensors", tmp_path / "out.safetensors", "--experts", "*.experts.*") == 0
    said = capsys.readouterr().out
    before = 2 * (3 * 40 * 96 + 3 * 24 * 64)
    assert (
        f"4 expert tensors to MXFP8, {before / 1024:.2f} KiB -> {before / 2 * 33 / 32 / 1024:.2f} KiB (0.52x)" in said
    )
    assert f"worst signal-to-noise 24.6 dB, in {MATRICES[1]}" in said
    assert f"2 matching vectors and biases stay as they were, {KEPT[0]} among them" in said


def test_matrices_that_lose_nothing_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"w": torch.ones(2, 32)}, tmp_path / "in.safetensors")
    assert quantize(tmp_path / "in.safetensors", tmp_path / "out.safetensors", "--experts", "w") == 0
    assert "no matrix lost anything" in capsys.readouterr().out


def test_existing_output_is_kept_without_force(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "out.safetensors"
    target.write_text("precious")
    assert quantize(source, target, "--experts", "*.experts.*") == 2
    assert "exists; --force replaces it" in capsys.readouterr().err
    assert target.read_text() == "precious"
    assert quantize(source, target, "--experts", "*.experts.*", "--force") == 0
    assert STACKED + "_scale_inv" in load_file(target)


def refused(words: list[object], capsys: pytest.CaptureFixture[str]) -> str:
    assert quantize(*words) == 2
    return capsys.readouterr().err


def test_in_and_out_must_differ(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = source.read_bytes()
    assert "must not be the same" in refused([source, source, "--experts", "*", "--force"], capsys)
    assert source.read_bytes() == before


def test_a_pattern_without_a_match_lists_some_names(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused([source, tmp_path / "out.safetensors", "--experts", "*.expert.*"], capsys)
    assert "no matrix matches *.expert.* among attention.weight, mask, model.embed_tokens.weight, ..." in said


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("w", torch.zeros(4, 40), "w: must have K, its last dimension, a positive multiple of 32, got (4, 40)"),
        ("w", torch.zeros(0, 32), "w: must have K, its last dimension, a positive multiple of 32, got (0, 32)"),
        ("w", torch.zeros(2, 2, 2, 32), "w: must have shape (N, K) or (E, N, K), got (2, 2, 2, 32)"),
        (
            "w",
            torch.zeros(4, 32).to(torch.float8_e4m3fn),
            "w: dtype must be BF16, F16 or F32, got F8_E4M3: it is quantized",
        ),
        (
            "w",
            torch.zeros(4, 32, dtype=torch.float64),
            "w: dtype must be BF16, F16 or F32, got F64: only those are converted, and FP8",
        ),
        ("w", torch.full((4, 32), float("inf")), "w: holds NaN or Inf"),
        ("w", torch.full((2, 4, 32), float("nan")), "w[0]: holds NaN or Inf"),
        ("w", torch.full((2, 32), torch.finfo(torch.float32).max), "w: holds NaN or Inf"),  # rounded, 2**128
    ],
)
def test_what_cannot_be_quantized_leaves_nothing_behind(
    name: str, tensor: torch.Tensor, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file({name: tensor, "other": torch.ones(2)}, tmp_path / "in.safetensors")
    assert message in refused([tmp_path / "in.safetensors", tmp_path / "out.safetensors", "--experts", "w"], capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["in.safetensors"]


def test_a_weight_that_has_scales_is_not_quantized_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"w": torch.ones(2, 32), "w_scale_inv": torch.ones(1, 1)}, tmp_path / "in.safetensors")
    said = refused([tmp_path / "in.safetensors", tmp_path / "out.safetensors", "--experts", "w"], capsys)
    assert "w: has scales, w_scale_inv, so it is quantized already" in said


@pytest.mark.parametrize("pattern", ["*.experts.*", "*.down_proj", "*.gate_up_proj"])
@pytest.mark.parametrize("hidden", [64, 96])
def test_experts_whose_last_dimension_is_n_are_refused(
    pattern: str, hidden: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As gpt-oss keeps them, whose H and I are equal; the pair may lie in two files."""
    up, down = torch.ones(2, hidden, 128), torch.ones(2, 64, hidden)
    folder = tmp_path / "in"
    folder.mkdir()
    save_file(
        {"layers.0.experts.gate_up_proj": up, "layers.0.experts.gate_up_proj_bias": torch.ones(2, 128)},
        folder / "a.safetensors",
    )
    save_file({"layers.0.experts.down_proj": down}, folder / "b.safetensors")
    said = refused([folder, tmp_path / "out", "--experts", pattern], capsys)
    assert "layers.0.experts.gate_up_proj: must be (E, N, K) = (E, 2I, H), as layers.0.experts.down_proj is" in said
    assert f"got (2, {hidden}, 128) and (2, 64, {hidden}): they look like (E, K, N)" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("hidden", [32, 64, 128, 256])
def test_experts_whose_last_dimension_is_k_are_converted(hidden: int, tmp_path: Path) -> None:
    """Also where sizes happen to be equal, and where two layers' would fit the other way."""
    up, down = torch.ones(2, 128, hidden), torch.ones(2, hidden, 64)
    other = {"layers.1.experts.gate_up_proj": up, "layers.2.experts.down_proj": torch.ones(2, hidden // 2, 128)}
    save_file(
        {"layers.0.experts.gate_up_proj": up.clone(), "layers.0.experts.down_proj": down, **other},
        tmp_path / "in.safetensors",
    )
    assert quantize(tmp_path / "in.safetensors", tmp_path / "out.safetensors", "--experts", "*.experts.*") == 0


def test_input_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.safetensors"
    assert "no such file or folder" in refused([tmp_path / "absent", out, "--experts", "*"], capsys)
    (tmp_path / "bad.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    assert "is no complete safetensors file" in refused([tmp_path / "bad.safetensors", out, "--experts", "*"], capsys)
    (tmp_path / "folder").mkdir()
    assert "has no safetensors file" in refused([tmp_path / "folder", out, "--experts", "*"], capsys)


# ---------------------------------------------------------------- folders


@pytest.fixture
def folder(tensors: dict[str, torch.Tensor], tmp_path: Path) -> Path:
    """A checkpoint of two files, one of which has no expert."""
    path = tmp_path / "model"
    path.mkdir()
    first = {name: t for name, t in tensors.items() if "experts" in name}
    second = {name: t for name, t in tensors.items() if name not in first}
    save_file(first, path / "model-00001-of-00002.safetensors")
    save_file(second, path / "model-00002-of-00002.safetensors")
    where = {**dict.fromkeys(first, "model-00001-of-00002.safetensors")}
    where |= dict.fromkeys(second, "model-00002-of-00002.safetensors")
    (path / checkpoint.INDEX_FILE).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))
    (path / "config.json").write_text(json.dumps({"model_type": "some_moe", "hidden_size": 96}))
    (path / "tokenizer.json").write_text("{}")
    return path


def test_a_folder_is_converted_file_by_file(folder: Path, tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    target = tmp_path / "out" / "model-MXFP8"
    assert quantize(folder, target, "--experts", "*.experts.*") == 0
    assert {path.name for path in target.iterdir()} == {path.name for path in folder.iterdir()}
    assert checkpoint.find_experts(target) == {
        STACKED: (3, 40, 96),
        "model.layers.1.mlp.experts.*.down_proj.weight": (3, 24, 64),
    }
    stacked = checkpoint.load_experts(target, STACKED)
    assert torch.equal(stacked.linear_scales(), reference.quantize(tensors[STACKED])[1])
    index = json.loads((target / checkpoint.INDEX_FILE).read_text())
    files = {name: load_file(target / name) for name in set(index["weight_map"].values())}
    assert index["weight_map"] == {name: file for file, found in files.items() for name in found}
    assert index["metadata"]["total_size"] == sum(t.nbytes for found in files.values() for t in found.values())
    config = json.loads((target / "config.json").read_text())
    assert config.pop("quantization_config") == {
        "quant_method": "mxfp8",
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "scale_fmt": "ue8m0",
        "weight_block_size": [1, 32],
        "modules_to_not_convert": ["model.embed_tokens", "model.layers.0.mlp.gate"],
    }
    assert config == {"model_type": "some_moe", "hidden_size": 96}
    assert (target / "tokenizer.json").read_text() == "{}"
    second = "model-00002-of-00002.safetensors"
    assert load_file(target / second).keys() == load_file(folder / second).keys()


def test_a_folder_that_fails_leaves_nothing_behind(folder: Path, tmp_path: Path) -> None:
    """The bad tensor is in the file that comes last."""
    save_file({"z.experts.w": torch.full((2, 32), float("nan"))}, folder / "z.safetensors")
    (folder / checkpoint.INDEX_FILE).unlink()
    assert quantize(folder, tmp_path / "out", "--experts", "*.experts.*") == 2
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_folder_is_replaced_only_with_force(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "precious").touch()
    assert "exists; --force" in refused([folder, target, "--experts", "*.experts.*"], capsys)
    said = refused([folder, target, "--experts", "*.experts.*", "--force"], capsys)
    assert "is a folder with no safetensors file, which --force does not replace" in said
    assert (target / "precious").exists()
    (target / "old.safetensors").touch()
    assert quantize(folder, target, "--experts", "*.experts.*", "--force") == 0
    assert not (target / "precious").exists()
    (tmp_path / "file").touch()
    assert "is a file, unlike" in refused([folder, tmp_path / "file", "--experts", "*", "--force"], capsys)


@pytest.mark.parametrize("target", ["model", "model/inside", "."])
def test_a_folder_and_its_output_lie_apart(
    folder: Path, target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With --force, an OUT around IN would take IN with it."""
    before = sorted(tmp_path.rglob("*"))
    assert "IN and OUT must not" in refused([folder, tmp_path / target, "--experts", "*", "--force"], capsys)
    assert sorted(tmp_path.rglob("*")) == before


def test_files_beside_the_index_are_left_out(folder: Path, tmp_path: Path) -> None:
    """Some publishers add the same tensors once more in a file of another form."""
    (folder / "consolidated.safetensors").write_text("another form")
    assert quantize(folder, tmp_path / "out", "--experts", "*.experts.*") == 0
    assert not (tmp_path / "out" / "consolidated.safetensors").exists()


def test_a_folder_that_lacks_a_file_of_its_index_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "model-00002-of-00002.safetensors").unlink()
    said = refused([folder, tmp_path / "out", "--experts", "*.experts.*"], capsys)
    assert "names the file 'model-00002-of-00002.safetensors', which is not there" in said
    assert not (tmp_path / "out").exists()
