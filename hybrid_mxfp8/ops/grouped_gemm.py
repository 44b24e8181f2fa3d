"""``grouped_gemm``: each expert's rows times its weights. Only the reference backend syncs."""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import Any

import torch

from hybrid_mxfp8.core import checks
from hybrid_mxfp8.core.operands import ExpertWeights, GroupedMXFP8
from hybrid_mxfp8.dispatch.backend import Steps
from hybrid_mxfp8.dispatch.buffers import metadata, with_rows
from hybrid_mxfp8.dispatch.plan import ALIGNMENT, PLANS, Operands, Plan, describe_operand, describe_rows
from hybrid_mxfp8.dispatch.problem import GemmBuffers, Problem
from hybrid_mxfp8.dispatch.registry import AUTO, NAMES, backend_of, choose, choose_ready, requested, settings


def grouped_gemm(
    x: GroupedMXFP8,
    w: ExpertWeights,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    out: torch.Tensor | None = None,
    workspace: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Multiply each expert's rows by its weights: ``y[t] = x[t] @ w[e].T`` for rows t of expert e.

    Equal calls give equal bytes. So do an expert's rows beside any other rows, as long as the
    configuration is the same, which ``explain`` prints: shapes, dtypes, scale groups, 16-byte
    alignment and the device decide.

    Args:
        x: T tokens of K elements, sorted by expert.
        w: E experts of (N, K), N % 8 == 0; E = x.groups.num_experts.
        out_dtype: bf16, fp16 or fp32; accumulation is fp32 or better.
        out: (T, N) of ``out_dtype``, contiguous, 16-byte aligned; written and returned. Must not
            overlap the operands.
        workspace: uint8 buffer on x's device of at least ``grouped_gemm_workspace_size`` bytes,
            256-byte aligned. Without it one is allocated if the backend needs any. Two streams must
            not share one; it must not overlap the operands or ``out``.
        backend: overrides ``use_backend()`` and HYBRID_MXFP8_BACKEND.

    Returns:
        (T, N) of ``out_dtype``; rows that no expert owns are not written.

    Raises:
        TypeError: wrong type or dtype.
        ValueError: operands that don't fit together, or an ``out`` or ``workspace`` that doesn't
            fit.
        BackendUnavailableError: the named backend can't run this problem here.
    """
    plan, signature = PLANS.find(_signature, x, w, out_dtype, out, workspace, backend)
    if plan is None:
        problem = _problem(x, w, out_dtype)
        if checks.is_tracing_any(x, w):
            checks.check_no_buffer("out", out)
            checks.check_no_buffer("workspace", workspace)
            return _gemm_traced(x, w, problem, backend)
        _check_buffers(problem, out, workspace)
        make = functools.partial(_plan, [*map(metadata, (x, w, workspace))], problem, backend)
        plan = PLANS.make(signature, _sizes(x, workspace), make)
    num_tokens, n, workspace_bytes = plan.result
    y = torch.empty(num_tokens, n, dtype=out_dtype, device=x.values.device) if out is None else out
    groups = x.groups
    layout = (groups.tokens_per_expert, groups.expert_offsets, groups.scale_offsets)
    tensors = (x.values, x.scales, *layout, w.values, w.scales, y)
    if workspace_bytes and workspace is None:
        workspace = torch.empty(workspace_bytes, dtype=torch.uint8, device=y.device)
    if workspace is None:
        plan.run(*tensors)
    else:
        plan.run(*tensors, workspace)
    return y


def _signature(
    x: Any, w: Any, out_dtype: Any, out: Any, workspace: Any, backend: Any
) -> tuple[Hashable, tuple[int, ...]]:
    """All that checks and launches depend on, and the sizes."""
    if type(x) is not GroupedMXFP8 or type(w) is not ExpertWeights:
        return None, ()
    num_tokens = x.groups.num_tokens
    signature = (
        "grouped_gemm",
        settings(backend),
        out_dtype,
        x.groups.tokens_per_expert.shape,
        describe_operand(x, num_tokens),
        describe_operand(w),
        None if out is None else (describe_rows(out, num_tokens), torch.is_grad_enabled()),
        None if workspace is None else (describe_rows(workspace), workspace.data_ptr() % ALIGNMENT),
    )
    return signature, _sizes(x, workspace)


def _sizes(x: GroupedMXFP8, workspace: torch.Tensor | None) -> tuple[int, ...]:
    """T, S, and the bytes of ``workspace`` if it is given."""
    sizes = x.groups.num_tokens, x.scales.shape[0]
    return sizes if workspace is None else (*sizes, workspace.shape[0])


def _plan(
    given: Any, problem: Problem, backend: str | None, num_tokens: int, num_scale_rows: int, workspace_bytes: int = 0
) -> Plan:
    """Plan one product, to run with the tensors that ``grouped_gemm`` lists. ``given`` is Metadata
    of x, w and workspace, whose sizes are replaced by the three given."""
    x, w, workspace = given
    problem = problem._replace(num_tokens=num_tokens)
    chosen, needed, cacheable = choose_ready(problem, backend)
    if workspace is not None and workspace_bytes < needed:
        checks.fail("workspace", f"must have at least {needed} bytes", workspace_bytes)
    operands = Operands()
    groups = x.groups
    read = (
        operands.add("x.values", with_rows(x.values, num_tokens)),
        operands.add("x.scales", with_rows(x.scales, num_scale_rows)),
        operands.add("tokens_per_expert", groups.tokens_per_expert),
        operands.add("expert_offsets", groups.expert_offsets),
        operands.add("scale_offsets", groups.scale_offsets),
        operands.add("w.values", w.values),
        operands.add("w.scales", w.scales),
    )
    shape = (num_tokens, problem.n)
    # Aligned: checked if it is the caller's, else allocated by PyTorch.
    y = operands.buffer("out", problem.out_dtype, shape)
    memory = None
    if workspace is not None:
        memory = operands.add("workspace", with_rows(workspace, workspace_bytes), written=True)
    elif needed:
        memory = operands.buffer("workspace", torch.uint8, (needed,))
    steps: Steps = ()
    if num_tokens and problem.num_experts:
        steps = chosen.plan(problem, GemmBuffers(*read, y, memory))
    return Plan(problem.device, operands, steps, result=(*shape, needed), cacheable=cacheable)


def _check_buffers(problem: Problem, out: torch.Tensor | None, workspace: torch.Tensor | None) -> None:
    """Check the buffers that are given; :func:`_plan` checks the workspace's size."""
    if out is not None:
        checks.check_tensor("out", out, dtypes=(problem.out_dtype,), ndim=2, dims="(T, N)", device=problem.device)
        checks.check_shape("out", out, (problem.num_tokens, problem.n), "(T, N)")
        checks.check_contiguous("out", out)
        checks.check_aligned("out", out)
        checks.check_no_grad("out", out)
    if workspace is not None:
        checks.check_tensor(
            "workspace", workspace, dtypes=(torch.uint8,), ndim=1, dims="(bytes,)", device=problem.device
        )
        checks.check_contiguous("workspace", workspace)
        if workspace.numel() and workspace.data_ptr() % ALIGNMENT:
            checks.fail("workspace", f"must start at a {ALIGNMENT}-byte boundary", f"address {workspace.data_ptr():#x}")


def _gemm_traced(x: GroupedMXFP8, w: ExpertWeights, p: Problem, backend: str | None) -> torch.Tensor:
    layout = (x.groups.tokens_per_expert, x.groups.expert_offsets, x.groups.scale_offsets)
    operands = (x.values, x.scales, *layout, w.values, w.scales)
    options = (p.out_dtype, backend, p.scale_group, p.squares)
    product: torch.Tensor = torch.ops.hybrid_mxfp8.grouped_gemm(*operands, *options)
    return product


def grouped_gemm_bytes(x: GroupedMXFP8, w: ExpertWeights, out_dtype: torch.dtype) -> int:
    """Bytes of ``workspace`` that ``grouped_gemm`` of these operands needs."""
    problem = _problem(x, w, out_dtype)
    return choose(problem).workspace_size(problem)


def grouped_gemm_workspace_size(
    w: ExpertWeights, num_tokens: int, *, out_dtype: torch.dtype = torch.bfloat16, backend: str | None = None
) -> int:
    """Bytes of ``workspace`` that suffice for ``grouped_gemm`` of ``w`` and up to ``num_tokens``
    rows, whatever their ``scale_group``; 0 if none are needed.

    A smaller batch may take another configuration, or another backend if none is named, and need
    more than a larger one. So this may be more than a call of ``num_tokens`` rows needs. Each call
    accepts a workspace of what it needs itself.

    Raises:
        TypeError: wrong type or dtype.
        ValueError: ``num_tokens`` negative or too large for int32 offsets, or N not a multiple of
            8.
        BackendUnavailableError: the named backend can't run this problem here.
    """
    if not isinstance(w, ExpertWeights):
        raise TypeError(f"w: must be an ExpertWeights, got {type(w).__name__}")
    checks.check_num_tokens(num_tokens, w.num_experts)
    checks.check_n("w", w.n)
    checks.check_float_dtype("out_dtype", out_dtype)
    problem = Problem(w.num_experts, w.n, w.k, num_tokens, out_dtype, w.device)
    asked = requested(backend)
    sizes = []
    for p in {problem, problem._replace(scale_group=w.scale_group)}:
        chosen = choose(p, backend)
        free = [b for b in map(backend_of, NAMES) if b.available(p.device)[0]] if asked == AUTO else [chosen]
        sizes += [chosen.workspace_size(p), *(b.workspace_bound(p) for b in free)]
    return max(sizes)


def explain(
    x: GroupedMXFP8, w: ExpertWeights, *, out_dtype: torch.dtype = torch.bfloat16, backend: str | None = None
) -> str:
    """Which backend ``grouped_gemm`` would use for these operands, with which configuration,
    and why; one line.

    Raises as ``grouped_gemm`` does.
    """
    problem = _problem(x, w, out_dtype)
    chosen = choose(problem, backend)
    why = "asked for"
    if requested(backend) == AUTO:
        support = {name: backend_of(name).can_run(problem) for name in NAMES}
        others = [f"{name}: {reason}" for name, (ok, reason) in support.items() if not ok]
        why = "chosen automatically" + (f" ({'; '.join(others)})" if others else "")
    unaligned = any(t.data_ptr() % 16 for t in (x.values, x.scales, w.values, w.scales) if checks.has_memory(type(t)))
    hint = "; as operands do not all begin at 16-byte boundaries, it may be another kernel" if unaligned else ""
    return f"{chosen.name}, {why}: {chosen.explain(problem)}{hint}"


def _problem(x: GroupedMXFP8, w: ExpertWeights, out_dtype: torch.dtype) -> Problem:
    if not isinstance(x, GroupedMXFP8):
        raise TypeError(f"x: must be a GroupedMXFP8 (from quantize_grouped), got {type(x).__name__}")
    if not isinstance(w, ExpertWeights):
        raise TypeError(f"w: must be an ExpertWeights (from quantize_weights), got {type(w).__name__}")
    checks.check_float_dtype("out_dtype", out_dtype)
    if w.device != x.device:
        checks.fail("w", f"must be on {x.device}, as x", w.device)
    num_experts, n, k = w.values.shape
    if num_experts != x.groups.num_experts:
        slips = {
            -1: " (from_indptr takes offsets with a leading 0)",
            1: " (from_ends takes offsets without a leading 0)",
        }
        hint = slips.get(num_experts - x.groups.num_experts, "")
        checks.fail("w", f"must have x's E = {x.groups.num_experts} experts", f"{num_experts}{hint}")
    if k != x.k:
        if n == x.k:
            checks.fail("w", f"must be (E, N, K) with x's K = {x.k} (transposed?)", tuple(w.values.shape))
        checks.fail("x", f"must have w's K = {k}", x.k)
    checks.check_n("w", n)
    scaling = min(x.scale_group, w.scale_group), w.squares
    return Problem(num_experts, n, k, x.groups.num_tokens, out_dtype, x.device, *scaling)
