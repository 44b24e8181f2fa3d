"""Models of transformers that torch.distributed has split: FSDP, tensor and expert parallelism.

Ranks are forked processes that talk by gloo, on the CPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers_models as models
from ranks import on_ranks

import hybrid_mxfp8 as mx
from hybrid_mxfp8.integrations import transformers as integration

NOT_PROVEN = r"^experts: must be quantized by quantize_model_\(model\) where torch.distributed is in use"


def in_ranks(folder: Path, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What ``function`` returns on each of two ranks; none may fail."""
    models.require()
    results = on_ranks(_with_transformers, folder, "cpu", function, *arguments)
    assert not [result for result in results if isinstance(result, str)], results
    return results


def _with_transformers(rank: int, ranks: int, device: str, function: Callable[..., Any], *arguments: Any) -> Any:
    torch._C._get_accelerator = lambda check=False: torch.device(device)  # by which transformers makes its meshes
    os.environ["LOCAL_RANK"] = str(rank)
    integration.register()
    with torch.no_grad(), mx.use_backend("reference"):
        return function(*arguments)


def quantized(model: torch.nn.Module) -> Any:
    return integration.quantize_model_(model, progress=False)


def _fsdp() -> bool:
    from torch.distributed.fsdp import fully_shard

    def sharded(model: Any) -> Any:
        model.set_experts_implementation("hybrid_mxfp8")
        for layer in model.model.layers:
            fully_shard(layer)
        return fully_shard(model)

    first, last, prompt = models.make("Mixtral"), models.make("Mixtral"), models.prompt()
    with pytest.raises(ValueError, match=rf"{NOT_PROVEN} \(FSDP: before fully_shard\)"):
        sharded(last)(prompt)
    with pytest.raises(ValueError, match=r"^model: must be quantized before FSDP shards it: quantize_model_,"):
        quantized(last)
    quantized(first)
    expected = first(prompt).logits
    return torch.equal(sharded(first)(prompt).logits, expected)


def test_fsdp_gathers_unseen_so_experts_are_quantized_before_it(tmp_path: Path) -> None:
    """Into the same parameter, with the version it had: a copy can't be proven to be current."""
    assert in_ranks(tmp_path, _fsdp) == [True, True]


def _parallel(name: str, sizes: dict[str, int], whole: tuple[int, ...], local: tuple[int, ...]) -> list[float]:
    """The logits, which must be the same on each rank."""
    from transformers.distributed.configuration_utils import DistributedConfig

    model = models.make(name, scale=2)
    config, _, meshes = type(model).prepare_distribute_model(DistributedConfig(**sizes))
    model = type(model).maybe_distribute_model(model, config, meshes)
    routing, prompt = models.Routing(model), models.prompt()
    model.set_experts_implementation("grouped_mm")
    expected = model(prompt).logits
    model.set_experts_implementation("hybrid_mxfp8")
    routing.replay()
    with pytest.raises(ValueError, match=NOT_PROVEN):
        model(prompt)

    calls: list[torch.nn.Module] = []
    quantize = integration._quantize
    integration._quantize = lambda module, *args: (calls.append(module), quantize(module, *args))[1]
    saved, logits = quantized(model), []
    for _ in range(3):
        routing.replay()
        logits.append(model(prompt).logits)
    assert len(calls) == 2  # layers
    assert [tuple(m.mxfp8.w13_values.shape) for m in models.experts_modules(model)] == [local, local]
    weights = 2 * whole[0] * whole[1] * whole[2] * 3 // 2  # elements of two layers
    biases = 2 * whole[0] * (whole[1] + whole[2]) if name == "gpt-oss" else 0
    assert saved.bytes_before == (weights + biases) * 2 // 2  # of two bytes, on two ranks
    assert saved.bytes_after < 0.6 * saved.bytes_before
    assert all(torch.equal(again, logits[0]) for again in logits)
    assert mx.signal_to_noise_db(expected, logits[0]) > models.MIN_SNR_DB
    return logits[0].flatten().tolist()


@pytest.mark.parametrize(
    ("name", "sizes", "whole", "local"),
    [
        ("Qwen3-MoE", {"tp_size": 2}, (8, 128, 128), (8, 64, 128)),
        ("Qwen3-MoE", {"tp_size": 2, "ep_size": 2}, (8, 128, 128), (4, 128, 128)),
        ("gpt-oss", {"tp_size": 2, "ep_size": 2}, (4, 384, 128), (2, 384, 128)),
    ],
    ids=["tensor", "expert", "expert, gpt-oss"],
)
def test_each_rank_quantizes_its_shard_once(
    name: str, sizes: dict[str, int], whole: tuple[int, ...], local: tuple[int, ...], tmp_path: Path
) -> None:
    models.require()
    pytest.importorskip("transformers.distributed.mixin", reason="a newer transformers has DistributedConfig")
    first, second = in_ranks(tmp_path, _parallel, name, sizes, whole, local)
    assert first == second
