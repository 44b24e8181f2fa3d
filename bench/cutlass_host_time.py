"""Host time of a CUTLASS grouped GEMM call, on any GPU of compute capability 9.0.

    python bench/cutlass_host_time.py

The call is the real one up to the launch of the SM100 kernel, which another GPU cannot take:
Python launcher, checks, arguments, launch of the prepare kernel and encoding of descriptors. Add
about 3 µs for the launch that is missing.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch

import hybrid_mxfp8 as mx
from hybrid_mxfp8.cutlass_kernels import grouped_gemm as launcher
from hybrid_mxfp8.cutlass_kernels.jit import build as jit
from hybrid_mxfp8.dispatch.problem import Problem

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "support"))

import cutlass_modules

CALLS, BATCHES = 200, 50


def main() -> None:
    """Print the median and best time of a call."""
    walker = jit.load(cutlass_modules.argument_walker())
    stand_in = SimpleNamespace(
        grouped_gemm=walker.everything_but_the_gemm,
        workspace_size=lambda num_experts, n, k, num_tokens, sm_count: walker.timed_workspace_size(
            num_experts, n, k, num_tokens
        ),
    )
    launcher._module = lambda module, out_dtype, capability: stand_in
    launcher._check_verified = lambda module, out_dtype, device: None  # nothing here could verify it
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, tvm-ffi module {cutlass_modules.GPU_ARCH}")
    for num_experts, n, k, num_tokens in ((32, 4096, 7168, 64), (256, 2048, 512, 1024)):
        counts = torch.full((num_experts,), num_tokens // num_experts, dtype=torch.int32, device="cuda")
        groups = mx.GroupLayout.from_counts(counts, num_tokens)
        x = mx.quantize_grouped(torch.randn(num_tokens, k, device="cuda"), groups)
        w = mx.quantize_weights(torch.randn(num_experts, n, k, device="cuda", dtype=torch.bfloat16))
        out = torch.empty(num_tokens, n, dtype=torch.bfloat16, device="cuda")
        problem = Problem(num_experts, n, k, num_tokens, out.dtype, out.device)
        offsets = groups.tokens_per_expert, groups.expert_offsets, groups.scale_offsets
        workspace = torch.empty(launcher.workspace_size(problem), dtype=torch.uint8, device="cuda")
        times = []
        for _ in range(BATCHES):
            start = time.perf_counter()
            for _ in range(CALLS):
                launcher.launch(problem, x.values, x.scales, *offsets, w.values, w.scales, out, workspace)
            times.append((time.perf_counter() - start) / CALLS * 1e6)
            torch.cuda.synchronize()
        times.sort()
        print(f"E {num_experts}, N {n}, K {k}, T {num_tokens}: {times[BATCHES // 2]:.1f} us, best {times[0]:.1f}")


if __name__ == "__main__":
    main()
