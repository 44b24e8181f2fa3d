"""Quantization in plain PyTorch, on CPU and CUDA tensors with the same bytes: integer arithmetic on fp32 bits and one
multiplication by a power of two."""

from __future__ import annotations

import torch

from hybrid_mxfp8.core.activation import PLAIN_SWIGLU, SwiGLU
from hybrid_mxfp8.core.formats import BLOCK_SIZE, E4M3_MAX, E4M3_NAN, E8M0_NAN, SCALE_ROUNDING_BIAS
from hybrid_mxfp8.core.scale_layout import swizzle_grouped_scales

FP32_INF_BITS = 0x7F800000


def quantize(x: torch.Tensor, scale_rounding: str = "rceil") -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize rows to MXFP8.

    Args:
        x: (..., K) bf16, fp16 or fp32, K % 32 == 0.
        scale_rounding: ``rceil``, ``floor`` or ``even``; design and formulas in the numerics section of the README.

    Returns:
        values (..., K) float8_e4m3fn and row-major scales (..., K/32) uint8, E8M0. A block with a NaN or an
        Inf has scale 255 and only NaN elements; a zero block has scale 0 and keeps its signs.
    """
    blocks = x.float().unflatten(-1, (-1, BLOCK_SIZE))
    # Integer comparison orders magnitudes as floats do, and puts NaN above Inf above all finite values.
    amax = (blocks.contiguous().view(torch.int32) & 0x7FFFFFFF).amax(dim=-1)
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
