"""Groups of 128: four neighbouring blocks of a row, from columns 0, 128, 256 and so on, with equal
scales. Squares: moreover those of 128 rows of weights, from row 0, 128, 256 and so on.

That is plain MXFP8, which every backend takes, and of which FP8 tensor cores can sum 128 elements
before a scale is needed. Where K or N is no multiple of 128 the last groups and squares are
smaller.
"""

from __future__ import annotations

import torch

from hybrid_mxfp8.core.checks import is_tracing
from hybrid_mxfp8.core.formats import BLOCK_SIZE, E4M3_NAN, E8M0_NAN


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
    """(group, squares) of scales (..., N, K/32) uint8: 128 where all blocks of each group have one
    scale, else 32, and whether those of each square have, none above 1. Syncs."""
    if is_tracing(linear):
        return BLOCK_SIZE, False
    if not torch.equal(linear, linear[..., ::4].repeat_interleave(4, -1)[..., : linear.shape[-1]]):
        return BLOCK_SIZE, False
    first = linear[..., ::128, :].repeat_interleave(128, -2)[..., : linear.shape[-2], :]
    return 128, torch.equal(linear, first) and at_most_one(linear)


def at_most_one(scales: torch.Tensor) -> bool:
    """Whether no scale (uint8) is above 2**0, but for NaN: times any other it fits fp32. Syncs."""
    return not bool(((scales > 127) & (scales != E8M0_NAN)).any())


def regroup(
    values: torch.Tensor, linear: torch.Tensor, scale_group: int, squares: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """values (N, K) e4m3 and row-major scales (N, K/32) uint8 with one scale a group or square, as
    new tensors. That is the largest scale of its blocks; those of zeros don't count. Elements of
    the other blocks become smaller by a power of two, and are rounded once if that takes them among
    e4m3's subnormals. A block of scale 255 makes its group, or its square, NaN."""
    codes = values.view(torch.uint8).unflatten(-1, (-1, BLOCK_SIZE))
    counts = (codes & 0x7F != 0).any(-1) | (linear == E8M0_NAN)
    shared = largest_of_group(torch.where(counts, linear, 0), scale_group, squares)
    shift = (shared.int() - linear).clamp(0, 126)  # zeros under a larger scale stay zeros
    factor = ((127 - shift) << 23).view(torch.float32)
    elements = values.float().unflatten(-1, (-1, BLOCK_SIZE)) * factor.unsqueeze(-1)
    rounded = elements.to(torch.float8_e4m3fn).view(torch.uint8)
    rounded = torch.where((shared == E8M0_NAN).unsqueeze(-1), E4M3_NAN, rounded)
    return rounded.flatten(-2).view(torch.float8_e4m3fn), shared
