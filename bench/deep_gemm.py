"""DeepGEMM's grouped GEMM: FP8 with a scale for 1x128 of x and for 128x128 of w, on Hopper.

Below 128 rows an expert it is the masked layout, where each expert has room for as many rows as the
largest; else the contiguous one, where each expert's rows begin at a multiple of 128. It multiplies
our codes with scales of one, laid out as it reads them without another kernel. Padding is written
before anything is timed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

import hybrid_mxfp8 as mx

from . import work
from .peers import Absent, Contender, GemmInputs, check_product, find_function

NAME = "DeepGEMM fp8"
ALIGNMENT = 128
"""Rows, of the contiguous layout."""
MASKED_ALIGNMENT = 64


@dataclass(frozen=True)
class Padded:
    """values (R, K) e4m3; rows (T,) of the tokens; experts (R,) int32, -1 of padding."""

    values: torch.Tensor
    rows: torch.Tensor
    experts: torch.Tensor


def pad(x: mx.GroupedMXFP8, room: int | None) -> Padded:
    """Give each expert ``room`` rows; None: its own number, up to a multiple of 128."""
    counts = x.groups.tokens_per_expert.long()
    rooms = torch.full_like(counts, room) if room else -(-counts // ALIGNMENT) * ALIGNMENT
    owners = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
    shift = (rooms.cumsum(0) - rooms) - (counts.cumsum(0) - counts)
    rows = torch.arange(len(owners), device=counts.device) + shift[owners]
    total = int(rooms.sum())
    values = torch.zeros(total, x.values.shape[1], dtype=torch.uint8, device=counts.device)
    values[rows] = x.values.view(torch.uint8)
    experts = torch.full((total,), -1, dtype=torch.int32, device=counts.device)
    experts[rows] = owners.int()
    return Padded(values.view(torch.float8_e4m3fn), rows, experts)


def deep_gemm(inputs: GemmInputs, capability: tuple[int, int]) -> Contender | Absent:
    """The contender."""
    num_experts, n, k = inputs.wq[0].values.shape
    largest = max(inputs.counts)
    masked = largest < ALIGNMENT
    reason = None
    if capability != (9, 0):
        reason = f"compared on compute capability 9.0, this card has {capability[0]}.{capability[1]}"
    elif n % 128 or k % 128:
        reason = f"needs N and K that are multiples of 128, got {n} and {k}"
    name = "fp8_m_grouped_gemm_nt_masked" if masked else "m_grouped_fp8_gemm_nt_contiguous"
    gemm = find_function("deep_gemm", name, reason)
    if isinstance(gemm, str):
        return Absent(NAME, gemm)
    room = -(-largest // MASKED_ALIGNMENT) * MASKED_ALIGNMENT if masked else None
    sets = [pad(xq, room) for xq in inputs.xq]
    total, device = sets[0].values.shape[0], sets[0].values.device
    rows = (num_experts, room) if room else (total,)
    x_scales = torch.ones(*rows[:-1], k // 128, rows[-1], device=device).mT
    w_scales = torch.ones(num_experts, n // 128, k // 128, device=device)
    y = [torch.empty(*rows, n, dtype=torch.bfloat16, device=device) for _ in sets]
    average = -(-sum(inputs.counts) // num_experts)

    def call(i: int) -> object:
        x = sets[i].values.view(*rows, k), x_scales
        w = inputs.wq[i % len(inputs.wq)].values, w_scales
        if masked:
            return gemm(x, w, y[i], inputs.xq[i].groups.tokens_per_expert, average)
        return gemm(x, w, y[i], sets[i].experts)

    return Contender(
        NAME,
        call,
        work.gemm_fp8_blocks(inputs.counts, n, k),
        precision="fp8",
        note=f"not MXFP8: scales of 1x128 and 128x128; {'masked' if masked else 'contiguous'} layout",
        check=check_product(
            inputs.xq[0].values, inputs.wq[0].values, inputs.counts, lambda: y[0].view(total, n)[sets[0].rows]
        ),
    )
