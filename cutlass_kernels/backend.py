"""What this package offers: the cutlass backend. Its GPUs take the triton package's quantizer."""

from __future__ import annotations

from hybrid_mxfp8.cutlass_kernels import grouped_gemm
from hybrid_mxfp8.dispatch.backend import Backend, Call
from hybrid_mxfp8.dispatch.device import SM100_CAPABILITIES, capability

BACKEND = Backend(
    name="cutlass",
    made_for=lambda device: capability(device) in SM100_CAPABILITIES,
    available=lambda device: grouped_gemm.availability(capability(device)),
    can_run=grouped_gemm.can_run,
    workspace_size=grouped_gemm.workspace_size,
    workspace_bound=grouped_gemm.workspace_bound,
    plan=lambda problem, buffers: (Call(grouped_gemm.launch, (problem, *buffers)),),
    explain=grouped_gemm.explain,
)
