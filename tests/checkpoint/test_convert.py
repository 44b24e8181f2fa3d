"""The ``quantize`` command: every byte of its output, what it leaves alone, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from files import FP8, Tensors, quantize, same_bytes
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import hybrid_mxfp8 as mx
from hybrid_mxfp8 import reference
from hybrid_mxfp8.checkpoint import convert
from hybrid_mxfp8.checkpoint import reader as checkpoint
from hybrid_mxfp8.checkpoint.parallel import in_order

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
    "attention.weight": torch.linspace(-4, 4, 64).reshape(2, 32).to(FP8),
    "nothing": torch.empty(0, 4),
}
KEPT = ["model.layers.0.mlp.experts.gate_up_proj_bias", "model.layers.0.mlp.experts.scale"]
ALL = ("--experts", "*.experts.*")


@pytest.fixture
def tensors(rng: torch.Generator) -> Tensors:
    experts = {name: torch.randn(24, 64, generator=rng).half() for name in MATRICES}
    return {**OTHERS, STACKED: torch.randn(3, 40, 96, generator=rng).bfloat16(), **experts}


@pytest.fixture
def source(tensors: Tensors, tmp_path: Path) -> Path:
    path = tmp_path / "in.safetensors"
    save_file(tensors, path, metadata={"format": "pt", "author": "somebody"})
    return path


@pytest.mark.parametrize("rounding", ["rceil", "floor", "even"])
def test_every_tensor(source: Path, tensors: Tensors, rounding: str, tmp_path: Path) -> None:
    target = tmp_path / "out.safetensors"
    with mx.use_backend("reference"):
        assert quantize(source, target, *ALL, "--scale-rounding", rounding) == 0
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


@pytest.mark.parametrize("elements", [96, 96 * 7, 2**22], ids=["a row a block", "blocks with a rest", "one block"])
def test_blocks_of_rows(source: Path, elements: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They do not show in the result; progress is told in bytes of the source."""
    told: list[tuple[str, int]] = []
    options, target = convert.Options(("*.experts.*",)), tmp_path / "blocks.safetensors"
    with mx.use_backend("reference"), checkpoint.Checkpoint(source) as opened:
        planned = convert.plan(opened, options)
        convert.convert(opened, planned, tmp_path / "whole.safetensors", options)
        monkeypatch.setattr(convert, "BLOCK_ELEMENTS", elements)
        convert.convert(opened, planned, target, options, lambda *said: told.append(said))
    assert (tmp_path / "whole.safetensors").read_bytes() == target.read_bytes()
    rows = min(24, max(1, elements // 64))
    assert next(size for name, size in told if name == MATRICES[0]) == rows * 64 * 2
    assert sum(size for _, size in told) == planned.num_bytes == sum(t.nbytes for t in load_file(source).values())


@pytest.mark.parametrize("number", [None, 1])
def test_blocks_of_several_threads(
    number: int | None, source: Path, tensors: Tensors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bytes are one thread's, a fault stops all of them, and the number of threads stays."""
    monkeypatch.setattr(convert, "BLOCK_ELEMENTS", 7 * 96)
    if number is not None:
        tensors[STACKED][number, 5, 6] = torch.nan
        save_file(tensors, source)
    monkeypatch.setattr(convert.env, "triton_interpret", lambda: False)
    threads = torch.get_num_threads()
    written = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            with mx.use_backend("reference"):  # the caller's choice holds in each thread
                assert quantize(source, tmp_path / f"{count}", *ALL) == (0 if number is None else 2)
            assert torch.get_num_threads() == count
            written.append((tmp_path / f"{count}").read_bytes() if number is None else b"")
    finally:
        torch.set_num_threads(threads)
    assert written[0] == written[1]
    assert (tmp_path / "3").exists() == (number is None)


def test_work_is_done_in_order_and_not_far_ahead() -> None:
    taken: list[int] = []
    results = in_order(lambda item: item * item, (taken.append(i) or i for i in range(50)), 3)
    for i in range(50):
        assert next(results) == i * i
        assert len(taken) <= i + 5
    assert list(results) == []


def test_summary_counts_bytes_and_finds_the_worst(
    tensors: Tensors, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """bf16 to 33/32 bytes an element: 0.52. 1.0625 between two e4m3 values is worst, 24.6 dB."""
    tensors[MATRICES[1]] = torch.full((24, 64), 1.0625, dtype=torch.float16)
    save_file(tensors, tmp_path / "in.safetensors")
    assert quantize(tmp_path / "in.safetensors", tmp_path / "out.safetensors", *ALL) == 0
    said = capsys.readouterr().out
    before = 2 * (3 * 40 * 96 + 3 * 24 * 64)
    after = before / 2 * 33 / 32
    assert f"4 expert tensors to MXFP8, {before / 1024:.2f} KiB -> {after / 1024:.2f} KiB (0.52x)" in said
    assert f"worst signal-to-noise 24.6 dB, in {MATRICES[1]}" in said
    assert f"2 matching vectors and biases stay as they were, {KEPT[0]} among them" in said


@pytest.mark.parametrize("scale", [1e-25, 1e-12, 1.0, 1e12, 1e25], ids=str)
def test_signal_to_noise_of_any_magnitude(
    scale: float, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose squares may be out of fp32's reach: 1.0625 and 1 in turns. Without copies of a matrix
    in double, or of its squares, which on a CPU took longer than to quantize it."""
    for copy in ("double", "square"):
        monkeypatch.setattr(torch.Tensor, copy, None)
    w = torch.tensor([1.0625, 1.0]).repeat(2, 16) * 2.0 ** round(torch.tensor(scale).log2().item())
    save_file({"w": w, "v": torch.ones(2, 32)}, tmp_path / "in.safetensors")
    assert quantize(tmp_path / "in.safetensors", tmp_path / "out.safetensors", "--experts", "w") == 0
    assert "worst signal-to-noise 27.4 dB, in w" in capsys.readouterr().out
    assert quantize(tmp_path / "in.safetensors", tmp_path / "v.safetensors", "--experts", "v") == 0
    assert "no matrix lost anything" in capsys.readouterr().out


# ---------------------------------------------------------------- what is refused


def refused(words: tuple[object, ...], capsys: pytest.CaptureFixture[str]) -> str:
    assert quantize(*words) == 2
    return capsys.readouterr().err


def test_output_that_exists(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "out.safetensors"
    target.write_text("precious")
    assert "exists; --force replaces it" in refused((source, target, *ALL), capsys)
    assert target.read_text() == "precious"
    assert quantize(source, target, *ALL, "--force") == 0
    assert STACKED + "_scale_inv" in load_file(target)


def test_a_pattern_without_a_match_lists_some_names(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused((source, tmp_path / "out.safetensors", "--experts", "*.expert.*"), capsys)
    assert "no matrix matches *.expert.* among attention.weight, mask, model.embed_tokens.weight, ..." in said


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(4, 40), "w: must have K, its last dimension, a positive multiple of 32, got (4, 40)"),
        (torch.zeros(0, 32), "w: must have K, its last dimension, a positive multiple of 32, got (0, 32)"),
        (torch.zeros(2, 2, 2, 32), "w: must have shape (N, K) or (E, N, K), got (2, 2, 2, 32)"),
        (torch.zeros(4, 32).to(FP8), "w: dtype must be BF16, F16 or F32, got F8_E4M3: it is quantized"),
        (torch.zeros(4, 32).double(), "w: dtype must be BF16, F16 or F32, got F64: only those are converted, and FP8"),
        (torch.full((4, 32), float("inf")), "w: holds NaN or Inf"),
        (torch.full((2, 4, 32), float("nan")), "w[0]: holds NaN or Inf"),
        (torch.full((2, 32), torch.finfo(torch.float32).max), "w: holds NaN or Inf"),  # rounded, 2**128
    ],
)
def test_what_cannot_be_quantized_leaves_nothing_behind(
    tensor: torch.Tensor, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file({"w": tensor, "other": torch.ones(2)}, tmp_path / "in.safetensors")
    assert message in refused((tmp_path / "in.safetensors", tmp_path / "out.safetensors", "--experts", "w"), capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["in.safetensors"]


def test_a_weight_that_has_scales_is_not_quantized_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"w": torch.ones(2, 32), "w_scale_inv": torch.ones(1, 1)}, tmp_path / "in.safetensors")
    said = refused((tmp_path / "in.safetensors", tmp_path / "out.safetensors", "--experts", "w"), capsys)
    assert "w: has scales, w_scale_inv, so it is quantized already" in said


@pytest.mark.parametrize("pattern", ["*.experts.*", "*.down_proj", "*.gate_up_proj"])
@pytest.mark.parametrize("hidden", [64, 96])
def test_experts_whose_last_dimension_is_n_are_refused(
    pattern: str, hidden: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As gpt-oss keeps them, whose H and I are equal; the pair may lie in two files."""
    up, bias, down = torch.ones(2, hidden, 128), torch.ones(2, 128), torch.ones(2, 64, hidden)
    (tmp_path / "in").mkdir()
    pair = {"layers.0.experts.gate_up_proj": up, "layers.0.experts.gate_up_proj_bias": bias}
    save_file(pair, tmp_path / "in" / "a.safetensors")
    save_file({"layers.0.experts.down_proj": down}, tmp_path / "in" / "b.safetensors")
    said = refused((tmp_path / "in", tmp_path / "out", "--experts", pattern), capsys)
    assert "layers.0.experts.gate_up_proj: must be (E, N, K) = (E, 2I, H), as layers.0.experts.down_proj is" in said
    assert f"got (2, {hidden}, 128) and (2, 64, {hidden}): they look like (E, K, N)" in said
    assert not (tmp_path / "out").exists()


def gpt_oss(hidden: int, intermediate: int) -> dict[str, torch.Tensor]:
    """A layer's experts as gpt-oss keeps them: (E, K, N), gate and up in turns."""
    rng = torch.Generator().manual_seed(0)
    up, down = (
        torch.randn(2, hidden, 2 * intermediate, generator=rng),
        torch.randn(2, intermediate, hidden, generator=rng),
    )
    biases = torch.randn(2, 2 * intermediate, generator=rng), torch.randn(2, hidden, generator=rng)
    names = ("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias")
    tensors = zip(names, (up.bfloat16(), down.bfloat16(), *biases), strict=True)
    return {f"layers.0.mlp.experts.{name}": t for name, t in tensors}


BY_OPTION = ("--transposed", "*_proj", "--interleaved", "*.gate_up_proj")
SAID = {
    "by config.json": ({"model_type": "gpt_oss"}, ()),
    "by that of a part": ({"model_type": "other", "text_config": {"model_type": "gpt_oss"}}, ()),
    "by option": ({"model_type": "other"}, BY_OPTION),
    "without config.json": (None, BY_OPTION),
}


@pytest.mark.parametrize("rows", [1, 7, 2**20], ids=lambda n: f"{n} rows a block")
@pytest.mark.parametrize("how", SAID)
@pytest.mark.parametrize("folder", [True, False], ids=["folder", "file"])
def test_experts_as_gpt_oss_keeps_them(
    folder: bool,
    how: str,
    rows: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """They leave as (E, N, K) with all gate rows first, biases too, as the transformers integration
    quantizes them; whatever the blocks."""
    monkeypatch.setattr(convert, "BLOCK_ELEMENTS", rows * 64)
    tensors, (config, words) = gpt_oss(64, 96), SAID[how]
    (tmp_path / "in").mkdir()
    save_file(tensors, tmp_path / "in" / "a.safetensors")
    if config is not None:
        (tmp_path / "in" / "config.json").write_text(json.dumps(config))
    source, target = tmp_path / "in", tmp_path / "out"
    if not folder:
        source, target = source / "a.safetensors", tmp_path / "out.safetensors"
    with mx.use_backend("reference"):
        assert quantize(source, target, *ALL, *words) == 0
    up, down, up_bias, down_bias = tensors.values()
    names = list(tensors)
    expected = mx.MXFP8Experts.from_weights(
        up, down, w13_bias=up_bias, transposed=True, interleaved=True, backend="reference"
    )
    for name, w in ((names[0], expected.w13q), (names[1], expected.w2q)):
        found = checkpoint.load_experts(target, name)
        assert same_bytes(found.values, w.values)
        assert same_bytes(found.scales, w.scales)
    with safe_open(target / "a.safetensors" if folder else target, framework="pt") as file:
        assert torch.equal(file.get_tensor(names[2]), expected.w13_bias)
        assert torch.equal(file.get_tensor(names[3]), down_bias)
    said = capsys.readouterr().out
    assert f"transposed from (E, K, N): 2, {names[1]} among them" in said
    assert f"gate and up rows put one after another: 2, {names[0]} among them" in said
    assert f"1 matching vectors and biases stay as they were, {names[3]} among them" in said


def test_known_layout_under_other_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No shape shows rows in turns, so a name that the layout does not know is asked about."""
    tensors = {f"{name}.weight": tensor for name, tensor in gpt_oss(64, 96).items() if not name.endswith("bias")}
    save_file(tensors, tmp_path / "a.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt_oss"}))
    given = (tmp_path / "a.safetensors", tmp_path / "out.safetensors", *ALL, "--transposed", "*_proj.weight")
    assert quantize(*given) == 2
    assert (
        "has gate and up rows in turns in *.experts.gate_up_proj: --interleaved says where" in capsys.readouterr().err
    )
    assert quantize(*given, "--interleaved", "*.gate_up_proj.weight") == 0


@pytest.mark.parametrize("name", ["layer.experts.0.w13.bias", "layer.experts.0.w13.weight_bias"])
def test_a_single_experts_bias_is_put_in_order(name: str, tmp_path: Path) -> None:
    """Before and after its weight in the alphabet."""
    save_file({"layer.experts.0.w13.weight": torch.ones(64, 32), name: torch.arange(64.0)}, tmp_path / "in")
    assert quantize(tmp_path / "in", tmp_path / "out", *ALL, "--interleaved", "*.weight") == 0
    with safe_open(tmp_path / "out", framework="pt") as file:
        assert file.get_tensor(name).tolist() == [*range(0, 64, 2), *range(1, 64, 2)]


@pytest.mark.parametrize("pattern", ["*.experts.*", "*_proj", "*scales"])
@pytest.mark.parametrize("mark", ["_", "."])
def test_mxfp4_is_named(mark: str, pattern: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As gpt-oss is published: 16 bytes a block of 32, and scales."""
    weight = "layers.0.mlp.experts.gate_up_proj"
    shapes = {f"{weight}{mark}blocks": (2, 192, 2, 16), f"{weight}{mark}scales": (2, 192, 2)}
    save_file({name: torch.ones(shape, dtype=torch.uint8) for name, shape in shapes.items()}, tmp_path / "in")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt_oss"}))
    said = refused((tmp_path / "in", tmp_path / "out", "--experts", pattern), capsys)
    assert f": {weight}{mark}" in said
    assert "got MXFP4: transformers saves a bf16 copy" in said
    for name in (weight, *shapes):
        with pytest.raises(ValueError, match=f"{name}: must be .* got MXFP4"):
            checkpoint.load_experts(tmp_path / "in", name)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--transposed", "*gate_up"), "--transposed: no stack of three dimensions that --experts matches has a name like *gate_up"),
        (("--interleaved", "*_bias"), "--interleaved: no matrix that --experts matches has a name like *_bias"),
        (("--transposed", "*gate_up_proj"), "got (2, 64, 192) and (2, 96, 64): --transposed must match both"),
        (BY_OPTION[2:], "(2, 64, 192) and (2, 96, 64): they look like (E, K, N): give --transposed, and --interleaved if"),
        (("--transposed", "*"), "got (2, 192, 64) and (2, 64, 96): they look like (E, N, K), which --transposed, or"),
    ],
)  # fmt: skip
def test_layouts_that_are_none(
    words: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = gpt_oss(64, 96)
    if "look like (E, N, K)" in message:
        tensors = {name: t.transpose(1, 2).contiguous() if t.ndim == 3 else t for name, t in tensors.items()}
    save_file(tensors, tmp_path / "in.safetensors")
    assert message in refused((tmp_path / "in.safetensors", tmp_path / "out.safetensors", *ALL, *words), capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["in.safetensors"]


@pytest.mark.parametrize("hidden", [32, 64, 128, 256])
def test_experts_whose_last_dimension_is_k_are_converted(hidden: int, tmp_path: Path) -> None:
    """Also where sizes happen to be equal, and where two layers' would fit the other way."""
    up, down = torch.ones(2, 128, hidden), torch.ones(2, hidden, 64)
    tensors = {"layers.0.experts.gate_up_proj": up, "layers.0.experts.down_proj": down}
    tensors |= {"layers.1.experts.gate_up_proj": up.clone()}
    tensors |= {"layers.2.experts.down_proj": torch.ones(2, hidden // 2, 128)}
    save_file(tensors, tmp_path / "in.safetensors")
    with mx.use_backend("reference"):
        assert quantize(tmp_path / "in.safetensors", tmp_path / "out.safetensors", *ALL) == 0


# ---------------------------------------------------------------- folders


@pytest.fixture
def folder(tensors: Tensors, tmp_path: Path) -> Path:
    """A checkpoint of two files, one of which has no expert."""
    path = tmp_path / "model"
    (path / "onnx").mkdir(parents=True)
    first = {name: t for name, t in tensors.items() if "experts" in name}
    second = {name: t for name, t in tensors.items() if name not in first}
    save_file(first, path / "1.safetensors")
    save_file(second, path / "2.safetensors")
    where = {**dict.fromkeys(first, "1.safetensors"), **dict.fromkeys(second, "2.safetensors")}
    (path / checkpoint.INDEX_FILE).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))
    (path / "config.json").write_text(json.dumps({"model_type": "some_moe", "hidden_size": 96}))
    (path / "tokenizer.json").write_text("{}")
    (path / "onnx" / "vocabulary.txt").write_text("a b")
    return path


@pytest.fixture
def _reference() -> object:
    with mx.use_backend("reference"):
        yield


@pytest.mark.usefixtures("_reference")
def test_a_folder_is_converted_file_by_file(folder: Path, tensors: Tensors, tmp_path: Path) -> None:
    target = tmp_path / "out" / "model-MXFP8"
    assert quantize(folder, target, *ALL) == 0
    assert {path.name for path in target.iterdir()} == {path.name for path in folder.iterdir()}
    pattern = "model.layers.1.mlp.experts.*.down_proj.weight"
    assert checkpoint.find_experts(target) == {STACKED: (3, 40, 96), pattern: (3, 24, 64)}
    stacked = checkpoint.load_experts(target, STACKED)
    assert torch.equal(stacked.linear_scales(), reference.quantize(tensors[STACKED])[1])
    index = json.loads((target / checkpoint.INDEX_FILE).read_text())
    files = {name: load_file(target / name) for name in set(index["weight_map"].values())}
    assert index["weight_map"] == {name: file for file, found in files.items() for name in found}
    assert index["metadata"]["total_size"] == sum(t.nbytes for found in files.values() for t in found.values())
    config = json.loads((target / "config.json").read_text())
    untouched = ["model.embed_tokens", "model.layers.0.mlp.gate"]
    expected = {**convert.QUANTIZATION_CONFIG, "modules_to_not_convert": untouched}
    assert config == {"model_type": "some_moe", "hidden_size": 96, "quantization_config": expected}
    assert (target / "tokenizer.json").read_text() == "{}"
    assert (target / "onnx" / "vocabulary.txt").read_text() == "a b"
    assert load_file(target / "2.safetensors").keys() == load_file(folder / "2.safetensors").keys()


@pytest.mark.usefixtures("_reference")
def test_a_folder_is_replaced_only_with_force(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "precious").touch()
    assert "exists; --force" in refused((folder, target, *ALL), capsys)
    said = refused((folder, target, *ALL, "--force"), capsys)
    assert "is a folder with no safetensors file, which --force does not replace" in said
    assert (target / "precious").exists()
    (target / "old.safetensors").touch()
    assert quantize(folder, target, *ALL, "--force") == 0
    assert not (target / "precious").exists()
    (tmp_path / "file").touch()
    assert "is a file, unlike" in refused((folder, tmp_path / "file", *ALL, "--force"), capsys)


@pytest.mark.parametrize("target", ["model", "model/inside", "."])
def test_a_folder_and_its_output_lie_apart(
    folder: Path, target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With --force, an OUT around IN would take IN with it."""
    before = sorted(tmp_path.rglob("*"))
    assert "IN and OUT must not" in refused((folder, tmp_path / target, *ALL, "--force"), capsys)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.usefixtures("_reference")
def test_what_the_index_does_not_name_is_left_out(folder: Path, tmp_path: Path) -> None:
    """Some publishers add the same tensors once more in a file of another form."""
    (folder / "consolidated.safetensors").write_text("another form")
    assert quantize(folder, tmp_path / "out", *ALL) == 0
    assert not (tmp_path / "out" / "consolidated.safetensors").exists()


@pytest.mark.usefixtures("_reference")
def test_a_file_of_tensors_may_have_any_name(folder: Path, tmp_path: Path) -> None:
    """It is the index that makes it one: it must not be copied over what it was converted to."""
    (folder / "1.safetensors").rename(folder / "1.st")
    index = folder / checkpoint.INDEX_FILE
    index.write_text(index.read_text().replace("1.safetensors", "1.st"))
    assert quantize(folder, tmp_path / "out", *ALL) == 0
    assert STACKED in checkpoint.find_experts(tmp_path / "out")
