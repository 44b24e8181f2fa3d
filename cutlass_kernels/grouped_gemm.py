"""Launcher of the CUTLASS SM100 grouped GEMM.

A call looks up its plan by shape: the compiled module's function, the configuration and the size of the workspace.
The first call of a shape chooses a configuration and, if nobody has yet, compiles its module. Later ones do one
dictionary look-up, at most one allocation and one call into C++, and launch two kernels on torch's current stream.

Whether a build works is known only once it has been tried. So the call whose build fails raises, even one where the
backend was chosen automatically; the failure is remembered, and later choices pass the backend over.

Compiled and checked, not yet run: no GPU of compute capability 10.0 or 10.3 was at hand.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hybrid_mxfp8 import env
from hybrid_mxfp8.core.formats import MAX_INT32, padded_scale_rows, scale_cols
from hybrid_mxfp8.core.operands import ExpertWeights, GroupedMXFP8
from hybrid_mxfp8.cutlass_kernels.config import (
    CUTLASS_CAPABILITIES,
    MODULES,
    SM_COUNT,
    Estimate,
    GemmConfig,
    estimate,
    select_estimate,
)
from hybrid_mxfp8.cutlass_kernels.jit import build as jit
from hybrid_mxfp8.errors import BackendUnavailableError

if TYPE_CHECKING:
    from hybrid_mxfp8.dispatch.problem import Problem

OUT_TYPES = {
    torch.bfloat16: ("bf16", "cutlass::bfloat16_t"),
    torch.float16: ("fp16", "cutlass::half_t"),
    torch.float32: ("fp32", "float"),
}
"""Output type: its name in a module's, and in C++."""

WORKSPACE_OF_SM, WORKSPACE_OF_EXPERT = 8192, 512
"""More bytes than any module needs, alignment included: tests/codegen asks each of them."""

NOT_RUN = "compiled and checked, not yet run on hardware"


def grouped_gemm(xq: GroupedMXFP8, wq: ExpertWeights, out: torch.Tensor, workspace: torch.Tensor | None) -> None:
    """Write the product of each expert's rows with its weights to ``out``.

    Args:
        xq: T tokens of K elements, sorted by expert.
        wq: E experts of (N, K).
        out: (T, N) bf16, fp16 or fp32, contiguous, on a 16-byte boundary; rows that no expert owns are not written.
        workspace: uint8, at least :func:`workspace_size` bytes, on a 128-byte boundary; None allocates it.

    Raises:
        BackendUnavailableError: the module cannot be compiled or loaded. It is not tried again in this environment:
            from then on :func:`can_run` says no.
        ValueError, TypeError: operands that do not fit; the launch checks them again in C++.
    """
    groups = xq.groups
    num_experts, n, k = wq.values.shape
    if num_experts == 0 or groups.num_tokens == 0:
        return
    plan = _plan(num_experts, n, k, groups.num_tokens, out.dtype, out.device, env.config())
    if workspace is None:
        workspace = torch.empty(plan.workspace_bytes, dtype=torch.uint8, device=out.device)
    # e4m3 travels as bytes: not every torch exports it through DLPack.
    plan.launch(
        xq.values.view(torch.uint8),
        xq.scales,
        wq.values.view(torch.uint8),
        wq.scales,
        groups.tokens_per_expert,
        groups.expert_offsets,
        groups.scale_offsets,
        out,
        workspace,
        *plan.cluster,
        plan.sm_count,
        env.pdl(),
    )


def workspace_size(
    num_experts: int, n: int, k: int, num_tokens: int, out_dtype: torch.dtype, device: torch.device
) -> int:
    """Exact bytes of ``workspace``; compiles the module if nobody has yet.

    Raises:
        BackendUnavailableError: as :func:`grouped_gemm`.
    """
    if num_experts == 0 or num_tokens == 0:
        return 0
    return _plan(num_experts, n, k, num_tokens, out_dtype, device, env.config()).workspace_bytes


def workspace_bound(num_experts: int, num_tokens: int, device: torch.device) -> int:
    """Bytes that suffice for every call of up to ``num_tokens`` rows, whichever modules they take; compiles none.

    A module needs TMA descriptors for each SM, as many as its pipelines have stages, and pointers, strides and layouts for
    each expert. The number of rows only decides on the module.
    """
    if num_experts == 0 or num_tokens == 0:
        return 0
    return WORKSPACE_OF_SM * _sm_count(device) + WORKSPACE_OF_EXPERT * num_experts


def availability(capability: tuple[int, int] | None) -> tuple[bool, str]:
    """Whether the backend runs on a device, and why or why not: the GPU, and headers and compiler or built modules.

    Tools that were found are not looked for again in this process. Missing ones are once a variable changes that says
    where to look (HYBRID_MXFP8_CUTLASS_DIR, HYBRID_MXFP8_CACHE_DIR, CUDA_HOME, PATH). A build that failed before any
    module was loaded counts as a missing tool: the next would fail alike.

    Args:
        capability: the device's compute capability; None if it is no GPU.
    """
    if capability is None:
        return False, "needs a GPU of compute capability 10.0 or 10.3"
    if capability in _tools:
        failed = _failed_builds(capability) if capability not in _loaded else {}
        return (False, next(iter(failed.values()))) if failed else (True, _tools[capability])
    if capability not in CUTLASS_CAPABILITIES:
        text = f"{capability[0]}.{capability[1]}"
        if capability[0] == 12:
            text += ", whose tensor cores take other instructions"
        return False, f"needs compute capability 10.0 or 10.3, got {text}: use the triton backend"
    place = capability, _environment()
    if place in _missing:
        return False, _missing[place]
    ok, said = _find_tools(capability)
    if ok:
        _tools[capability] = said
    else:
        _missing[place] = said
    return ok, said


def can_run(problem: Problem) -> tuple[bool, str]:
    """Whether the backend runs on the problem's device, takes its shape and has a module for it, and why or why not.

    A module that was not tried yet counts as there; one that failed to build or load does not.
    """
    ok, reason = availability(problem.capability)
    if ok:
        ok, reason = takes(problem.n, problem.k, problem.out_dtype)
    failed = _failed_builds(problem.capability) if ok else {}
    if failed and problem.num_experts and problem.num_tokens:
        module = _choose_for(problem)[0].config.module, problem.out_dtype
        if module in failed:
            return False, failed[module]
    return ok, reason


def takes(n: int, k: int, out_dtype: torch.dtype) -> tuple[bool, str]:
    """Whether the kernel takes matrices of this shape: what TMA descriptors and 32-bit layouts ask for."""
    if out_dtype not in OUT_TYPES:
        return False, f"out_dtype: expected bf16, fp16 or fp32, got {out_dtype}"
    multiple = 16 // out_dtype.itemsize
    if n <= 0 or n % multiple:
        return False, f"w: N must be a positive multiple of {multiple} for {out_dtype}, got {n}"
    if k <= 0 or k % 32:
        return False, f"x: K must be a positive multiple of 32, got {k}"
    if n * k > MAX_INT32:
        return False, f"w: the weights of one expert must be below 2 GiB, got N = {n}, K = {k}"
    if padded_scale_rows(n) * scale_cols(k) > MAX_INT32:
        return False, f"w: the scales of one expert must be below 2 GiB, got N = {n}, K = {k}"
    return True, NOT_RUN


def explain(problem: Problem) -> str:
    """The configuration that a call would use, and why."""
    if problem.num_experts == 0 or problem.num_tokens == 0:
        return "nothing to compute, nothing is launched"
    chosen, forced = _choose_for(problem)
    return f"{chosen}" + (", forced by HYBRID_MXFP8_CONFIG" if forced else "") + f" ({NOT_RUN})"


def source(module: str, out_dtype: torch.dtype, arch: str) -> jit.Source:
    """What is compiled for a configuration's :attr:`GemmConfig.module`, an output type and a target like ``10.0a``."""
    config = GemmConfig.parse(module)
    short, element = OUT_TYPES[out_dtype]
    return jit.Source(
        name=f"grouped_gemm_{module}_{short}_sm{arch.replace('.', '')}",
        file=jit.CSRC / "grouped_gemm_sm100.cu",
        arch=arch,
        definitions=(
            ("HYBRID_MXFP8_CTA_GROUP", str(config.cta_group)),
            ("HYBRID_MXFP8_TOKEN_TILE", str(config.token_tile)),
            ("HYBRID_MXFP8_OUT", element),
            ("CUTLASS_ENABLE_GDC_FOR_SM100", "1"),  # griddepcontrol, for programmatic dependent launch
        ),
    )


# ---------------------------------------------------------------- plans


@dataclass(frozen=True)
class Plan:
    """All that a call of one shape needs to know."""

    launch: Callable[..., Any]
    cluster: tuple[int, int]
    sm_count: int
    workspace_bytes: int


@functools.lru_cache(maxsize=16384)
def _plan(
    num_experts: int, n: int, k: int, num_tokens: int, out_dtype: torch.dtype, device: torch.device, forced: str | None
) -> Plan:
    chosen, _ = _choose(num_experts, n, k, num_tokens, out_dtype, device, forced)
    module = _module(chosen.config.module, out_dtype, _capability(device))
    sm_count = _sm_count(device)
    return Plan(
        launch=module.grouped_gemm,
        cluster=chosen.config.cluster,
        sm_count=sm_count,
        workspace_bytes=module.workspace_size(num_experts, n, k, num_tokens, sm_count),
    )


def _choose(
    num_experts: int, n: int, k: int, num_tokens: int, out_dtype: torch.dtype, device: torch.device, forced: str | None
) -> tuple[Estimate, bool]:
    shape = (num_experts, n, k, num_tokens, _sm_count(device), out_dtype.itemsize)
    if forced is None:
        return select_estimate(*shape), False
    try:
        config = GemmConfig.parse(forced)
    except ValueError as error:
        raise ValueError(f"HYBRID_MXFP8_CONFIG: {error}") from None
    return estimate(config, *shape), True


def _choose_for(problem: Problem) -> tuple[Estimate, bool]:
    return _choose(
        problem.num_experts, problem.n, problem.k, problem.num_tokens, problem.out_dtype, problem.device, env.config()
    )


@functools.cache
def _module(module: str, out_dtype: torch.dtype, capability: tuple[int, int]) -> Any:
    """The compiled module: one that is built for the capability or its family, else built now, unless that failed."""
    failed = _failed_builds(capability)
    if (module, out_dtype) in failed:
        raise BackendUnavailableError(failed[module, out_dtype])
    sources = [source(module, out_dtype, arch) for arch in _targets(capability)]
    try:
        loaded = jit.load(next((s for s in sources if jit.find(s) is not None), sources[0]))
    except BackendUnavailableError as error:
        _failures.setdefault((capability, _environment()), {})[module, out_dtype] = str(error)
        raise BackendUnavailableError(
            f"{error}; this process will not try again in this environment: the next call without a named backend "
            "uses another"
        ) from error
    _loaded.add(capability)
    return loaded


# ---------------------------------------------------------------- what was found, and what failed

Capability = tuple[int, int]
Environment = tuple[Path | None, Path | None, Path, bool, tuple[Path, ...]]

_tools: dict[Capability, str] = {}
"""What modules are compiled with, or come from."""

_missing: dict[tuple[Capability, Environment], str] = {}
"""Why there are no tools."""

_loaded: set[Capability] = set()
"""Where at least one module was loaded."""

_failures: dict[tuple[Capability, Environment], dict[tuple[str, torch.dtype], str]] = {}
"""Why a configuration's module for an output type could not be built or loaded."""


def _environment() -> Environment:
    """The variables that decide what is found and where modules are kept: with another value, all is tried anew."""
    return env.cutlass_dir(), env.cuda_home(), env.cache_dir(), env.trust_cache(), tuple(env.search_path())


def _failed_builds(capability: Capability | None) -> dict[tuple[str, torch.dtype], str]:
    if not _failures or capability is None:  # the environment takes longer to read than a launch
        return {}
    return _failures.get((capability, _environment()), {})


def _targets(capability: Capability) -> tuple[str, ...]:
    return jit.FAMILY[f"{capability[0]}.{capability[1]}"]


def _find_tools(capability: Capability) -> tuple[bool, str]:
    targets = _targets(capability)
    try:
        jit.check_cache()
    except BackendUnavailableError as error:
        return False, str(error)
    try:
        cutlass, cuda = jit.toolchain(targets[0])
    except BackendUnavailableError as error:
        sources = (source(m, d, arch) for m in MODULES for d in OUT_TYPES for arch in targets)
        if next(jit.carried(sources), None) is not None:
            return True, f"modules that were built elsewhere, {NOT_RUN}"
        return False, str(error)
    mainloop = "ragged" if cutlass.ragged else "pointer-array"
    return True, f"CUTLASS {cutlass.version_string} ({mainloop} mainloop), nvcc {cuda.version_string}, {NOT_RUN}"


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@functools.cache
def _sm_count(device: torch.device) -> int:
    if device.type != "cuda":
        return SM_COUNT
    return torch.cuda.get_device_properties(device).multi_processor_count
