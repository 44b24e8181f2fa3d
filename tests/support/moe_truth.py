"""The truth of an MoE layer: fp64, one choice of one token at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

import hybrid_mxfp8 as mx
from hybrid_mxfp8 import reference as routing
from hybrid_mxfp8.core.activation import PLAIN_SWIGLU


@dataclass(frozen=True)
class Layer:
    """Inputs of one layer: x (M, H), w13 (E, 2I, H), w2 (E, H, I), ids and weights (M, top_k),
    biases (E, 2I), (E, H)."""

    x: torch.Tensor
    w13: torch.Tensor
    w2: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    w13_bias: torch.Tensor | None = None
    w2_bias: torch.Tensor | None = None


def make_layer(
    rng: torch.Generator,
    *,
    tokens: int = 9,
    experts: int = 5,
    hidden: int = 64,
    intermediate: int = 32,
    top_k: int = 2,
    dtype: torch.dtype = torch.bfloat16,
    bias: bool = False,
    dropped: bool = False,
    ids_dtype: torch.dtype = torch.int64,
) -> Layer:
    """Normal data; weights scaled so that every stage has values around 1. ``dropped``: some ids
    are -1, some >= E."""

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=rng) * scale).to(dtype)

    ids = torch.argsort(torch.rand(tokens, experts, generator=rng), dim=1)[:, :top_k].contiguous()
    if dropped:
        fate = torch.rand(tokens, top_k, generator=rng)
        ids = torch.where(fate < 0.2, -1, torch.where(fate < 0.4, experts + 3, ids))
    return Layer(
        x=normal(tokens, hidden),
        w13=normal(experts, 2 * intermediate, hidden, scale=hidden**-0.5),
        w2=normal(experts, hidden, intermediate, scale=intermediate**-0.5),
        ids=ids.to(ids_dtype),
        weights=torch.rand(tokens, top_k, generator=rng),
        w13_bias=normal(experts, 2 * intermediate) if bias else None,
        w2_bias=normal(experts, hidden) if bias else None,
    )


def to(layer: Layer, device: str) -> Layer:
    """The same layer elsewhere."""
    return Layer(**{name: None if t is None else t.to(device) for name, t in vars(layer).items()})


def spread_scales(layer: Layer, rng: torch.Generator) -> Layer:
    """With columns of x and rows of w13 whose blocks of 32 differ by up to 2**16, so that one scale
    for four of them makes a difference."""

    def factors(size: int) -> torch.Tensor:
        return torch.exp2(torch.randint(-8, 9, (size // 32,), generator=rng)).repeat_interleave(32)

    _, rows, hidden = layer.w13.shape
    return replace(layer, x=layer.x * factors(hidden), w13=layer.w13 * factors(rows).unsqueeze(1) / 2**4)


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Plain SwiGLU."""
    return gate * torch.sigmoid(gate) * up


def swigluoai(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """That of gpt-oss."""
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return gate * torch.sigmoid(1.702 * gate) * (up + 1)


def forward(layer: Layer, activation: Callable[..., torch.Tensor] = silu_mul) -> torch.Tensor:
    """(M, H) float64; the activation is of gate and up."""
    num_experts, _, intermediate = layer.w2.shape
    out = torch.zeros(layer.x.shape, dtype=torch.float64)
    x, w13, w2 = layer.x.cpu().double(), layer.w13.cpu().double(), layer.w2.cpu().double()
    for m, choices in enumerate(layer.ids.tolist()):
        for k, e in enumerate(choices):
            if not 0 <= e < num_experts:
                continue
            h = w13[e] @ x[m]
            if layer.w13_bias is not None:
                h = h + layer.w13_bias[e].cpu().double()
            gate, up = h[:intermediate], h[intermediate:]
            y = w2[e] @ activation(gate, up)
            if layer.w2_bias is not None:
                y = y + layer.w2_bias[e].cpu().double()
            out[m] += layer.weights[m, k].double().cpu() * y
    return out


def forward_in_steps(
    layer: Layer, w13q: mx.ExpertWeights, w2q: mx.ExpertWeights, backend: str, activation: mx.SwiGLU = PLAIN_SWIGLU,
    scale_groups: tuple[int, int] = (32, 32),
) -> torch.Tensor:  # fmt: skip
    """Separate public calls, routing and sum by their references: the bits of ``moe_forward``."""
    ids, device, experts = layer.ids.contiguous(), layer.x.device, w2q.num_experts
    out = torch.zeros(layer.x.shape, dtype=layer.x.dtype, device=device)
    if not ids.numel():
        return out

    def ints(*size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.int32, device=device)

    inverse_permutation, layout = ints(*ids.shape), ints(3 * experts + 2)
    routing.route(ids, experts, inverse_permutation, layout)
    groups = mx.GroupLayout(*layout.split((experts, experts + 1, experts + 1)), ids.numel())
    first, second = ({"scale_group": group, "backend": backend} for group in scale_groups)
    tokens = routing.source_rows(inverse_permutation, ids.numel()).int()
    xq = mx.quantize_grouped(layer.x, groups, row_index=tokens, **first)
    h = mx.grouped_gemm(xq, w13q, out_dtype=layer.x.dtype, backend=backend)
    if layer.w13_bias is not None:
        routing.add_expert_bias(h, inverse_permutation, ids, layer.w13_bias)
    hq = mx.quantize_grouped(h, groups, activation=activation, **second)
    y = mx.grouped_gemm(hq, w2q, out_dtype=layer.x.dtype, backend=backend)
    routing.combine(y, inverse_permutation, ids, layer.weights, layer.w2_bias, out)
    return out
