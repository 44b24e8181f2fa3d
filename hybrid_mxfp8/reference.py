"""The PyTorch counterpart of every kernel: the truth that kernels are compared with.

Every function works on CPU and CUDA tensors and gives the same bytes on both: quantization by
integers and powers of two. Clarity over speed: nothing here is meant for a hot path, and
``grouped_matmul`` syncs with the device. May import: ``core``.
"""

from __future__ import annotations

import itertools

import torch

from hybrid_mxfp8.core.activation import PLAIN_SWIGLU, SwiGLU
from hybrid_mxfp8.core.formats import BLOCK_SIZE, E4M3_MAX, E4M3_NAN, E8M0_NAN, SCALE_ROUNDING_BIAS
from hybrid_mxfp8.core.layout import group_offsets
from hybrid_mxfp8.core.scales import (
    dequantize_experts,
    dequantize_grouped,
    largest_of_group,
    rows_in_use,
    swizzle_grouped_scales,
    swizzle_scales,
)
from hybrid_mxfp8.core.token_record import TokenRecord

FP32_INF_BITS = 0x7F800000


def quantize(
    x: torch.Tensor, scale_rounding: str = "rceil", scale_group: int = BLOCK_SIZE
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (..., K), K % 32 == 0, to values (..., K) e4m3 and row-major scales (..., K/32) uint8. A
    group with a NaN or an Inf has scale 255 and only NaN elements; a group of zeros has scale 0 and
    keeps its signs. The README's section on numerics has the design and the formulas."""
    blocks = x.float().unflatten(-1, (-1, BLOCK_SIZE))
    # Integer comparison orders magnitudes as floats do, and puts NaN above Inf above all finite
    # values.
    amax = largest_of_group((blocks.contiguous().view(torch.int32) & 0x7FFFFFFF).amax(dim=-1), scale_group)
    exponent = ((amax + SCALE_ROUNDING_BIAS[scale_rounding]) >> 23) - 8
    finite = amax < FP32_INF_BITS
    scales = torch.where(finite, exponent.clamp_min(0), E8M0_NAN)
    # 2**(127 - b) from its bits: exact, where exp2 or a reciprocal might flush or round.
    inverse = torch.where(finite, (254 - scales) << 23, 0).to(torch.int32).view(torch.float32)
    codes = (blocks * inverse.unsqueeze(-1)).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8)
    codes = torch.where(finite.unsqueeze(-1), codes, E4M3_NAN)
    return codes.flatten(-2).view(torch.float8_e4m3fn), scales.to(torch.uint8)


def swiglu(x: torch.Tensor, activation: SwiGLU = PLAIN_SWIGLU) -> torch.Tensor:
    """The activation in fp32 of x (R, 2K) = [gate | up]; returns (R, K) fp32."""
    gate, up = x.float().chunk(2, dim=-1)
    if activation.limit is not None:
        gate, up = gate.clamp(max=activation.limit), up.clamp(-activation.limit, activation.limit)
    if activation.beta:  # adding 0 would lose the sign of -0
        up = up + activation.beta
    return gate / (1 + torch.exp(-activation.alpha * gate)) * up


def write_grouped(
    values: torch.Tensor,  # (T, K) e4m3
    linear_scales: torch.Tensor,  # (T, K/32) uint8, row-major
    expert_offsets: torch.Tensor,  # (E+1,) int32
    scale_offsets: torch.Tensor,  # (E+1,) int32
    out_values: torch.Tensor,  # (T, K) e4m3; rows beyond the last expert keep what they hold
    out_scales: torch.Tensor,  # (S, C) uint8; so do rows beyond scale_offsets[E]
) -> None:
    """Put quantized rows into a grouped operand's buffers, padding included."""
    num_rows = out_scales.shape[0]
    swizzled = swizzle_grouped_scales(linear_scales, expert_offsets, scale_offsets, num_rows)
    used = rows_in_use(scale_offsets, num_rows).unsqueeze(1)
    # Tiles are 128 whole rows, so a swizzled row is in use exactly where its linear row is.
    out_scales.copy_(torch.where(used, swizzled, out_scales))
    kept = out_values.view(torch.uint8)
    owned = rows_in_use(expert_offsets, out_values.shape[0]).unsqueeze(1)
    kept.copy_(torch.where(owned, values.view(torch.uint8), kept))


def quantize_rows(
    x: torch.Tensor,  # (R, K), or (R, 2K) with an activation; bf16, fp16 or fp32
    row_index: torch.Tensor | None,  # (T,) int32, the source of each row
    scale_rounding: str,
    scale_group: int,
    activation: SwiGLU | None,  # what is quantized of [gate | up]
    expert_offsets: torch.Tensor,
    scale_offsets: torch.Tensor,
    out_values: torch.Tensor,
    out_scales: torch.Tensor,
) -> None:
    """What the kernel does for grouped rows: gather, activation, quantization, swizzled scales. An
    index outside 0 .. R-1 reads as zeros; outputs are those of :func:`write_grouped`."""
    if row_index is not None:
        inside = (row_index >= 0) & (row_index < x.shape[0])
        rows = x[torch.where(inside, row_index, 0)] if x.shape[0] else x.new_zeros(row_index.shape[0], x.shape[1])
        x = torch.where(inside.unsqueeze(1), rows, 0)
    values, scales = quantize(x if activation is None else swiglu(x, activation), scale_rounding, scale_group)
    write_grouped(values, scales, expert_offsets, scale_offsets, out_values, out_scales)


def source_rows(rows: torch.Tensor, num_rows: int) -> torch.Tensor:
    """The token of each of T = ``num_rows`` rows, (T,) int64, 0 for a row of none: the inverse of
    ``rows`` (M, top_k), the row of each token's choices, -1 for none."""
    flat = rows.reshape(-1).to(torch.int64)
    tokens = flat.new_zeros(num_rows + 1)  # one more for choices that are dropped
    tokens[torch.where(flat >= 0, flat, num_rows)] = torch.arange(flat.numel(), device=rows.device) // rows.shape[1]
    return tokens[:-1]


def spread_tokens(
    x: torch.Tensor,  # (M, K) bf16, fp16 or fp32, or e4m3 with ``x_scales``
    x_scales: torch.Tensor | None,  # (M, K/32) uint8, row-major: tokens are quantized already
    rows: torch.Tensor,  # (M, top_k) int32: where the choices of each token go, -1 for nowhere
    scale_rounding: str,
    scale_group: int,
    expert_offsets: torch.Tensor,
    scale_offsets: torch.Tensor,
    out_values: torch.Tensor,
    out_scales: torch.Tensor,
) -> None:
    """As :func:`quantize_rows`, of each token to the rows of its choices."""
    token = source_rows(rows, out_values.shape[0])
    if x_scales is None:
        values, scales = quantize(x[token], scale_rounding, scale_group)
    else:
        values, scales = x.view(torch.uint8)[token].view(torch.float8_e4m3fn), x_scales[token]
    write_grouped(values, scales, expert_offsets, scale_offsets, out_values, out_scales)


def pack_tokens(
    x: torch.Tensor,  # (M, H) bf16, fp16 or fp32
    topk_ids: torch.Tensor | None,  # (M, top_k) int32 or int64
    topk_weights: torch.Tensor | None,  # (M, top_k) bf16, fp16 or fp32
    records: torch.Tensor,  # (R, bytes) uint8, R >= M, written
    num_experts: int,  # E
    scale_group: int = BLOCK_SIZE,
) -> None:
    """Tokens to the records in which they travel; see ``core.token_record``. Ids outside 0 .. E-1
    become -1; records from M on get ids -1 and weights 0, and keep the rest."""
    num_tokens, hidden = x.shape
    top_k = 0 if topk_ids is None else topk_ids.shape[1]
    values, scales, ids, weights = TokenRecord(hidden, top_k).split(records)
    codes, linear = quantize(x, "rceil", scale_group)
    values.view(torch.uint8)[:num_tokens] = codes.view(torch.uint8)
    scales[:num_tokens] = linear
    if topk_ids is not None and topk_weights is not None:
        ids[:num_tokens] = torch.where((topk_ids >= 0) & (topk_ids < num_experts), topk_ids, -1)
        ids[num_tokens:] = -1
        weights[:num_tokens] = topk_weights
        weights[num_tokens:] = 0


def quantize_weights(
    w: torch.Tensor, out_values: torch.Tensor, out_scales: torch.Tensor, scale_rounding: str, scale_group: int
) -> None:
    """w (E, N, K) to ``out_values`` (E, N, K) and ``out_scales`` (E, roundup(N, 128), C)."""
    # One expert at a time: fp32 copies of all weights would be several times their size.
    for e in range(w.shape[0]):
        values, scales = quantize(w[e], scale_rounding, scale_group)
        out_values[e].view(torch.uint8).copy_(values.view(torch.uint8))
        out_scales[e] = swizzle_scales(scales)


def grouped_matmul(
    x_values: torch.Tensor,  # (T, K) e4m3
    x_scales: torch.Tensor,  # (S, C) uint8, swizzled
    expert_offsets: torch.Tensor,  # (E+1,) int32
    scale_offsets: torch.Tensor,  # (E+1,) int32
    w_values: torch.Tensor,  # (E, N, K) e4m3
    w_scales: torch.Tensor,  # (E, roundup(N, 128), C) uint8, swizzled
    out: torch.Tensor,  # (T, N) bf16, fp16 or fp32; rows that no expert owns keep what they hold
) -> None:
    """out[t] = x[t] @ w[expert of t].T, accumulated in float64; syncs to learn the group sizes."""
    x = dequantize_grouped(x_values, x_scales, expert_offsets, scale_offsets, torch.float64)
    offsets = expert_offsets.clamp(0, out.shape[0]).tolist()
    for e, (start, end) in enumerate(itertools.pairwise(offsets)):
        if start < end:
            w = dequantize_experts(w_values[e : e + 1], w_scales[e : e + 1], torch.float64)[0]
            out[start:end] = (x[start:end] @ w.T).to(out.dtype)


def route(
    topk_ids: torch.Tensor,  # (M, top_k) int32 or int64
    num_experts: int,  # E
    inverse_permutation: torch.Tensor,  # (M, top_k) int32, written: the row of each slot, or -1
    layout: torch.Tensor,  # (3E+2,) int32, written: see GroupLayout.from_buffer
) -> None:
    """Sort the (token, k) slots of a batch by expert, stably: S = M * top_k of them. A slot with an
    id outside 0 .. E-1 is dropped: sorted behind all experts."""
    ids = topk_ids.reshape(-1).to(torch.int64)
    experts = torch.where((ids >= 0) & (ids < num_experts), ids, num_experts)
    order = torch.sort(experts, stable=True).indices
    rows = torch.empty_like(order)
    rows[order] = torch.arange(order.numel(), device=order.device)
    inverse_permutation.view(-1).copy_(torch.where(experts < num_experts, rows, -1))
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=ids.device)
    counts.scatter_add_(0, experts, torch.ones_like(experts))
    layout.copy_(torch.cat(group_offsets(counts[:num_experts], ids.numel(), from_ends=False)))


def add_expert_bias(
    y: torch.Tensor, inverse_permutation: torch.Tensor, topk_ids: torch.Tensor, bias: torch.Tensor
) -> None:
    """y[row of slot] += bias (E, N)[id], summed in fp32, for y (T, N); row -1 is skipped."""
    rows, ids = inverse_permutation.reshape(-1).to(torch.int64), topk_ids.reshape(-1).to(torch.int64)
    live = rows >= 0
    # Rows of dropped slots land in one extra row, so that no shape depends on device data.
    target = torch.where(live, rows, y.shape[0])
    padded = torch.cat([y, y.new_zeros(1, y.shape[1])])
    padded[target] = (padded[target].float() + bias[torch.where(live, ids, 0)].float()).to(y.dtype)
    y.copy_(padded[:-1])


def combine(
    y: torch.Tensor,  # (T, H) bf16, fp16 or fp32, T >= 1
    inverse_permutation: torch.Tensor,  # (M, top_k) int32; a slot of row -1 adds nothing
    topk_ids: torch.Tensor,  # (M, top_k) int32 or int64
    topk_weights: torch.Tensor,  # (M, top_k) bf16, fp16 or fp32
    bias: torch.Tensor | None,  # (E, H) bf16, fp16 or fp32
    out: torch.Tensor,  # (M, H) bf16, fp16 or fp32, written
) -> None:
    """out[m] = sum over k of topk_weights[m, k] * (y[inverse_permutation[m, k]] + bias[topk_ids[m,
    k]]), in fp32, in the order of k."""
    total = torch.zeros(out.shape, dtype=torch.float32, device=out.device)
    for k in range(inverse_permutation.shape[1]):
        rows = inverse_permutation[:, k].to(torch.int64)
        live = rows >= 0
        value = y[torch.where(live, rows, 0)].float()
        if bias is not None:
            value = value + bias[torch.where(live, topk_ids[:, k].to(torch.int64), 0)].float()
        weighted = topk_weights[:, k].float().unsqueeze(1) * value
        total = torch.where(live.unsqueeze(1), total + weighted, total)
    out.copy_(total.to(out.dtype))
