"""Experts spread over the GPUs of one machine: what travels and how long a layer takes, with tokens
in MXFP8 and in bf16.

    python -m bench.expert_parallel --out FILE.json [--ranks 2] [--tokens 16,1024]
    python -m bench.expert_parallel --model        # 2 to 256 ranks, modelled; no GPU

One run starts a process for each GPU. Contenders are replayed from CUDA graphs in turns, as
``timing.py`` does it; a sample is that of the slowest rank, since no rank is done before the
others. ``layer bf16`` gathers tokens, ids and weights, runs the experts and adds their parts with a
reduce-scatter. Both layers share weights and workspace, and their results are compared before
anything is timed. ``all_to_all`` syncs, so no graph can hold it: ``wall_us`` has the wall time of
eager calls, of each layer.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

import hybrid_mxfp8 as mx
from hybrid_mxfp8.core.token_record import TokenRecord
from hybrid_mxfp8.distributed import ExpertParallelExperts, experts_of_rank
from hybrid_mxfp8.ops.tokens import pack_tokens

from . import report, timing
from .expert_parallel_model import estimate, table
from .run import why_not
from .shapes import MODELS, ModelShape

NAMES = ("Qwen3-30B-A3B", "DeepSeek-V3")
TOKENS = (16, 64, 256, 1024, 4096, 8192)
"""Of a rank."""
ROUNDS = 9
MAX_DIFFERENCE = 1e-5
TIMEOUT = datetime.timedelta(seconds=120)

_gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Batch(NamedTuple):
    """A rank's tokens: x (M, H) bf16, ids (M, top_k) int64, weights (M, top_k) fp32."""

    x: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor


def random_weights(model: ModelShape, experts: int, device: str) -> tuple[mx.ExpertWeights, mx.ExpertWeights]:
    """A rank's experts: four of normal data over and over, so that making them takes no time."""

    def repeated(n: int, k: int) -> mx.ExpertWeights:
        few = mx.quantize_weights(torch.randn(4, n, k, dtype=torch.bfloat16, device=device) / k**0.5)
        index = torch.arange(experts, device=device) % 4
        values = few.values.view(torch.uint8)[index].view(torch.float8_e4m3fn)
        return mx.ExpertWeights(values, few.scales[index])

    (up_n, up_k), (down_n, down_k) = model.gemms
    return repeated(up_n, up_k), repeated(down_n, down_k)


def random_batch(model: ModelShape, tokens: int, device: str) -> Batch:
    """Every expert is as likely as another."""
    x = torch.randn(tokens, model.hidden, dtype=torch.bfloat16, device=device)
    weights, ids = torch.rand(tokens, model.experts, device=device).softmax(-1).topk(model.top_k)
    return Batch(x, ids, weights)


def gathered(mine: torch.Tensor) -> torch.Tensor:
    """Every rank's rows."""
    everyone = mine.new_empty(dist.get_world_size() * mine.shape[0], *mine.shape[1:])
    _gather_into(everyone, mine)
    return everyone


def contenders(layer: ExpertParallelExperts, batch: Batch, first: int) -> dict[str, Callable[[int], Any]]:
    """Name to call: both layers, and each of their parts."""
    x, ids, weights = batch
    tokens, experts = x.shape[0], layer.experts

    def pack() -> torch.Tensor:
        return pack_tokens(x, ids, weights, num_records=tokens, num_experts=layer.num_experts)

    def scattered(parts: torch.Tensor) -> torch.Tensor:
        y = torch.empty_like(x)
        _reduce_scatter(y, parts)
        return y

    everyone, everyone_ids, everyone_weights = gathered(x), gathered(ids) - first, gathered(weights)
    records = gathered(pack())
    values, scales, record_ids, record_weights = TokenRecord(x.shape[1], ids.shape[1]).split(records)
    quantized = mx.MXFP8Tokens(values, scales)
    parts = torch.empty_like(everyone)
    packed = pack()
    return {
        "layer bf16": lambda i: scattered(experts(gathered(x), gathered(ids) - first, gathered(weights))),
        "layer mxfp8": lambda i: layer(x, ids, weights),
        "gather bf16": lambda i: (gathered(x), gathered(ids), gathered(weights)),
        "gather mxfp8": lambda i: gathered(packed),
        "pack and gather mxfp8": lambda i: gathered(pack()),
        "experts bf16": lambda i: experts(everyone, everyone_ids, everyone_weights),
        "experts mxfp8": lambda i: experts(quantized, record_ids - first, record_weights),
        "reduce-scatter": lambda i: scattered(parts),
    }


def wall_us(call: Callable[[int], object], device: timing.Device) -> float:
    """Of an eager call, waiting for the GPU included: the median of a few runs of a few calls."""
    runs = []
    for _ in range(4):
        device.synchronize()
        start = time.perf_counter()
        for _ in range(5):
            call(0)
        device.synchronize()
        runs.append((time.perf_counter() - start) / 5 * 1e6)
    slowest = torch.tensor(statistics.median(runs[1:]), device="cpu")
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return round(float(slowest), 1)


def measure(
    model: ModelShape, layer: ExpertParallelExperts, batch: Batch, first: int, device: timing.Device
) -> dict[str, Any]:
    """One row: bytes that a rank sends, times, and what follows from them."""
    tokens, ranks = batch.x.shape[0], dist.get_world_size()
    calls = contenders(layer, batch, first)
    difference = mx.calc_diff(calls["layer mxfp8"](0), calls["layer bf16"](0))
    if not difference < MAX_DIFFERENCE:
        raise AssertionError(f"{model.name}, {tokens} tokens: layers differ by {difference:.1e}")
    repeats = 20 if tokens <= 256 else 10 if tokens <= 1024 else 3
    plan = timing.Plan(sets=1, calls=repeats, budget_us=0, min_rounds=ROUNDS, max_rounds=ROUNDS)
    timings: dict[str, timing.Timing] = {}
    for name, result in timing.measure(calls, plan, device).items():
        if result.timing is None:
            raise RuntimeError(f"{model.name}, {tokens} tokens, {name}: {result.failure}")
        samples = torch.tensor(result.timing.samples_us, device="cpu")
        dist.all_reduce(samples, dist.ReduceOp.MAX)
        timings[name] = timing.summarize(samples.tolist())
    layers = {name: calls[name] for name in ("layer bf16", "layer mxfp8")}
    direct = ExpertParallelExperts(layer.experts, num_experts=layer.num_experts, dispatch="all_to_all")
    layers["layer all_to_all mxfp8"] = lambda i: direct(*batch)
    modelled: dict[str, float] = {}
    for name in ("bf16", "mxfp8"):
        guess = estimate(model, tokens, ranks, mxfp8=name == "mxfp8", dispatch="all_gather")
        modelled |= {f"layer {name}": round(guess.us, 1), f"communication {name}": round(guess.communication_us, 1)}
    us = {name: round(found.median_us, 2) for name, found in timings.items()}
    as_bf16 = sum(t[0].numel() * t.element_size() for t in batch)
    as_mxfp8 = TokenRecord(model.hidden, model.top_k).size
    return {
        "model": model.name,
        "ranks": ranks,
        "tokens": tokens,
        "sent_bytes": {
            "gather bf16": (ranks - 1) * tokens * as_bf16,
            "gather mxfp8": (ranks - 1) * tokens * as_mxfp8,
            "reduce-scatter": (ranks - 1) * tokens * 2 * model.hidden,
        },
        "us": us,
        "modelled_us": modelled,
        "p10_p90_us": {n: [round(t.p10_us, 2), round(t.p90_us, 2)] for n, t in timings.items()},
        "wall_us": {name: wall_us(call, device) for name, call in layers.items()},
        "calc_diff": difference,
        "communication_share": round((us["gather bf16"] + us["reduce-scatter"]) / us["layer bf16"], 3),
        "ratio": round(timing.ratio(timings["layer bf16"], timings["layer mxfp8"]), 3),
    }


def measure_models(
    models: Sequence[ModelShape], tokens: Sequence[int], device: timing.Device, where: str
) -> Iterator[dict[str, Any]]:
    """A row of each model and number of tokens, on this rank; all ranks must take them."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for model in models:
        torch.manual_seed(0)
        own = experts_of_rank(model.experts, rank, ranks)
        w13q, w2q = random_weights(model, len(own), where)
        largest = ranks * max(tokens)
        workspace = mx.MoEWorkspace(w13q, w2q, max_tokens=largest, top_k=model.top_k)
        experts = mx.MXFP8Experts(w13q, w2q, workspace=workspace)
        torch.manual_seed(1 + rank)
        for each in tokens:
            batch = random_batch(model, each, where)
            layer = ExpertParallelExperts(experts, num_experts=model.experts, max_tokens=each)
            yield measure(model, layer, batch, own.start, device)
        del w13q, w2q, workspace, experts, layer
        if where != "cpu":
            torch.cuda.empty_cache()


def line(row: dict[str, Any]) -> str:
    """A row for people."""
    us, sent = row["us"], row["sent_bytes"]
    parts = " | ".join(f"{name} {us[name]:.1f}" for name in us)
    share = sent["gather mxfp8"] / sent["gather bf16"]
    return (
        f"{row['model']} {row['tokens']} tokens x {row['ranks']}: {row['ratio']:.2f}x, communication"
        f" {row['communication_share']:.0%}, {share:.2f} of the bytes; µs: {parts}; modelled {row['modelled_us']}"
    )


def _run_rank(rank: int, ranks: int, store: str, out: str, models: Sequence[ModelShape], tokens: Sequence[int]) -> None:
    torch.cuda.set_device(rank)
    options: dict[str, Any] = {"init_method": f"file://{store}", "rank": rank, "world_size": ranks}
    dist.init_process_group("cpu:gloo,cuda:nccl", timeout=TIMEOUT, **options)
    rows: list[dict[str, Any]] = []
    for row in measure_models(models, tokens, timing.CudaDevice(), "cuda"):
        if rank:
            continue
        print(line(row), flush=True)
        rows.append(row)
        record = {
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "gpu": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
            "commit": report.commit(),
            "method": " ".join((__doc__ or "").split("\n\n", 2)[2].split()),
            "rows": rows,
        }
        Path(out).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    dist.destroy_process_group()


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.expert_parallel", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--out", default="expert_parallel.json", help="the JSON file that is written")
    parser.add_argument("--ranks", type=int, default=0, help="GPUs; default all")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)), help="tokens of a rank, a list")
    parser.add_argument("--model", action="store_true", help="print what is modelled for 2 to 256 ranks")
    arguments = parser.parse_args()
    models = [model for name in NAMES for model in MODELS if model.name == name]
    tokens = [int(each) for each in arguments.tokens.split(",")]
    if arguments.model:
        print("\n\n".join(table(model, each) for model in models for each in (128, 4096)))
        return
    if (reason := why_not()) is not None:
        sys.exit(f"Nothing was measured: {reason}.")
    ranks = arguments.ranks or torch.cuda.device_count()
    with tempfile.TemporaryDirectory() as folder:
        given = (ranks, f"{folder}/store", arguments.out, models, tokens)
        spawn(_run_rank, args=given, nprocs=ranks)


if __name__ == "__main__":
    main()
