"""The public functions: check, allocate, choose a backend, launch. Or, where the same buffers come a third time, launch again.

None of them looks at device data, so none syncs (but for the reference backend's product). Under ``torch.compile``, and
for fake and meta tensors, each becomes one operator of :mod:`hybrid_mxfp8.ops.torch_library`; eager calls don't pay for PyTorch's
dispatcher.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from hybrid_mxfp8.core.activation import SwiGLU, swiglu_of
from hybrid_mxfp8.core.checks import (
    FLOAT_DTYPES,
    check_aligned,
    check_contiguous,
    check_k,
    check_n,
    check_no_buffer,
    check_no_grad,
    check_no_overlap,
    check_num_tokens,
    check_out_dtype,
    check_scale_rounding,
    check_shape,
    check_tensor,
    fail,
    is_tracing,
)
from hybrid_mxfp8.core.formats import grouped_scale_rows, padded_scale_rows, scale_cols
from hybrid_mxfp8.core.layout import GroupLayout
from hybrid_mxfp8.core.operands import ExpertWeights, GroupedMXFP8
from hybrid_mxfp8.dispatch.registry import (
    AUTO,
    BACKENDS,
    Backend,
    Problem,
    choose,
    choose_quantizer,
    in_force,
    requested,
    settled,
)
from hybrid_mxfp8.dispatch.repeats import Places
from hybrid_mxfp8.dispatch.seen import Seen

WORKSPACE_ALIGNMENT = 256


_places = Places(8192)
"""Of both functions, whose keys start with different objects."""


def quantize_grouped(
    x: torch.Tensor,
    groups: GroupLayout | torch.Tensor,
    *,
    scale_rounding: str = "rceil",
    row_index: torch.Tensor | None = None,
    activation: str | SwiGLU | None = None,
    out: GroupedMXFP8 | None = None,
    backend: str | None = None,
) -> GroupedMXFP8:
    """Quantize token rows, sorted by expert, to MXFP8.

    Args:
        x: (R, K) bf16, fp16 or fp32, K % 32 == 0, any row stride, unit column stride. R = T unless ``row_index``
            is given. With an activation: (R, 2K), gate in the first K columns.
        groups: layout of the T output rows, on x's device; or the counts it would be built from, (E,) int32 or int64:
            then T is the number of rows of x or of ``row_index``, and for a decode batch no launch is spent on the
            layout, which the result holds.
        scale_rounding: ``rceil`` (no element saturates), ``floor`` (OCP) or ``even``.
        row_index: (T,) int32; output row t is source row ``row_index[t]``. An index outside 0 .. R-1 reads as zeros.
        activation: None; ``"swiglu"``: quantize ``silu(x[:, :K]) * x[:, K:]``, computed in fp32; ``"swigluoai"``, gpt-oss's, or
            another :class:`SwiGLU`.
        out: an earlier result of the same shapes whose buffers are written instead of new ones; ``out.groups`` is not used.
            They must not overlap the inputs.
        backend: overrides ``use_backend()`` and HYBRID_MXFP8_BACKEND; ``cutlass`` quantizes with the Triton kernel.

    Returns:
        GroupedMXFP8 of values (T, K) and scales (S, C). Rows that no expert owns, and scale rows beyond
        ``groups.scale_offsets[E]``, are not written; all other padding is zero.

    Raises:
        TypeError: wrong type or dtype.
        ValueError: wrong shape, stride, device or option.
        BackendUnavailableError: the named backend can't run here.
    """
    key, rows = _quantized_before(x, groups, scale_rounding, row_index, activation)
    if rows is None:
        rows = _check_rows(x, groups, scale_rounding, row_index, activation)
        if is_tracing(x):
            check_no_buffer("out", out)
            return _quantize_traced(x, groups, rows, scale_rounding, row_index, backend)
        if key is not None:
            _rows_seen.add(key, rows)
    asked = requested(backend)
    if out is None:
        values = torch.empty(rows.values_shape, dtype=torch.float8_e4m3fn, device=rows.device)
        scales = torch.empty(rows.scales_shape, dtype=torch.uint8, device=rows.device)
    elif isinstance(out, GroupedMXFP8):
        values, scales = out.values, out.scales
    else:
        raise TypeError(f"out: must be a GroupedMXFP8, got {type(out).__name__}")
    # Of counts a new layout is made each time, so such a launch is not repeated: no place to know but that of ``out``.
    found_again = key is not None and (out is not None or isinstance(groups, GroupLayout))
    place = _rows_place(rows, asked, x, groups, values, scales, row_index) if found_again else None
    repeat = None if place is None else _places.get(place)
    if repeat is None:
        if out is not None:
            _check_quantized_buffers(values, scales, rows, x, groups, row_index)
    elif isinstance(groups, GroupLayout) and repeat():
        return GroupedMXFP8.unchecked(values, scales, groups)
    chosen = choose_quantizer(rows.device, asked)
    layout, launched = chosen.quantize_grouped(x, groups, values, scales, scale_rounding, row_index, rows.swiglu)
    if place is not None:
        _places.remember(place, repeat, launched)
    return GroupedMXFP8.unchecked(values, scales, layout)


@dataclass(frozen=True, eq=False)
class _Rows:
    """What the checks of :func:`quantize_grouped` find out."""

    num_tokens: int
    values_shape: tuple[int, int]
    scales_shape: tuple[int, int]
    device: torch.device
    swiglu: SwiGLU | None


_rows_seen: Seen[_Rows] = Seen(4096)


def _quantized_before(
    x: Any, groups: Any, scale_rounding: Any, row_index: Any, activation: Any
) -> tuple[Hashable, _Rows | None]:
    """All that :func:`_check_rows` looks at, and what it found for that.

    None for what can't be a key, and where torch.compile must see the checks.
    """
    if torch.compiler.is_compiling():
        return None, None
    try:
        layout: tuple[Hashable, ...]
        if type(groups) is GroupLayout:
            tokens = groups.tokens_per_expert
            layout = (groups.num_tokens, tokens.shape, tokens.device)
        else:
            layout = (groups.dtype, groups.shape, groups.stride(), groups.device)
        key = (
            *(type(x), x.dtype, x.shape, x.stride(), x.device, x.requires_grad and torch.is_grad_enabled()),
            *(layout, scale_rounding, activation),
            None if row_index is None else (row_index.dtype, row_index.shape, row_index.stride(), row_index.device),
        )
        return key, _rows_seen.get(key)
    except (AttributeError, RuntimeError, TypeError):  # no tensors, or none with strides, or no strings
        return None, None


def _check_rows(
    x: torch.Tensor,
    groups: GroupLayout | torch.Tensor,
    scale_rounding: str,
    row_index: torch.Tensor | None,
    activation: str | SwiGLU | None,
) -> _Rows:
    if isinstance(groups, GroupLayout):
        device, num_experts = groups.device, groups.num_experts
    elif isinstance(groups, torch.Tensor):
        check_tensor("groups", groups, dtypes=(torch.int32, torch.int64), ndim=1, dims="(E,)")
        check_contiguous("groups", groups)
        device, num_experts = groups.device, groups.shape[0]
    else:
        raise TypeError(f"groups: must be a GroupLayout or a tensor of counts (E,), got {type(groups).__name__}")
    check_tensor("x", x, dtypes=FLOAT_DTYPES, ndim=2, dims="(R, K)", device=device)
    check_no_grad("x", x)
    check_scale_rounding(scale_rounding)
    swiglu = None if activation is None else swiglu_of(activation, "None, ")
    num_tokens, width = x.shape
    if swiglu is not None and width % 2:
        fail("x", "must have an even number of columns, gate and up, for swiglu", width)
    k = width if swiglu is None else width // 2
    check_k("x", k)
    if x.stride(1) != 1 and x.numel():
        fail("x", "must have unit stride along its columns", f"strides {x.stride()}")
    if row_index is not None:
        check_tensor("row_index", row_index, dtypes=(torch.int32,), ndim=1, dims="(T,)", device=device)
        check_contiguous("row_index", row_index)
        num_tokens = row_index.shape[0]
    if isinstance(groups, GroupLayout) and num_tokens != groups.num_tokens:
        name = "x" if row_index is None else "row_index"
        fail(name, f"must have T = groups.num_tokens = {groups.num_tokens} rows", num_tokens)
    scales_shape = (grouped_scale_rows(num_tokens, num_experts), scale_cols(k))
    return _Rows(num_tokens, (num_tokens, k), scales_shape, device, swiglu)


def _quantize_traced(
    x: torch.Tensor,
    groups: GroupLayout | torch.Tensor,
    rows: _Rows,
    scale_rounding: str,
    row_index: torch.Tensor | None,
    backend: str | None,
) -> GroupedMXFP8:
    layout = groups if isinstance(groups, GroupLayout) else GroupLayout.from_counts(groups, rows.num_tokens)
    values, scales = torch.ops.hybrid_mxfp8.quantize_grouped(
        x,
        layout.tokens_per_expert,
        layout.expert_offsets,
        layout.scale_offsets,
        scale_rounding,
        row_index,
        None if rows.swiglu is None else rows.swiglu.spec,
        backend,
    )
    return GroupedMXFP8.unchecked(values.view(torch.float8_e4m3fn), scales, layout)


def _rows_place(
    rows: _Rows,
    asked: str,
    x: torch.Tensor,
    groups: GroupLayout | torch.Tensor,
    values: torch.Tensor,
    scales: torch.Tensor,
    row_index: torch.Tensor | None,
) -> tuple[Hashable, ...] | None:
    """All that :func:`_check_quantized_buffers` looks at, and with ``rows`` all that the launch depends on; None if fake."""
    try:
        return (
            *(rows, asked, x.data_ptr()),
            *(values.shape, values.device, values.data_ptr(), scales.shape, scales.data_ptr()),
            None if row_index is None else row_index.data_ptr(),
            *(
                (groups.expert_offsets.data_ptr(), groups.scale_offsets.data_ptr())
                if isinstance(groups, GroupLayout)
                else (groups.data_ptr(),)
            ),
        )
    except RuntimeError:
        return None


def _check_quantized_buffers(
    values: torch.Tensor,
    scales: torch.Tensor,
    rows: _Rows,
    x: torch.Tensor,
    groups: GroupLayout | torch.Tensor,
    row_index: torch.Tensor | None,
) -> None:
    """``out`` fits, and lies apart from what is read."""
    if isinstance(groups, GroupLayout):
        read = {"x": x, "expert_offsets": groups.expert_offsets, "scale_offsets": groups.scale_offsets}
    else:
        read = {"x": x, "groups": groups}
    if row_index is not None:
        read["row_index"] = row_index
    check_tensor("out", values, dtypes=(torch.float8_e4m3fn,), ndim=2, dims="(T, K)", device=rows.device)
    check_shape("out", values, rows.values_shape, "(T, K)")
    check_shape("out", scales, rows.scales_shape, "(S, C)")
    check_aligned("out", scales)
    for buffer in (values, scales):
        check_no_overlap("out", buffer, **read)
    check_no_overlap("out", values, **{"its own scales": scales})


def quantize_weights(w: torch.Tensor, *, scale_rounding: str = "rceil", backend: str | None = None) -> ExpertWeights:
    """Quantize expert weights to MXFP8, with the kernel that quantizes tokens.

    Args:
        w: (E, N, K) bf16, fp16 or fp32, K % 32 == 0, unit stride along K.
        scale_rounding: ``rceil``, ``floor`` or ``even``.
        backend: overrides ``use_backend()`` and HYBRID_MXFP8_BACKEND.

    Returns:
        ExpertWeights of values (E, N, K) and scales (E, roundup(N, 128), C), padding zero.

    Raises:
        TypeError: wrong type or dtype.
        ValueError: wrong shape, stride or option.
        BackendUnavailableError: the named backend can't run here.
    """
    check_tensor("w", w, dtypes=FLOAT_DTYPES, ndim=3, dims="(E, N, K)")
    check_no_grad("w", w)
    check_scale_rounding(scale_rounding)
    num_experts, n, k = w.shape
    check_k("w", k)
    if w.stride(2) != 1 and w.numel():
        fail("w", "must have unit stride along K", f"strides {w.stride()}")
    if is_tracing(w):
        values, scales = torch.ops.hybrid_mxfp8.quantize_weights(w, scale_rounding, backend)
        return ExpertWeights.unchecked(values.view(torch.float8_e4m3fn), scales)
    values = torch.empty(num_experts, n, k, dtype=torch.float8_e4m3fn, device=w.device)
    scales = torch.empty(num_experts, padded_scale_rows(n), scale_cols(k), dtype=torch.uint8, device=w.device)
    choose_quantizer(w.device, backend).quantize_weights(w, values, scales, scale_rounding)
    return ExpertWeights(values, scales)


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

    Equal calls give equal bytes. Within a configuration, which :func:`explain` prints and which depends on shapes alone, so do
    an expert's rows whatever the others are.

    Args:
        x: T tokens of K elements, sorted by expert.
        w: E experts of (N, K), N % 8 == 0; E = x.groups.num_experts.
        out_dtype: bf16, fp16 or fp32; accumulation is fp32 or better.
        out: (T, N) of ``out_dtype``, contiguous, 16-byte aligned; written and returned. Must not overlap the operands.
        workspace: uint8 buffer on x's device of at least :func:`grouped_gemm_workspace_size` bytes, 256-byte aligned.
            Without it one is allocated if the backend needs any. Two streams must not share one; it must not overlap the
            operands or ``out``.
        backend: overrides ``use_backend()`` and HYBRID_MXFP8_BACKEND.

    Returns:
        (T, N) of ``out_dtype``; rows that no expert owns are not written.

    Raises:
        TypeError: wrong type or dtype.
        ValueError: operands that don't fit together, or an ``out`` or ``workspace`` that doesn't fit.
        BackendUnavailableError: the named backend can't run this problem here.
    """
    key = _product_key(x, w, out_dtype)
    product = None if key is None else _products_seen.get(key)
    if product is None:
        product = _Product(_problem(x, w, out_dtype), Seen(16))
        if is_tracing(x.values):
            check_no_buffer("out", out)
            check_no_buffer("workspace", workspace)
            return _gemm_traced(x, w, out_dtype, backend)
        if key is not None:
            _products_seen.add(key, product)
    force = in_force(backend)
    way = product.ways.get(force) or _way(product, force, workspace is not None)
    y = out
    if y is None:
        problem = product.problem
        y = torch.empty((problem.num_tokens, problem.n), dtype=out_dtype, device=problem.device)
    memory = workspace
    if memory is None and way.allocate:
        memory = torch.empty(way.needed, dtype=torch.uint8, device=product.problem.device)
    found_again = key is not None and (way.settled or out is not None or workspace is not None)
    place = _tile_coordinates(product, force, way.needed, y, memory, x, w) if found_again else None
    repeat = None if place is None else _places.get(place)
    if repeat is None:
        _check_buffers(out, workspace, y, product.problem, x, w, way.needed)
    elif repeat():
        return y
    launched = way.backend.grouped_gemm(x, w, y, memory)
    if place is not None:
        _places.remember(place, repeat, launched if way.settled else None)
    return y


class _Way(NamedTuple):
    """How a product is computed.

    Attributes:
        backend: by this one.
        settled: always, as long as the same is in force.
        needed: bytes that a workspace must have; not known, and 0, where none is given and nothing is settled.
        allocate: whether a workspace is allocated here where none is given.
    """

    backend: Backend
    settled: bool
    needed: int
    allocate: bool


@dataclass(frozen=True, eq=False)
class _Product:
    """What the checks of :func:`grouped_gemm` find out, and how it is computed by what is in force."""

    problem: Problem
    ways: Seen[_Way]


_products_seen: Seen[_Product] = Seen(4096)


def _way(product: _Product, force: tuple[str, str], sized: bool) -> _Way:
    """The backend, and the size of its workspace if that is ``sized`` or free to ask."""
    problem, name = product.problem, force[0]
    chosen = settled("grouped_gemm", name, problem.device)
    if chosen is None:
        chosen = choose(problem, name)
        return _Way(chosen, False, chosen.workspace_size(problem) if sized else 0, False)
    needed = chosen.workspace_size(problem)
    way = _Way(chosen, True, needed, needed > 0 and problem.num_tokens > 0)
    product.ways.add(force, way)
    return way


def _product_key(x: Any, w: Any, out_dtype: Any) -> tuple[Hashable, ...] | None:
    """All that :func:`_problem` looks at; None where that must be seen by torch.compile, or is of a wrong type."""
    if torch.compiler.is_compiling() or type(x) is not GroupedMXFP8 or type(w) is not ExpertWeights:
        return None
    if not isinstance(out_dtype, torch.dtype):
        return None
    groups, xv, wv = x.groups, x.values, w.values
    tokens = groups.tokens_per_expert.shape
    return type(xv), type(wv), xv.shape, xv.device, wv.shape, wv.device, groups.num_tokens, tokens, out_dtype


def _gemm_traced(x: GroupedMXFP8, w: ExpertWeights, out_dtype: torch.dtype, backend: str | None) -> torch.Tensor:
    groups = x.groups
    product: torch.Tensor = torch.ops.hybrid_mxfp8.grouped_gemm(
        x.values,
        x.scales,
        groups.tokens_per_expert,
        groups.expert_offsets,
        groups.scale_offsets,
        w.values,
        w.scales,
        out_dtype,
        backend,
    )
    return product


def _check_buffers(
    out: torch.Tensor | None,
    workspace: torch.Tensor | None,
    y: torch.Tensor,
    problem: Problem,
    x: GroupedMXFP8,
    w: ExpertWeights,
    needed: int,
) -> None:
    """Those of ``out`` and ``workspace`` that are given fit, and lie apart from the operands and from ``y``, which is written."""
    if out is not None:
        check_tensor("out", out, dtypes=(problem.out_dtype,), ndim=2, dims="(T, N)", device=problem.device)
        check_shape("out", out, (problem.num_tokens, problem.n), "(T, N)")
        check_contiguous("out", out)
        check_aligned("out", out)
        check_no_grad("out", out)
        _check_no_overlap("out", out, x, w)
    if workspace is not None:
        check_tensor("workspace", workspace, dtypes=(torch.uint8,), ndim=1, dims="(bytes,)", device=problem.device)
        if workspace.numel() < needed:
            fail("workspace", f"must have at least {needed} bytes", workspace.numel())
        check_contiguous("workspace", workspace)
        if workspace.numel() and workspace.data_ptr() % WORKSPACE_ALIGNMENT:
            fail(
                "workspace",
                f"must start at a {WORKSPACE_ALIGNMENT}-byte boundary",
                f"address {workspace.data_ptr():#x}",
            )
        _check_no_overlap("workspace", workspace, x, w, y)


def _tile_coordinates(
    product: _Product, force: tuple[str, str], needed: int, y: Any, workspace: Any, x: GroupedMXFP8, w: ExpertWeights
) -> tuple[Hashable, ...] | None:
    """All that :func:`_check_buffers` looks at, and with ``product`` all that launches depend on; None if one is no tensor."""
    groups = x.groups
    try:
        return (
            *(product, force, needed),
            *(y.dtype, y.shape, y.stride(), y.device, y.data_ptr(), y.requires_grad and torch.is_grad_enabled()),
            None
            if workspace is None
            else (workspace.dtype, workspace.shape, workspace.stride(), workspace.device, workspace.data_ptr()),
            *(x.values.data_ptr(), x.scales.shape, x.scales.data_ptr()),
            *(w.values.data_ptr(), w.scales.shape, w.scales.data_ptr()),
            *(groups.tokens_per_expert.data_ptr(), groups.expert_offsets.data_ptr(), groups.scale_offsets.data_ptr()),
        )
    except (AttributeError, RuntimeError):
        return None


def grouped_gemm_workspace_size(
    w: ExpertWeights, num_tokens: int, *, out_dtype: torch.dtype = torch.bfloat16, backend: str | None = None
) -> int:
    """Bytes of ``workspace`` that suffice for :func:`grouped_gemm` of up to ``num_tokens`` rows by ``w``; 0 if none are needed.

    A smaller batch may take another configuration, or where the choice is free another backend, and need more than a larger
    one. So this may be more than a call of ``num_tokens`` rows needs, and a call takes a workspace of what it needs itself.

    Raises:
        TypeError: wrong type or dtype.
        ValueError: ``num_tokens`` negative or too large for int32 offsets, or N not a multiple of 8.
        BackendUnavailableError: the named backend can't run this problem here.
    """
    if not isinstance(w, ExpertWeights):
        raise TypeError(f"w: must be an ExpertWeights, got {type(w).__name__}")
    check_num_tokens(num_tokens, w.num_experts)
    check_n("w", w.n)
    problem = Problem(w.num_experts, w.n, w.k, num_tokens, check_out_dtype(out_dtype), w.device)
    asked = requested(backend)
    chosen = choose(problem, asked)
    free = [b for b in BACKENDS.values() if b.available(problem.device)[0]] if asked == AUTO else [chosen]
    return max(chosen.workspace_size(problem), *(b.workspace_bound(problem) for b in free))


def explain(
    x: GroupedMXFP8, w: ExpertWeights, *, out_dtype: torch.dtype = torch.bfloat16, backend: str | None = None
) -> str:
    """Which backend :func:`grouped_gemm` would use for these operands, with which configuration, and why; one line.

    Raises as :func:`grouped_gemm` does.
    """
    problem = _problem(x, w, out_dtype)
    asked = requested(backend)
    chosen = choose(problem, backend)
    if asked == AUTO:
        others = [f"{b.name}: {b.can_run(problem)[1]}" for b in BACKENDS.values() if not b.can_run(problem)[0]]
        why = "chosen automatically" + (f" ({'; '.join(others)})" if others else "")
    else:
        why = "asked for"
    return f"{chosen.name}, {why}: {chosen.explain(problem)}"


def _check_no_overlap(
    name: str, written: torch.Tensor, x: GroupedMXFP8, w: ExpertWeights, out: torch.Tensor | None = None
) -> None:
    groups = x.groups
    operands = {
        "x.values": x.values,
        "x.scales": x.scales,
        "w.values": w.values,
        "w.scales": w.scales,
        "tokens_per_expert": groups.tokens_per_expert,
        "expert_offsets": groups.expert_offsets,
        "scale_offsets": groups.scale_offsets,
    }
    check_no_overlap(name, written, **operands, out=out)


def _problem(x: GroupedMXFP8, w: ExpertWeights, out_dtype: torch.dtype) -> Problem:
    if not isinstance(x, GroupedMXFP8):
        raise TypeError(f"x: must be a GroupedMXFP8 (from quantize_grouped), got {type(x).__name__}")
    if not isinstance(w, ExpertWeights):
        raise TypeError(f"w: must be an ExpertWeights (from quantize_weights), got {type(w).__name__}")
    check_out_dtype(out_dtype)
    if w.device != x.device:
        fail("w", f"must be on {x.device}, as x", w.device)
    num_experts, n, k = w.values.shape
    if num_experts != x.groups.num_experts:
        slip = abs(num_experts - x.groups.num_experts) == 1
        hint = " (from_ends takes E ends, without the leading 0)" if slip else ""
        fail("w", f"must have x's E = {x.groups.num_experts} experts", f"{num_experts}{hint}")
    if k != x.k:
        fail("w", f"must have x's K = {x.k}", k)
    check_n("w", n)
    return Problem(num_experts, n, k, x.groups.num_tokens, out_dtype, x.device)
