"""Shapes, dtypes, options and device of one step: all that the choice of a kernel depends on."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from hybrid_mxfp8.core.activation import SwiGLU
from hybrid_mxfp8.core.formats import BLOCK_SIZE
from hybrid_mxfp8.dispatch.buffers import Buffer
from hybrid_mxfp8.dispatch.device import capability

Support = tuple[bool, str]  # whether a backend can run something, and why, or what to do


class Problem(NamedTuple):
    """A grouped GEMM: (T, K) rows of E experts times their (N, K) weights."""

    num_experts: int
    n: int
    k: int
    num_tokens: int
    out_dtype: torch.dtype
    device: torch.device
    scale_group: int = BLOCK_SIZE  # 128 if both operands have such groups; may be ignored
    squares: bool = False  # whether weights have one scale for 128x128; counts only with groups of 128

    @property
    def capability(self) -> tuple[int, int] | None:
        """Compute capability; None on a CPU."""
        return capability(self.device)


class GemmBuffers(NamedTuple):
    """What a grouped GEMM reads and writes."""

    x_values: Buffer  # (T, K) e4m3
    x_scales: Buffer  # (S, C) uint8, swizzled
    tokens_per_expert: Buffer  # (E,) int32
    expert_offsets: Buffer  # (E+1,) int32
    scale_offsets: Buffer  # (E+1,) int32
    w_values: Buffer  # (E, N, K) e4m3
    w_scales: Buffer  # (E, roundup(N, 128), C) uint8, swizzled
    out: Buffer  # (T, N); rows that no expert owns keep what they hold
    workspace: Buffer | None  # (bytes,) uint8, 256-byte aligned


Grouping = Literal["offsets", "counts", "uniform"]
"""How rows belong to experts: by the offsets of a layout; by counts, from which the quantizer also
writes the layout; or the same number for each expert, as of weights."""


class QuantizeProblem(NamedTuple):
    """Quantization of rows grouped by expert; strides in elements, except ``scale_stride``."""

    num_rows: int  # T, or E*N of weights
    num_experts: int
    k: int
    num_source_rows: int  # R, rows of x: T, except for a gather and for tokens of a layer
    row_stride: int  # from one row of x to the next
    scale_rounding: str  # ``rceil``, ``floor`` or ``even``
    activation: SwiGLU | None = None  # x has 2K columns, [gate | up], and this of them is quantized
    grouping: Grouping = "offsets"  # how rows belong to experts
    expert_stride: int = 0  # from one expert of x to the next, of weights
    scale_group: int = BLOCK_SIZE  # elements of a row whose blocks get one scale: 32 or 128
    scale_stride: int = 0  # bytes from one row of ``x_scales`` to the next


class QuantizeBuffers(NamedTuple):
    """What a quantization reads and writes."""

    x: Buffer  # (R, K), or (R, 2K) with an activation, or (E, N, K); any row stride
    values: Buffer  # (T, K) e4m3, written
    scales: Buffer  # (S, C) uint8, swizzled, written
    row_index: Buffer | None = None  # (T,) int32, the source row of each output row
    expert_offsets: Buffer | None = None  # (E+1,) int32, read with grouping "offsets"
    scale_offsets: Buffer | None = None  # (E+1,) int32, read with grouping "offsets"
    counts: Buffer | None = None  # (E,) int32 or int64, read with grouping "counts"
    layout: Buffer | None = None  # (3E+2,) int32, written with grouping "counts"
    rows: Buffer | None = None  # (R, top_k) int32: where the choices of each row of x go, -1 for nowhere
    ids: Buffer | None = None  # (R, top_k) int32 or int64, their experts; with ``rows``
    x_scales: Buffer | None = None  # (R, K/32) uint8, row-major: x is e4m3 and copied, with ``rows`` alone


def split_layout(layout: Buffer, num_experts: int) -> tuple[Buffer, Buffer, Buffer]:
    """tokens_per_expert, expert_offsets and scale_offsets in a layout's memory, (3E+2,) int32."""
    e = num_experts
    operand, offset = layout.operand, layout.offset
    return (
        Buffer(operand, offset, torch.int32, (e,)),
        Buffer(operand, offset + 4 * e, torch.int32, (e + 1,)),
        Buffer(operand, offset + 4 * (2 * e + 1), torch.int32, (e + 1,)),
    )
