"""The backends and quantizers that there are, and the choice among them.

``backend=`` beats ``use_backend()`` beats ``HYBRID_MXFP8_BACKEND`` beats auto. A backend that is
asked for by name runs or raises; only auto looks further. A kernel package is imported when it is
first asked about, so this one imports where Triton, a compiler or a GPU is missing.
"""

from __future__ import annotations

import contextvars
import functools
import importlib
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple, NoReturn

import torch

from hybrid_mxfp8 import env
from hybrid_mxfp8.core.checks import resolve_device
from hybrid_mxfp8.dispatch import reference_backend
from hybrid_mxfp8.dispatch.backend import Backend, Quantizer
from hybrid_mxfp8.dispatch.device import TRITON_MIN_CAPABILITY, capability, default_device, has_triton
from hybrid_mxfp8.dispatch.problem import Problem, Support
from hybrid_mxfp8.errors import BackendUnavailableError

AUTO = "auto"
NAMES = ("cutlass", "triton", "reference")  # in the order in which auto tries them
logger = logging.getLogger("hybrid_mxfp8")
_backends = {"reference": reference_backend.BACKEND}


def backend_of(name: str) -> Backend:
    """The backend of this name; where its package can't be imported, one that only says why."""
    if name not in _backends:
        try:
            backend: Backend = importlib.import_module(f"hybrid_mxfp8.{name}_kernels.backend").BACKEND
        except (ImportError, AttributeError) as error:  # missing, broken or too old: other calls go on
            missing = "Triton is not installed: pip install triton"
            backend = _unavailable(name, f"{name} can't be imported: {error}" if has_triton() else missing)
        _backends[name] = backend
    return _backends[name]


def _unavailable(name: str, reason: str) -> Backend:
    def raise_reason(*_: object) -> NoReturn:
        raise BackendUnavailableError(f"backend {name}: {reason}")

    return Backend(
        name=name,
        made_for=lambda device: (capability(device) or (0, 0)) >= TRITON_MIN_CAPABILITY,
        available=lambda device: (False, reason),
        can_run=lambda problem: (False, reason),
        workspace_size=raise_reason,
        workspace_bound=raise_reason,
        plan=raise_reason,
        explain=raise_reason,
    )


_override: contextvars.ContextVar[str | None] = contextvars.ContextVar("hybrid_mxfp8_backend", default=None)


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Within the block, in this thread or task, calls that name no backend use ``name``; ``"auto"``
    or None chooses.

    Raises:
        ValueError: no such backend.
    """
    token = _override.set(_known("name", name) if name is not None else AUTO)
    try:
        yield
    finally:
        _override.reset(token)


def requested(backend: str | None) -> str:
    """The argument, else use_backend(), else the environment; ValueError for no such backend."""
    env.start()
    if backend is not None:
        return _known("backend", backend)
    override = _override.get()
    if override is not None:
        return override
    return _known("HYBRID_MXFP8_BACKEND", env.backend() or AUTO)


def settings(backend: str | None) -> tuple[object, ...]:
    """What a call's plan depends on beside the call's arguments. No name is checked here."""
    return backend, _override.get(), env.snapshot()


def _cause(backend: str | None) -> str:
    """How an error about the requested backend begins: with the variable, if that named it."""
    return "HYBRID_MXFP8_BACKEND: " if backend is None and _override.get() is None else ""


def _known(source: str, name: object) -> str:
    """The name in lower case, as the variable may be written."""
    if isinstance(name, str) and (lower := name.strip().lower()) in (AUTO, *NAMES):
        return lower
    raise ValueError(f"{source}: must be one of {', '.join((AUTO, *NAMES))}, got {name!r}")


class Ready(NamedTuple):
    """A backend that is ready to run a problem."""

    backend: Backend  # with what it needs compiled and verified
    workspace_bytes: int  # that the problem takes
    cacheable: bool  # whether the next call would choose it, too: no other failed to get ready


def choose_ready(problem: Problem, backend: str | None) -> Ready:
    """The backend that runs this now. Auto passes over one that fails to get ready."""
    failed: dict[str, str] = {}
    while True:
        chosen = choose(problem, backend, failed)
        try:
            return Ready(chosen, chosen.workspace_size(problem), not failed)
        except BackendUnavailableError as error:
            if requested(backend) != AUTO:
                if cause := _cause(backend):
                    raise BackendUnavailableError(f"{cause}{error}") from error
                raise
            failed[chosen.name] = str(error)


def choose(problem: Problem, backend: str | None = None, failed: Mapping[str, str] = {}) -> Backend:
    """The backend that runs this; BackendUnavailableError if one asked for by name can't."""
    name = requested(backend)
    if name != AUTO:
        chosen = backend_of(name)
        ok, reason = chosen.can_run(problem)
        if not ok:
            raise BackendUnavailableError(f"{_cause(backend)}backend {name}: {reason}")
        return chosen
    passed_over = ""
    for candidate in map(backend_of, NAMES):
        ok, reason = candidate.can_run(problem)
        if candidate.name in failed:
            ok, reason = False, failed[candidate.name]
        if ok:
            _log_choice("grouped_gemm", candidate.name, problem.device, reason, passed_over)
            return candidate
        if candidate.made_for(problem.device):
            passed_over = f"{candidate.name}: {reason}"
    raise AssertionError("the reference backend runs everything")


def choose_quantizer(device: torch.device, backend: str | None = None) -> Quantizer:
    """The quantizer for calls that ask for ``backend``; raises as ``choose`` does."""
    name = requested(backend)
    if name == "reference":
        return reference_backend.QUANTIZER
    triton = backend_of("triton")
    ok, reason = triton.available(device)
    if ok:
        if name == AUTO:
            _log_choice("quantize", "triton", device, reason, "")
        quantizer: Quantizer = importlib.import_module("hybrid_mxfp8.triton_kernels.backend").QUANTIZER
        return quantizer
    if name == "cutlass":
        able, own_reason = backend_of(name).available(device)
        reason = f", which quantizes with the triton kernel: {reason}" if able else f": {own_reason}"
        raise BackendUnavailableError(f"{_cause(backend)}backend cutlass{reason}")
    if name == "triton":
        raise BackendUnavailableError(f"{_cause(backend)}backend triton: {reason}")
    passed_over = f"triton: {reason}" if triton.made_for(device) else ""
    _log_choice("quantize", "reference", device, "always", passed_over)
    return reference_backend.QUANTIZER


@functools.cache
def _log_choice(what: str, name: str, device: torch.device, reason: str, passed_over: str) -> None:
    """Log a choice, and by the cache each different one once."""
    if passed_over:
        logger.warning("%s on %s falls back to backend %s (%s)", what, device, name, passed_over)
    else:
        logger.info("%s on %s uses backend %s (%s)", what, device, name, reason)


def backends(device: torch.device | str | None = None) -> dict[str, Support]:
    """Each backend's name: whether it can run on ``device`` (default: the current GPU, else the
    CPU), and why or why not.

    Raises:
        ValueError: no such device.
    """
    where = default_device() if device is None else resolve_device(device)
    return {name: backend_of(name).available(where) for name in NAMES}
