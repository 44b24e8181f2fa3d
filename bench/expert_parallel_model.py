"""What experts spread over 2 to 256 ranks send and compute: a model on paper. Everything it says is
modelled.

A rank of M tokens, R ranks, 8 of them a machine. Bytes are those that a rank sends:

    all_gather       a token goes to each other rank, and a part comes back from each:
                     (R - 1) * M * (there + back); into a machine each token comes once, shared out
                     over its 8 network cards: (R - 8) / 8 * M * (there + back)
    all_to_all       a token goes to the ranks of its experts, d of the R - 1 others on average:
                     d * M * (there + back), of which the share of other machines by network

``there`` is 2H bytes in bf16 and 33/32 H in MXFP8, plus 8 a choice; ``back`` 2H. Time is that of
the slower link, plus the experts': the larger of their products at a grouped GEMM's rate and of
their weights at the memory's. Launches are not in it, but for one latency a collective: two, and
for all_to_all a third, of the counts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from hybrid_mxfp8.core.token_record import TokenRecord

from .shapes import ModelShape

GPUS_A_MACHINE = 8
NVLINK_BYTES_PER_US = 360e3
"""450 GB/s of an H100's fourth generation, in one direction, at 0.8 of which NCCL's collectives
run."""
NETWORK_BYTES_PER_US = 45e3
"""A card of 400 Gb/s for each GPU, at 0.9."""
LATENCY_US = {"nvlink": 12.0, "network": 30.0}
"""Of a collective."""
FLOPS_PER_US = 450e6
"""Of a layer of 8192 tokens on an H100: bench/results/h100-80gb-hbm3-2026-11-25-full.md."""
MEMORY_BYTES_PER_US = 2.8e6
"""Weights, there."""
RANKS = (2, 4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Estimate:
    """Of one rank and one call: bytes by NVLink and by network, and µs."""

    nvlink_bytes: float
    network_bytes: float
    communication_us: float
    experts_us: float

    @property
    def us(self) -> float:
        """One after the other."""
        return self.communication_us + self.experts_us


def other_ranks(model: ModelShape, ranks: int) -> float:
    """d: ranks beside a token's own that hold one of its experts, on average; experts evenly
    likely."""
    held = model.experts / ranks
    missed = math.prod((model.experts - held - k) / (model.experts - k) for k in range(model.top_k))
    return (ranks - 1) * (1 - max(missed, 0.0))


def estimate(model: ModelShape, tokens: int, ranks: int, *, mxfp8: bool, dispatch: str) -> Estimate:
    """One layer with ``tokens`` tokens a rank; pure."""
    back = 2 * model.hidden
    there = TokenRecord(model.hidden, model.top_k).size if mxfp8 else back + 8 * model.top_k
    token = tokens * (there + back)
    far = max(ranks - GPUS_A_MACHINE, 0)
    if dispatch == "all_gather":
        network = token * far / GPUS_A_MACHINE
        nvlink = token * (ranks - 1) - network
    else:
        sent = token * other_ranks(model, ranks)
        network = sent * far / (ranks - 1)
        nvlink = sent - network
    latency = (2 if dispatch == "all_gather" else 3) * LATENCY_US["network" if far else "nvlink"]
    communication = latency + max(nvlink / NVLINK_BYTES_PER_US, network / NETWORK_BYTES_PER_US)

    elements = 3 * model.hidden * model.intermediate
    hit = 1 - (1 - model.top_k / model.experts) ** (ranks * tokens)
    weights = elements * 33 / 32 * model.experts / ranks * hit
    flops = 2 * elements * tokens * model.top_k  # of R * M * top_k rows every rank has one in R
    return Estimate(nvlink, network, communication, max(flops / FLOPS_PER_US, weights / MEMORY_BYTES_PER_US))


def table(model: ModelShape, tokens: int) -> str:
    """A markdown table: a row for each number of ranks."""
    ways = [(mxfp8, dispatch) for dispatch in ("all_gather", "all_to_all") for mxfp8 in (False, True)]
    titles = [f"{dispatch} {'MXFP8' if mxfp8 else 'bf16'}" for mxfp8, dispatch in ways]
    lines = [
        f"{model.name}, {tokens} tokens a rank: MB that a rank sends (of these by network), µs of the layer",
        "",
        f"| ranks | experts µs | {' | '.join(titles)} |",
        "| --- " * (2 + len(ways)) + "|",
    ]
    for ranks in RANKS:
        if ranks > model.experts:
            break
        found = [estimate(model, tokens, ranks, mxfp8=mxfp8, dispatch=dispatch) for mxfp8, dispatch in ways]
        cells = [
            f"{(e.nvlink_bytes + e.network_bytes) / 1e6:.1f} ({e.network_bytes / 1e6:.1f}), {e.us:.0f}" for e in found
        ]
        lines.append(f"| {ranks} | {found[0].experts_us:.0f} | {' | '.join(cells)} |")
    return "\n".join(lines)
