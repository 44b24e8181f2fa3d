"""What this package offers: the triton backend, and the quantizer that every GPU uses."""

from __future__ import annotations

import torch

from hybrid_mxfp8 import env
from hybrid_mxfp8.dispatch.backend import Backend, Quantizer, Steps
from hybrid_mxfp8.dispatch.device import TRITON_MIN_CAPABILITY, capability
from hybrid_mxfp8.dispatch.problem import GemmBuffers, Problem, Support
from hybrid_mxfp8.triton_kernels import group_layout, quantize
from hybrid_mxfp8.triton_kernels.gemm import blackwell, portable
from hybrid_mxfp8.triton_kernels.gemm.hopper_config import (
    HopperGemmConfig,
    WorkspaceLayout,
    hopper_takes,
    largest_batches,
    select_hopper_config,
)
from hybrid_mxfp8.triton_kernels.gemm.hopper_fp8_config import (
    HopperFp8Config,
    hopper_fp8_takes,
    select_hopper_fp8_config,
)
from hybrid_mxfp8.triton_kernels.launch import INTERPRETED
from hybrid_mxfp8.triton_kernels.moe import combine, expert_bias, pack_tokens, route


def available(device: torch.device) -> Support:
    """Whether this package's kernels run on a device."""
    if device.type not in ("cuda", "cpu"):
        return False, f"runs on CUDA GPUs and on the CPU through Triton's interpreter, not on {device.type}"
    if torch.version.hip is not None and device.type == "cuda":
        return False, "its e4m3 and scale layouts are NVIDIA's; this is a ROCm build of PyTorch"
    if INTERPRETED:
        return True, "Triton's interpreter, on the CPU"
    found = capability(device)
    if found is None:
        return False, "no GPU: set TRITON_INTERPRET=1 before Triton is imported to run kernels on the CPU"
    text = f"{found[0]}.{found[1]}"
    if found < TRITON_MIN_CAPABILITY:
        return False, f"needs compute capability 8.9 or newer for e4m3, got {text}"
    return True, f"compute capability {text}"


def _hopper_fp8_config(problem: Problem) -> HopperFp8Config | None:
    """The tile of the Hopper FP8 kernel for a problem; None where another kernel runs it."""
    p = problem
    if INTERPRETED or p.capability != (9, 0) or p.scale_group != 128 or env.hopper_gemm() != "1":
        return None
    if not hopper_fp8_takes(p.num_tokens, p.num_experts, p.n, p.k):
        return None
    return select_hopper_fp8_config(p.num_tokens, p.num_experts, p.squares)


def _hopper_config(problem: Problem) -> HopperGemmConfig | None:
    """The tile of the Hopper bf16 kernel for a problem; None where another kernel runs it."""
    p = problem
    if INTERPRETED or p.capability != (9, 0) or env.hopper_gemm() == "0" or _hopper_fp8_config(p):
        return None
    if not hopper_takes(p.num_tokens, p.num_experts, p.n, p.k):
        return None
    return select_hopper_config(p.num_tokens, p.num_experts)


def _blackwell_config(problem: Problem) -> blackwell.BlackwellConfig | None:
    """The tile of the Blackwell kernel for a problem; None where another kernel runs it."""
    if INTERPRETED or not blackwell.takes(problem):
        return None
    return blackwell.select_blackwell_config(problem.num_tokens, problem.num_experts)


def made_for(device: torch.device) -> bool:
    """GPUs with e4m3, and the CPU where kernels are interpreted."""
    found = capability(device)
    return env.triton_interpret() or (found is not None and found >= TRITON_MIN_CAPABILITY)


def workspace_size(problem: Problem) -> int:
    """Bytes: the list of token tiles and the bf16 tokens of Hopper's bf16 kernel."""
    config = _hopper_config(problem)
    if config is None or not (problem.num_tokens and problem.num_experts):
        return 0
    return WorkspaceLayout.of(problem.num_tokens, problem.num_experts, problem.k, config).size


def workspace_bound(problem: Problem) -> int:
    """Bytes: a smaller batch may take a tile that needs more."""
    batches = largest_batches(problem.num_tokens, problem.num_experts)
    return max(workspace_size(problem._replace(num_tokens=rows)) for rows in batches)


def plan(problem: Problem, buffers: GemmBuffers) -> Steps:
    """The launches of one product. TMA reads from 16-byte boundaries, ``portable`` from any.

    Hopper's kernels are imported only where they can run: Gluon's names differ from one Triton to
    the next.
    """
    weights_aligned = buffers.w_values.aligned and buffers.w_scales.aligned
    all_aligned = weights_aligned and buffers.x_values.aligned and buffers.x_scales.aligned
    if all_aligned and (fp8 := _hopper_fp8_config(problem)):
        from hybrid_mxfp8.triton_kernels.gemm import hopper_fp8

        return hopper_fp8.plan(problem, buffers, fp8)
    if weights_aligned and (bf16 := _hopper_config(problem)):
        from hybrid_mxfp8.triton_kernels.gemm import hopper

        return hopper.plan(problem, buffers, bf16)
    if all_aligned and (scaled := _blackwell_config(problem)):
        return blackwell.plan(problem, buffers, scaled)
    return portable.plan(problem, buffers)


def explain(problem: Problem) -> str:
    """The configuration of whichever kernel takes the problem, and on Hopper why that kernel."""
    fp8, bf16 = _hopper_fp8_config(problem), _hopper_config(problem)
    config = fp8 or bf16 or _blackwell_config(problem) or portable.config_for(problem)
    average = problem.num_tokens / max(problem.num_experts, 1)
    why = ""
    if fp8:
        why = "; multiplied in FP8: four blocks share each scale"
    elif bf16 and problem.scale_group == 128:
        why = "; multiplied in bf16: HYBRID_MXFP8_HOPPER_GEMM=bf16, or too large for the FP8 kernel"
    elif bf16:
        why = "; multiplied in bf16: x or w has scale_group 32, FP8 needs 128 of both"
    elif not INTERPRETED and problem.capability == (9, 0):
        why = "; by the portable kernel: HYBRID_MXFP8_HOPPER_GEMM=0, or too large for the Hopper kernels"
    return f"{config}, for {average:.1f} tokens an expert on average{why}"


BACKEND = Backend(
    name="triton",
    made_for=made_for,
    available=available,
    can_run=lambda problem: available(problem.device),
    workspace_size=workspace_size,
    workspace_bound=workspace_bound,
    plan=plan,
    explain=explain,
)
QUANTIZER = Quantizer(
    name="triton",
    quantize=quantize.quantize,
    group_offsets=group_layout.group_offsets,
    caller_layout=group_layout.caller_layout,
    pack_tokens=pack_tokens.pack_tokens,
    route=route.route,
    route_scratch=route.scratch_elements,
    add_expert_bias=expert_bias.add_expert_bias,
    combine=combine.combine,
)
