"""What ``moe_forward`` checks of its arguments, and how it knows arguments that passed."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from hybrid_mxfp8.core.activation import SwiGLU, swiglu_of
from hybrid_mxfp8.core.checks import (
    FLOAT_DTYPES,
    check_contiguous,
    check_no_grad,
    check_no_overlap,
    check_shape,
    check_tensor,
    fail,
)
from hybrid_mxfp8.core.operands import ExpertWeights
from hybrid_mxfp8.dispatch.seen import Seen
from hybrid_mxfp8.ops.workspace import MoEShape, shape_of


class Inputs(NamedTuple):
    """What a call of ``moe_forward`` reads, by its names."""

    x: torch.Tensor
    w13q: ExpertWeights
    w2q: ExpertWeights
    topk_ids: torch.Tensor
    topk_weights: torch.Tensor
    w13_bias: torch.Tensor | None
    w2_bias: torch.Tensor | None


@dataclass(frozen=True, eq=False)
class Layer:
    """What the checks find out.

    Attributes:
        shape: of the layer.
        read_in_place: whether the kernels read ``topk_ids`` and ``topk_weights`` where they are, and no contiguous copies.
        swiglu: the activation.
    """

    shape: MoEShape
    read_in_place: bool
    swiglu: SwiGLU


layers_seen: Seen[Layer] = Seen(4096)
"""What was found out about inputs that passed, by :func:`looks`."""


def looks(inputs: Inputs, activation: Any) -> tuple[Hashable, ...] | None:
    """All that :func:`check_layer` looks at; None for what can't be a key, and where torch.compile must see the checks.

    Nothing has been checked yet: any of the inputs may be of any type.
    """
    x, w13q, w2q, topk_ids, topk_weights, w13_bias, w2_bias = inputs
    if torch.compiler.is_compiling() or type(w13q) is not ExpertWeights or type(w2q) is not ExpertWeights:
        return None
    try:
        return (
            *(activation, _metadata(x), _metadata(topk_ids), _metadata(topk_weights)),
            *(_metadata(w13q.values), w13q.scales.shape, _metadata(w2q.values), w2q.scales.shape),
            None if w13_bias is None else _metadata(w13_bias),
            None if w2_bias is None else _metadata(w2_bias),
        )
    except (AttributeError, RuntimeError, TypeError):  # no tensors, or none with strides
        return None


def _metadata(x: torch.Tensor) -> tuple[Hashable, ...]:
    return type(x), x.dtype, x.shape, x.stride(), x.device, x.requires_grad and torch.is_grad_enabled()


def check_layer(inputs: Inputs, activation: str | SwiGLU) -> Layer:
    """All that is read fits together; raises as ``moe_forward`` does."""
    x, w13q, w2q, topk_ids, topk_weights, w13_bias, w2_bias = inputs
    check_tensor("x", x, dtypes=FLOAT_DTYPES, ndim=2, dims="(M, H)")
    device = x.device
    check_tensor("topk_ids", topk_ids, dtypes=(torch.int32, torch.int64), ndim=2, dims="(M, top_k)", device=device)
    check_tensor("topk_weights", topk_weights, dtypes=FLOAT_DTYPES, ndim=2, dims="(M, top_k)", device=device)
    num_tokens, top_k = topk_ids.shape
    shape = shape_of(w13q, w2q, top_k, x.dtype)
    if shape.device != device:
        fail("w13q", f"must be on {device}, as x", shape.device)
    check_shape("x", x, (num_tokens, shape.hidden), "(M, H) with topk_ids' M and w13q's H")
    check_shape("topk_weights", topk_weights, (num_tokens, top_k), "(M, top_k)")
    swiglu = swiglu_of(activation)
    if x.stride(1) != 1:
        fail("x", "must have unit stride along its columns", f"strides {x.stride()}")
    check_no_grad("x", x)
    check_no_grad("topk_weights", topk_weights)
    check_biases(shape, w13_bias, w2_bias)
    for name, bias in (("w13_bias", w13_bias), ("w2_bias", w2_bias)):
        if bias is not None:
            check_no_grad(name, bias)
    return Layer(shape, topk_ids.is_contiguous() and topk_weights.is_contiguous(), swiglu)


def check_biases(shape: MoEShape, w13_bias: torch.Tensor | None, w2_bias: torch.Tensor | None) -> None:
    """Those that are given are (E, 2I) and (E, H)."""
    for name, bias, n in (("w13_bias", w13_bias, 2 * shape.intermediate), ("w2_bias", w2_bias, shape.hidden)):
        if bias is not None:
            check_tensor(name, bias, dtypes=FLOAT_DTYPES, ndim=2, dims="(E, N)", device=shape.device)
            check_shape(name, bias, (shape.experts, n), "(E, N)")
            check_contiguous(name, bias)


def check_out(out: torch.Tensor, x: torch.Tensor) -> None:
    """``out`` is one that the result for ``x`` can be written to."""
    check_tensor("out", out, dtypes=(x.dtype,), ndim=2, dims="(M, H)", device=x.device)
    check_shape("out", out, (x.shape[0], x.shape[1]), "(M, H)")
    check_no_grad("out", out)
    if out.stride(1) != 1:
        fail("out", "must have unit stride along its columns", f"strides {out.stride()}")
    if out.shape[0] > 1 and out.stride(0) < out.shape[1]:
        fail("out", f"must have a row stride of at least H = {out.shape[1]}", out.stride(0))


def check_out_apart(out: torch.Tensor, inputs: Inputs) -> None:
    """``out`` lies apart from all that is read, but may be ``x`` itself."""
    x, w13q, w2q, topk_ids, topk_weights, w13_bias, w2_bias = inputs
    same = out.data_ptr() == x.data_ptr() and out.stride() == x.stride()
    check_no_overlap(
        "out",
        out,
        x=None if same else x,
        topk_ids=topk_ids,
        topk_weights=topk_weights,
        w13_bias=w13_bias,
        w2_bias=w2_bias,
        **{"w13q.values": w13q.values, "w13q.scales": w13q.scales},
        **{"w2q.values": w2q.values, "w2q.scales": w2q.scales},
    )


def place_of(layer: Layer, force: tuple[str, str], out: Any, inputs: Inputs) -> tuple[Hashable, ...] | None:
    """All that the checks of ``out`` look at, and with ``layer`` all that launches depend on; None if one is no tensor."""
    x, w13q, w2q, topk_ids, topk_weights, w13_bias, w2_bias = inputs
    try:
        return (
            *(layer, force, _metadata(out), out.data_ptr(), x.data_ptr()),
            *(w13q.values.data_ptr(), w13q.scales.data_ptr(), w2q.values.data_ptr(), w2q.scales.data_ptr()),
            *(topk_ids.data_ptr(), topk_weights.data_ptr()),
            None if w13_bias is None else w13_bias.data_ptr(),
            None if w2_bias is None else w2_bias.data_ptr(),
        )
    except (AttributeError, RuntimeError, TypeError):
        return None
