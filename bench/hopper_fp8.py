"""The Hopper FP8 grouped GEMM alone, at each tile, beside the bf16 kernel, torch and DeepGEMM.

One process, one GPU, timed as the suite does. dB: the first and last rows of the expert that has
most, against fp64 of the same operands, both rounded. 0 tokens an expert stand for one token of 8
experts, as a layer with one token has.

    python -m bench.hopper_fp8 --shapes 0 --tokens 256,1024
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable

import torch
import triton

import hybrid_mxfp8 as mx
from hybrid_mxfp8.dispatch.plan import Operands
from hybrid_mxfp8.dispatch.problem import GemmBuffers, Problem
from hybrid_mxfp8.triton_kernels.gemm import hopper_fp8
from hybrid_mxfp8.triton_kernels.gemm.hopper_fp8_config import HopperFp8Config, select_hopper_fp8_config

from . import work
from .bench_grouped_gemm import Kept, Weights, in_groups, make_inputs, our_gemm
from .deep_gemm import deep_gemm
from .peers import Contender, GemmInputs, bf16_grouped_mm
from .run import why_not
from .shapes import Case
from .timing import Call, CudaDevice, measure, plan

SHAPES = ((32, 4096, 7168), (8, 7168, 2048), (128, 1536, 2048))
TOKENS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048)
CONFIGS = tuple(
    select_hopper_fp8_config(*given) for given in ((1, 1, False), (32, 1, False), (1000, 1, False), (1000, 1, True))
)
"""Each tile that is ever chosen, the widest for squares, too."""


def launch(x: mx.GroupedMXFP8, w: mx.ExpertWeights, y: torch.Tensor, config: HopperFp8Config) -> Callable[[], None]:
    """The FP8 kernel at this tile."""
    e, n, k = w.values.shape
    g = x.groups
    given = [x.values, x.scales, g.tokens_per_expert, g.expert_offsets, g.scale_offsets, w.values, w.scales, y]
    operands = Operands()
    buffers = GemmBuffers(*[operands.add("tensor", t) for t in given], None)
    problem = Problem(e, n, k, g.num_tokens, y.dtype, y.device, 128)
    (step,) = hopper_fp8.plan(problem, buffers, config)
    return lambda: step.run(given, y.device)


def error_db(inputs: GemmInputs) -> float:
    """Of set 0."""
    counts, y = inputs.counts, inputs.y[0]
    e = counts.index(max(counts))
    rows = range(sum(counts[:e]), sum(counts[: e + 1]))
    some = [*rows[:4], *rows[-4:]]
    exact = inputs.xq[0].dequantize()[some].double() @ inputs.wq[0].dequantize()[e].double().T
    return mx.signal_to_noise_db(exact.to(y.dtype), y[some])


def run(case: Case, store: Kept[Weights]) -> None:
    """Print a line."""
    plain, _ = make_inputs(case, store, torch.cuda.get_device_properties().L2_cache_size, "cuda")
    inputs = in_groups(plain, 128)
    sets = [(x, inputs.wq[i % len(inputs.wq)], y) for i, (x, y) in enumerate(zip(inputs.xq, inputs.y, strict=True))]
    calls: dict[str, Call] = {"bf16 kernel": our_gemm(inputs, "triton")}
    for config in CONFIGS:
        launches = [launch(*operands, config) for operands in sets]
        name = "{}/{} s{}{}".format(*dataclasses.astuple(config)[:3], " squares" * config.squares)
        calls[name] = lambda i, launches=launches: launches[i]()
    db = {}
    for name, call in calls.items():
        inputs.y[0].fill_(float("nan"))
        call(0)
        db[name] = f" {error_db(inputs):3.0f} dB"
    peers = [bf16_grouped_mm(plain), deep_gemm(plain, torch.cuda.get_device_capability())]
    calls |= {peer.name: peer.call for peer in peers if isinstance(peer, Contender)}
    timing_plan = plan(len(sets), work.gemm(inputs.counts, case.n, case.k), quick=True)
    cells, baseline = [case.name], float("nan")
    for name, result in measure(calls, timing_plan, CudaDevice()).items():
        if result.timing is None:
            cells.append(f"{name} failed: {result.failure}")
            continue
        us = result.timing.median_us
        baseline = us if len(cells) == 1 else baseline
        teraflops = 2e-6 * case.num_tokens * case.n * case.k / us
        cells.append(f"{name} {us:7.1f} us {baseline / us:4.2f}x {teraflops:5.0f} TF{db.get(name, '')}")
    print(" | ".join(cells), flush=True)


def integers(text: str) -> list[int]:
    """Of a list with commas."""
    return [int(part) for part in text.split(",")]


def main() -> None:
    """Every shape and number of tokens, even counts and random ones."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", type=integers, default=[*range(len(SHAPES))], help="indices into SHAPES")
    parser.add_argument("--tokens", type=integers, default=TOKENS, help="of each expert")
    args = parser.parse_args()
    if (reason := why_not()) is not None:
        sys.exit(f"Nothing was measured: {reason}.")
    os.environ["HYBRID_MXFP8_HOPPER_GEMM"] = "bf16"  # what mx.grouped_gemm takes; tiles are launched by themselves
    torch.manual_seed(0)
    print(torch.cuda.get_device_name(), torch.__version__, triton.__version__, flush=True)
    store: Kept[Weights] = Kept()
    for e, n, k in (SHAPES[i] for i in args.shapes):
        for per in args.tokens:
            for distribution in ("uniform",) if per < 2 else ("uniform", "random"):
                run(Case("gemm", "tiles", e * per or 8, n, k, e, distribution), store)


if __name__ == "__main__":
    main()
