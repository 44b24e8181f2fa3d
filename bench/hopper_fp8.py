"""The Hopper FP8 grouped GEMM alone, at each tile, beside the bf16 kernel, torch and DeepGEMM.

One process, one GPU, CUDA-graph replay, contenders in turns, medians. The weights of each shape
exceed the L2 cache, so inputs are rotated only where few experts are hit: 0 tokens an expert stand
for one token of 8 experts, as a layer with one token has, other ones in each of 8 sets.

    python -m bench.hopper_fp8 --shapes 0 --tokens 256,1024 --even
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import os
import statistics
from collections.abc import Callable, Sequence

import torch
import triton

import hybrid_mxfp8 as mx
from hybrid_mxfp8.dispatch.plan import Operands
from hybrid_mxfp8.dispatch.problem import GemmBuffers, Problem
from hybrid_mxfp8.triton_kernels.gemm import hopper_fp8
from hybrid_mxfp8.triton_kernels.gemm.hopper_fp8_config import HopperFp8Config, select_hopper_fp8_config

SHAPES = ((32, 4096, 7168), (8, 7168, 2048), (128, 1536, 2048))
TOKENS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048)
CONFIGS = tuple(select_hopper_fp8_config(average, 1) for average in (1, 1000))
"""Each that is ever chosen."""


def weights(e: int, n: int, k: int) -> tuple[torch.Tensor, mx.ExpertWeights]:
    w = torch.randn(e, n, k, dtype=torch.bfloat16, device="cuda") * k**-0.5
    return w, mx.quantize_weights(w, scale_group=128)


def tokens(x: torch.Tensor, counts: torch.Tensor) -> mx.GroupedMXFP8:
    return mx.quantize_grouped(x, mx.GroupLayout.from_counts(counts, x.shape[0]), scale_group=128)


def launch(x: mx.GroupedMXFP8, w: mx.ExpertWeights, y: torch.Tensor, config: HopperFp8Config) -> Callable[[], None]:
    e, n, k = w.values.shape
    g = x.groups
    given = [x.values, x.scales, g.tokens_per_expert, g.expert_offsets, g.scale_offsets, w.values, w.scales, y]
    operands = Operands()
    buffers = GemmBuffers(*[operands.add("tensor", t) for t in given], None)
    problem = Problem(e, n, k, g.num_tokens, y.dtype, y.device, scale_group=128)
    (step,) = hopper_fp8.plan(problem, buffers, config)
    return lambda: step.run(given, y.device)


def error_db(y: torch.Tensor, x: mx.GroupedMXFP8, w: mx.ExpertWeights, counts: torch.Tensor) -> float:
    """Of the first and last rows of the expert that has the most, against fp64 of the same
    operands, both rounded to y's dtype."""
    e = int(counts.argmax())
    rows = range(int(counts[:e].sum()), int(counts[: e + 1].sum()))
    some = [*rows[:4], *rows[-4:]]
    exact = x.dequantize()[some].double() @ w.dequantize()[e].double().T
    return mx.signal_to_noise_db(exact.to(y.dtype), y[some])


Calls = list[Callable[[], object]]
"""One for each input set."""


def measure(contenders: dict[str, Calls], reps: int) -> dict[str, float]:
    """µs a call: medians of graph replays, contenders in turns."""
    graphs = {}
    for name, calls in contenders.items():
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(8 // len(calls)):
                for call in calls:
                    call()
        graphs[name] = graph
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(reps):
        for name, graph in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            graph.replay()
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) * 1e3 / 8)
    return {name: statistics.median(v) for name, v in times.items()}


def deep_gemm_call(w: torch.Tensor, x: torch.Tensor, y: torch.Tensor, per: int) -> Callable[[], object] | None:
    """DeepGEMM's contiguous FP8 grouped GEMM, all scales one: time alone counts. None where it is
    not installed, or built for another torch."""
    try:
        import deep_gemm
    except (ImportError, OSError):
        return None
    e, n, k = w.shape
    fw = (w.to(torch.float8_e4m3fn), torch.ones(e, n // 128, k // 128, device="cuda"))
    fx = (x.to(torch.float8_e4m3fn), torch.ones(x.shape[0], k // 128, device="cuda"))
    index = torch.arange(e, device="cuda", dtype=torch.int32).repeat_interleave(per)
    return lambda: deep_gemm.m_grouped_fp8_gemm_nt_contiguous(fx, fw, y, index)


def counts_of(e: int, per: int, even: bool, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if per == 0:
        return torch.zeros(e, dtype=torch.int32).scatter_(0, torch.randperm(e, generator=generator)[:8], 1)
    if even:
        return torch.full((e,), per, dtype=torch.int32)
    return torch.bincount(torch.randint(0, e, (e * per,), generator=generator), minlength=e).to(torch.int32)


def case(
    w: torch.Tensor, wq: mx.ExpertWeights, per: int, even: bool, configs: Sequence[HopperFp8Config], reps: int
) -> None:
    e, n, k = w.shape
    t = e * per or 8
    counts = [counts_of(e, per, even, seed) for seed in range(1 if per else 8)]
    x = torch.randn(t, k, dtype=torch.bfloat16, device="cuda")
    xq = [tokens(x, c.cuda()) for c in counts]
    y = torch.empty(t, n, dtype=torch.bfloat16, device="cuda")
    calls: dict[str, Calls] = {}
    db: dict[str, float] = {}
    size = mx.grouped_gemm_workspace_size(wq, t)
    workspace = torch.empty(max(size, 1), dtype=torch.uint8, device="cuda")
    calls["bf16 kernel"] = [
        lambda q=q: mx.grouped_gemm(q, wq, out=y, workspace=workspace if size else None) for q in xq
    ]
    ends = [c.cumsum(0).to(torch.int32).cuda() for c in counts]
    wt = w.transpose(1, 2)
    calls["torch bf16"] = [lambda end=end: torch._grouped_mm(x, wt, offs=end) for end in ends]
    for config in configs:
        name = "{}/{} s{}".format(*dataclasses.astuple(config))
        calls[name] = [launch(q, wq, y, config) for q in xq]
    for name in calls:
        y.fill_(float("nan"))
        calls[name][0]()
        if name != "torch bf16":
            db[name] = error_db(y, xq[0], wq, counts[0])
    if per and per % 128 == 0 and even and (call := deep_gemm_call(w, x, y, per)):
        call()
        calls["DeepGEMM"] = [call]
    us = measure(calls, reps)
    base = us["bf16 kernel"]
    kind = "even" if even else "random"
    print(f"E{e} N{n} K{k} {per:5d} {kind:6s} | " + " | ".join(
        f"{name} {v:7.1f} us {base / v:4.2f}x {2e-6 * t * n * k / v:5.0f} TF {db.get(name, 0):3.0f} dB" for name, v in us.items()
    ), flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="0,1,2", help="indices into SHAPES")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--even", action="store_true", help="even counts alone")
    parser.add_argument("--configs", default="", help="Python list of HopperFp8Config argument tuples")
    parser.add_argument("--reps", type=int, default=9)
    a = parser.parse_args()
    os.environ["HYBRID_MXFP8_HOPPER_GEMM"] = "bf16"  # what mx.grouped_gemm takes; tiles are launched by themselves
    torch.manual_seed(0)
    print(torch.cuda.get_device_name(), torch.__version__, triton.__version__, flush=True)
    configs = [HopperFp8Config(*c) for c in ast.literal_eval(a.configs)] if a.configs else CONFIGS
    for i in map(int, a.shapes.split(",")):
        w, wq = weights(*SHAPES[i])
        for per in map(int, a.tokens.split(",")):
            for even in (True,) if a.even or per < 2 else (True, False):
                case(w, wq, per, even, configs, a.reps)
                torch.cuda.empty_cache()
        del w, wq
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
