"""What MXFP8 is, and where its scales lie: constants and padding arithmetic on plain ints.

An MXFP8 tensor is e4m3 elements plus one E8M0 scale per block of 32 consecutive elements along K
(OCP Microscaling Formats v1.0). The scales are stored in 128x4 tiles, the layout that CUTLASS and
cuBLAS read on Blackwell: a tile holds 128 rows by 4 scale columns (128 elements of K) in 512
consecutive bytes, and tiles follow one another along K first.
"""

from __future__ import annotations

from typing import Final

BLOCK_SIZE: Final = 32  # elements of K that share one scale
E4M3_MAX: Final = 448.0
E4M3_NAN: Final = 0x7F
E8M0_NAN: Final = 255

SCALE_TILE_ROWS: Final = 128
SCALE_TILE_COLS: Final = 4
SCALE_TILE_BYTES: Final = SCALE_TILE_ROWS * SCALE_TILE_COLS

MAX_INT32: Final = 2**31 - 1

SCALE_ROUNDING_BIAS: Final[dict[str, int]] = {
    "rceil": 0x1FFFFF,  # smallest b with amax <= 448 * 2**(b - 127): 448 is 1.75 * 2**8
    "floor": 0,  # OCP: floor(log2(amax)) - 8; elements above 448 saturate
    "even": 0x080000,  # amax first rounded half up to e4m3's 3 mantissa bits
}
"""What is added to the fp32 bits of a block's amax before its exponent is taken."""

SCALE_ROUNDINGS: Final = tuple(SCALE_ROUNDING_BIAS)
SCALE_GROUPS: Final = (32, 128)  # elements of K whose blocks have equal scales


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of ``multiple`` that is at least ``value``."""
    return (value + multiple - 1) // multiple * multiple


def ceil_div(value: int, divisor: int) -> int:
    """``value / divisor``, rounded up."""
    return (value + divisor - 1) // divisor


def next_power_of_2(value: int) -> int:
    """The smallest power of two that is at least ``value``, and at least 1."""
    return 1 << max(value - 1, 0).bit_length()


def scale_cols(k: int) -> int:
    """C: stored scale columns of K elements, K/32 rounded up to whole 128x4 tiles."""
    return round_up(k // BLOCK_SIZE, SCALE_TILE_COLS)


def padded_scale_rows(rows: int) -> int:
    """Stored scale rows of one operand of ``rows`` rows: rounded up to whole 128x4 tiles."""
    return round_up(rows, SCALE_TILE_ROWS)


def grouped_scale_rows(num_tokens: int, num_experts: int) -> int:
    """S: the tightest bound on the sum over experts of roundup(tokens, 128) that needs no device
    data: at most min(E, T) experts have a token, and each of these wastes at most 127 rows."""
    return token_tiles_bound(num_tokens, num_experts, SCALE_TILE_ROWS) * SCALE_TILE_ROWS


def token_tiles_bound(num_tokens: int, num_experts: int, block_t: int) -> int:
    """The most tiles of ``block_t`` rows of one expert each that T rows over E experts need."""
    return (num_tokens + (block_t - 1) * min(num_experts, num_tokens)) // block_t


def scale_offset(row: int, col: int, cols: int) -> int:
    """Byte of scale (row, col), of C = ``cols``, as in CuTe's ``Sm1xxBlockScaledConfig<32>``."""
    tile = (row // SCALE_TILE_ROWS) * (cols // SCALE_TILE_COLS) + col // SCALE_TILE_COLS
    return tile * SCALE_TILE_BYTES + (row % 32) * 16 + (row % SCALE_TILE_ROWS // 32) * 4 + col % SCALE_TILE_COLS
