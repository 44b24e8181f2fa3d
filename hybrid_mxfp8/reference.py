"""The truth, in plain PyTorch: quantize, dequantize, swizzle, group offsets, grouped product.

Every function works on CPU and CUDA tensors and gives the same bytes on both. Quantization is exact
integer arithmetic on fp32 bits plus one multiplication by a power of two; the product accumulates
dequantized operands in float64, whatever the global TF32 or bf16 matmul settings say. Clarity over
speed: nothing here is meant for a hot path, and ``grouped_matmul`` syncs with the device.
"""

from __future__ import annotations

import itertools

import torch

from hybrid_mxfp8.activation import PLAIN_SWIGLU, SwiGLU
from hybrid_mxfp8.checks import check_int
from hybrid_mxfp8.formats import (
    BLOCK_SIZE,
    E4M3_MAX,
    E4M3_NAN,
    E8M0_NAN,
    SCALE_ROUNDING_BIAS,
    SCALE_TILE_BYTES,
    SCALE_TILE_COLS,
    SCALE_TILE_ROWS,
    padded_scale_rows,
    round_up,
)

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


def scale_values(scales: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """E8M0 bytes as powers of two ``2**(b - 127)``, exact in fp32 (0 is subnormal there); 255 is NaN."""
    b = scales.to(torch.int32)
    bits = torch.where(b == 0, 0x00400000, b << 23)
    bits = torch.where(b == E8M0_NAN, 0x7FC00000, bits).to(torch.int32)
    return bits.view(torch.float32).to(dtype)


def dequantize(values: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """values (..., K) e4m3 times row-major scales (..., K/32) uint8: (..., K) in ``dtype``.

    Exact in float64; in float32 all but a value that reaches 2**128, which becomes Inf.
    """
    blocks = values.to(dtype).unflatten(-1, (-1, BLOCK_SIZE))
    product: torch.Tensor = blocks * scale_values(scales, dtype).unsqueeze(-1)
    return product.flatten(-2)


def swizzle_scales(linear: torch.Tensor) -> torch.Tensor:
    """Row-major scales (..., rows, cols) uint8 to 128x4 tiles: (..., roundup(rows, 128), roundup(cols, 4)) uint8.

    The result's last two dimensions only count bytes: element (r, c) of the input is at byte
    ``formats.scale_offset(r, c, C)`` of its matrix. Padding is zero. float8_e8m0fnu is accepted too.

    Raises:
        TypeError: the dtype is not uint8 or float8_e8m0fnu.
        ValueError: fewer than two dimensions.
    """
    linear = _scale_bytes("linear", linear)
    *batch, rows, cols = linear.shape
    padded_rows, padded_cols = padded_scale_rows(rows), round_up(cols, SCALE_TILE_COLS)
    padded = linear.new_zeros(*batch, padded_rows, padded_cols)
    padded[..., :rows, :cols] = linear
    # (row tile, row // 32 % 4, row % 32, column tile, column % 4), to be stored as (row tile, column tile, row % 32, ...).
    tiles = padded.reshape(
        *batch, padded_rows // SCALE_TILE_ROWS, 4, 32, padded_cols // SCALE_TILE_COLS, SCALE_TILE_COLS
    )
    return tiles.movedim((-2, -3, -4), (-4, -3, -2)).reshape(*batch, padded_rows, padded_cols)


def unswizzle_scales(swizzled: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    """The inverse of :func:`swizzle_scales`: row-major (..., rows, cols) uint8 without padding.

    Raises:
        TypeError: the dtype is not uint8 or float8_e8m0fnu, or ``rows`` or ``cols`` no int.
        ValueError: the shape is not (..., roundup(rows, 128), roundup(cols, 4)), or ``rows`` or ``cols`` negative.
    """
    check_int("rows", rows, 0)
    check_int("cols", cols, 0)
    swizzled = _scale_bytes("swizzled", swizzled)
    *batch, padded_rows, padded_cols = swizzled.shape
    if (padded_rows, padded_cols) != (padded_scale_rows(rows), round_up(cols, SCALE_TILE_COLS)):
        expected = (padded_scale_rows(rows), round_up(cols, SCALE_TILE_COLS))
        raise ValueError(
            f"swizzled: must end in dimensions {expected} for {rows} rows and {cols} columns, got {(padded_rows, padded_cols)}"
        )
    tiles = swizzled.reshape(
        *batch, padded_rows // SCALE_TILE_ROWS, padded_cols // SCALE_TILE_COLS, 32, 4, SCALE_TILE_COLS
    )
    linear = tiles.movedim((-4, -3, -2), (-2, -3, -4)).reshape(*batch, padded_rows, padded_cols)
    return linear[..., :rows, :cols].contiguous()


def _scale_bytes(name: str, scales: torch.Tensor) -> torch.Tensor:
    if not isinstance(scales, torch.Tensor):
        raise TypeError(f"{name}: must be a torch.Tensor (..., rows, cols), got {type(scales).__name__}")
    if scales.dtype not in (torch.uint8, torch.float8_e8m0fnu):
        raise TypeError(
            f"{name}: dtype must be uint8 or float8_e8m0fnu, got {str(scales.dtype).removeprefix('torch.')}"
        )
    if scales.ndim < 2:
        raise ValueError(f"{name}: must have shape (..., rows, cols), got {tuple(scales.shape)}")
    return scales.view(torch.uint8)


def group_offsets(
    counts_or_ends: torch.Tensor, num_tokens: int, from_ends: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """tokens_per_expert (E,), expert_offsets (E+1,), scale_offsets (E+1,), all int32, of (E,) counts or inclusive ends.

    Whatever the data, the result is a valid layout of ``num_tokens`` rows: negative counts act as 0, ends that
    fall act as the largest before them, and no expert reaches beyond ``num_tokens``. So no kernel that trusts
    the layout can leave its buffers.
    """
    # Clamped before it is summed: the sum of E counts of at most T fits int64, that of any E counts does not.
    given = counts_or_ends.to(torch.int64).clamp(0, num_tokens)
    ends = given.cumsum(0).clamp_max(num_tokens)
    if from_ends and given.numel():
        ends = given.cummax(0).values
    offsets = torch.nn.functional.pad(ends, (1, 0))
    tokens = offsets.diff()
    scale_offsets = torch.nn.functional.pad((-(-tokens // SCALE_TILE_ROWS) * SCALE_TILE_ROWS).cumsum(0), (1, 0))
    return tokens.to(torch.int32), offsets.to(torch.int32), scale_offsets.to(torch.int32)


def scale_rows_of_tokens(
    expert_offsets: torch.Tensor, scale_offsets: torch.Tensor, num_tokens: int, num_scale_rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """For each of T rows: its scale row (T,) int64 among all padded experts, and whether any expert owns it (T,) bool.

    A scale row of an owned row is always one of the S that there are, whatever numbers a layout holds: on a GPU an index
    out of range would end the process.
    """
    num_experts = expert_offsets.numel() - 1
    rows = torch.arange(num_tokens, device=expert_offsets.device)
    owned = rows < expert_offsets[-1]
    if not num_experts:
        return rows, owned
    expert = torch.searchsorted(expert_offsets[1:].to(torch.int64), rows, right=True).clamp_max(num_experts - 1)
    scale_rows = rows - expert_offsets[expert] + scale_offsets[expert]
    return scale_rows.clamp(0, max(num_scale_rows - 1, 0)), owned & (num_scale_rows > 0)


def swizzled_offsets(scale_rows: torch.Tensor, num_cols: int, padded_cols: int) -> torch.Tensor:
    """Byte offsets (rows, num_cols) int64 of scales in 128x4 tiles: ``formats.scale_offset``, elementwise."""
    row = scale_rows.to(torch.int64).unsqueeze(1)
    col = torch.arange(num_cols, device=scale_rows.device).unsqueeze(0)
    tile = (row // SCALE_TILE_ROWS) * (padded_cols // SCALE_TILE_COLS) + col // SCALE_TILE_COLS
    return tile * SCALE_TILE_BYTES + row % 32 * 16 + row % SCALE_TILE_ROWS // 32 * 4 + col % SCALE_TILE_COLS


def swizzle_grouped_scales(
    linear: torch.Tensor, expert_offsets: torch.Tensor, scale_offsets: torch.Tensor, num_scale_rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Row-major scales of T rows, (T, K/32) uint8, to a grouped operand's (S, C), padding zero; and which rows are owned, (T,).

    No shape depends on device data, so nothing syncs: rows that no expert owns land in one row more, which is cut off.
    """
    num_tokens, cols = linear.shape
    scale_row, owned = scale_rows_of_tokens(expert_offsets, scale_offsets, num_tokens, num_scale_rows)
    padded = linear.new_zeros(num_scale_rows + 1, round_up(cols, SCALE_TILE_COLS))
    padded[torch.where(owned, scale_row, num_scale_rows), :cols] = linear
    return swizzle_scales(padded[:num_scale_rows]), owned


def unswizzle_grouped_scales(
    scales: torch.Tensor, expert_offsets: torch.Tensor, scale_offsets: torch.Tensor, num_tokens: int, cols: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The inverse: (S, C) to (T, ``cols``) uint8, which hold anything where no expert owns the row; and which are owned, (T,)."""
    scale_row, owned = scale_rows_of_tokens(expert_offsets, scale_offsets, num_tokens, scales.shape[0])
    offsets = swizzled_offsets(torch.where(owned, scale_row, 0), cols, scales.shape[1])
    # With no scale rows there is no owned row either.
    return (scales.reshape(-1)[offsets] if scales.numel() else offsets.to(torch.uint8)), owned


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


def dequantize_grouped(
    values: torch.Tensor,
    scales: torch.Tensor,
    expert_offsets: torch.Tensor,
    scale_offsets: torch.Tensor,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """values (T, K) e4m3 and swizzled scales (S, C) to (T, K) in ``dtype``; rows that no expert owns are zero."""
    num_tokens, k = values.shape
    linear, owned = unswizzle_grouped_scales(scales, expert_offsets, scale_offsets, num_tokens, k // BLOCK_SIZE)
    return torch.where(owned.unsqueeze(1), dequantize(values, linear, dtype), 0)


def dequantize_experts(values: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """values (E, N, K) e4m3 and swizzled scales (E, roundup(N, 128), C) to (E, N, K) in ``dtype``."""
    _, n, k = values.shape
    return dequantize(values, unswizzle_scales(scales, n, k // BLOCK_SIZE), dtype)


def grouped_matmul(
    x_values: torch.Tensor,
    x_scales: torch.Tensor,
    expert_offsets: torch.Tensor,
    scale_offsets: torch.Tensor,
    w_values: torch.Tensor,
    w_scales: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """out[t] = x[t] @ w[expert of t].T, accumulated in float64; syncs to learn the group sizes.

    Args:
        x_values: (T, K) float8_e4m3fn.
        x_scales: (S, C) uint8, swizzled.
        expert_offsets: (E+1,) int32.
        scale_offsets: (E+1,) int32.
        w_values: (E, N, K) float8_e4m3fn.
        w_scales: (E, roundup(N, 128), C) uint8, swizzled.
        out: (T, N) bf16, fp16 or fp32; rows that no expert owns keep what they hold.
    """
    x = dequantize_grouped(x_values, x_scales, expert_offsets, scale_offsets, torch.float64)
    offsets = expert_offsets.clamp(0, out.shape[0]).tolist()
    for e, (start, end) in enumerate(itertools.pairwise(offsets)):
        if start < end:
            w = dequantize_experts(w_values[e : e + 1], w_scales[e : e + 1], torch.float64)[0]
            out[start:end] = (x[start:end] @ w.T).to(out.dtype)
