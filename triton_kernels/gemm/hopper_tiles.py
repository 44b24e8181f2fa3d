"""What both Hopper kernels do alike: which tile a program takes next, the ring of stages, and TMA's
view of an operand."""

from __future__ import annotations

import functools

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

from hybrid_mxfp8.core.formats import SCALE_TILE_BYTES
from hybrid_mxfp8.dispatch.buffers import Buffer, TensorMap

tma_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared  # its name before 3.7


@gluon.jit
def advance(stage, phase, STAGES: gl.constexpr):
    """The ring's next stage, and the parity of the round that it is in."""
    last = stage == STAGES - 1
    return gl.where(last, 0, stage + 1), gl.where(last, phase ^ 1, phase)


@gluon.jit
def split_last_wave(num_t_tiles, num_n_tiles, BLOCK_T: gl.constexpr):
    """(tiles that stay whole, parts that each other one is cut into, how many there are of both).

    Every wave gives each program a tile, but the last may have few. Its tiles are cut by tokens
    where each program still gets at most one part.
    """
    programs = gl.num_programs(0)
    tiles = num_t_tiles * num_n_tiles
    whole = tiles // programs * programs
    rest = tiles - whole
    parts = 1
    if BLOCK_T >= 128:
        parts = gl.where(rest * 2 <= programs, 2, 1)
    if BLOCK_T >= 256:
        parts = gl.where(rest * 4 <= programs, 4, parts)
    return whole, parts, whole + rest * parts


@gluon.jit
def tile_coordinates(index, whole, parts, num_n_tiles):
    """(token tile, n tile, part): a token tile's n tiles follow each other."""
    cut = gl.maximum(index - whole, 0)
    tile = gl.minimum(index, whole) + cut // parts
    t_tile = tile // num_n_tiles
    return t_tile, tile - t_tile * num_n_tiles, cut % parts


SCALE_WORDS = SCALE_TILE_BYTES // 4  # int32 words of a 128x4 tile of scales


@functools.cache
def _box_layout(swizzle: int, element_bits: int) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout(swizzle_byte_width=swizzle, element_bitwidth=element_bits, rank=2)


def tensor_map(buffer: Buffer, rows: int, columns: int, box_rows: int, box_columns: int) -> TensorMap:
    """TMA's view of a contiguous matrix: scale tiles as they are, the rest in swizzled lines."""
    size = buffer.dtype.itemsize
    swizzle = 0 if buffer.dtype == torch.int32 else min(box_columns * size, 128)
    return TensorMap(buffer, (rows, columns), (box_rows, box_columns), _box_layout(swizzle, 8 * size))
