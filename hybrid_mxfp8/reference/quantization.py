"""Quantization in plain PyTorch, on CPU and CUDA tensors with the same bytes: integer arithmetic on
fp32 bits and one multiplication by a power of two."""

from __future__ import annotations

import torch

from hybrid_mxfp8.core.activation import PLAIN_SWIGLU, SwiGLU
from hybrid_mxfp8.core.formats import BLOCK_SIZE, E4M3_MAX, E4M3_NAN, E8M0_NAN, SCALE_ROUNDING_BIAS
from hybrid_mxfp8.core.scale_group import largest_of_group
from hybrid_mxfp8.core.scale_layout import swizzle_grouped_scales, swizzle_scales

FP32_INF_BITS = 0x7F800000


def quantize(
    x: torch.Tensor, scale_rounding: str = "rceil", scale_group: int = BLOCK_SIZE
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize rows to MXFP8.

    Args:
        x: (..., K) bf16, fp16 or fp32, K % 32 == 0.
        scale_rounding: ``rceil``, ``floor`` or ``even``; design and formulas in the numerics
            section of the README.
        scale_group: elements whose blocks get one scale: 32 or 128.

    Returns:
        values (..., K) float8_e4m3fn and row-major scales (..., K/32) uint8, E8M0. A group with a
        NaN or an Inf has scale 255 and only NaN elements; a group of zeros has scale 0 and keeps
        its signs.
    """
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
    values: torch.Tensor,
    linear_scales: torch.Tensor,
    expert_offsets: torch.Tensor,
    scale_offsets: torch.Tensor,
    out_values: torch.Tensor,
    out_scales: torch.Tensor,
) -> None:
    """Put quantized rows into a grouped operand's buffers, padding included.

    Args:
        values: (T, K) float8_e4m3fn.
        linear_scales: (T, K/32) uint8, row-major.
        expert_offsets: (E+1,) int32.
        scale_offsets: (E+1,) int32.
        out_values: (T, K) float8_e4m3fn; rows beyond the last expert keep what they hold.
        out_scales: (S, C) uint8; rows beyond scale_offsets[E] keep what they hold.
    """
    num_rows = out_scales.shape[0]
    swizzled, owned = swizzle_grouped_scales(linear_scales, expert_offsets, scale_offsets, num_rows)
    used = (torch.arange(num_rows, device=out_scales.device) < scale_offsets[-1]).unsqueeze(1)
    # Tiles are 128 whole rows, so a swizzled row is in use exactly where its linear row is.
    out_scales.copy_(torch.where(used, swizzled, out_scales))
    kept = out_values.view(torch.uint8)
    kept.copy_(torch.where(owned.unsqueeze(1), values.view(torch.uint8), kept))


def quantize_rows(
    x: torch.Tensor,
    row_index: torch.Tensor | None,
    scale_rounding: str,
    scale_group: int,
    activation: SwiGLU | None,
    expert_offsets: torch.Tensor,
    scale_offsets: torch.Tensor,
    out_values: torch.Tensor,
    out_scales: torch.Tensor,
) -> None:
    """What the kernel does for grouped rows: gather, activation, quantization, scales in their
    places.

    Args:
        x: (R, K), or (R, 2K) with an activation; bf16, fp16 or fp32.
        row_index: (T,) int32, the source of each row, or None; one outside 0 .. R-1 reads as zeros.
        scale_rounding: as for :func:`quantize`.
        scale_group: as for :func:`quantize`.
        activation: what is quantized of [gate | up], or None.
        expert_offsets: (E+1,) int32.
        scale_offsets: (E+1,) int32.
        out_values: as for :func:`write_grouped`.
        out_scales: as for :func:`write_grouped`.
    """
    if row_index is not None:
        inside = (row_index >= 0) & (row_index < x.shape[0])
        rows = x[torch.where(inside, row_index, 0)] if x.shape[0] else x.new_zeros(row_index.shape[0], x.shape[1])
        x = torch.where(inside.unsqueeze(1), rows, 0)
    values, scales = quantize(x if activation is None else swiglu(x, activation), scale_rounding, scale_group)
    write_grouped(values, scales, expert_offsets, scale_offsets, out_values, out_scales)


def quantize_weights(
    w: torch.Tensor, out_values: torch.Tensor, out_scales: torch.Tensor, scale_rounding: str, scale_group: int
) -> None:
    """w (E, N, K) to ``out_values`` (E, N, K) and ``out_scales`` (E, roundup(N, 128), C)."""
    # One expert at a time: fp32 copies of all weights would be several times their size.
    for e in range(w.shape[0]):
        values, scales = quantize(w[e], scale_rounding, scale_group)
        out_values[e].view(torch.uint8).copy_(values.view(torch.uint8))
        out_scales[e] = swizzle_scales(scales)
