"""E8M0 scales: what they mean, where they lie, and groups of 128. In PyTorch, on any device.

They lie in 128x4 tiles, the layout of CUTLASS and cuBLAS: ``formats.scale_offset`` states it for
one scale, the functions here for tensors, of one matrix and of rows grouped by expert.

A group of 128 is four neighbouring blocks of a row with equal scales, the first at column 0, 128,
256 and so on. A square is 128 such groups of weights, one below the other, with equal scales, the
first at row 0, 128, 256 and so on. Both are plain MXFP8, which every backend takes; FP8 tensor
cores can sum 128 elements before a scale is needed. Where K or N is no multiple of 128 the last
groups and squares are smaller.
"""

from __future__ import annotations

import torch

from hybrid_mxfp8.core.checks import check_int, is_tracing, short
from hybrid_mxfp8.core.formats import (
    BLOCK_SIZE,
    E4M3_NAN,
    E8M0_NAN,
    SCALE_TILE_COLS,
    SCALE_TILE_ROWS,
    padded_scale_rows,
    round_up,
)


def swizzle_scales(linear: torch.Tensor) -> torch.Tensor:
    """Row-major scales (..., rows, cols) uint8 to 128x4 tiles: (..., roundup(rows, 128),
    roundup(cols, 4)) uint8.

    The result's last two dimensions only count bytes: element (r, c) of the input is at byte
    ``formats.scale_offset(r, c, C)`` of its matrix. Padding is zero. float8_e8m0fnu is accepted
    too.

    Raises:
        TypeError: the dtype is not uint8 or float8_e8m0fnu.
        ValueError: fewer than two dimensions.
    """
    linear = _scale_bytes("linear", linear)
    *batch, rows, cols = linear.shape
    padded_rows, padded_cols = padded_scale_rows(rows), round_up(cols, SCALE_TILE_COLS)
    padded = torch.nn.functional.pad(linear, (0, padded_cols - cols, 0, padded_rows - rows))
    # (row tile, row // 32 % 4, row % 32, column tile, column % 4), to be stored as (row tile,
    # column tile, row % 32, ...).
    tiles: torch.Tensor = padded.unflatten(-1, (-1, SCALE_TILE_COLS)).unflatten(-3, (-1, 4, 32))
    return tiles.movedim((-2, -3, -4), (-4, -3, -2)).reshape(*batch, padded_rows, padded_cols)


def unswizzle_scales(swizzled: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    """The inverse of ``swizzle_scales``: row-major (..., rows, cols) uint8 without padding.

    Raises:
        TypeError: the dtype is not uint8 or float8_e8m0fnu, or ``rows`` or ``cols`` no int.
        ValueError: the shape is not (..., roundup(rows, 128), roundup(cols, 4)), or ``rows`` or
            ``cols`` negative.
    """
    check_int("rows", rows, 0)
    check_int("cols", cols, 0)
    swizzled = _scale_bytes("swizzled", swizzled)
    *batch, padded_rows, padded_cols = swizzled.shape
    given, expected = (padded_rows, padded_cols), (padded_scale_rows(rows), round_up(cols, SCALE_TILE_COLS))
    if given != expected:
        raise ValueError(f"swizzled: must end in dimensions {expected} for {rows} rows and {cols} columns, got {given}")
    tiles = swizzled.reshape(
        *batch, padded_rows // SCALE_TILE_ROWS, padded_cols // SCALE_TILE_COLS, 32, 4, SCALE_TILE_COLS
    )
    linear = tiles.movedim((-4, -3, -2), (-2, -3, -4)).reshape(*batch, padded_rows, padded_cols)
    return linear[..., :rows, :cols].contiguous()


def _scale_bytes(name: str, scales: torch.Tensor) -> torch.Tensor:
    if not isinstance(scales, torch.Tensor):
        raise TypeError(f"{name}: must be a torch.Tensor (..., rows, cols), got {type(scales).__name__}")
    if scales.dtype not in (torch.uint8, torch.float8_e8m0fnu):
        raise TypeError(f"{name}: dtype must be uint8 or float8_e8m0fnu, got {short(scales.dtype)}")
    if scales.ndim < 2:
        raise ValueError(f"{name}: must have shape (..., rows, cols), got {tuple(scales.shape)}")
    return scales.view(torch.uint8)


def rows_in_use(offsets: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Whether each of ``num_rows`` rows comes before the last of ``offsets``: (num_rows,) bool."""
    return torch.arange(num_rows, device=offsets.device) < offsets[-1]


def _scale_rows_of_tokens(
    expert_offsets: torch.Tensor, scale_offsets: torch.Tensor, num_tokens: int, num_scale_rows: int
) -> torch.Tensor:
    """For each of T rows its scale row among all padded experts, (T,) int64; S, one past the last,
    for rows that no expert owns. Never more than S, whatever the layout holds: on a GPU an index
    out of range would end the process."""
    rows = torch.arange(num_tokens, device=expert_offsets.device)
    expert = torch.searchsorted(expert_offsets[1:].to(torch.int64), rows, right=True)
    expert = expert.clamp_max(expert_offsets.numel() - 2)
    scale_rows = rows - expert_offsets[expert] + scale_offsets[expert]
    inside = scale_rows.clamp_max(num_scale_rows - 1).clamp_min(0)
    return torch.where(rows_in_use(expert_offsets, num_tokens), inside, num_scale_rows)


def swizzle_grouped_scales(
    linear: torch.Tensor, expert_offsets: torch.Tensor, scale_offsets: torch.Tensor, num_scale_rows: int
) -> torch.Tensor:
    """Row-major scales of T rows, (T, K/32) uint8, to a grouped operand's (S, C), padding zero. No
    shape depends on device data, so nothing syncs."""
    num_tokens, cols = linear.shape
    padded = linear.new_zeros(num_scale_rows + 1, cols)
    padded[_scale_rows_of_tokens(expert_offsets, scale_offsets, num_tokens, num_scale_rows)] = linear
    return swizzle_scales(padded[:num_scale_rows])


def unswizzle_grouped_scales(
    scales: torch.Tensor, expert_offsets: torch.Tensor, scale_offsets: torch.Tensor, num_tokens: int, cols: int
) -> torch.Tensor:
    """The inverse: (S, C) to (T, ``cols``) uint8, 0 in rows that no expert owns."""
    num_scale_rows = scales.shape[0]
    linear = unswizzle_scales(scales, num_scale_rows, cols)
    padded = torch.cat([linear, linear.new_zeros(1, cols)])
    return padded[_scale_rows_of_tokens(expert_offsets, scale_offsets, num_tokens, num_scale_rows)]


def scale_values(scales: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """E8M0 bytes as ``2**(b - 127)``, exact in fp32 (0 is subnormal there); 255 is NaN."""
    b = scales.to(torch.int32)
    bits = torch.where(b == 0, 0x00400000, b << 23)
    bits = torch.where(b == E8M0_NAN, 0x7FC00000, bits).to(torch.int32)
    return bits.view(torch.float32).to(dtype)


def dequantize(values: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """values (..., K) e4m3 times row-major scales (..., K/32) uint8: (..., K) in ``dtype``. Exact
    in float64; in float32 all but a value that reaches 2**128, which becomes Inf."""
    blocks = _decode(values, dtype).unflatten(-1, (-1, BLOCK_SIZE))
    product: torch.Tensor = blocks.mul_(scale_values(scales, dtype).unsqueeze(-1))
    return product.flatten(-2)


def _decode(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """e4m3 in ``dtype``, new memory; on a CPU by a table, five times as fast as PyTorch."""
    if not values.is_cpu:
        return values.to(dtype)
    table = torch.arange(256, dtype=torch.uint8, device=values.device).view(torch.float8_e4m3fn).to(dtype)
    return table.index_select(0, values.view(torch.uint8).flatten().int()).view(values.shape)


def dequantize_grouped(
    values: torch.Tensor,
    scales: torch.Tensor,
    expert_offsets: torch.Tensor,
    scale_offsets: torch.Tensor,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """(T, K) in ``dtype`` of e4m3 and swizzled scales (S, C); 0 in rows that no expert owns."""
    num_tokens, k = values.shape
    linear = unswizzle_grouped_scales(scales, expert_offsets, scale_offsets, num_tokens, k // BLOCK_SIZE)
    owned = rows_in_use(expert_offsets, num_tokens).unsqueeze(1)
    return torch.where(owned, dequantize(values, linear, dtype), 0)


def dequantize_experts(values: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """(E, N, K) in ``dtype`` of e4m3 and swizzled scales (E, roundup(N, 128), C)."""
    _, n, k = values.shape
    return dequantize(values, unswizzle_scales(scales, n, k // BLOCK_SIZE), dtype)


def largest_of_group(of_blocks: torch.Tensor, scale_group: int, squares: bool = False) -> torch.Tensor:
    """For each block of (..., N, K/32) the largest number in its group, or in its square."""
    if squares:
        rows = of_blocks.shape[-2]
        padded = torch.nn.functional.pad(of_blocks, (0, 0, 0, -rows % 128))
        of_blocks = padded.unflatten(-2, (-1, 128)).amax(-2).repeat_interleave(128, -2)[..., :rows, :]
    blocks, size = of_blocks.shape[-1], scale_group // BLOCK_SIZE
    padded = torch.nn.functional.pad(of_blocks, (0, -blocks % size))
    largest: torch.Tensor = padded.unflatten(-1, (-1, size)).amax(-1)
    return largest.repeat_interleave(size, -1)[..., :blocks]


def find_scale_group(linear: torch.Tensor) -> tuple[int, bool]:
    """(scale_group, squares) of scales (..., N, K/32) uint8: 128 if the scales of each group are
    equal, else 32; and whether those of each square are equal and none is above 1. Syncs."""
    if is_tracing(linear) or not torch.equal(linear, largest_of_group(linear, 128)):
        return BLOCK_SIZE, False
    return 128, torch.equal(linear, largest_of_group(linear, 128, squares=True)) and at_most_one(linear)


def at_most_one(scales: torch.Tensor) -> bool:
    """Whether no scale (uint8) but NaN is above 2**0: products with others then fit fp32. Syncs;
    False of scales that are traced."""
    return not is_tracing(scales) and not bool(((scales > 127) & (scales != E8M0_NAN)).any())


def regroup(
    values: torch.Tensor, linear: torch.Tensor, scale_group: int, squares: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """values (N, K) e4m3 and row-major scales (N, K/32) uint8 with one scale a group or square, as
    new tensors. It is the largest scale of the blocks that are not all zeros. Elements of the other
    blocks become smaller by a power of two, and are rounded once if that makes them subnormal. A
    block of scale 255 makes its group, or its square, NaN."""
    codes = values.view(torch.uint8).unflatten(-1, (-1, BLOCK_SIZE))
    counts = (codes & 0x7F != 0).any(-1) | (linear == E8M0_NAN)
    shared = largest_of_group(torch.where(counts, linear, 0), scale_group, squares)
    shift = (shared.int() - linear).clamp(0, 126)  # zeros under a larger scale stay zeros
    factor = ((127 - shift) << 23).view(torch.float32)
    elements = values.float().unflatten(-1, (-1, BLOCK_SIZE)) * factor.unsqueeze(-1)
    rounded = elements.to(torch.float8_e4m3fn).view(torch.uint8)
    rounded = torch.where((shared == E8M0_NAN).unsqueeze(-1), E4M3_NAN, rounded)
    return rounded.flatten(-2).view(torch.float8_e4m3fn), shared
