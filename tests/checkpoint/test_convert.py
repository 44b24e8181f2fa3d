"""The ``quantize`` command: every byte of its output, what it leaves alone, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from files import FP8, Tensors, convert_tensors, quantize, read_folder, same_bytes, same_experts, write_folder
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
def test_every_tensor(source: Path, tensors: Tensors, rounding: str, cpu_backend: str, tmp_path: Path) -> None:
    target = tmp_path / "out.safetensors"
    with mx.use_backend(cpu_backend):
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
    """Seen neither in the result nor in what it lost; progress is in bytes of the source."""
    told: list[tuple[str, int]] = []
    options, target = convert.Options(ALL[1:]), tmp_path / "blocks.safetensors"
    with checkpoint.Checkpoint(source) as opened:
        planned = convert.plan(opened, options)
        whole = convert.convert(opened, planned, tmp_path / "whole.safetensors", options)
        monkeypatch.setattr(convert, "BLOCK_ELEMENTS", elements)
        parts = convert.convert(opened, planned, target, options, lambda *said: told.append(said))
    assert parts == pytest.approx(whole)
    assert (tmp_path / "whole.safetensors").read_bytes() == target.read_bytes()
    rows = min(24, max(1, elements // 64))
    assert next(size for name, size in told if name == MATRICES[0]) == rows * 64 * 2
    assert (
        sum(size for _, size in told)
        == sum(tensor.entry.num_bytes for tensor in planned)
        == sum(t.nbytes for t in load_file(source).values())
    )


def test_blocks_of_several_threads(
    source: Path, tensors: Tensors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One thread's bytes, by the caller's backend; a fault stops all, and their number stays."""
    monkeypatch.setattr(convert, "BLOCK_ELEMENTS", 7 * 96)
    monkeypatch.setattr(convert.env, "triton_interpret", lambda: False)
    monkeypatch.setenv("HYBRID_MXFP8_BACKEND", "none")  # for whom the caller's choice does not hold
    tensors[STACKED][1, 5, 6] = torch.nan
    save_file(tensors, tmp_path / "nan")
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert quantize(source, tmp_path / f"{count}", *ALL) == 0
            assert quantize(tmp_path / "nan", tmp_path / f"nan {count}", *ALL) == 2
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert (tmp_path / "1").read_bytes() == (tmp_path / "3").read_bytes()
    assert not list(tmp_path.glob("nan *"))


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
    assert convert_tensors(tensors, tmp_path, *ALL) == 0
    said = capsys.readouterr().out
    before = 2 * (3 * 40 * 96 + 3 * 24 * 64)
    after = before / 2 * 33 / 32
    assert f"4 expert tensors to MXFP8, {before / 1024:.2f} KiB -> {after / 1024:.2f} KiB (0.52x)" in said
    files = (load_file(tmp_path / f"{name}.safetensors").values() for name in ("in", "out"))
    sizes = [f"{sum(t.nbytes for t in file) / 1024:.2f} KiB" for file in files]
    assert f"all tensors {sizes[0]} -> {sizes[1]}\n" in said
    assert "model.layers.*.mlp.experts.*.down_proj.weight (3), " in said
    assert f"worst signal-to-noise 24.6 dB, in {MATRICES[1]}" in said
    assert f"2 matching vectors and biases stay as they were, {KEPT[0]} among them" in said


@pytest.mark.parametrize("scale", [1e-25, 1e-12, 1.0, 1e12, 1e25], ids=str)
def test_signal_to_noise_of_any_magnitude(
    scale: float, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose squares may be out of fp32's reach: 1.0625 and 1 in turns."""
    for copy in ("double", "square"):  # of a matrix: on a CPU that took longer than to quantize it
        monkeypatch.setattr(torch.Tensor, copy, None)
    w = torch.tensor([1.0625, 1.0]).repeat(2, 16) * 2.0 ** round(torch.tensor(scale).log2().item())
    assert convert_tensors({"w": w}, tmp_path, "--experts", "w") == 0
    assert "worst signal-to-noise 27.4 dB, in w" in capsys.readouterr().out
    assert convert_tensors({"w": torch.ones(2, 32)}, tmp_path, "--experts", "w", "--force") == 0
    assert "no matrix lost anything" in capsys.readouterr().out


# ---------------------------------------------------------------- what is refused


def gpt_oss(hidden: int, intermediate: int) -> dict[str, torch.Tensor]:
    """A layer's experts as gpt-oss keeps them: (E, K, N), gate and up in turns."""
    rng = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {
        "gate_up_proj": (2, hidden, 2 * intermediate),
        "down_proj": (2, intermediate, hidden),
        "gate_up_proj_bias": (2, 2 * intermediate),
        "down_proj_bias": (2, hidden),
    }
    tensors = {f"layers.0.mlp.experts.{name}": torch.randn(s, generator=rng) for name, s in shapes.items()}
    return {name: t.bfloat16() if t.ndim == 3 else t for name, t in tensors.items()}


W = ("--experts", "w")
E4M3 = torch.full((2, 130, 32), 448.0).to(FP8)
AS_E_N_K = {name: t.mT.contiguous() if t.ndim == 3 else t for name, t in gpt_oss(64, 96).items()}
QUANTIZED = "w: dtype must be BF16, F16 or F32, got F8_E4M3: it is quantized already"
REFUSED: dict[str, tuple[Tensors, tuple[str, ...], str]] = {
    "no match": (OTHERS, ("--experts", "*.expert.*"), "no matrix matches *.expert.* among attention.weight, mask, model.embed_tokens.weight, ..."),
    "K of 40": ({"w": torch.zeros(4, 40)}, W, "w: must have K, its last dimension, a positive multiple of 32, got (4, 40)"),
    "no row": ({"w": torch.zeros(0, 32)}, W, "w: must have no empty dimension, got (0, 32)"),
    "four dimensions": ({"w": torch.zeros(2, 2, 2, 32)}, W, "w: must have shape (N, K) or (E, N, K), got (2, 2, 2, 32)"),
    "no scales": ({"w": E4M3}, W, QUANTIZED),
    "fp64": ({"w": torch.zeros(4, 32).double()}, W, "w: dtype must be BF16, F16 or F32, got F64: only those are converted, and FP8"),
    "has scales": ({"w": torch.ones(2, 32), "w_scale_inv": torch.ones(1, 1)}, W, "w: has scales, w_scale_inv, so it is quantized already"),
    "Inf": ({"w": torch.full((4, 32), torch.inf)}, W, "w: holds NaN or Inf"),
    "NaN": ({"w": torch.full((2, 4, 32), torch.nan)}, W, "w[0]: holds NaN or Inf"),
    "rounded, 2**128": ({"w": torch.full((2, 32), torch.finfo(torch.float32).max)}, W, "w: holds NaN or Inf"),
    **{  # of the last rows; 448 times 1e37 is Inf
        f"a scale of {scale}": ({"w": E4M3, "w_scale_inv": torch.tensor([[1.0, 1], [1, scale]])[..., None]}, W, "w[1]: holds NaN or Inf")
        for scale in (torch.nan, torch.inf, 1e37)
    },
    **{  # of other blocks, rows or whole tensors
        f"scales {shape}": ({"w": torch.ones(200, 384).to(FP8), "w_scale_inv": torch.ones(shape)}, W, QUANTIZED)
        for shape in ((2, 2), (4, 1), (1, 3), (2, 3, 1))
    },
    **{  # as gpt-oss keeps them; its H and I are equal
        f"K before N, H {h}, {name}": (gpt_oss(h, 64), ("--experts", name), f"got (2, {h}, 128) and (2, 64, {h}): they look like (E, K, N): give --trans")
        for h in (64, 96)
        for name in ("*.experts.*", "*.down_proj", "*.gate_up_proj")
    },
    "E, N, K transposed": (AS_E_N_K, (*ALL, "--transposed", "*"), "got (2, 192, 64) and (2, 64, 96): they look like (E, N, K), which --transposed, or"),
    **{
        f"{option} {pattern}": (gpt_oss(64, 96), (*ALL, option, pattern), message)
        for option, pattern, message in (
            ("--transposed", "*gate_up", "--transposed: no stack of three dimensions that --experts matches has a name like *gate_up"),
            ("--interleaved", "*_proj", "--interleaved: must match gate and up alone, got layers.0.mlp.experts.down_proj"),
            ("--interleaved", "*_bias", "--interleaved: no matrix that --experts matches has a name like *_bias"),
            ("--transposed", "*gate_up_proj", "got (2, 64, 192) and (2, 96, 64): --transposed must match both"),
            ("--interleaved", "*.gate_up_proj", "gate_up_proj: must be (E, N, K) = (E, 2I, H), as layers.0.mlp.experts.down_proj is (E, H, I)"),
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused_leaves_nothing_behind(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors, words, message = REFUSED[what]
    assert convert_tensors(tensors, tmp_path, *words) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["in.safetensors"]


# ---------------------------------------------------------------- experts in another layout


BY_OPTION = ("--transposed", "*_proj", "--interleaved", "*.gate_up_proj")
SAID = {
    "by config.json": ({"model_type": "gpt_oss"}, ()),
    "by that of a part": ({"model_type": "other", "text_config": {"model_type": "gpt_oss"}}, ()),
    "by option": ({"model_type": "other"}, BY_OPTION),
    "without config.json": (None, BY_OPTION),
}


@pytest.mark.parametrize("rows", [1, 7, 2**20], ids=lambda n: f"{n} rows a block")
@pytest.mark.parametrize("how", SAID)
def test_experts_as_gpt_oss_keeps_them(
    how: str, rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """To (E, N, K) with gate rows first, biases too, as the transformers integration has them."""
    monkeypatch.setattr(convert, "BLOCK_ELEMENTS", rows * 64)
    tensors, (config, words) = gpt_oss(64, 96), SAID[how]
    (tmp_path / "in").mkdir()
    save_file(tensors, tmp_path / "in" / "a.safetensors")
    if config is not None:
        (tmp_path / "in" / "config.json").write_text(json.dumps(config))
    up, down, up_bias, down_bias = tensors.values()
    expected = mx.MXFP8Experts.from_weights(up, down, w13_bias=up_bias, transposed=True, interleaved=True)
    names = list(tensors)
    for file in ("", "a.safetensors"):
        target = tmp_path / "out" / file
        assert quantize(tmp_path / "in" / file, target, *ALL, *words, "--force") == 0
        assert same_experts(checkpoint.load_experts(target, names[0]), expected.w13q)
        assert same_experts(checkpoint.load_experts(target, names[1]), expected.w2q)
        with safe_open(tmp_path / "out" / "a.safetensors", framework="pt") as written:
            assert torch.equal(written.get_tensor(names[2]), expected.w13_bias)
            assert torch.equal(written.get_tensor(names[3]), down_bias)
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
    said = capsys.readouterr().err
    assert "has gate and up rows in turns in *.experts.gate_up_proj: --interleaved says where" in said
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
    assert quantize(tmp_path / "in", tmp_path / "out", "--experts", pattern) == 2
    said = capsys.readouterr().err
    assert f": {weight}{mark}" in said
    assert "got MXFP4: transformers saves a bf16 copy" in said
    for name in (weight, *shapes):
        with pytest.raises(ValueError, match=f"{name}: must be .* got MXFP4"):
            checkpoint.load_experts(tmp_path / "in", name)


@pytest.mark.parametrize("hidden", [32, 64, 128, 256])
def test_experts_whose_last_dimension_is_k_are_converted(hidden: int, tmp_path: Path) -> None:
    """Also where sizes happen to be equal, and where two layers' would fit the other way."""
    up, down = torch.ones(2, 128, hidden), torch.ones(2, hidden, 64)
    tensors = {"layers.0.experts.gate_up_proj": up, "layers.0.experts.down_proj": down}
    tensors |= {"layers.1.experts.gate_up_proj": up.clone()}
    tensors |= {"layers.2.experts.down_proj": torch.ones(2, hidden // 2, 128)}
    assert convert_tensors(tensors, tmp_path, *ALL) == 0


# ---------------------------------------------------------------- folders


@pytest.fixture
def folder(tensors: Tensors, tmp_path: Path) -> Path:
    """A checkpoint of two files, one of which has no expert."""
    first = {name: t for name, t in tensors.items() if "experts" in name}
    second = {name: t for name, t in tensors.items() if name not in first}
    config = {"model_type": "some_moe", "hidden_size": 96}
    path = write_folder(tmp_path / "model", {"1.safetensors": first, "2.safetensors": second}, config)
    (path / "tokenizer.json").write_text("{}")
    (path / "onnx").mkdir()
    (path / "onnx" / "vocabulary.txt").write_text("a b")
    return path


def test_a_folder_is_converted_file_by_file(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "out" / "model-MXFP8"
    assert quantize(folder, target, *ALL) == 0
    assert {path.name for path in target.iterdir()} == {path.name for path in folder.iterdir()}
    pattern = "model.layers.1.mlp.experts.*.down_proj.weight"
    assert checkpoint.find_experts(target) == {STACKED: (3, 40, 96), pattern: (3, 24, 64)}
    files, config = read_folder(target)
    untouched = ["model.embed_tokens", "model.layers.0.mlp.gate"]
    expected = {**convert.QUANTIZATION_CONFIG, "modules_to_not_convert": untouched}
    assert config == {"model_type": "some_moe", "hidden_size": 96, "quantization_config": expected}
    assert (target / "tokenizer.json").read_text() == "{}"
    assert (target / "onnx" / "vocabulary.txt").read_text() == "a b"
    assert files["2.safetensors"].keys() == load_file(folder / "2.safetensors").keys()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        *(
            (f"model/1.safetensors {same} --force", "IN and OUT must not be the same")
            for same in ("model/1.safetensors", "model/../model/1.safetensors", "link", "hard", "linked/1.safetensors")
        ),
        ("model linked --force", "IN and OUT must not be the same"),
        ("model model/inside --force", "IN and OUT must not lie in one another"),
        ("model linked/inside --force", "IN and OUT must not lie in one another"),
        ("model . --force", "IN and OUT must not lie in one another"),  # it would take IN with it
        ("model/1.safetensors file", "exists; --force replaces it"),
        ("model/1.safetensors gone", "exists; --force replaces it"),  # a link to nothing
        ("model mine", "exists; --force replaces it"),
        ("model mine --force", "is a folder with no safetensors file, which --force does not replace"),
        ("model linked_mine --force", "is a link to a folder, which --force does not replace"),
        ("model file --force", "is a file, unlike"),
    ],
)
def test_an_out_that_is_refused_stays(
    words: str, message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").mkdir()
    for file in ("file", "mine/file"):
        (tmp_path / file).write_text("precious")
    links = {"link": "model/1.safetensors", "linked": "model", "linked_mine": "mine", "gone": "nothing"}
    for link, name in links.items():
        (tmp_path / link).symlink_to(tmp_path / name)
    (tmp_path / "hard").hardlink_to(folder / "1.safetensors")
    before = {path: path.is_symlink() or path.is_dir() or path.read_bytes() for path in tmp_path.rglob("*")}
    source, target, *force = words.split()
    assert quantize(tmp_path / source, tmp_path / target, *ALL, *force) == 2
    assert message in capsys.readouterr().err
    assert {path: path.is_symlink() or path.is_dir() or path.read_bytes() for path in tmp_path.rglob("*")} == before


def test_a_folder_that_appears_meanwhile_stays(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other_files = convert._other_files

    def meanwhile(source: checkpoint.Checkpoint) -> list[Path]:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "precious").touch()
        return other_files(source)

    monkeypatch.setattr(convert, "_other_files", meanwhile)
    assert quantize(folder, tmp_path / "out", *ALL) == 2
    assert "something else made it meanwhile" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious"]


def test_force_replaces_an_earlier_result(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for old in ("old.safetensors", "old"):
        (tmp_path / "out" / old).touch()
    assert quantize(folder, tmp_path / "out", *ALL, "--force") == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in folder.iterdir()}


def test_the_index_says_which_files_hold_tensors(folder: Path, tmp_path: Path) -> None:
    """Under any name; some publishers add them once more in a file of another form."""
    (folder / "consolidated.safetensors").write_text("another form")
    (folder / "1.safetensors").rename(folder / "1.st")
    index = folder / checkpoint.INDEX_FILE
    index.write_text(index.read_text().replace("1.safetensors", "1.st"))
    assert quantize(folder, tmp_path / "out", *ALL) == 0
    assert STACKED in checkpoint.find_experts(tmp_path / "out")
    assert not (tmp_path / "out" / "consolidated.safetensors").exists()
