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
    room = -(-largest // MASKED_ALIGNMENT) * MASKED_ALIGNMENT
    average = -(-sum(inputs.counts) // num_experts)
    rooms = [num_experts * [room] if masked else [-(-c // ALIGNMENT) * ALIGNMENT for c in inputs.counts]]
