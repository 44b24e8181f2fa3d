"""FP8 with one scale for each block of 128x128, as DeepSeek-V3, Kimi-K2 and Qwen3 publish it.

A weight ``NAME`` (..., N, K) is F8_E4M3; ``NAME_scale_inv`` (..., ceil(N/128), ceil(K/128))
multiplies, in spite of its name. It is no MXFP8, whose scales are powers of two for 32 elements
of a row, but can be turned into it: exactly, where its scales are powers of two, as in
DeepSeek-V3.1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from hybrid_mxfp8.checkpoint.writer import Entry
from hybrid_mxfp8.core.checks import check_k, check_scale_group, check_shape, check_tensor, resolve_device
from hybrid_mxfp8.core.formats import BLOCK_SIZE, ceil_div, padded_scale_rows, scale_cols
from hybrid_mxfp8.core.operands import ExpertWeights
from hybrid_mxfp8.ops.quantize import quantize_weights

__all__ = ["quantize_fp8_blocks"]

if TYPE_CHECKING:
    from hybrid_mxfp8.checkpoint.reader import Checkpoint

BLOCK: Final = 128  # rows and columns that share a scale
SCALE_NAMES: Final = {"F32": "fp32", "BF16": "bf16", "F8_E8M0": "E8M0"}  # of their dtypes


def block_scales(checkpoint: Checkpoint, weight: Entry) -> Entry | None:
    """The scales of a weight that is FP8 in blocks of 128x128; None if it is anything else."""
    if weight.dtype != "F8_E4M3" or len(weight.shape) < 2 or (name := checkpoint.scale_of(weight.name)) is None:
        return None
    scale = checkpoint.entry(name)
    return scale if scale.dtype in SCALE_NAMES and scale.shape == scales_shape(weight.shape) else None


def scales_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of the scales of a weight (..., N, K): (..., ceil(N/128), ceil(K/128))."""
    *stack, n, k = shape
    return (*stack, ceil_div(n, BLOCK), ceil_div(k, BLOCK))


def dequantize(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """fp32: rows (R, K) of such a weight, from a block on, times scales (ceil(R/128),
    ceil(K/128))."""
    rows, k = values.shape
    each = scales.float().repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :k]
    return values.float().mul_(each)


def quantize_fp8_blocks(
    values: torch.Tensor,
    scales: torch.Tensor,
    *,
    scale_rounding: str = "rceil",
    scale_group: int = BLOCK_SIZE,
    device: torch.device | str | None = None,
    backend: str | None = None,
) -> ExpertWeights:
    """FP8 experts with a scale for each block of 128x128 to MXFP8, as ``quantize_weights`` would.

    One expert at a time is dequantized to fp32.

    Args:
        values: (E, N, K) float8_e4m3fn, K % 32 == 0.
        scales: (E, ceil(N/128), ceil(K/128)) fp32, bf16 or float8_e8m0fnu, which multiply.
        scale_rounding: ``rceil``, which loses nothing where the scales are powers of two; ``floor``
            or ``even``.
        scale_group: 32 or 128, as for ``quantize_weights``.
        device: where experts are quantized and the result is; default: where ``values`` are.
        backend: as for ``quantize_weights``.

    Raises:
        TypeError: wrong type or dtype.
        ValueError: wrong shape, device or option.
        BackendUnavailableError: the named backend can't run here.
    """
    check_tensor("values", values, dtypes=(torch.float8_e4m3fn,), ndim=3, dims="(E, N, K)")
    dims = "(E, ceil(N/128), ceil(K/128))"
    dtypes = (torch.float32, torch.bfloat16, torch.float8_e8m0fnu)
    check_tensor("scales", scales, dtypes=dtypes, ndim=3, dims=dims, device=values.device)
    num_experts, n, k = values.shape
    check_k("values", k)
    check_scale_group(scale_group)
    check_shape("scales", scales, scales_shape(values.shape), dims)
    device = values.device if device is None else resolve_device(device)
    out = torch.empty(num_experts, n, k, dtype=torch.float8_e4m3fn, device=device)
    out_scales = torch.empty(num_experts, padded_scale_rows(n), scale_cols(k), dtype=torch.uint8, device=device)
    for e in range(num_experts):
        w = dequantize(values[e].detach().to(device), scales[e].detach().to(device)).unsqueeze(0)
        wq = quantize_weights(w, scale_rounding=scale_rounding, scale_group=scale_group, backend=backend)
        out[e].view(torch.uint8).copy_(wq.values[0].view(torch.uint8))
        out_scales[e].copy_(wq.scales[0])
    return ExpertWeights.unchecked(out, out_scales, scale_group)
