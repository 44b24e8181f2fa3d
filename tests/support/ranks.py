"""Two ranks of a process group, a process each, and what experts spread over them must do: through
gloo on the CPU, through NCCL on two GPUs."""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import moe_truth
import pytest
import torch
import torch.distributed as dist
from forked import Child

import hybrid_mxfp8 as mx
from hybrid_mxfp8 import checkpoint
from hybrid_mxfp8.checkpoint import reader
from hybrid_mxfp8.distributed import ExpertParallelExperts, experts_of_rank

EXPERTS, HIDDEN = 7, 256
MAX_TOKENS = 16
RANKS = 2


def on_ranks(
    function: Callable[..., Any], folder: Path, device: str, *arguments: Any, timeout: float = 60
) -> list[Any]:
    """function(rank, ranks, device of the rank, *arguments) on each; what they return, or their
    tracebacks; None of one that was killed. ``timeout`` is the group's, in seconds."""
    given = (device, str(folder / "store"), timeout, function, *arguments)
    children = [Child(_rank, rank, *given, spawned=device == "cuda") for rank in range(RANKS)]
    return [child.result(timeout + 120) for child in children]


def _rank(rank: int, device: str, store: str, timeout: float, function: Callable[..., Any], *arguments: Any) -> Any:
    torch.set_num_threads(1)  # a fork's child has no pool of them
    # After a timeout NCCL's watchdog leaves its process four times this, by default a minute.
    os.environ["TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC"] = "500"
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=RANKS,
        timeout=datetime.timedelta(seconds=timeout),
    )
    result = function(rank, RANKS, device, *arguments)
    dist.destroy_process_group()
    return result


# ---------------------------------------------------------------- one layer on all ranks


def _layer(tokens: int, seed: int, device: str) -> moe_truth.Layer:
    shape = {"tokens": tokens, "experts": EXPERTS, "hidden": HIDDEN, "intermediate": 128, "top_k": 3}
    rng = torch.Generator().manual_seed(seed)
    return moe_truth.to(moe_truth.make_layer(rng, **shape, bias=True, dropped=True), device)


def check_layer(rank: int, ranks: int, device: str, backend: str, folder: str) -> bool:
    """Every dispatch, for several spreads of tokens over ranks, against the layer on one rank."""
    weights = _layer(1, 0, device)
    given = {"w13_bias": weights.w13_bias, "w2_bias": weights.w2_bias, "backend": backend}
    whole = mx.MXFP8Experts.from_weights(weights.w13, weights.w2, **given)

    def make(**option: Any) -> ExpertParallelExperts:
        return ExpertParallelExperts.from_weights(weights.w13, weights.w2, **option, **given)

    for option in ({}, {"max_tokens": MAX_TOKENS}, {"dispatch": "all_to_all"}):
        experts = make(**option)
        for tokens in ([13, 7], [0, 5], [MAX_TOKENS, 1], [4, 4]):
            batch = _layer(tokens[rank], 1 + rank, device)
            ids = batch.ids if rank else batch.ids.t().contiguous().t()
            y = experts(batch.x, ids, batch.weights)
            _compare(y, whole, batch, backend, f"{option} {tokens}")
        nobody = _layer(0, 0, device)
        assert experts(nobody.x, nobody.ids, nobody.weights).shape == (0, HIDDEN)
    _check_refusals(experts, batch)
    _check_checkpoint(Path(folder), whole, rank)
    _check_compiled(make(max_tokens=MAX_TOKENS), rank, device)
    if device == "cuda":
        _check_graph(make(max_tokens=MAX_TOKENS), whole, rank, backend)
    return True


def _compare(y: torch.Tensor, whole: mx.MXFP8Experts, batch: moe_truth.Layer, backend: str, case: str) -> None:
    """The reference's bits: each rank's part, rounded, then their sum, rounded. Kernels choose
    tiles by the number of rows, so theirs may differ from those on one rank by roundings."""
    expected = torch.zeros(batch.x.shape, device=y.device)
    for rank in range(RANKS):
        own = experts_of_rank(EXPERTS, rank, RANKS)
        ids = torch.where((batch.ids >= own.start) & (batch.ids < own.stop), batch.ids, -1)
        expected += whole(batch.x, ids, batch.weights)
    expected = expected.to(y.dtype)
    assert y.shape == expected.shape, case
    if backend == "reference":
        assert torch.equal(y, expected), case
    elif y.numel():
        assert mx.calc_diff(y, expected) < 2e-5, case
        assert mx.calc_diff(y, whole(batch.x, batch.ids, batch.weights)) < 2e-5, case


def _check_refusals(experts: ExpertParallelExperts, batch: moe_truth.Layer) -> None:
    """Before anything is sent: the group is of use afterwards."""
    own, make, few = experts.experts, ExpertParallelExperts, torch.zeros(1, 64, 32)
    seven: dict[str, Any] = {"num_experts": EXPERTS}
    x, ids, weights = batch.x, batch.ids, batch.weights
    refused: list[tuple[str, Callable[[], object]]] = [
        ("x: must have shape", lambda: experts(x[:, :32], ids, weights)),
        ("topk_weights: must have shape", lambda: experts(x, ids, weights[:, :1])),
        ("topk_ids: dtype must be", lambda: experts(x, ids.float(), weights)),
        ("x: must have at most max_tokens = 1 rows, got 4$", lambda: make(own, **seven, max_tokens=1)(x, ids, weights)),
        ("experts: must be an MXFP8Experts", lambda: make(None, **seven)),  # type: ignore[arg-type]
        ("experts: must be 10, numbers", lambda: make(own, num_experts=20)),
        ("num_experts: must be at least one for each of 2 ranks, got 1", lambda: make.from_weights(few, few)),
        ("num_experts: must be an int", lambda: make(own, num_experts=7.0)),  # type: ignore[arg-type]
        ("dispatch: must be one of", lambda: make(own, **seven, dispatch="deepep")),
        ("max_tokens: must be at least 1", lambda: make(own, **seven, max_tokens=0)),
        ("max_tokens: must be None", lambda: make(own, **seven, dispatch="all_to_all", max_tokens=4)),
        ("w2: must have w13's E = 2", lambda: make.from_weights(few.expand(2, 64, 32), few)),
        ("names: must be a pair", lambda: make.from_checkpoint("nowhere", "experts")),  # type: ignore[arg-type]
    ]
    for message, call in refused:
        with pytest.raises((TypeError, ValueError), match=f"^{message}"):
            call()


def _check_checkpoint(folder: Path, whole: mx.MXFP8Experts, rank: int) -> None:
    """A rank reads the bytes of its own experts alone."""
    file = folder / "experts.safetensors"
    if rank == 0:
        checkpoint.save_experts(file, {"w13": whole.w13q, "w2": whole.w2q})
    dist.barrier()
    with patch.object(reader, "_matrix", wraps=reader._matrix) as matrix:
        experts = ExpertParallelExperts.from_checkpoint(file, ("w13", "w2"), max_tokens=4)
    own = experts_of_rank(EXPERTS, rank, RANKS)
    assert {index for (_, _, index), _ in matrix.call_args_list} == set(own)
    assert torch.equal(experts.experts.w13_values, whole.w13_values[own.start : own.stop].cpu())
    assert torch.equal(experts.experts.w2_scales, whole.w2_scales[own.start : own.stop].cpu())


def _check_compiled(experts: ExpertParallelExperts, rank: int, device: str) -> None:
    """One graph, no break, the bits of the eager module."""
    compiled = torch.compile(experts, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    for tokens in ([13, 7], [2, 9]):
        batch = _layer(tokens[rank], 3 + rank, device)
        given = batch.x, batch.ids, batch.weights
        assert torch.equal(compiled(*given), experts(*given)), f"compiled {tokens}"


def _check_graph(experts: ExpertParallelExperts, whole: mx.MXFP8Experts, rank: int, backend: str) -> None:
    """Captured with tokens of its own on each rank, replayed with others and with other routing."""
    batch = _layer(11 + rank, 5 + rank, "cuda")
    experts(batch.x, batch.ids, batch.weights)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = experts(batch.x, batch.ids, batch.weights)
    for seed in range(3):
        other = _layer(11 + rank, 10 * seed + rank, "cuda")
        for name in ("x", "ids", "weights"):
            getattr(batch, name).copy_(getattr(other, name))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, experts(batch.x, batch.ids, batch.weights)), f"replay {seed}"
        _compare(y, whole, batch, backend, f"replay {seed}")
    graph.reset()  # NCCL waits for the graphs that hold its communicator before it lets go of it


# ---------------------------------------------------------------- a rank that fails


def fail_on_rank_1(
    rank: int, ranks: int, device: str, how: str, option: dict[str, Any], timeout: float
) -> tuple[str, float]:
    """After a good call rank 1 dies, or is refused its call and lives on: how a rank's next call
    ends, and after how many seconds."""
    weights = _layer(4, 0, device)
    experts = ExpertParallelExperts.from_weights(weights.w13, weights.w2, **option, backend="reference")
    experts(weights.x, weights.ids, weights.weights)
    dist.barrier()
    if rank == 1 and how == "dies":
        os._exit(1)
    start = time.monotonic()
    try:
        experts(weights.x, weights.ids, weights.weights if rank == 0 else weights.weights[:, :1])
        if device == "cuda":
            torch.cuda.synchronize()
    except (RuntimeError, ValueError) as error:
        if rank == 1:
            time.sleep(timeout + 5)  # in no collective, until rank 0 has given up
        return type(error).__name__, time.monotonic() - start
    return "no error", time.monotonic() - start
