"""What the tests of checkpoints share: the ``quantize`` command, and bytes compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import hybrid_mxfp8 as mx
from hybrid_mxfp8.checkpoint.reader import INDEX_FILE
from hybrid_mxfp8.commands import cli

FP8 = torch.float8_e4m3fn
Tensors = dict[str, torch.Tensor]


def quantize(*words: object, device: str = "cpu") -> int:
    """The command's exit code."""
    return cli.main(["quantize", *map(str, words), "--device", device])


def convert_tensors(tensors: Tensors, folder: Path, *words: object) -> int:
    """The exit code of ``quantize`` of these, from in.safetensors to out.safetensors."""
    save_file(tensors, folder / "in.safetensors")
    return quantize(folder / "in.safetensors", folder / "out.safetensors", *words)


def write_folder(path: Path, files: dict[str, Tensors], config: object) -> Path:
    """A checkpoint of several files, with an index and a ``config.json``."""
    path.mkdir()
    for file, tensors in files.items():
        save_file(tensors, path / file)
    weight_map = {name: file for file, tensors in files.items() for name in tensors}
    (path / INDEX_FILE).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    (path / "config.json").write_text(json.dumps(config))
    return path


def read_folder(path: Path) -> tuple[dict[str, Tensors], Any]:
    """Each file's tensors, and ``config.json``; the index must agree with the files."""
    files = {file.name: load_file(file) for file in sorted(path.glob("*.safetensors"))}
    index = json.loads((path / INDEX_FILE).read_text())
    assert index["weight_map"] == {name: file for file, found in files.items() for name in found}
    assert index["metadata"]["total_size"] == sum(t.nbytes for found in files.values() for t in found.values())
    return files, json.loads((path / "config.json").read_text())


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether dtype, shape and bytes are equal."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return a.reshape(-1).view(torch.uint8).equal(b.reshape(-1).view(torch.uint8))


def same_experts(a: mx.ExpertWeights, b: mx.ExpertWeights) -> bool:
    """Whether both have the same bytes."""
    return same_bytes(a.values, b.values) and same_bytes(a.scales, b.scales)
