"""``quantize_tokens``: tokens to MXFP8 before they are routed, so that they travel as such.

Expert parallelism launches ``pack_tokens`` before they leave and ``sum_rows`` after they return.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable
from typing import Any

import torch

from hybrid_mxfp8.core import checks
from hybrid_mxfp8.core.formats import BLOCK_SIZE
from hybrid_mxfp8.core.operands import MXFP8Tokens
from hybrid_mxfp8.core.token_record import TokenRecord
from hybrid_mxfp8.dispatch.plan import PLANS, Operands, Plan, describe
from hybrid_mxfp8.dispatch.registry import choose_quantizer, settings


def quantize_tokens(x: torch.Tensor, *, scale_group: int = BLOCK_SIZE, backend: str | None = None) -> MXFP8Tokens:
    """Quantize tokens to MXFP8 before they are sent to the ranks of their experts and routed there.

    ``moe_forward`` gives the same bits for the result as for x if ``scale_group`` is w13q's. 32
    elements take 33 bytes, in bf16 64.

    Args:
        x: (M, H) bf16, fp16 or fp32, H % 32 == 0, unit column stride.
        scale_group: elements of a row that share one scale, 32 or 128.
        backend: overrides ``use_backend()`` and HYBRID_MXFP8_BACKEND.

    Returns:
        MXFP8Tokens of x's dtype. Values and scales are columns of one (M, H + H/32) buffer of
        bytes, whose rows are padded to 16 bytes.

    Raises:
        TypeError: wrong type or dtype.
        ValueError: wrong shape or stride; x requires grad.
        BackendUnavailableError: the named backend can't run here.
    """
    (x,) = checks.wait_for(x)
    checks.check_tensor("x", x, dtypes=checks.FLOAT_DTYPES, ndim=2, dims="(M, H)")
    records = pack_tokens(
        x, None, None, num_records=x.shape[0], num_experts=0, scale_group=scale_group, backend=backend
    )
    values, scales, _, _ = TokenRecord(x.shape[1]).split(records)
    return MXFP8Tokens.unchecked(values=values, scales=scales, dtype=x.dtype, scale_group=scale_group)


def pack_tokens(
    x: torch.Tensor,  # as for :func:`quantize_tokens`
    topk_ids: torch.Tensor | None,  # (M, top_k) int32 or int64; None as the weights
    topk_weights: torch.Tensor | None,  # (M, top_k) bf16, fp16 or fp32
    *,
    num_records: int,  # R >= M; records from M on choose no expert
    num_experts: int,  # E; an id outside 0 .. E-1 becomes -1
    scale_group: int = BLOCK_SIZE,
    backend: str | None = None,
) -> torch.Tensor:
    """Quantize tokens into records (R, TokenRecord.size) uint8; see ``core.token_record``. Raises
    as :func:`quantize_tokens`; ValueError also for more tokens than records."""
    tokens: tuple[torch.Tensor, ...] = (x,)
    if topk_ids is not None and topk_weights is not None:
        tokens = x, topk_ids.contiguous(), topk_weights.contiguous()
    plan, signature = PLANS.find(_signature, tokens, num_records, num_experts, scale_group, backend)
    if plan is None:
        record = check_tokens(*tokens)
        checks.check_scale_group(scale_group)
        if x.shape[0] > num_records:
            checks.fail("x", f"must have at most max_tokens = {num_records} rows", x.shape[0])
        if checks.is_tracing_any(*tokens):
            options = (num_records, num_experts, backend, scale_group)
            packed: torch.Tensor = torch.ops.hybrid_mxfp8.pack_tokens(x, *(tokens[1:] or (None, None)), *options)
            return packed
        make = functools.partial(_plan_pack, tokens, (num_records, record.size), num_experts, scale_group, backend)
        plan = PLANS.make(signature, (), make)
    records = torch.empty(num_records, *plan.result, dtype=torch.uint8, device=x.device)
    plan.run(records, *tokens)
    return records


def _signature(
    tokens: tuple[Any, ...], num_records: int, num_experts: int, scale_group: Any, backend: Any
) -> tuple[Hashable, tuple[int, ...]]:
    """All that checks and launches depend on; every number of tokens has plans of its own."""
    numbers = (num_records, num_experts, scale_group, type(scale_group))  # 32.0 equals 32
    return ("pack_tokens", settings(backend), torch.is_grad_enabled(), numbers, *map(describe, tokens)), ()


def check_tokens(
    x: torch.Tensor, topk_ids: torch.Tensor | None = None, topk_weights: torch.Tensor | None = None
) -> TokenRecord:
    """Check that tokens can be packed; returns the layout of their records."""
    checks.check_unquantized("x", x, "(M, H)")
    num_tokens, hidden = x.shape
    checks.check_k("x", hidden)
    if topk_ids is None or topk_weights is None:
        return TokenRecord(hidden)
    checks.check_choices(topk_ids, topk_weights, x.device)
    checks.check_shape("topk_ids", topk_ids, (num_tokens, topk_ids.shape[1]), "(M, top_k) with x's M")
    checks.check_shape("topk_weights", topk_weights, (num_tokens, topk_ids.shape[1]), "(M, top_k)")
    return TokenRecord(hidden, topk_ids.shape[1])


def _plan_pack(
    tokens: tuple[torch.Tensor, ...], shape: tuple[int, int], num_experts: int, scale_group: int, backend: str | None
) -> Plan:
    """The plan to run with (records, x, and the ids and weights if there are any)."""
    quantizer, operands = choose_quantizer(tokens[0].device, backend), Operands()
    target = operands.buffer("records", torch.uint8, shape)
    names = ("x", "topk_ids", "topk_weights")
    source, *choices = [operands.add(name, tensor) for name, tensor in zip(names, tokens, strict=False)]
    ids, weights = choices or (None, None)
    given = (source, tokens[0].stride(0), ids, weights, target, num_experts, scale_group)
    steps = quantizer.pack_tokens(*given) if math.prod(shape) else ()
    return Plan(tokens[0].device, operands, steps, result=(shape[1],))


def sum_rows(y: torch.Tensor, rows: torch.Tensor, *, backend: str | None = None) -> torch.Tensor:
    """out[m] = sum over k of y[rows[m, k]], in fp32, in the order of k: (M, H) of y's dtype, of y
    (T, H) and rows (M, n) int32, both contiguous. A row outside 0 .. T-1 adds nothing."""
    out = torch.empty(rows.shape[0], y.shape[1], dtype=y.dtype, device=y.device)
    if not (y.numel() and rows.numel()):
        return out.zero_()
    ones = torch.ones(rows.shape, dtype=y.dtype, device=y.device)
    signature = ("sum_rows", settings(backend), describe(y), describe(rows))
    plan = PLANS.get(signature)
    if plan is None:
        operands = Operands()
        target, source = operands.add("out", out, written=True), operands.add("y", y)
        places, weights = operands.add("rows", rows), operands.add("weights", ones)
        given = (source, places, places, weights, None, target, out.stride(0))
        steps = choose_quantizer(y.device, backend).combine(*given)
        plan = PLANS.make(signature, (), functools.partial(Plan, y.device, operands, steps))
    plan.run(out, y, rows, ones)
    return out
