"""Input bit patterns for the quantizer: where a scale or an element changes, at every exponent, and
random bits.

A block of 32 is a head, which is the amax, and 31 elements at chosen distances below it: beyond
2**17 or so below the amax everything rounds to zero, so that blocks of independent random bits
would test little but the amax.
"""

from __future__ import annotations

import torch

DISTANCES = 20
"""Binary orders of magnitude below the amax: e4m3 spans 18, with its subnormals."""

SCALE_EDGES = [m + d for m in (0x080000, 0x5FFFFF, 0x600000, 0x780000) for d in (-1, 0, 1)] + [0, 1, 0x400000, 0x7FFFFF]
"""Mantissas of an amax around those where one of the three roundings takes the next scale."""


def _as_floats(bits: torch.Tensor) -> torch.Tensor:
    """(..., 32) magnitudes as fp32 bits in int64, every other one negative, to (R, 1024) fp32."""
    negative = (torch.arange(bits.numel()).reshape(bits.shape) % 3 == 1).long() << 31
    return (bits | negative).to(torch.uint32).reshape(-1, 1024).view(torch.float32)


def _blocks(heads: torch.Tensor, distances: torch.Tensor, mantissas: torch.Tensor) -> torch.Tensor:
    """Heads (B,), fp32 bits without sign, over 31 elements of these distances and mantissas."""
    exponents = (heads >> 23)[:, None] - distances
    normal = (exponents << 23) + mantissas
    subnormal = (2**23 + mantissas) >> (1 - exponents).clamp(1, 24)
    elements = torch.where(exponents >= 1, normal, subnormal).minimum(heads[:, None])
    # The amax at any place of its block.
    blocks = torch.cat([heads[:, None], elements], dim=1)
    shift = torch.arange(heads.numel())[:, None]
    return blocks.gather(1, (torch.arange(32)[None, :] + shift) % 32)


def fp32_edges(rng: torch.Generator, repeats: int = 8) -> torch.Tensor:
    """(R, 1024): heads of every exponent; elements within 2 of where e4m3 rounds the other way."""
    exponents = torch.arange(255, dtype=torch.int64) << 23
    heads = (exponents[:, None] + torch.tensor(SCALE_EDGES)).reshape(-1).repeat(repeats)
    heads = heads[: heads.numel() // 32 * 32]
    size = (heads.numel(), 31)
    distances = torch.randint(0, DISTANCES, size, generator=rng)
    # Halfway between neighbours is a multiple of 2**19 in normal results, of up to 2**23 in
    # subnormal ones.
    shift = torch.randint(19, 24, size, generator=rng)
    halfway = torch.randint(0, 2**23, size, generator=rng) >> shift << shift
    mantissas = halfway + torch.randint(-2, 3, size, generator=rng)
    return _as_floats(_blocks(heads, distances, mantissas.clamp(0, 0x7FFFFF)))


def fp32_random(rng: torch.Generator, blocks: int = 2**15) -> torch.Tensor:
    """(R, 1024): random heads and random mantissas."""
    heads = torch.randint(0, 0x7F800000, (blocks,), generator=rng)
    size = (blocks, 31)
    distances, mantissas = (torch.randint(0, limit, size, generator=rng) for limit in (DISTANCES, 2**23))
    return _as_floats(_blocks(heads, distances, mantissas))


def fp32_raw(rng: torch.Generator, rows: int = 128) -> torch.Tensor:
    """(rows, 1024): 32 random bits each, NaN and Inf among them."""
    return torch.randint(-(2**31), 2**31, (rows, 1024), generator=rng).to(torch.int32).view(torch.float32)


def every_code_below_an_amax(dtype: torch.dtype) -> torch.Tensor:
    """(R, 1024): each finite code of a 16-bit dtype at each distance below an amax."""
    mantissa_bits, largest = {torch.bfloat16: (7, 0x7F7F), torch.float16: (10, 0x7BFF)}[dtype]
    codes = torch.arange(0, largest + 1, dtype=torch.int64)
    codes = torch.nn.functional.pad(codes, (0, -codes.numel() % 31)).reshape(-1, 31)
    parts = []
    for distance in range(DISTANCES):
        heads = (codes.amax(dim=1, keepdim=True) + (distance << mantissa_bits)).clamp_max(largest)
        parts.append(torch.cat([codes, heads], dim=1))
    blocks = torch.cat([*parts, *(part | 0x8000 for part in parts)])
    blocks = torch.nn.functional.pad(blocks, (0, 0, 0, -blocks.shape[0] % 32))
    return blocks.to(torch.uint16).reshape(-1, 1024).view(dtype)


def distinct(*tensors: torch.Tensor) -> int:
    """How many different bit patterns they hold."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensors[0].element_size()]
    return torch.cat([t.contiguous().view(bits).reshape(-1) for t in tensors]).unique().numel()
