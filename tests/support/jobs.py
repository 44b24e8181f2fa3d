"""All public functions on data of a seed, for tests that run them beside one another."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import cases
import moe_truth
import torch

import hybrid_mxfp8 as mx


def job(seed: int, backend: str) -> list[bytes]:
    """All public functions on data of this seed: their bytes."""
    rng = torch.Generator().manual_seed(seed)
    x = cases.random_rows(6 + seed, 96, torch.bfloat16, rng)
    counts = [4, 2 + seed]
    out = cases.poisoned_output(cases.layout(counts), 96)
    xq = mx.quantize_grouped(x, torch.tensor(counts), out=out, backend=backend)
    wq = mx.quantize_weights(torch.randn(2, 24, 96, generator=rng), backend=backend)
    y = mx.grouped_gemm(xq, wq, out_dtype=torch.float32, backend=backend)
    layer = moe_truth.make_layer(rng, tokens=2 + seed, experts=3, hidden=32)
    w13q, w2q = (mx.quantize_weights(each, backend="reference") for each in (layer.w13, layer.w2))
    z = mx.moe_forward(layer.x, w13q, w2q, layer.ids, layer.weights, backend=backend)
    return [cases.bits(t).numpy().tobytes() for t in (xq.values, xq.scales, wq.values, wq.scales, y, z)]


def together(threads: int, work: Callable[[int], Any]) -> list[Any]:
    """work(0), work(1), ... on a thread each, started at once; raises what the first raised."""
    barrier = threading.Barrier(threads)

    def start(i: int) -> Any:
        barrier.wait(timeout=60)
        return work(i)

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(start, range(threads), timeout=300))


def forget_everything() -> None:
    """As in a new process: no backend probed, no configuration chosen, no call known."""
    cases.forget_calls()
    for name, module in list(sys.modules.items()):
        if name.startswith("hybrid_mxfp8"):
            for value in list(vars(module).values()):
                if isinstance(value, functools._lru_cache_wrapper):
                    value.cache_clear()


class Quantized(torch.utils.data.Dataset[mx.GroupedMXFP8]):
    """Batches that are quantized where they are loaded."""

    def __init__(self, backend: str) -> None:
        self.backend = backend

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> mx.GroupedMXFP8:
        rng = torch.Generator().manual_seed(index)
        x = cases.random_rows(20 + index, 96, torch.bfloat16, rng)
        out = cases.poisoned_output(cases.layout([20, index]), 96)
        return mx.quantize_grouped(x, out.groups, out=out, backend=self.backend)
