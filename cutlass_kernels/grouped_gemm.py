"""Grouped GEMM by CUTLASS on the SM100 family: which kernel a problem gets, and its launch.

The first plan that needs a module compiles it and verifies it on the GPU, since none of capability
10.0 or 10.3 was at hand: it was run in an emulator of its PTX. A launch is one call into C++, which
starts two kernels on torch's current stream.

Whether a build works is known only once it was tried. A plan whose build fails raises, and where
auto chose the backend the call takes another; :func:`can_run` says the failure from then on.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch

from hybrid_mxfp8 import env
from hybrid_mxfp8.core.formats import MAX_INT32, padded_scale_rows, scale_cols
from hybrid_mxfp8.cutlass_kernels import verify
from hybrid_mxfp8.cutlass_kernels.config import MODULES, SM_COUNT, Estimate, GemmConfig, estimate, select_estimate
from hybrid_mxfp8.cutlass_kernels.jit import build as jit
from hybrid_mxfp8.cutlass_kernels.jit import toolchain
from hybrid_mxfp8.dispatch import device as devices
from hybrid_mxfp8.dispatch.problem import Problem, Support
from hybrid_mxfp8.errors import BackendUnavailableError

OUT_TYPES = {
    torch.bfloat16: ("bf16", "cutlass::bfloat16_t"),
    torch.float16: ("fp16", "cutlass::half_t"),
    torch.float32: ("fp32", "float"),
}
"""Output type: its name in a module's, and in C++."""

Capability = tuple[int, int]
TARGETS: dict[Capability | None, tuple[str, ...]] = {(10, 0): ("10.0a", "10.0f"), (10, 3): ("10.3a", "10.0f")}
"""What code runs on a compute capability: its own first, then its family's."""

WORKSPACE_OF_SM, WORKSPACE_OF_EXPERT = 8192, 512  # bytes: more than any module needs
NOT_RUN = "run in an emulator of its PTX, not yet on hardware; verified at first use"


def launch(
    problem: Problem,  # T, E >= 1
    x_values: torch.Tensor,  # (T, K) e4m3, rows sorted by expert
    x_scales: torch.Tensor,  # (S, C) uint8, swizzled
    tokens_per_expert: torch.Tensor,  # (E,) int32
    expert_offsets: torch.Tensor,  # (E+1,) int32
    scale_offsets: torch.Tensor,  # (E+1,) int32
    w_values: torch.Tensor,  # (E, N, K) e4m3
    w_scales: torch.Tensor,  # (E, roundup(N, 128), C) uint8, swizzled
    out: torch.Tensor,  # (T, N) bf16, fp16 or fp32, on a 16-byte boundary
    workspace: torch.Tensor,  # :func:`workspace_size` bytes on a 128-byte boundary
) -> None:
    """Write the product to ``out``. Raises as :func:`workspace_size` and as C++ checks."""
    config, module = _ready(problem)
    # e4m3 travels as bytes: not every torch exports it through DLPack.
    x_bytes, w_bytes = x_values.view(torch.uint8), w_values.view(torch.uint8)
    offsets = tokens_per_expert, expert_offsets, scale_offsets
    how = *config.cluster, _sm_count(problem.device), env.pdl()
    module.grouped_gemm(x_bytes, x_scales, w_bytes, w_scales, *offsets, out, workspace, *how)


def nothing_to_compute(p: Problem) -> bool:
    """Whether the result has no elements."""
    return p.num_experts == 0 or p.num_tokens == 0


def workspace_size(p: Problem) -> int:
    """Exact bytes of ``workspace``, from the module, compiled if need be. BackendUnavailableError
    where that fails or the module computes something wrong: :func:`can_run` then says no."""
    if nothing_to_compute(p):
        return 0
    _, module = _ready(p)
    return int(module.workspace_size(p.num_experts, p.n, p.k, p.num_tokens, _sm_count(p.device)))


def workspace_bound(p: Problem) -> int:
    """Bytes that suffice for every call of up to as many rows, without compiling: TMA descriptors
    for each SM, and pointers, strides and layouts for each expert."""
    return 0 if nothing_to_compute(p) else WORKSPACE_OF_SM * _sm_count(p.device) + WORKSPACE_OF_EXPERT * p.num_experts


def availability(capability: Capability | None) -> Support:
    """Whether the backend runs on a compute capability (None: no GPU) with the tools there are.
    Tools are looked for once in each :data:`Environment`. A build that failed before any module
    was loaded counts as a missing tool: the next would fail alike."""
    if capability is None:
        return False, "needs a GPU of compute capability 10.0 or 10.3"
    if capability not in TARGETS:
        other = ", whose tensor cores take other instructions" if capability[0] == 12 else ""
        got = f"{capability[0]}.{capability[1]}{other}"
        return False, f"needs compute capability 10.0 or 10.3, got {got}: use the triton backend"
    failed = _failed_builds(capability)
    if failed and not any(loaded[2] == capability for loaded in _modules):
        return False, next(iter(failed.values()))
    return _find_tools(capability, _environment())


def can_run(problem: Problem) -> Support:
    """Whether the backend takes the problem. A module not tried yet counts as there."""
    ok, reason = availability(problem.capability)
    if ok:
        ok, reason = takes(problem.n, problem.k, problem.out_dtype)
    failed = _failed_builds(problem.capability) if ok else {}
    if failed and not nothing_to_compute(problem):
        module = _choose(problem)[0].config.module, problem.out_dtype
        if module in failed:
            return False, failed[module]
    return ok, reason


def takes(n: int, k: int, out_dtype: torch.dtype) -> Support:
    """Whether the kernel takes matrices of this shape, as TMA and 32-bit layouts allow."""
    if out_dtype not in OUT_TYPES:
        return False, f"out_dtype: expected bf16, fp16 or fp32, got {out_dtype}"
    multiple = 16 // out_dtype.itemsize
    if n <= 0 or n % multiple:
        return False, f"w: N must be a positive multiple of {multiple} for {out_dtype}, got {n}"
    if k <= 0 or k % 32:
        return False, f"x: K must be a positive multiple of 32, got {k}"
    for what, size in (("weights", n * k), ("scales", padded_scale_rows(n) * scale_cols(k))):
        if size > MAX_INT32:
            return False, f"w: the {what} of one expert must be below 2 GiB, got N = {n}, K = {k}"
    return True, NOT_RUN


def explain(problem: Problem) -> str:
    """The configuration that a call would use, and why."""
    if nothing_to_compute(problem):
        return "nothing to compute, nothing is launched"
    chosen, forced = _choose(problem)
    said = f"{chosen}{', forced by HYBRID_MXFP8_CONFIG' if forced else ''} ({NOT_RUN})"
    try:
        return "; ".join(filter(None, (said, toolchain.find_cutlass().hint)))
    except BackendUnavailableError:  # the module was built elsewhere
        return said


def source(module: str, out_dtype: torch.dtype, arch: str) -> jit.Source:
    """What is compiled for a :attr:`GemmConfig.module`, an output type and a target (``10.0a``)."""
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


def forced_config() -> GemmConfig | None:
    """The configuration that HYBRID_MXFP8_CONFIG names, if any; ValueError for no such name."""
    try:
        return GemmConfig.parse(name) if (name := env.config()) else None
    except ValueError as error:
        raise ValueError(f"HYBRID_MXFP8_CONFIG: {error}") from None


def _choose(p: Problem) -> tuple[Estimate, bool]:
    """The configuration, and whether HYBRID_MXFP8_CONFIG forced it."""
    shape = (p.num_experts, p.n, p.k, p.num_tokens, _sm_count(p.device), p.out_dtype.itemsize)
    forced = forced_config()
    return (estimate(forced, *shape), True) if forced else (select_estimate(*shape), False)


def _ready(p: Problem) -> tuple[GemmConfig, Any]:
    """The configuration, and its module (tvm-ffi's), built and verified if need be."""
    config = _choose(p)[0].config
    module = _module(config.module, p.out_dtype, p.capability)
    _check_verified(config.module, p.out_dtype, p.device)
    return config, module


def _sm_count(device: torch.device) -> int:
    return devices.multiprocessors(device) or SM_COUNT


Environment = tuple[Path | None, tuple[str, Path] | None, Path, bool, tuple[Path, ...]]

_modules: dict[tuple[str, torch.dtype, Capability | None], Any] = {}
"""The loaded modules, by :attr:`GemmConfig.module` and output type."""

_verified: set[tuple[str, torch.dtype, torch.device]] = set()  # found right on a GPU
_failures: dict[tuple[Capability | None, Environment], dict[tuple[str, torch.dtype], str]] = {}
"""Why a module could not be built or loaded, or was found wrong."""


def _environment() -> Environment:
    """The variables that decide what is found and where modules are kept."""
    return env.cutlass_dir(), env.cuda_home(), env.cache_dir(), env.trust_cache(), tuple(env.search_path())


def _failed_builds(capability: Capability | None) -> dict[tuple[str, torch.dtype], str]:
    # The environment takes longer to read than a launch.
    return _failures.get((capability, _environment()), {}) if _failures else {}


def _module(module: str, out_dtype: torch.dtype, capability: Capability | None) -> Any:
    """The module, the capability's or its family's; built now if neither is there."""
    key = module, out_dtype, capability
    if key not in _modules:
        missing = _source(*key)
        try:
            _modules[key] = jit.load(missing)
        except BackendUnavailableError as error:
            raise _failed(*key, str(error)) from error
    return _modules[key]


def _check_verified(module: str, out_dtype: torch.dtype, device: torch.device) -> None:
    """Check that the module was verified on this GPU; verify it now if need be."""
    if (module, out_dtype, device) in _verified or not env.verify():
        return
    key = module, out_dtype, devices.capability(device)
    built = jit.build(_source(*key))
    if verify.find(built, device) is None and torch.cuda.is_current_stream_capturing():
        raise BackendUnavailableError(
            f"{module} was not verified on this GPU yet, and while a stream is captured nothing is: call once before, "
            "or run python -m hybrid_mxfp8 warmup"
        )
    record = verify.verified(built, device)
    if not record["ok"]:
        raise _failed(*key, f"{module} failed its verification on {device}: {record['reason']}")
    _verified.add((module, out_dtype, device))


def _source(module: str, out_dtype: torch.dtype, capability: Capability | None) -> jit.Source:
    """The source for a target that is built, the capability's own first; for its own if none is.
    BackendUnavailableError if it failed before."""
    if why := _failed_builds(capability).get((module, out_dtype)):
        raise BackendUnavailableError(why)
    sources = [source(module, out_dtype, arch) for arch in TARGETS[capability]]
    return next((s for s in sources if jit.find(s) is not None), sources[0])


def _failed(module: str, out_dtype: torch.dtype, capability: Capability | None, why: str) -> BackendUnavailableError:
    _failures.setdefault((capability, _environment()), {})[module, out_dtype] = why
    return BackendUnavailableError(
        f"{why}; this process will not try again in this environment: the next call without a named backend uses another"
    )


@functools.lru_cache(maxsize=64)
def _find_tools(capability: Capability, environment: Environment) -> Support:
    targets = TARGETS[capability]
    try:
        jit.check_cache()
    except BackendUnavailableError as error:
        return False, str(error)
    try:
        cutlass, cuda = toolchain.find_for(targets[0])
    except BackendUnavailableError as error:
        sources = (source(m, d, arch) for m in MODULES for d in OUT_TYPES for arch in targets)
        if any(jit.built_elsewhere(s) is not None for s in sources):
            return True, f"modules that were built elsewhere, {NOT_RUN}"
        return False, str(error)
    mainloop = "ragged" if cutlass.ragged else "pointer-array"
    said = f"CUTLASS {cutlass.version_string} ({mainloop} mainloop), nvcc {cuda.version_string}, {NOT_RUN}"
    return True, "; ".join(filter(None, (said, cutlass.hint)))
