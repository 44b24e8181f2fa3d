"""``quantize_grouped`` and ``quantize_weights``: rows to MXFP8. Nothing looks at device data."""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import Any

import torch

from hybrid_mxfp8.core import checks
from hybrid_mxfp8.core.activation import SwiGLU, swiglu_of
from hybrid_mxfp8.core.formats import BLOCK_SIZE, grouped_scale_rows, padded_scale_rows, scale_cols
from hybrid_mxfp8.core.layout import GroupLayout, check_numbers
from hybrid_mxfp8.core.operands import ExpertWeights, GroupedMXFP8
from hybrid_mxfp8.dispatch.backend import Steps
from hybrid_mxfp8.dispatch.buffers import metadata, with_rows
from hybrid_mxfp8.dispatch.plan import PLANS, Operands, Plan, describe, describe_operand, describe_rows
from hybrid_mxfp8.dispatch.problem import Grouping, QuantizeBuffers, QuantizeProblem
from hybrid_mxfp8.dispatch.registry import choose_quantizer, settings

E4M3 = torch.float8_e4m3fn


def quantize_grouped(
    x: torch.Tensor,
    groups: GroupLayout | torch.Tensor,
    *,
    scale_rounding: str = "rceil",
    scale_group: int = BLOCK_SIZE,
    row_index: torch.Tensor | None = None,
    activation: str | SwiGLU | None = None,
    out: GroupedMXFP8 | None = None,
    backend: str | None = None,
) -> GroupedMXFP8:
    """Quantize token rows, sorted by expert, to MXFP8.

    Args:
        x: (R, K) bf16, fp16 or fp32, K % 32 == 0, any row stride, unit column stride. R = T unless
            ``row_index`` is given. With an activation: (R, 2K), gate in the first K columns.
        groups: layout of the T output rows, on x's device; or the counts it would be built from,
            (E,) int32 or int64: then T is the number of rows of x or of ``row_index``, and for a
            decode batch no launch is spent on the layout, which the result holds.
        scale_rounding: ``rceil`` (no element saturates), ``floor`` (OCP) or ``even``.
        scale_group: 32; or 128: four neighbouring blocks get one scale, from the amax of all four.
            FP8 tensor cores want that of both operands; it is MXFP8 that every backend takes.
        row_index: (T,) int32; output row t is source row ``row_index[t]``. An index outside 0 ..
            R-1 reads as zeros.
        activation: None; ``"swiglu"``: quantize ``silu(x[:, :K]) * x[:, K:]``, computed in fp32;
            ``"swigluoai"``, gpt-oss's, or another ``SwiGLU``.
        out: an earlier result of the same shapes whose buffers are written instead of new ones.
            They must not overlap the inputs. Use what is returned from then on: ``out.groups`` and
            ``out.scale_group`` stay those of the earlier result.
        backend: overrides ``use_backend()`` and HYBRID_MXFP8_BACKEND; ``cutlass`` quantizes with
            the Triton kernel.

    Returns:
        GroupedMXFP8 of values (T, K) and scales (S, C). Rows that no expert owns, and scale rows
        beyond ``groups.scale_offsets[E]``, are not written; all other padding is zero.

    Raises:
        TypeError: wrong type or dtype.
        ValueError: wrong shape, stride, device or option; on a CPU, counts that are negative or
            have a sum above T.
        BackendUnavailableError: the named backend can't run here.
    """
    rows = x, groups, row_index = checks.wait_for(x, groups, row_index)
    plan, signature = PLANS.find(_signature, rows, scale_rounding, scale_group, activation, out, backend)
    if plan is None:
        problem = _check(rows, scale_rounding, scale_group, activation)
        if checks.is_tracing_any(*rows):
            checks.check_no_buffer("out", out)
            return _quantize_traced(rows, problem, backend)
        if out is not None:
            _check_out(out, problem, x.device)
        buffers = None if out is None else (metadata(out.values), metadata(out.scales))
        make = functools.partial(_plan, [*map(metadata, rows)], buffers, problem, backend)
        plan = PLANS.make(signature, _sizes(x, problem.num_rows, out), make)
    if out is None:
        num_tokens, k, scale_rows, scale_columns, _ = plan.result
        # Unpacked: PyTorch takes 1.2 µs longer to parse a tuple.
        values = torch.empty(num_tokens, k, dtype=E4M3, device=x.device)
        scales = torch.empty(scale_rows, scale_columns, dtype=torch.uint8, device=x.device)
    else:
        values, scales = out.values, out.scales
    return _run(plan, rows, values, scales)


def quantize_into(x: torch.Tensor, groups: GroupLayout, values: torch.Tensor, scales: torch.Tensor) -> None:
    """Quantize checked rows into checked buffers, of any number of whole 128x4 tiles."""
    sizes = (x.shape[0], groups.num_tokens, scales.shape[0])
    signature = ("quantize_into", settings(None), groups.num_experts, *map(describe_rows, (x, values, scales)))
    plan = PLANS.get(signature, sizes)
    if plan is None:
        shape = (groups.num_tokens, groups.num_experts, values.shape[1], x.shape[0], x.stride(0))
        buffers = metadata(values), metadata(scales)
        given = ((metadata(x), metadata(groups), None), buffers, QuantizeProblem(*shape, "rceil"), None)
        plan = PLANS.make(signature, sizes, functools.partial(_plan, *given))
    _run(plan, (x, groups, None), values, scales)


def _run(plan: Plan, rows: tuple[Any, ...], values: torch.Tensor, scales: torch.Tensor) -> GroupedMXFP8:
    x, groups, row_index = rows
    if isinstance(groups, GroupLayout):
        layout = groups
        offsets = (groups.tokens_per_expert, groups.expert_offsets, groups.scale_offsets)
        inputs: tuple[torch.Tensor, ...] = (x, scales, values, *offsets)
    else:
        check_numbers("groups", groups, values.shape[0], "counts")
        buffer = torch.empty(3 * groups.shape[0] + 2, dtype=torch.int32, device=groups.device)
        layout = GroupLayout.from_buffer(buffer, groups.shape[0], values.shape[0])
        inputs = (x, scales, values, groups, buffer)
    if row_index is None:
        plan.run(*inputs)
    else:
        plan.run(*inputs, row_index)
    return GroupedMXFP8.unchecked(values=values, scales=scales, groups=layout, scale_group=plan.result[-1])


def _signature(
    rows: tuple[Any, ...], scale_rounding: Any, scale_group: Any, activation: Any, out: Any, backend: Any
) -> tuple[Hashable, tuple[int, ...]]:
    """All that checks and launches depend on, and the sizes."""
    x, groups, row_index = rows
    if type(groups) is GroupLayout:
        num_tokens, num_experts = groups.num_tokens, groups.tokens_per_expert.shape[0]
        layout: object = (num_experts, groups.tokens_per_expert.device)
    else:
        num_tokens, num_experts = (x if row_index is None else row_index).shape[0], groups.shape[0]
        layout = describe(groups)
    buffers = None
    if out is not None:
        if type(out) is not GroupedMXFP8:
            return None, ()
        fits = out.scales.shape[0] == grouped_scale_rows(num_tokens, num_experts)
        buffers = fits, describe_operand(out, num_tokens)
    signature = (
        "quantize_grouped",
        settings(backend),
        torch.is_grad_enabled(),
        (scale_rounding, scale_group, type(scale_group), activation),  # 32.0 equals 32
        describe_rows(x, num_tokens),
        layout,
        describe_rows(row_index, num_tokens),
        buffers,
    )
    return signature, _sizes(x, num_tokens, out)


def _sizes(x: torch.Tensor, num_tokens: int, out: GroupedMXFP8 | None) -> tuple[int, ...]:
    """R, T, and the S of ``out`` if it is given."""
    sizes = x.shape[0], num_tokens
    return sizes if out is None else (*sizes, out.scales.shape[0])


def _check(
    rows: tuple[Any, ...], scale_rounding: str, scale_group: int, activation: str | SwiGLU | None
) -> QuantizeProblem:
    x, groups, row_index = rows
    checks.check_devices(x=x, groups=groups, row_index=row_index)
    grouping: Grouping = "offsets"
    if isinstance(groups, GroupLayout):
        num_experts = groups.num_experts
    elif isinstance(groups, torch.Tensor):
        checks.check_tensor("groups", groups, dtypes=(torch.int32, torch.int64), ndim=1, dims="(E,)")
        checks.check_contiguous("groups", groups)
        grouping, num_experts = "counts", groups.shape[0]
    else:
        raise TypeError(f"groups: must be a GroupLayout or a tensor of counts (E,), got {type(groups).__name__}")
    checks.check_unquantized("x", x, "(R, K)")
    checks.check_scale_rounding(scale_rounding)
    checks.check_scale_group(scale_group)
    swiglu = None if activation is None else swiglu_of(activation, "None, ")
    num_tokens, width = x.shape
    if swiglu is not None and width % 2:
        checks.fail("x", "must have an even number of columns, gate and up, for swiglu", width)
    k = width if swiglu is None else width // 2
    checks.check_k("x", k)
    if row_index is not None:
        checks.check_tensor("row_index", row_index, dtypes=(torch.int32,), ndim=1, dims="(T,)")
        checks.check_contiguous("row_index", row_index)
        num_tokens = row_index.shape[0]
    if isinstance(groups, GroupLayout) and num_tokens != groups.num_tokens:
        name = "x" if row_index is None else "row_index"
        checks.fail(name, f"must have T = groups.num_tokens = {groups.num_tokens} rows", num_tokens)
    sizes = (num_tokens, num_experts, k, x.shape[0], x.stride(0))
    return QuantizeProblem(*sizes, scale_rounding, swiglu, grouping, scale_group=scale_group)


def _scales_shape(p: QuantizeProblem) -> tuple[int, int]:
    """(S, C)."""
    return grouped_scale_rows(p.num_rows, p.num_experts), scale_cols(p.k)


def _check_out(out: GroupedMXFP8, p: QuantizeProblem, device: torch.device) -> None:
    if not isinstance(out, GroupedMXFP8):
        raise TypeError(f"out: must be a GroupedMXFP8, got {type(out).__name__}")
    checks.check_tensor("out", out.values, dtypes=(E4M3,), ndim=2, dims="(T, K)", device=device)
    checks.check_shape("out", out.values, (p.num_rows, p.k), "(T, K)")
    checks.check_shape("out", out.scales, _scales_shape(p), "(S, C)")
    checks.check_aligned("out", out.scales)


def _plan(
    rows: Any,
    out: tuple[Any, Any] | None,
    problem: QuantizeProblem,
    backend: str | None,
    num_source_rows: int,
    num_tokens: int,
    num_scale_rows: int = 0,
) -> Plan:
    """Plan one quantization, to run with the tensors that :func:`_run` lists. ``rows`` and ``out``,
    which is (values, scales), are Metadata, whose sizes are replaced by the three given."""
    x, groups, row_index = rows
    quantizer = choose_quantizer(x.device, backend)
    p = problem._replace(num_rows=num_tokens, num_source_rows=num_source_rows)
    scales_shape = _scales_shape(p)
    operands = Operands()
    source = operands.add("x", with_rows(x, num_source_rows))
    if out is None:
        scale_target = operands.buffer("out", torch.uint8, scales_shape)
        value_target = operands.buffer("out", E4M3, (num_tokens, p.k))
    else:
        values, scales = with_rows(out[0], num_tokens), with_rows(out[1], num_scale_rows)
        scale_target = operands.add("out", scales, written=True, label="its own scales")
        value_target = operands.add("out", values, written=True)
    given = {}
    if isinstance(groups, GroupLayout):
        operands.add("tokens_per_expert", groups.tokens_per_expert)  # of the result: not to be written
        given["expert_offsets"] = operands.add("expert_offsets", groups.expert_offsets)
        given["scale_offsets"] = operands.add("scale_offsets", groups.scale_offsets)
    else:
        given["counts"] = operands.add("groups", groups)
        given["layout"] = operands.buffer("layout", torch.int32, (3 * p.num_experts + 2,))
    if row_index is not None:
        given["row_index"] = operands.add("row_index", with_rows(row_index, num_tokens))
    steps: Steps = ()
    if p.num_rows and p.num_experts:
        steps = quantizer.quantize(p, QuantizeBuffers(source, value_target, scale_target, **given))
    elif "counts" in given:
        steps = quantizer.group_offsets(given["counts"], given["layout"], p.num_rows, False)
    return Plan(x.device, operands, steps, result=(num_tokens, p.k, *scales_shape, p.scale_group))


def _quantize_traced(rows: tuple[Any, ...], p: QuantizeProblem, backend: str | None) -> GroupedMXFP8:
    x, groups, row_index = rows
    layout = groups if isinstance(groups, GroupLayout) else GroupLayout.from_counts(groups, p.num_rows)
    offsets = (layout.tokens_per_expert, layout.expert_offsets, layout.scale_offsets)
    activation = None if p.activation is None else p.activation.spec
    options = (p.scale_rounding, row_index, activation, backend, p.scale_group)
    values, scales = torch.ops.hybrid_mxfp8.quantize_grouped(x, *offsets, *options)
    return GroupedMXFP8.unchecked(values.view(E4M3), scales, layout, p.scale_group)


def quantize_weights(
    w: torch.Tensor, *, scale_rounding: str = "rceil", scale_group: int = BLOCK_SIZE, backend: str | None = None
) -> ExpertWeights:
    """Quantize expert weights to MXFP8, with the kernel that quantizes tokens.

    Args:
        w: (E, N, K) bf16, fp16 or fp32, K % 32 == 0, unit stride along K.
        scale_rounding: ``rceil``, ``floor`` or ``even``.
        scale_group: 32 or 128, as in :func:`quantize_grouped`.
        backend: overrides ``use_backend()`` and HYBRID_MXFP8_BACKEND.

    Returns:
        ExpertWeights of values (E, N, K) and scales (E, roundup(N, 128), C), padding zero.

    Raises:
        TypeError: wrong type or dtype.
        ValueError: wrong shape, stride or option.
        BackendUnavailableError: the named backend can't run here.
    """
    (w,) = checks.wait_for(w)
    checks.check_tensor("w", w, dtypes=checks.FLOAT_DTYPES, ndim=3, dims="(E, N, K)")
    checks.check_no_grad("w", w)
    checks.check_scale_rounding(scale_rounding)
    checks.check_scale_group(scale_group)
    num_experts, n, k = w.shape
    checks.check_k("w", k)
    if w.stride(2) != 1 and w.numel():
        checks.fail("w", "must have unit stride along K (as .contiguous() makes it)", f"strides {w.stride()}")
    if checks.is_tracing(w):
        values, scales = torch.ops.hybrid_mxfp8.quantize_weights(w, scale_rounding, backend, scale_group)
        return ExpertWeights.unchecked(values.view(E4M3), scales, scale_group)
    values = torch.empty(num_experts, n, k, dtype=E4M3, device=w.device)
    scales = torch.empty(num_experts, padded_scale_rows(n), scale_cols(k), dtype=torch.uint8, device=w.device)
    signature = ("quantize_weights", settings(backend), scale_rounding, scale_group, describe(w))
    plan = PLANS.get(signature)
    if plan is None:
        rows, quantizer, operands = num_experts * n, choose_quantizer(w.device, backend), Operands()
        source = operands.add("w", w)
        target = operands.add("values", values, written=True), operands.add("scales", scales, written=True)
        sizes = (rows, num_experts, k, rows, w.stride(1))
        problem = QuantizeProblem(*sizes, scale_rounding, None, "uniform", w.stride(0), scale_group)
        steps = quantizer.quantize(problem, QuantizeBuffers(source, *target)) if rows else ()
        plan = PLANS.make(signature, (), functools.partial(Plan, w.device, operands, steps))
    plan.run(w, values, scales)
    return ExpertWeights.unchecked(values, scales, scale_group)
