"""Where a scale lies in its 128x4 tiles, for Triton kernels; ``core.formats.scale_offset`` is the
same in Python.

Tiles are 512 bytes and follow one another along K, so an offset is the sum of one part of the row
and one of the column.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def row_offset(row, num_column_tiles):
    """Bytes to a row's first scale; int64, since 2**31 scales can be exceeded."""
    return row.to(tl.int64) // 128 * num_column_tiles * 512 + row % 32 * 16 + row % 128 // 32 * 4


@triton.jit
def column_offset(col):
    """Bytes from a row's first scale to that of column ``col``, a block of 32 elements."""
    return col // 4 * 512 + col % 4


@triton.jit
def load_scale_tile(tile_ptr):
    """(128, 4) scales of one whole tile."""
    tile = tl.load(tile_ptr + tl.arange(0, 512))
    return tl.reshape(tl.trans(tl.reshape(tile, [32, 4, 4]), 1, 0, 2), [128, 4])


@triton.jit
def load_row_scales(scales_ptr, rows, valid, column_tile, num_column_tiles):
    """(rows, 4) scales of any rows, in one column of tiles."""
    offset = (row_offset(rows, num_column_tiles) + column_tile * 512)[:, None] + tl.arange(0, 4)[None, :]
    return tl.load(scales_ptr + offset, mask=valid[:, None], other=0)
