"""Where scales lie: 128x4 tiles, for one matrix and for rows grouped by expert. In PyTorch, on any
device.

The layout is that of CUTLASS and cuBLAS: ``formats.scale_offset`` states it for one scale, the
functions here for tensors.
"""

from __future__ import annotations

import torch

from hybrid_mxfp8.core.checks import check_int, short
from hybrid_mxfp8.core.formats import SCALE_TILE_BYTES, SCALE_TILE_COLS, SCALE_TILE_ROWS, padded_scale_rows, round_up


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
    padded = linear.new_zeros(*batch, padded_rows, padded_cols)
    padded[..., :rows, :cols] = linear
    # (row tile, row // 32 % 4, row % 32, column tile, column % 4), to be stored as (row tile,
    # column tile, row % 32, ...).
    tiles = padded.reshape(
        *batch, padded_rows // SCALE_TILE_ROWS, 4, 32, padded_cols // SCALE_TILE_COLS, SCALE_TILE_COLS
    )
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


def scale_rows_of_tokens(
    expert_offsets: torch.Tensor, scale_offsets: torch.Tensor, num_tokens: int, num_scale_rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """For each of T rows: its scale row (T,) int64 among all padded experts, and whether any expert
    owns it (T,) bool. A scale row of an owned row is always one of the S that there are, whatever
    numbers a layout holds: on a GPU an index out of range would end the process."""
    num_experts = expert_offsets.numel() - 1
    rows = torch.arange(num_tokens, device=expert_offsets.device)
    owned = rows < expert_offsets[-1]
    if not num_experts:
        return rows, owned
    expert = torch.searchsorted(expert_offsets[1:].to(torch.int64), rows, right=True).clamp_max(num_experts - 1)
    scale_rows = rows - expert_offsets[expert] + scale_offsets[expert]
    return scale_rows.clamp(0, max(num_scale_rows - 1, 0)), owned & (num_scale_rows > 0)


def swizzled_offsets(scale_rows: torch.Tensor, num_cols: int, padded_cols: int) -> torch.Tensor:
    """``formats.scale_offset``, elementwise: (rows, num_cols) int64."""
    row = scale_rows.to(torch.int64).unsqueeze(1)
    col = torch.arange(num_cols, device=scale_rows.device).unsqueeze(0)
    tile = (row // SCALE_TILE_ROWS) * (padded_cols // SCALE_TILE_COLS) + col // SCALE_TILE_COLS
    return tile * SCALE_TILE_BYTES + row % 32 * 16 + row % SCALE_TILE_ROWS // 32 * 4 + col % SCALE_TILE_COLS


def swizzle_grouped_scales(
    linear: torch.Tensor, expert_offsets: torch.Tensor, scale_offsets: torch.Tensor, num_scale_rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Row-major scales of T rows, (T, K/32) uint8, to a grouped operand's (S, C), padding zero; and
    which rows are owned, (T,). No shape depends on device data, so nothing syncs: rows that no
    expert owns land in one row more, which is cut off."""
    num_tokens, cols = linear.shape
    scale_row, owned = scale_rows_of_tokens(expert_offsets, scale_offsets, num_tokens, num_scale_rows)
    padded = linear.new_zeros(num_scale_rows + 1, round_up(cols, SCALE_TILE_COLS))
    padded[torch.where(owned, scale_row, num_scale_rows), :cols] = linear
    return swizzle_scales(padded[:num_scale_rows]), owned


def unswizzle_grouped_scales(
    scales: torch.Tensor, expert_offsets: torch.Tensor, scale_offsets: torch.Tensor, num_tokens: int, cols: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The inverse: (S, C) to (T, ``cols``) uint8, anything in rows without an expert; and (T,)."""
    scale_row, owned = scale_rows_of_tokens(expert_offsets, scale_offsets, num_tokens, scales.shape[0])
    offsets = swizzled_offsets(torch.where(owned, scale_row, 0), cols, scales.shape[1])
    # With no scale rows there is no owned row either.
    return (scales.reshape(-1)[offsets] if scales.numel() else offsets.to(torch.uint8)), owned
