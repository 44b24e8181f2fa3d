"""Bytes and flops of each job, counted from the group sizes: operands read once, results written
once.

Scales and their padding count; the few KB of offsets do not. Every function is pure and takes the
(E,) counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hybrid_mxfp8.core.formats import padded_scale_rows, scale_cols

BF16 = 2
INT32 = 4
FP8_BLOCK = 128 * 128
"""Elements of a weight that share a scale in FP8 checkpoints."""


@dataclass(frozen=True)
class Work:
    """Bytes moved at least, and floating point operations of the matrix unit."""

    bytes: int
    flops: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.bytes + other.bytes, self.flops + other.flops)


def _active(counts: Sequence[int]) -> int:
    return sum(c > 0 for c in counts)


def quantize(counts: Sequence[int], k: int, *, gather: bool = False, swiglu: bool = False) -> Work:
    """T*K read (twice that for gate and up), T*K codes and whole scale tiles written."""
    tokens = sum(counts)
    read = tokens * k * BF16 * (2 if swiglu else 1) + (tokens * INT32 if gather else 0)
    scales = sum(padded_scale_rows(c) for c in counts) * scale_cols(k)
    return Work(read + tokens * k + scales)


def gemm(counts: Sequence[int], n: int, k: int) -> Work:
    """Codes and scales of active experts' weights and of tokens, and the output; 2*T*N*K flops."""
    tokens = sum(counts)
    weights = _active(counts) * (n * k + padded_scale_rows(n) * scale_cols(k))
    rows = tokens * (k + scale_cols(k))
    return Work(weights + rows + tokens * n * BF16, 2 * tokens * n * k)


def gemm_bf16(counts: Sequence[int], n: int, k: int) -> Work:
    """The same product with operands in bf16."""
    tokens = sum(counts)
    return Work((_active(counts) * n * k + tokens * k + tokens * n) * BF16, 2 * tokens * n * k)


def gemm_fp8_rowwise(counts: Sequence[int], n: int, k: int) -> Work:
    """The same product with e4m3 operands and one fp32 scale a row."""
    tokens = sum(counts)
    return Work(_active(counts) * n * (k + 4) + tokens * (k + 4) + tokens * n * BF16, 2 * tokens * n * k)


def gemm_fp8_blocks(counts: Sequence[int], n: int, k: int) -> Work:
    """The same product with e4m3 operands and an fp32 scale for 1x128 of x and 128x128 of w."""
    tokens = sum(counts)
    weights = _active(counts) * (n * k + n * k // FP8_BLOCK * 4)
    return Work(weights + tokens * (k + k // 128 * 4) + tokens * n * BF16, 2 * tokens * n * k)


def moe(counts: Sequence[int], num_tokens: int, hidden: int, intermediate: int) -> Work:
    """A whole layer: tokens in and out in bf16, active experts' weights; no intermediate."""
    up = padded_scale_rows(2 * intermediate) * scale_cols(hidden)
    down = padded_scale_rows(hidden) * scale_cols(intermediate)
    weights = _active(counts) * (3 * hidden * intermediate + up + down)
    return Work(weights + 2 * num_tokens * hidden * BF16, 6 * sum(counts) * hidden * intermediate)


def moe_bf16(counts: Sequence[int], num_tokens: int, hidden: int, intermediate: int) -> Work:
    """The same layer with bf16 weights."""
    weights = _active(counts) * 3 * hidden * intermediate * BF16
    return Work(weights + 2 * num_tokens * hidden * BF16, 6 * sum(counts) * hidden * intermediate)


def moe_fp8_blocks(counts: Sequence[int], num_tokens: int, hidden: int, intermediate: int) -> Work:
    """The same layer with e4m3 weights and an fp32 scale for 128x128 of them."""
    elements = _active(counts) * 3 * hidden * intermediate
    tokens = 2 * num_tokens * hidden * BF16
    return Work(elements + elements // FP8_BLOCK * 4 + tokens, 6 * sum(counts) * hidden * intermediate)


def copy(elements: int) -> Work:
    """Each element read and written."""
    return Work(2 * elements * BF16)


def silu_mul(tokens: int, k: int) -> Work:
    """Gate and up read, their product written."""
    return Work(3 * tokens * k * BF16)
