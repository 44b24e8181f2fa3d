"""Checkpoints on a GPU: converted to the bytes that the CPU writes, loaded straight onto it."""

from __future__ import annotations

from pathlib import Path

import cases
import pytest
import torch
from safetensors.torch import save_file

import hybrid_mxfp8 as mx
from hybrid_mxfp8.checkpoint import reader as checkpoint
from hybrid_mxfp8.commands import cli

pytestmark = pytest.mark.gpu

NAME = "model.layers.0.mlp.experts.gate_up_proj"


def test_converted_on_the_gpu_to_the_same_file(tmp_path: Path) -> None:
    rng = torch.Generator().manual_seed(0)
    save_file({NAME: torch.randn(3, 200, 160, generator=rng).bfloat16()}, tmp_path / "in.safetensors")
    for device in ("cpu", "cuda"):
        target = tmp_path / f"{device}.safetensors"
        words = ["quantize", str(tmp_path / "in.safetensors"), str(target), "--experts", "*.experts.*"]
        assert cli.main([*words, "--device", device]) == 0
    assert (tmp_path / "cpu.safetensors").read_bytes() == (tmp_path / "cuda.safetensors").read_bytes()


def test_saved_from_the_gpu_and_loaded_onto_it(tmp_path: Path) -> None:
    saved = mx.quantize_weights(torch.randn(4, 256, 128, device="cuda"))
    checkpoint.save_experts(tmp_path / "m.safetensors", {NAME: saved})
    loaded = checkpoint.load_experts(tmp_path / "m.safetensors", NAME, device="cuda")
    assert loaded.device.type == "cuda"
    cases.same_bytes(loaded, saved)
