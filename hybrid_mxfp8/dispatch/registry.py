"""The table of backends, and the choice among them.

``backend=`` beats ``use_backend()`` beats ``HYBRID_MXFP8_BACKEND`` beats auto. A backend asked for by name runs
or raises; only auto looks further. The choice depends on shapes, dtypes and the device, never on device data.

A backend's kernel room is imported when it is first asked about, so that the package imports where Triton,
a compiler or a GPU is missing.
"""

from __future__ import annotations

import contextvars
import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Literal, NamedTuple

import torch

from hybrid_mxfp8 import env, reference
from hybrid_mxfp8.core.activation import SwiGLU
from hybrid_mxfp8.core.layout import GroupLayout
from hybrid_mxfp8.core.operands import ExpertWeights, GroupedMXFP8
from hybrid_mxfp8.cutlass_kernels.config import CUTLASS_CAPABILITIES
from hybrid_mxfp8.dispatch.device import TRITON_MIN_CAPABILITY, resolve_device
from hybrid_mxfp8.dispatch.device import capability as _capability
from hybrid_mxfp8.dispatch.device import has_triton as _has_triton
from hybrid_mxfp8.dispatch.repeats import Launched
from hybrid_mxfp8.errors import BackendUnavailableError

AUTO = "auto"
CUTLASS = "cutlass"
TRITON = "triton"

logger = logging.getLogger("hybrid_mxfp8")


class Problem(NamedTuple):
    """What the host knows of a grouped GEMM: all that a choice may depend on."""

    num_experts: int
    n: int
    k: int
    num_tokens: int
    out_dtype: torch.dtype
    device: torch.device

    @property
    def capability(self) -> tuple[int, int] | None:
        """Compute capability; None on a CPU."""
        return _capability(self.device)


Support = tuple[bool, str]
"""Whether it can, and why or why not: one line that says what to do."""


class Quantized(NamedTuple):
    """What a quantizer gives back."""

    layout: GroupLayout
    launched: Launched | None = None


@dataclass(frozen=True, eq=False)
class Backend:
    """One way to run the product, with the quantizer that goes with it.

    Attributes:
        name: as users write it.
        about: one line for tables.
        hardware: whether the device is one that this backend is made for.
        available: whether it can run at all on a device.
        grouped_gemm: (x, w, out, workspace) -> the call, if it can be repeated.
        quantize_grouped: (x, layout or counts, values, scales, scale_rounding, row_index, swiglu) -> the layout, and the
            call, if it can be repeated.
        quantize_weights: (w, values, scales, scale_rounding) -> None.
        explain: configuration and why, one line.
        workspace_size: bytes of device memory that a call needs beside its output.
        workspace_bound: bytes that suffice for every call of up to as many rows.
        can_run: available, and takes this problem.
    """

    name: str
    about: str
    hardware: Callable[[torch.device], bool]
    available: Callable[[torch.device], Support]
    grouped_gemm: Callable[[GroupedMXFP8, ExpertWeights, torch.Tensor, torch.Tensor | None], Launched | None]
    quantize_grouped: Callable[
        [torch.Tensor, GroupLayout | torch.Tensor, torch.Tensor, torch.Tensor, str, torch.Tensor | None, SwiGLU | None],
        Quantized,
    ]
    quantize_weights: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, str], None]
    explain: Callable[[Problem], str]
    workspace_size: Callable[[Problem], int]
    workspace_bound: Callable[[Problem], int]
    can_run: Callable[[Problem], Support]


def _layout(groups: GroupLayout | torch.Tensor, num_tokens: int) -> GroupLayout:
    return groups if isinstance(groups, GroupLayout) else GroupLayout.from_counts(groups, num_tokens)


# ---------------------------------------------------------------- reference


def _reference_gemm(x: GroupedMXFP8, w: ExpertWeights, out: torch.Tensor, workspace: torch.Tensor | None) -> None:
    groups = x.groups
    reference.grouped_matmul(x.values, x.scales, groups.expert_offsets, groups.scale_offsets, w.values, w.scales, out)


def _reference_quantize_grouped(
    x: torch.Tensor,
    groups: GroupLayout | torch.Tensor,
    values: torch.Tensor,
    scales: torch.Tensor,
    scale_rounding: str,
    row_index: torch.Tensor | None,
    swiglu: SwiGLU | None,
) -> Quantized:
    groups = _layout(groups, values.shape[0])
    if not groups.num_tokens:
        return Quantized(groups)
    if row_index is not None:
        inside = (row_index >= 0) & (row_index < x.shape[0])
        rows = x[torch.where(inside, row_index, 0)] if x.shape[0] else x.new_zeros(groups.num_tokens, x.shape[1])
        x = torch.where(inside.unsqueeze(1), rows, 0)
    codes, linear = reference.quantize(x if swiglu is None else reference.swiglu(x, swiglu), scale_rounding)
    reference.write_grouped(codes, linear, groups.expert_offsets, groups.scale_offsets, values, scales)
    return Quantized(groups)


def _reference_quantize_weights(
    w: torch.Tensor, values: torch.Tensor, scales: torch.Tensor, scale_rounding: str
) -> None:
    # One expert at a time: fp32 copies of all weights would be several times their size.
    for e in range(w.shape[0]):
        codes, linear = reference.quantize(w[e], scale_rounding)
        values[e].view(torch.uint8).copy_(codes.view(torch.uint8))
        scales[e] = reference.swizzle_scales(linear)


# ---------------------------------------------------------------- triton


def _triton_hardware(device: torch.device) -> bool:
    capability = _capability(device)
    return env.triton_interpret() or (capability is not None and capability >= TRITON_MIN_CAPABILITY)


@functools.cache
def _interpreted() -> bool:
    from hybrid_mxfp8.triton_kernels.launch import INTERPRETED

    return INTERPRETED


def _triton_available(device: torch.device) -> Support:
    if not _has_triton():
        return False, "Triton is not installed: pip install triton"
    if device.type not in ("cuda", "cpu"):
        return False, f"runs on CUDA GPUs and on the CPU through Triton's interpreter, not on {device.type}"
    if torch.version.hip is not None and device.type == "cuda":
        return False, "its e4m3 and scale layouts are NVIDIA's; this is a ROCm build of PyTorch"
    if _interpreted():
        return True, "Triton's interpreter, on the CPU"
    capability = _capability(device)
    if capability is None:
        return False, "no GPU: set TRITON_INTERPRET=1 before Triton is imported to run kernels on the CPU"
    if capability < TRITON_MIN_CAPABILITY:
        return False, f"needs compute capability 8.9 or newer for e4m3, got {capability[0]}.{capability[1]}"
    return True, f"compute capability {capability[0]}.{capability[1]}"


@functools.cache
def _gemm_kernels() -> ModuleType:
    from hybrid_mxfp8.triton_kernels.gemm import portable as grouped_gemm

    return grouped_gemm


@functools.cache
def _quantize_kernels() -> ModuleType:
    from hybrid_mxfp8.triton_kernels import quantize

    return quantize


def _triton_gemm(
    x: GroupedMXFP8, w: ExpertWeights, out: torch.Tensor, workspace: torch.Tensor | None
) -> Launched | None:
    launched: Launched | None = _gemm_kernels().grouped_gemm(
        x.values, x.scales, x.groups, w.values, w.scales, out, workspace
    )
    return launched


def _triton_workspace_size(problem: Problem) -> int:
    size: int = _gemm_kernels().workspace_size(
        problem.num_tokens, problem.num_experts, problem.n, problem.k, problem.device
    )
    return size


def _triton_workspace_bound(problem: Problem) -> int:
    size: int = _gemm_kernels().workspace_bound(
        problem.num_tokens, problem.num_experts, problem.n, problem.k, problem.device
    )
    return size


def _triton_quantize_grouped(
    x: torch.Tensor,
    groups: GroupLayout | torch.Tensor,
    values: torch.Tensor,
    scales: torch.Tensor,
    scale_rounding: str,
    row_index: torch.Tensor | None,
    swiglu: SwiGLU | None,
) -> Quantized:
    kernel = _quantize_kernels()
    num_tokens, k = values.shape
    if isinstance(groups, torch.Tensor) and kernel.can_fuse_counts(num_tokens, k, groups.shape[0]):
        layout = kernel.quantize_counts(
            x, groups, values, scales, scale_rounding=scale_rounding, row_index=row_index, swiglu=swiglu
        )
        return Quantized(layout)
    layout = _layout(groups, num_tokens)
    launched = kernel.quantize_grouped(
        x, layout, values, scales, scale_rounding=scale_rounding, row_index=row_index, swiglu=swiglu
    )
    return Quantized(layout, launched if layout is groups else None)  # one made here lies elsewhere the next time


def _triton_quantize_weights(w: torch.Tensor, values: torch.Tensor, scales: torch.Tensor, scale_rounding: str) -> None:
    _quantize_kernels().quantize_weights(w, values, scales, scale_rounding=scale_rounding)


def _triton_explain(problem: Problem) -> str:
    config = _gemm_kernels().config_for(problem.num_tokens, problem.num_experts, problem.n, problem.k, problem.device)
    return f"{config}, for {problem.num_tokens / max(problem.num_experts, 1):.1f} tokens an expert on average"


# ---------------------------------------------------------------- cutlass


def _cutlass_hardware(device: torch.device) -> bool:
    return _capability(device) in CUTLASS_CAPABILITIES


def _cutlass_available(device: torch.device) -> Support:
    from hybrid_mxfp8.cutlass_kernels.grouped_gemm import availability

    return availability(_capability(device))


def _cutlass_can_run(problem: Problem) -> Support:
    from hybrid_mxfp8.cutlass_kernels.grouped_gemm import can_run

    return can_run(problem)


def _cutlass_gemm(x: GroupedMXFP8, w: ExpertWeights, out: torch.Tensor, workspace: torch.Tensor | None) -> None:
    from hybrid_mxfp8.cutlass_kernels.grouped_gemm import grouped_gemm

    grouped_gemm(x, w, out, workspace)


def _cutlass_workspace_size(problem: Problem) -> int:
    from hybrid_mxfp8.cutlass_kernels.grouped_gemm import workspace_size

    return workspace_size(
        problem.num_experts, problem.n, problem.k, problem.num_tokens, problem.out_dtype, problem.device
    )


def _cutlass_workspace_bound(problem: Problem) -> int:
    from hybrid_mxfp8.cutlass_kernels.grouped_gemm import workspace_bound

    return workspace_bound(problem.num_experts, problem.num_tokens, problem.device)


def _cutlass_explain(problem: Problem) -> str:
    from hybrid_mxfp8.cutlass_kernels.grouped_gemm import explain

    return explain(problem)


# ---------------------------------------------------------------- the table


def _takes_every_problem(available: Callable[[torch.device], Support]) -> Callable[[Problem], Support]:
    return lambda problem: available(problem.device)


BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend(
            name=CUTLASS,
            about="CUTLASS SM100 block-scaled kernel, compiled just in time; not yet run on hardware",
            hardware=_cutlass_hardware,
            available=_cutlass_available,
            grouped_gemm=_cutlass_gemm,
            quantize_grouped=_triton_quantize_grouped,
            quantize_weights=_triton_quantize_weights,
            explain=_cutlass_explain,
            workspace_size=_cutlass_workspace_size,
            workspace_bound=_cutlass_workspace_bound,
            can_run=_cutlass_can_run,
        ),
        Backend(
            name=TRITON,
            about="tl.dot_scaled on Blackwell, bf16 MMA on dequantized operands elsewhere, or Triton's interpreter",
            hardware=_triton_hardware,
            available=_triton_available,
            grouped_gemm=_triton_gemm,
            quantize_grouped=_triton_quantize_grouped,
            quantize_weights=_triton_quantize_weights,
            explain=_triton_explain,
            workspace_size=_triton_workspace_size,
            workspace_bound=_triton_workspace_bound,
            can_run=_takes_every_problem(_triton_available),
        ),
        Backend(
            name="reference",
            about="plain PyTorch in float64, any device; syncs",
            hardware=lambda device: True,
            available=lambda device: (True, "always"),
            grouped_gemm=_reference_gemm,
            quantize_grouped=_reference_quantize_grouped,
            quantize_weights=_reference_quantize_weights,
            explain=lambda problem: "one float64 matmul an expert",
            workspace_size=lambda problem: 0,
            workspace_bound=lambda problem: 0,
            can_run=lambda problem: (True, "always"),
        ),
    )
}

_override: contextvars.ContextVar[str | None] = contextvars.ContextVar("hybrid_mxfp8_backend", default=None)


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Within the block, in this thread or task, calls that name no backend use ``name``; ``"auto"`` or None chooses.

    Raises:
        ValueError: no such backend.
    """
    token = _override.set(_known("name", name) if name is not None else AUTO)
    try:
        yield
    finally:
        _override.reset(token)


def requested(backend: str | None) -> str:
    """The backend that is asked for, or ``auto``: the argument, else use_backend(), else the environment.

    Raises:
        ValueError: no such backend; the message lists the valid names.
    """
    if backend is not None:
        return _known("backend", backend)
    override = _override.get()
    if override is not None:
        return override
    return _known("HYBRID_MXFP8_BACKEND", env.backend() or AUTO)


def _known(source: str, name: object) -> str:
    if isinstance(name, str) and (name == AUTO or name in BACKENDS):
        return name
    raise ValueError(f"{source}: must be one of {', '.join((AUTO, *BACKENDS))}, got {name!r}")


def choose(problem: Problem, backend: str | None = None) -> Backend:
    """The backend for this problem.

    Raises:
        BackendUnavailableError: the backend asked for by name can't run it.
        ValueError: no such backend.
    """
    name = requested(backend)
    return settled("grouped_gemm", name, problem.device) or _choose(name, problem, problem.device)


def choose_quantizer(device: torch.device, backend: str | None = None) -> Backend:
    """The backend whose quantizer runs on this device; raises as :func:`choose` does.

    The cutlass backend quantizes with the Triton kernel, so a request for it asks for Triton here.
    """
    name = requested(backend)
    if name != CUTLASS:
        return settled("quantize", name, device) or _choose(name, None, device)
    triton = BACKENDS[TRITON]
    ok, reason = triton.available(device)
    if not ok:
        raise BackendUnavailableError(f"backend cutlass, which quantizes with the triton kernel: {reason}")
    return triton


Product = Literal["grouped_gemm", "quantize"]
"""What a backend is chosen for."""


def settled(product: Product, name: str, device: torch.device) -> Backend | None:
    """The backend that requests for ``name`` on ``device`` come to at every call; None if each call must ask :func:`choose`."""
    return _settled(BACKENDS[TRITON], product, name, device)


def in_force(backend: str | None) -> tuple[str, str]:
    """All outside a call's other arguments that a settled backend's launches depend on: to be equal for a call to be repeated.

    The first is the backend asked for, as :func:`requested` says; raises as that does.
    """
    return requested(backend), env.hopper_gemm_as_set()


@functools.cache
def _settled(triton: Backend, product: Product, name: str, device: torch.device) -> Backend | None:
    """The triton backend, where nothing but the device decides on it, and so once for all calls; else None."""
    ok, reason = triton.available(device)
    if not ok or name not in (AUTO, TRITON):
        return None
    if name == AUTO:
        if product == "grouped_gemm" and BACKENDS[CUTLASS].hardware(device):
            return None
        _log_choice(product, TRITON, device, reason, "")
    return triton


def _choose(name: str, problem: Problem | None, device: torch.device) -> Backend:
    """The backend of that name, or for ``auto`` the first that can: run the problem, or without one quantize."""
    if name != AUTO:
        ok, reason = _can(BACKENDS[name], problem, device)
        if not ok:
            raise BackendUnavailableError(f"backend {name}: {reason}")
        return BACKENDS[name]
    passed_over = ""
    for candidate in BACKENDS.values():
        if problem is None and candidate.name == CUTLASS:
            continue
        ok, reason = _can(candidate, problem, device)
        if ok:
            _log_choice("grouped_gemm" if problem else "quantize", candidate.name, device, reason, passed_over)
            return candidate
        if candidate.hardware(device):
            passed_over = f"{candidate.name}: {reason}"
    raise AssertionError("the reference backend runs everything")


def _can(backend: Backend, problem: Problem | None, device: torch.device) -> Support:
    return backend.can_run(problem) if problem else backend.available(device)


@functools.cache
def _log_choice(product: Product, name: str, device: torch.device, reason: str, passed_over: str) -> None:
    """Log a choice; the cache makes that once for each different one."""
    if passed_over:
        logger.warning("%s on %s falls back to backend %s (%s)", product, device, name, passed_over)
    else:
        logger.info("%s on %s uses backend %s (%s)", product, device, name, reason)


def default_device() -> torch.device:
    """The current GPU if there is one, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def backends(device: torch.device | str | None = None) -> dict[str, Support]:
    """Each backend's name: whether it can run on ``device`` (default: the current GPU, else the CPU), and why or why not.

    Raises:
        ValueError: no such device.
    """
    where = default_device() if device is None else resolve_device(device)
    return {name: backend.available(where) for name, backend in BACKENDS.items()}
