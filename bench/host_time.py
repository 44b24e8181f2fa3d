"""Host time of eager calls on a GPU, as multiples of ``x.add_(0)`` in the same process.

    python -m bench.host_time        # prints JSON; medians of several processes go to results/

A loop is so short that the queue of launches never fills: else the host would wait for the GPU.
Small shapes: E 16, N and K 256, T 16; the layer is Qwen3-30B-A3B's with 16 tokens. "Never seen" is
one call for each of 100 numbers of tokens, whose tensors are there before.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import triton

import hybrid_mxfp8 as mx

from .run import why_not

CALLS, ROUNDS = 60, 25
NEW = range(17, 117)
"""Numbers of tokens that no call before has had; WARM are as new, and come first, untimed."""
WARM = range(150, 153)


class HostTime(NamedTuple):
    """Of one call, medians."""

    us: float
    multiple: float  # of ``x.add_(0)`` in the rounds between, since a host's clock drifts


def a_call(call: Callable[[], object]) -> float:
    """Seconds of one of CALLS, which find the queue of launches empty."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - start) / CALLS


def host_time(times: Sequence[float], adds: Sequence[float]) -> HostTime:
    median = statistics.median(times)
    return HostTime(median * 1e6, median / statistics.median(adds))


def seen(add: Callable[[], object], call: Callable[[], object]) -> HostTime:
    """Of a call that comes again and again."""
    rounds = [(a_call(call), a_call(add)) for _ in range(1 + ROUNDS)]
    times, adds = zip(*rounds[1:], strict=True)
    return host_time(times, adds)


def never_seen(add: Callable[[], object], call: Callable[..., object], cases: Sequence[tuple[object, ...]]) -> HostTime:
    """Of a call whose sizes are new each time; the first of WARM are not timed."""
    times, adds = [], []
    for i, arguments in enumerate(cases):
        if i % 10 == 0:
            adds.append(a_call(add))
            torch.cuda.synchronize()
        start = time.perf_counter()
        call(*arguments)
        times.append(time.perf_counter() - start)
    return host_time(times[len(WARM) :], adds)


def small_calls(add: Callable[[], object]) -> dict[str, HostTime]:
    e, n, k, t = 16, 256, 256, 16
    counts = torch.ones(e, dtype=torch.int32, device="cuda")
    groups = mx.GroupLayout.from_counts(counts, t)
    x = torch.randn(max(*NEW, *WARM), k, dtype=torch.bfloat16, device="cuda")
    w = torch.randn(e, n, k, dtype=torch.bfloat16, device="cuda")
    wq, xq = mx.quantize_weights(w), mx.quantize_grouped(x[:t], groups)
    out = torch.empty(t, n, dtype=torch.bfloat16, device="cuda")
    workspace = torch.empty(mx.grouped_gemm_workspace_size(wq, t), dtype=torch.uint8, device="cuda")
    few, ends = x[:t].clone(), counts.cumsum(0, dtype=torch.int32)
    return {
        "quantize_grouped, out given": seen(add, lambda: mx.quantize_grouped(few, groups, out=xq)),
        "quantize_grouped, nothing given": seen(add, lambda: mx.quantize_grouped(few, groups)),
        "quantize_grouped of counts": seen(add, lambda: mx.quantize_grouped(few, counts)),
        "grouped_gemm, out and workspace given": seen(
            add, lambda: mx.grouped_gemm(xq, wq, out=out, workspace=workspace)
        ),
        "grouped_gemm, nothing given": seen(add, lambda: mx.grouped_gemm(xq, wq)),
        "torch's _grouped_mm": seen(add, lambda: torch._grouped_mm(few, w.mT, offs=ends)),
        "layout and quantize_grouped, T never seen": never_seen(
            add,
            lambda rows: mx.quantize_grouped(rows, mx.GroupLayout.from_counts(counts, rows.shape[0])),
            [(x[:rows],) for rows in (*WARM, *NEW)],
        ),
    }


def layer_calls(add: Callable[[], object]) -> dict[str, HostTime]:
    e, hidden, intermediate, top_k, m = 128, 2048, 768, 8, 16
    w13 = torch.randn(e, 2 * intermediate, hidden, dtype=torch.bfloat16, device="cuda") * hidden**-0.5
    w2 = torch.randn(e, hidden, intermediate, dtype=torch.bfloat16, device="cuda") * intermediate**-0.5
    weights = mx.quantize_weights(w13), mx.quantize_weights(w2)
    most = max(*NEW, *WARM)
    x = torch.randn(most, hidden, dtype=torch.bfloat16, device="cuda")
    ids = torch.rand(most, e, device="cuda").topk(top_k, dim=1).indices
    scores = torch.rand(most, top_k, device="cuda")
    few = x[:m].clone(), *weights, ids[:m].clone(), scores[:m].clone()
    out, workspace = torch.empty_like(few[0]), mx.MoEWorkspace(*weights, max_tokens=m, top_k=top_k)
    return {
        "moe_forward, out and workspace given": seen(add, lambda: mx.moe_forward(*few, workspace=workspace, out=out)),
        "moe_forward, nothing given": seen(add, lambda: mx.moe_forward(*few)),
        "moe_forward, M never seen": never_seen(
            add, mx.moe_forward, [(x[:rows], *weights, ids[:rows], scores[:rows]) for rows in (*WARM, *NEW)]
        ),
    }


def main() -> None:
    """Print µs and multiples of each call."""
    if (reason := why_not()) is not None:
        sys.exit(f"Nothing was measured: {reason}.")
    small = torch.zeros(4096, device="cuda")

    def add() -> object:
        return small.add_(0)

    times = {"x.add_(0)": seen(add, add), **small_calls(add), **layer_calls(add)}
    result = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "us": {name: round(time.us, 1) for name, time in times.items()},
        "multiples": {name: round(time.multiple, 2) for name, time in times.items()},
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
