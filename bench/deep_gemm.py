"""DeepGEMM's grouped GEMM: FP8 with a scale for 1x128 of x and for 128x128 of w, on Hopper.

Where the largest expert has fewer than 128 rows it is the masked layout, in which each expert has
room for as many; else the contiguous one, where each expert's rows begin at a multiple of 128. It
multiplies our codes with scales of one, laid out as it reads them without another kernel. Padding
is written before anything is timed.
"""

from __future__ import annotations

import torch

from . import work
from .peers import Absent, Contender, GemmInputs, check_product, find_function, rows_in_rooms

NAME = "DeepGEMM fp8"
ALIGNMENT = 128
"""Rows, of the contiguous layout."""
MASKED_ALIGNMENT = 64


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
    padded: list[tuple[torch.Tensor, ...]] = []
    for xq in inputs.xq:
        counts = xq.groups.tokens_per_expert.long()
        rooms = -(-counts // ALIGNMENT) * ALIGNMENT
        if masked:
            rooms = torch.full_like(counts, -(-largest // MASKED_ALIGNMENT) * MASKED_ALIGNMENT)
        owners, rows = rows_in_rooms(counts, rooms)
        values = torch.zeros(int(rooms.sum()), k, dtype=torch.uint8, device=rows.device)
        values[rows] = xq.values.view(torch.uint8)
        experts = torch.full(values.shape[:1], -1, dtype=torch.int32, device=rows.device)
        experts[rows] = owners.int()
        padded.append((values.view(torch.float8_e4m3fn), rows, experts))
    total, device = padded[0][0].shape[0], padded[0][0].device
    shape = (num_experts, total // num_experts) if masked else (total,)
    x_scales = torch.ones(*shape[:-1], k // 128, shape[-1], device=device).mT
    w_scales = torch.ones(num_experts, n // 128, k // 128, device=device)
    y = [torch.empty(*shape, n, dtype=torch.bfloat16, device=device) for _ in padded]
    average = -(-sum(inputs.counts) // num_experts)

    def call(i: int) -> object:
        values, _, experts = padded[i]
        x = values.view(*shape, k), x_scales
        w = inputs.wq[i % len(inputs.wq)].values, w_scales
        return gemm(x, w, y[i], *((inputs.xq[i].groups.tokens_per_expert, average) if masked else (experts,)))

    return Contender(
        NAME,
        call,
        work.gemm_fp8_blocks(inputs.counts, n, k),
        precision="fp8",
        note=f"not MXFP8: scales of 1x128 and 128x128; {'masked' if masked else 'contiguous'} layout",
        check=check_product(
            inputs.xq[0].values, inputs.wq[0].values, inputs.counts, lambda: y[0].view(total, n)[padded[0][1]]
        ),
    )
