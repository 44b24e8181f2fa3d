"""Quantization in PyTorch, the same bytes on CPU and CUDA: integers, and powers of two."""

from __future__ import annotations

import torch

from hybrid_mxfp8.core.activation import PLAIN_SWIGLU, SwiGLU
from hybrid_mxfp8.core.formats import BLOCK_SIZE, E4M3_MAX, E4M3_NAN, E8M0_NAN, SCALE_ROUNDING_BIAS
from hybrid_mxfp8.core.scale_group import largest_of_group
from hybrid_mxfp8.core.scale_layout import swizzle_grouped_scales, swizzle_scales
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
    swizzled, owned = swizzle_grouped_scales(linear_scales, expert_offsets, scale_offsets, num_rows)
    used = (torch.arange(num_rows, device=out_scales.device) < scale_offsets[-1]).unsqueeze(1)
    # Tiles are 128 whole rows, so a swizzled row is in use exactly where its linear row is.
    out_scales.copy_(torch.where(used, swizzled, out_scales))
    kept = out_values.view(torch.uint8)
    kept.copy_(torch.where(owned.unsqueeze(1), values.view(torch.uint8), kept))


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
    """What the kernel does for grouped rows: gather, activation, quantization, scales in their
    places. An index outside 0 .. R-1 reads as zeros; outputs are those of :func:`write_grouped`."""
    if row_index is not None:
        inside = (row_index >= 0) & (row_index < x.shape[0])
        rows = x[torch.where(inside, row_index, 0)] if x.shape[0] else x.new_zeros(row_index.shape[0], x.shape[1])
        x = torch.where(inside.unsqueeze(1), rows, 0)
    values, scales = quantize(x if activation is None else swiglu(x, activation), scale_rounding, scale_group)
    write_grouped(values, scales, expert_offsets, scale_offsets, out_values, out_scales)


def gather_rows(
    x_values: torch.Tensor,  # (R, K) e4m3
    x_scales: torch.Tensor,  # (R, K/32) uint8, row-major
    row_index: torch.Tensor,  # (T,) int32
    expert_offsets: torch.Tensor,
    scale_offsets: torch.Tensor,
    out_values: torch.Tensor,
    out_scales: torch.Tensor,
) -> None:
    """As :func:`quantize_rows`, of rows that are quantized."""
    index = row_index.to(torch.int64)
    values = x_values.view(torch.uint8)[index].view(torch.float8_e4m3fn)
    write_grouped(values, x_scales[index], expert_offsets, scale_offsets, out_values, out_scales)


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
