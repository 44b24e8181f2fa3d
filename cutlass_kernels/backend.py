"""What this package offers: the cutlass backend. It has no quantizer; on its GPUs the triton package's runs.

May import: ``errors``, ``env``, ``core``, ``reference``, ``dispatch``.
"""

from __future__ import annotations

import torch

from hybrid_mxfp8.cutlass_kernels import grouped_gemm
from hybrid_mxfp8.dispatch.backend import Call, Steps
from hybrid_mxfp8.dispatch.device import CUTLASS_CAPABILITIES, capability
from hybrid_mxfp8.dispatch.problem import GemmBuffers, Problem, Support


class CutlassBackend:
    """The SM100 block-scaled kernel: compiled and checked, not yet run on hardware."""

    name = "cutlass"
    about = "CUTLASS SM100 block-scaled kernel, compiled just in time; not yet run on hardware"

    def made_for(self, device: torch.device) -> bool:
        """Compute capability 10.0 and 10.3."""
        return capability(device) in CUTLASS_CAPABILITIES

    def available(self, device: torch.device) -> Support:
        """A GPU that it is made for, with headers and a compiler, or with built modules."""
        return grouped_gemm.availability(capability(device))

    def can_run(self, problem: Problem) -> Support:
        """Available, a shape that it takes, and no module that failed to build."""
        return grouped_gemm.can_run(problem)

    def workspace_size(self, problem: Problem) -> int:
        """Exact bytes; compiles the module if nobody has yet."""
        p = problem
        return grouped_gemm.workspace_size(p.num_experts, p.n, p.k, p.num_tokens, p.out_dtype, p.device)

    def workspace_bound(self, problem: Problem) -> int:
        """Bytes that suffice whichever modules are taken; compiles none."""
        return grouped_gemm.workspace_bound(problem.num_experts, problem.num_tokens, problem.device)

    def plan(self, problem: Problem, buffers: GemmBuffers) -> Steps:
        """One call of the module, which launches two kernels."""
        return (Call(grouped_gemm.grouped_gemm, tuple(buffers)),)

    def explain(self, problem: Problem) -> str:
        """The configuration and why."""
        return grouped_gemm.explain(problem)


BACKEND = CutlassBackend()
