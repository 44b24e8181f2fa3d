"""``moe_forward``: an MoE layer from the router's choices to the weighted sum, with no host sync.

Six launches for up to 2048 choices in a batch, eight for more, one more for ``w13_bias``, and one
more for each product by cutlass or by Hopper's bf16 kernel.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import Any

import torch

from hybrid_mxfp8.core import checks
from hybrid_mxfp8.core.activation import SwiGLU, swiglu_of
from hybrid_mxfp8.core.operands import ExpertWeights, MXFP8Tokens
from hybrid_mxfp8.dispatch.buffers import Metadata, metadata
from hybrid_mxfp8.dispatch.plan import PLANS, describe, describe_operand, describe_rows
from hybrid_mxfp8.dispatch.registry import settings
from hybrid_mxfp8.ops.layer import (
    LayerInputs,
    MoEShape,
    choose_backends,
    plan_layer,
    rows_and_scales,
    shape_of,
    tensors_of,
)
from hybrid_mxfp8.ops.workspace import MoEWorkspace, check_workspace


def moe_forward(
    x: torch.Tensor | MXFP8Tokens,
    w13q: ExpertWeights,
    w2q: ExpertWeights,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    *,
    activation: str | SwiGLU = "swiglu",
    w13_bias: torch.Tensor | None = None,
    w2_bias: torch.Tensor | None = None,
    scale_group: int | None = None,
    workspace: MoEWorkspace | None = None,
    backend: str | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The experts of an MoE layer: ``out[m] = sum_k topk_weights[m, k] * expert[topk_ids[m,
    k]](x[m])``.

    An expert is ``w2 @ (silu(g) * u) + w2_bias`` with ``[g; u] = w13 @ x + w13_bias``, or has
    another activation of g and u. Tokens and activations are quantized to MXFP8; products and the
    activation are computed in fp32, the sum over k too, always in the order of k, so equal inputs
    give equal bits. Between the products rows are held in x's dtype.

    Against the layer of unquantized weights, normal data give 23.6 to 23.8 dB of signal to noise,
    which is what the format allows: see the page on numerics.

    Under ``torch.compile`` the whole layer is one operator, ``hybrid_mxfp8::moe_forward``: no graph
    break, and no recompilation when routing changes. There the intermediates come from PyTorch's
    allocator and ``workspace`` is not used.

    Args:
        x: (M, H) bf16, fp16 or fp32, H % 32 == 0, unit column stride; or MXFP8Tokens, such as
            ``quantize_tokens`` makes: the bits of x if their ``scale_group`` is w13q's.
        w13q: E experts of (2I, H), the I rows of gate first, then those of up: transformers'
            ``gate_up_proj``, vLLM's w13.
        w2q: E experts of (H, I), I % 32 == 0.
        topk_ids: (M, top_k) int32 or int64; copied if not contiguous. Choices outside 0 .. E-1
            (those of other ranks, or padding) contribute nothing.
        topk_weights: (M, top_k) bf16, fp16 or fp32; copied if not contiguous.
        activation: ``swiglu``, silu(g) * u; ``swigluoai``, that of gpt-oss and MiniMax-M3; or a
            ``SwiGLU``.
        w13_bias: (E, 2I), contiguous, added in fp32 in a launch of its own.
        w2_bias: (E, H), contiguous, added in fp32 by the combine.
        scale_group: None: tokens and activation get the groups of the weights that they meet. 32:
            groups of 32, whatever the weights have. 128 is as None: one operand in groups of 128
            is of no use.
        workspace: made for this shape and at least M tokens; then a call allocates only ``out``.
        backend: overrides ``use_backend()`` and HYBRID_MXFP8_BACKEND. ``reference`` syncs.
        out: (M, H) of x's dtype, unit column stride, rows apart; written and returned. It may be x
            itself, which is read before anything is written; it must not overlap another argument,
            nor x in part.

    Returns:
        (M, H) of x's dtype; zero where all choices of a token are dropped.

    Raises:
        TypeError: wrong type or dtype.
        ValueError: wrong shape, stride, device or option; an argument that requires grad or has a
            tangent; a workspace that doesn't fit, or that another thread is using.
        BackendUnavailableError: the named backend can't run this here.
    """
    check_workspace(workspace)
    x, topk_ids, topk_weights = checks.wait_for(x, topk_ids, topk_weights)
    inputs = LayerInputs(x, w13q, w2q, topk_ids, topk_weights, w13_bias, w2_bias)
    plan, signature = PLANS.find(_signature, inputs, activation, scale_group, out, workspace, backend)
    if plan is None:
        shape, swiglu = _check(inputs, activation, scale_group)
        if out is not None:
            _check_out(out, x)
        if checks.is_tracing_any(*inputs):
            return _forward_traced(inputs, shape, swiglu, out, backend)
        if not (x.shape[0] and shape.top_k):
            choose_backends(shape, 0, backend)  # a named one that can't run here raises, whatever M is
            return torch.zeros(x.shape, dtype=x.dtype, device=x.device) if out is None else out.zero_()
        if workspace is not None:
            workspace.check(shape, x.shape[0])
        target = Metadata(x.dtype, x.shape, (x.shape[1], 1), x.device) if out is None else metadata(out)
        given = LayerInputs(*map(metadata, _contiguous(inputs)))
        make = functools.partial(plan_layer, given, shape, swiglu, target, backend)
        plan = PLANS.make(signature, (x.shape[0],), make)
    y = torch.empty(*x.shape, dtype=x.dtype, device=x.device) if out is None else out
    tensors = tensors_of(_contiguous(inputs))
    (arena_bytes,) = plan.result
    if workspace is None:
        plan.run(torch.empty(arena_bytes, dtype=torch.uint8, device=y.device), y, *tensors)
    else:
        with workspace.arena(arena_bytes) as arena:
            plan.run(arena, y, *tensors)
    return y


def _contiguous(inputs: LayerInputs) -> LayerInputs:
    """The inputs with contiguous ids and weights, as kernels read them."""
    if inputs.topk_ids.is_contiguous() and inputs.topk_weights.is_contiguous():
        return inputs
    return inputs._replace(topk_ids=inputs.topk_ids.contiguous(), topk_weights=inputs.topk_weights.contiguous())


def _signature(
    inputs: LayerInputs, activation: Any, scale_group: Any, out: Any, workspace: MoEWorkspace | None, backend: Any
) -> tuple[Hashable, tuple[int, ...]]:
    """All that checks and launches depend on, and the size, M."""
    x, w13q, w2q, topk_ids, topk_weights, w13_bias, w2_bias = inputs
    if type(w13q) is not ExpertWeights or type(w2q) is not ExpertWeights:
        return None, ()
    num_tokens = x.shape[0]
    signature = (
        "moe_forward",
        settings(backend),
        torch.is_grad_enabled(),
        (activation, scale_group, type(scale_group)),  # 32.0 equals 32
        (x.dtype, x.scale_group) if isinstance(x, MXFP8Tokens) else None,
        *map(describe_rows, rows_and_scales(x)),
        None if workspace is None else (workspace.shape, num_tokens <= workspace.max_tokens),
        describe_operand(w13q),
        describe_operand(w2q),
        describe_rows(topk_ids, num_tokens),
        describe_rows(topk_weights, num_tokens),
        describe(w13_bias),
        describe(w2_bias),
        describe_rows(out, num_tokens),
    )
    return signature, (num_tokens,)


def _check(inputs: LayerInputs, activation: str | SwiGLU, scale_group: int | None) -> tuple[MoEShape, SwiGLU]:
    """Check that the inputs fit together."""
    checks.check_devices(**inputs._asdict())
    x, w13q, w2q, topk_ids, topk_weights, w13_bias, w2_bias = inputs
    if not isinstance(x, MXFP8Tokens):
        checks.check_unquantized("x", x, "(M, H)")
    checks.check_choices(topk_ids, topk_weights, x.device)
    num_tokens, top_k = topk_ids.shape
    shape = shape_of(w13q, w2q, top_k, x.dtype)
    if x.shape != (num_tokens, shape.hidden):
        expected = f"must have shape (M, H) with topk_ids' M and w13q's H = {(num_tokens, shape.hidden)}"
        checks.fail("x", expected, tuple(x.shape))
    checks.check_shape("topk_weights", topk_weights, (num_tokens, top_k), "(M, top_k)")
    swiglu = swiglu_of(activation)
    check_biases(shape, w13_bias, w2_bias)
    for name, bias in (("w13_bias", w13_bias), ("w2_bias", w2_bias)):
        if bias is not None:
            checks.check_no_grad(name, bias)
    w13_group, w2_group = shape.scale_groups
    if scale_group is not None:
        checks.check_scale_group(scale_group)
        w13_group, w2_group = min(scale_group, w13_group), min(scale_group, w2_group)
    if isinstance(x, MXFP8Tokens):
        w13_group = min(w13_group, x.scale_group)
    return shape._replace(scale_groups=(w13_group, w2_group)), swiglu


def check_biases(shape: MoEShape, w13_bias: torch.Tensor | None, w2_bias: torch.Tensor | None) -> None:
    """Check that the biases that are given are (E, 2I) and (E, H)."""
    for name, bias, n in (("w13_bias", w13_bias, 2 * shape.intermediate), ("w2_bias", w2_bias, shape.hidden)):
        if bias is not None:
            checks.check_tensor(name, bias, dtypes=checks.FLOAT_DTYPES, ndim=2, dims="(E, N)", device=shape.device)
            checks.check_shape(name, bias, (shape.experts, n), "(E, N)")
            checks.check_contiguous(name, bias)


def _check_out(out: torch.Tensor, x: torch.Tensor | MXFP8Tokens) -> None:
    checks.check_tensor("out", out, dtypes=(x.dtype,), ndim=2, dims="(M, H)", device=x.device)
    checks.check_shape("out", out, (x.shape[0], x.shape[1]), "(M, H)")
    checks.check_no_grad("out", out)
    checks.check_unit_stride("out", out)
    if out.shape[0] > 1 and out.stride(0) < out.shape[1]:
        checks.fail("out", f"must have a row stride of at least H = {out.shape[1]}", out.stride(0))


def _forward_traced(
    inputs: LayerInputs, shape: MoEShape, activation: SwiGLU, out: torch.Tensor | None, backend: str | None
) -> torch.Tensor:
    x, w13q, w2q, topk_ids, topk_weights, w13_bias, w2_bias = inputs
    weights = (w13q.values, w13q.scales, w2q.values, w2q.scales)
    options = (topk_ids, topk_weights, w13_bias, w2_bias, activation.spec, backend, *shape.scale_groups)
    given: tuple[Any, ...] = (x, *weights, *options)
    if isinstance(x, MXFP8Tokens):
        given = (x.values.view(torch.uint8), *weights, *options, x.scales, x.dtype, x.scale_group)
    squares = dict(zip(("w13_squares", "w2_squares"), shape.squares, strict=True))
    result: torch.Tensor = torch.ops.hybrid_mxfp8.moe_forward(*given, **squares)
    return result if out is None else out.copy_(result)
