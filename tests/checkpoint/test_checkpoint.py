"""Checkpoints: what is written is what the library and the convention say, what is read is checked.

Files that lie or are damaged are in test_hostile_files.py.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from files import FP8, Tensors, same_experts
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import hybrid_mxfp8 as mx
from hybrid_mxfp8.checkpoint import reader as checkpoint
from hybrid_mxfp8.checkpoint.writer import Entry, SafetensorsWriter

NAME = "model.layers.0.mlp.experts.down_proj"


@pytest.fixture
def experts(rng: torch.Generator) -> mx.ExpertWeights:
    """N and K are no multiples of a scale tile: swizzled and row-major scales differ in shape."""
    return mx.quantize_weights(torch.randn(3, 40, 96, generator=rng), backend="reference")


@pytest.fixture
def whole_tiles(rng: torch.Generator) -> mx.ExpertWeights:
    """2 experts whose swizzled and row-major scales have the same shape."""
    w = torch.randn(2, 128, 128, generator=rng) * torch.exp2(torch.randint(-9, 9, (2, 128, 1), generator=rng).float())
    return mx.quantize_weights(w, backend="reference")


# ---------------------------------------------------------------- round trips


def test_saved_experts_come_back(experts: mx.ExpertWeights, whole_tiles: mx.ExpertWeights, tmp_path: Path) -> None:
    path = tmp_path / "experts.safetensors"
    saved = {NAME: experts, "other": whole_tiles}
    checkpoint.save_experts(path, saved)
    assert all(same_experts(checkpoint.load_experts(path, name, device="cpu"), w) for name, w in saved.items())
    assert checkpoint.find_experts(path) == {NAME: (3, 40, 96), "other": (2, 128, 128)}


def test_file_follows_the_convention(whole_tiles: mx.ExpertWeights, tmp_path: Path) -> None:
    """Read by the library: e4m3 elements, row-major bytes that multiply by 2**(b - 127)."""
    path = tmp_path / "experts.safetensors"
    checkpoint.save_experts(path, {NAME: whole_tiles})
    found = load_file(path)
    assert set(found) == {NAME, NAME + "_scale_inv"}
    values, scales = found[NAME], found[NAME + "_scale_inv"]
    assert (values.dtype, scales.dtype, scales.shape) == (FP8, torch.uint8, (2, 128, 4))
    assert not torch.equal(scales, whole_tiles.scales), "a test of layouts needs scales that differ in them"
    by_definition = values.double() * torch.exp2(scales.double() - 127).repeat_interleave(32, dim=-1)
    assert torch.equal(by_definition, whole_tiles.dequantize().double())
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt", **checkpoint.METADATA}


@pytest.mark.parametrize("scale", ["weight_scale_inv", "weight_scale", "scale"])
@pytest.mark.parametrize("scale_dtype", [torch.uint8, torch.float8_e8m0fnu])
def test_published_files_of_each_convention_are_read(
    experts: mx.ExpertWeights, scale: str, scale_dtype: torch.dtype, tmp_path: Path
) -> None:
    """MiniMax's names, ModelOpt's, DeepSeek's; eleven experts, so that 10 comes after 9."""
    order = [0, 1, 2, 2, 1, 0, 0, 1, 2, 2, 1]
    values, scales = experts.values, experts.linear_scales()
    matrices = {f"block_sparse_moe.experts.{number}.w2": e for number, e in enumerate(order)}
    matrices |= {"shared_experts.0.w2": 0, "self_attn.w2": 0}  # MXFP8, too, but no experts of the layer
    tensors: Tensors = {"model.norm.weight": torch.ones(96, dtype=torch.bfloat16)}
    for name, e in matrices.items():
        tensors[f"model.layers.3.{name}.weight"] = values[e].clone()
        tensors[f"model.layers.3.{name}.{scale}"] = scales[e].clone().view(scale_dtype)
    save_file(tensors, tmp_path / "m.safetensors")
    pattern = "model.layers.3.block_sparse_moe.experts.*.w2.weight"
    assert checkpoint.find_experts(tmp_path) == {pattern: (11, 40, 96)}
    loaded = checkpoint.load_experts(tmp_path, pattern)
    assert torch.equal(loaded.values.view(torch.uint8), values.view(torch.uint8)[order])
    assert torch.equal(loaded.linear_scales(), scales[order])


def test_several_names_are_joined_along_n(rng: torch.Generator, tmp_path: Path) -> None:
    """gate and up, of different N, then down the same rows as one quantization of both."""
    gate, up = torch.randn(2, 24, 64, generator=rng), torch.randn(2, 40, 64, generator=rng)
    quantized = {n: mx.quantize_weights(w, backend="reference") for n, w in (("gate", gate), ("up", up))}
    checkpoint.save_experts(tmp_path / "m.safetensors", quantized)
    both = mx.quantize_weights(torch.cat([gate, up], dim=1), backend="reference")
    assert same_experts(checkpoint.load_experts(tmp_path, ["gate", "up"]), both)
    assert not same_experts(checkpoint.load_experts(tmp_path, ["up", "gate"]), both)


@pytest.mark.parametrize("numbers", [range(4, 8), range(10), range(9, 10), range(8, 2, -3)], ids=str)
def test_some_experts_of_a_layer(
    experts: mx.ExpertWeights, numbers: range, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of a stack and of matrices alike; the others' bytes are not read."""
    values, scales = (torch.cat([t] * 4)[:10] for t in (experts.values, experts.linear_scales()))
    tensors = {"stack": values, "stack_scale": scales, "stack.0": values[0].clone(), "stack.0_scale": scales[0].clone()}
    for e in range(10):
        tensors |= {f"experts.{e}.w": values[e].clone(), f"experts.{e}.w_scale": scales[e].clone()}
    save_file(tensors, tmp_path / "m.safetensors")
    read: list[tuple[str, int | None]] = []
    matrix = checkpoint._matrix
    monkeypatch.setattr(checkpoint, "_matrix", lambda c, name, e: (read.append((name, e)), matrix(c, name, e))[1])
    for names in ("stack", "experts.*.w"):
        loaded = checkpoint.load_experts(tmp_path, names, experts=numbers)
        assert torch.equal(loaded.values.view(torch.uint8), values[list(numbers)].view(torch.uint8))
        assert torch.equal(loaded.linear_scales(), scales[list(numbers)])
    stacked = [(name, e) for e in numbers for name in ("stack", "stack_scale")]
    assert read == stacked + [(f"experts.{e}.w{suffix}", None) for e in numbers for suffix in ("", "_scale")]


def test_folder_with_an_index(experts: mx.ExpertWeights, tmp_path: Path) -> None:
    """Elements in one file and scales in another; a file not in the index is not looked at."""
    save_file({NAME: experts.values}, tmp_path / "a.safetensors", metadata={"a": "said"})
    save_file({NAME + "_scale_inv": experts.linear_scales()}, tmp_path / "b.safetensors", metadata={"b": "said"})
    (tmp_path / "c.safetensors").write_text("an unfinished download")
    index = {"weight_map": {NAME: "a.safetensors", NAME + "_scale_inv": "b.safetensors"}}
    (tmp_path / checkpoint.INDEX_FILE).write_text(json.dumps(index))
    assert same_experts(checkpoint.load_experts(tmp_path, NAME), experts)
    with checkpoint.Checkpoint(tmp_path) as found:
        assert found.metadata == {"a": "said", "b": "said"}


@pytest.mark.parametrize("content", ["precious", None], ids=["file", "link to nothing"])
def test_saving_replaces_only_when_told_to(content: str | None, experts: mx.ExpertWeights, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_text(content) if content else path.symlink_to("gone")
    with pytest.raises(FileExistsError, match="force=True"):
        checkpoint.save_experts(path, {NAME: experts})
    assert path.read_text() == content if content else path.is_symlink()
    checkpoint.save_experts(path, {NAME: experts}, force=True)
    assert same_experts(checkpoint.load_experts(path, NAME), experts)
    assert list(tmp_path.iterdir()) == [path]


# ---------------------------------------------------------------- what is not MXFP8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"w": torch.zeros(3, 40, 96, dtype=torch.bfloat16)}, "w: dtype must be F8_E4M3, got BF16: convert it with"),
        ({"w": torch.zeros(40, 96).to(FP8)}, r"w: must have shape \(E, N, K\), or a \*"),
        ({"w": torch.zeros(3, 40, 90).to(FP8)}, "w: K must be a positive multiple of 32, got 90"),
        ({"w_scale_inv": None}, "w: has no scales: neither w_scale_inv nor w_scale is there"),
        ({"w_scale_inv": torch.ones(3, 40, 1)}, "dtype must be U8 or F8_E8M0, got F32: .* perhaps those of FP8 of whole rows"),
        ({"w_scale_inv": torch.ones(3, 128, 4, dtype=torch.uint8)}, r"\(..., N, K/32\) = \(3, 40, 3\), row-major, got \(3, 128, 4\)"),
        ({"w_scale": torch.ones(3, 40, 3, dtype=torch.uint8)}, "'w' has two sets of scales"),
        *(  # as DeepSeek-V3 is published
            ({"w": torch.zeros(2, 200, 384).to(FP8), "w_scale_inv": torch.ones(2, 2, 3).to(dtype)}, f"must be MXFP8, got FP8 with one {said} scale a 128x128 block: convert it")
            for dtype, said in ((torch.float32, "fp32"), (torch.bfloat16, "bf16"), (torch.float8_e8m0fnu, "E8M0"))
        ),
    ],
)  # fmt: skip
def test_what_is_not_mxfp8_is_named(
    experts: mx.ExpertWeights, changes: dict[str, torch.Tensor | None], message: str, tmp_path: Path
) -> None:
    """In a good file but for the changes; None leaves a tensor out."""
    tensors = {"w": experts.values, "w_scale_inv": experts.linear_scales(), **changes}
    save_file({name: t for name, t in tensors.items() if t is not None}, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=message):
        checkpoint.load_experts(tmp_path, "w")
    if "w_scale" not in changes:
        assert checkpoint.find_experts(tmp_path) == {}


@pytest.mark.parametrize(("key", "known", "got"), [("scale_layout", "linear", "swizzled"), ("version", "1", "2")])
def test_what_only_the_header_tells(
    key: str, known: str, got: str, whole_tiles: mx.ExpertWeights, tmp_path: Path
) -> None:
    """Swizzled scales may have the shape of row-major ones."""
    tensors = {NAME: whole_tiles.values, NAME + "_scale_inv": whole_tiles.scales}
    save_file(tensors, tmp_path / "m.safetensors", metadata={f"mxfp8.{key}": got})
    for read in (checkpoint.find_experts, lambda path: checkpoint.load_experts(path, NAME)):
        with pytest.raises(ValueError, match=f"{key} must be '{known}' for this version to read it, got '{got}'"):
            read(tmp_path)


def test_files_of_a_refused_checkpoint_are_closed(experts: mx.ExpertWeights, tmp_path: Path) -> None:
    """Also where two files hold one tensor; what is absent is an error of its own."""
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        checkpoint.load_experts(tmp_path / "absent", "w")
    with pytest.raises(FileNotFoundError, match="has no safetensors file"):
        checkpoint.load_experts(tmp_path, "w")
    for name in "ab":
        checkpoint.save_experts(tmp_path / f"{name}.safetensors", {"w": experts})
    before = os.listdir("/proc/self/fd")
    with pytest.raises(ValueError, match=r"b.safetensors: tensor 'w\w*' is in another file"):
        checkpoint.load_experts(tmp_path, "w")
    assert os.listdir("/proc/self/fd") == before


# ---------------------------------------------------------------- wrong arguments


LOADED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"names": 3}, TypeError, "^names: must be a string or a sequence of strings, got 3$"),
    ({"names": ["w", 3]}, TypeError, "^names: must be a string or a sequence of strings"),
    ({"names": []}, ValueError, "^names: must name at least one tensor, got none$"),
    ({"names": "v"}, ValueError, "has no tensor 'v'$"),
    ({"names": "a*b*"}, ValueError, r"^names: 'a\*b\*' must have one \* at most$"),
    ({"device": "tpu0"}, ValueError, "^device: must be a torch.device or the name of one, got 'tpu0'$"),
    ({"device": "cuda:63", "path": "/nowhere"}, ValueError, "^device: there are .* got 'cuda:63'$"),
    ({"experts": range(1, 4)}, ValueError, r"^experts: must be numbers of 0 \.\. 1, at least one, got range\(1, 4\)$"),
    ({"experts": range(-1, 2)}, ValueError, r"^experts: must be numbers of 0 \.\. 1, .* got range\(-1, 2\)$"),
    ({"experts": range(2, 2)}, ValueError, r"^experts: must be numbers of 0 \.\. 1, at least one, got range\(2, 2\)$"),
    ({"experts": [0, 1]}, TypeError, "^experts: must be a range of experts' numbers, got list$"),
    ({"names": "experts.*.w"}, ValueError, r"experts.\*.w: experts must be numbered 0 .. 3, number 1 is missing"),
    ({"names": "experts.*.v"}, ValueError, r"has no tensor 'experts.\*.v' with a number for the \*$"),
    ({"names": ["a", "b"]}, ValueError, r"b: must have E = 2 and K = 32 as a, got \(E, N, K\) \(3, 8, 32\)"),
    ({"names": "odd.*"}, ValueError, r"odd.\*: experts must have one shape, got \[\(8, 32\), \(16, 32\)\]"),
    ({"names": "four.*"}, ValueError, r"four.0: must have shape \(N, K\) or \(E, N, K\), got \(1, 1, 8, 32\)"),
]  # fmt: skip
SHAPES: dict[str, tuple[int, ...]] = {
    **{"w": (2, 8, 64), "a": (2, 8, 32), "b": (3, 8, 32), "four.0": (1, 1, 8, 32), "odd.0": (8, 32), "odd.1": (16, 32)},
    **dict.fromkeys(("experts.0.w", "experts.2.w", "experts.3.w"), (8, 32)),
}


@pytest.mark.parametrize(("changes", "error", "message"), LOADED)
def test_wrong_arguments_for_loading(
    changes: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    tensors = {name: torch.zeros(shape).to(FP8) for name, shape in SHAPES.items()}
    tensors |= {f"{n}_scale": torch.ones(*s[:-1], s[-1] // 32, dtype=torch.uint8) for n, s in SHAPES.items()}
    save_file(tensors, tmp_path / "m.safetensors")
    with pytest.raises(error, match=message):
        checkpoint.load_experts(**{"path": tmp_path, "names": "w", **changes})


W = mx.quantize_weights(torch.ones(2, 8, 64), backend="reference")
ON_META = mx.ExpertWeights(W.values.to("meta"), W.scales.to("meta"))
SAVED: list[tuple[Any, type[Exception], str]] = [
    (W, TypeError, "^experts: must map names to ExpertWeights, got ExpertWeights$"),
    ({"w": torch.ones(3)}, TypeError, "^experts: must map names to ExpertWeights, got 'w': Tensor$"),
    ({3: W}, TypeError, "^experts: must map names to ExpertWeights, got 3"),
    ({"": W}, ValueError, "^experts: a tensor can't be called ''"),
    ({"__metadata__": W}, ValueError, "^experts: a tensor can't be called '__metadata__'"),
    ({"experts.*.w": W}, ValueError, r"^experts: 'experts\.\*\.w' must have no \*"),
    ({"w": W, "w_scale_inv": W}, ValueError, "'w_scale_inv' is there twice"),
    ({"w": ON_META}, ValueError, "^experts: 'w' must have data, got tensors on meta$"),
    ({"w": mx.quantize_weights(torch.ones(0, 8, 64))}, ValueError, r"^experts: 'w' must have no .*, got \(0, 8, 64\)$"),
]


@pytest.mark.parametrize(("experts", "error", "message"), SAVED)
def test_wrong_arguments_for_saving(experts: Any, error: type[Exception], message: str, tmp_path: Path) -> None:
    """Refused before anything is written."""
    with pytest.raises(error, match=message):
        checkpoint.save_experts(tmp_path / "experts.safetensors", experts)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- the writer


def test_writer_takes_pieces_in_any_order(tmp_path: Path) -> None:
    """Wide ones come first: a tensor must start at a multiple of its element."""
    tensors = {
        "U8": torch.tensor([1, 2, 3], dtype=torch.uint8),
        "F64": torch.tensor([[1.5, -2.5], [3.5, 4.5]], dtype=torch.float64),
        "BF16": torch.empty(0, 4, dtype=torch.bfloat16),
        "I32": torch.tensor(7, dtype=torch.int32),
        "BOOL": torch.tensor([True, False]),
    }
    entries = [Entry(dtype, dtype, tuple(t.shape)) for dtype, t in tensors.items()]
    path = tmp_path / "m.safetensors"
    with SafetensorsWriter(path, entries, {}) as writer:
        writer.append("F64", tensors["F64"][:1])
        for name in ("U8", "BF16", "BOOL", "I32"):
            writer.append(name, tensors[name])
        writer.append("F64", tensors["F64"][1:])
        assert not path.exists()
    found = load_file(path)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], t) and found[name].dtype == t.dtype for name, t in tensors.items())


@pytest.mark.parametrize("pieces", [[], [3], [4, 1]], ids=["nothing", "too little", "too much"])
def test_an_incomplete_file_never_appears(pieces: list[int], tmp_path: Path) -> None:
    def write() -> None:
        with SafetensorsWriter(tmp_path / "m.safetensors", [Entry("w", "U8", (4,))], {}) as writer:
            for piece in pieces:
                writer.append("w", torch.zeros(piece, dtype=torch.uint8))

    with pytest.raises(ValueError, match=r"^w: "):
        write()
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_appears_meanwhile_stays(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"

    def write() -> None:
        with SafetensorsWriter(path, [Entry("w", "U8", (4,))], {}) as writer:
            writer.append("w", torch.zeros(4, dtype=torch.uint8))
            path.write_text("precious")

    with pytest.raises(FileExistsError, match="something else made it meanwhile"):
        write()
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {path.name: "precious"}


@pytest.mark.parametrize(
    ("names", "dtype", "message"),
    [
        ("ww", "U8", "'w' is there twice"),
        ("w", "F4", "w: dtype F4 is not known here"),
        (["__metadata__"], "U8", "can't hold a tensor of the name '__metadata__'"),
        (["lone \ud800 surrogate"], "U8", "can't hold a tensor of the name"),
        (["w" * 55], "U8", r"m.safetensors: its header would have 112 bytes, of which the format allows 100"),
    ],
)
def test_writer_refuses(names: Sequence[str], dtype: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it does not know, and what the format or the library does not."""
    monkeypatch.setattr("hybrid_mxfp8.checkpoint.writer.MAX_HEADER_BYTES", 100)
    with pytest.raises(ValueError, match=message):
        SafetensorsWriter(Path("m.safetensors"), [Entry(name, dtype, (4,)) for name in names], {})
