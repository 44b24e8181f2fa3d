"""The tile configurations of the CUTLASS backend, and the choice among them.

A grouped GEMM is cut into tiles of 128 rows of one expert's weights (256 for a pair of SMs) by
``token_tile`` of its tokens, each summed over all of K. :func:`select_estimate` is a pure function
of shapes. It estimates, for each configuration, how many waves of tiles the SMs need and how long a
step along K takes, against the time that memory needs for the bytes of the whole product:

    tiles = active experts * ceil(N / 128) * token tiles of an expert,
            each count rounded up to whole clusters
    step  = max(tensor core time of a 128 x token_tile x 128 product,
                shared memory time of its operands, written once and read once,
                L2 time of the bytes that reach the cluster)
    time  = max(ceil(tiles / SMs) * steps * step, HBM time) + fill and drain of the pipeline

Every constant below is modelled, from published rates of the B200; none has been fitted to a
measurement yet.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

from hybrid_mxfp8.core.formats import BLOCK_SIZE, ceil_div, next_power_of_2, round_up

WEIGHT_ROWS = 128  # rows of the weights that one SM takes
TILE_K = 128
TOKEN_TILES = (64, 128, 192, 256)
CLUSTERS = {1: ((1, 1), (2, 1), (4, 1), (1, 2), (2, 2)), 2: ((2, 1), (4, 1), (2, 2), (4, 2))}
"""Clusters tried for each number of SMs an MMA spans, as (along N, along the tokens), in CTAs."""

# Modelled: B200 at 1.85 GHz, 148 SMs, 4.5 PFLOP/s dense MXFP8, 8 TB/s HBM3e of which 7 are reached.
SM_COUNT = 148
CLOCK_GHZ = 1.85
MACS_PER_CYCLE = 8192  # of one SM
SHARED_BYTES_PER_CYCLE = 128  # of one SM
L2_BYTES_PER_CYCLE = 40  # of one SM, all SMs at once
HBM_BYTES_PER_CYCLE = 3800  # of the GPU
LAUNCH_CYCLES = 6000  # prepare kernel, launch, first descriptor
DRAIN_CYCLES_PER_COLUMN = 8  # epilogue of the last tile, per token of the tile


class GemmConfig(NamedTuple):
    """One way to tile the product. Where the preferred cluster does not fit on the GPU, the
    hardware takes (cta_group, 1)."""

    cta_group: int  # SMs that one MMA spans, 1 or 2
    token_tile: int  # tokens of a tile: 64, 128, 192 or 256
    cluster: tuple[int, int]  # preferred CTAs of a cluster, (along N, along the tokens)

    @property
    def module(self) -> str:
        """What is compiled, like ``2sm_256x128x128``; the cluster is chosen at launch."""
        return f"{self.cta_group}sm_{WEIGHT_ROWS * self.cta_group}x{self.token_tile}x{TILE_K}"

    def __str__(self) -> str:
        """All of it, like ``2sm_256x128x128_4x1``."""
        return f"{self.module}_{self.cluster[0]}x{self.cluster[1]}"

    @classmethod
    def parse(cls, name: str) -> GemmConfig:
        """The configuration of this name, by default the smallest cluster; ValueError lists all."""
        if name not in BY_NAME:
            expected = f"expected one of {', '.join(MODULES)}, each optionally with a cluster like _4x1"
            raise ValueError(f"config: {expected}, got {name!r}")
        return BY_NAME[name]


CONFIGS = tuple(
    GemmConfig(cta_group, token_tile, cluster)
    for cta_group in (1, 2)
    for token_tile in TOKEN_TILES
    for cluster in CLUSTERS[cta_group]
)
"""All that select_estimate chooses from."""

MODULES = tuple(dict.fromkeys(config.module for config in CONFIGS))
"""All that is ever compiled, per output type."""

BY_NAME = {
    name: config
    for cta_group in (1, 2)
    for token_tile in TOKEN_TILES  # what CUTLASS's block-scaled mainloop takes
    for along_tokens in (4, 2, 1)  # scales are multicast to at most 4 CTAs a side
    for along_n in (4, 2, 1)
    if along_n % cta_group == 0  # whole pairs of SMs
    for config in [GemmConfig(cta_group, token_tile, (along_n, along_tokens))]
    for name in (str(config), config.module)
}
"""All that the kernel can be. A module's name means the smallest cluster, which comes last."""


@dataclass(frozen=True)
class Estimate:
    """What the model says of one configuration; cycles of an SM."""

    config: GemmConfig
    waves: int
    compute_cycles: float
    memory_cycles: float
    overhead_cycles: float

    @property
    def cycles(self) -> float:
        """In all."""
        return max(self.compute_cycles, self.memory_cycles) + self.overhead_cycles

    def __str__(self) -> str:
        bound = "memory" if self.memory_cycles >= self.compute_cycles else "tiles"
        microseconds = self.cycles / CLOCK_GHZ / 1000
        return f"{self.config}: {self.waves} waves, bound by {bound}, {microseconds:.1f} us modelled"


def estimate(
    config: GemmConfig, num_experts: int, n: int, k: int, num_tokens: int, sm_count: int, out_bytes: int
) -> Estimate:
    """The model of the module's docstring, for tokens spread evenly at random over the experts."""
    active = num_experts * -math.expm1(num_tokens * math.log1p(-1 / num_experts)) if num_experts > 1 else 1.0
    tokens = num_tokens / active
    # A ragged count leaves its last tile half empty on average.
    token_tiles = max(1.0, tokens / config.token_tile + 0.5)
    along_n, along_tokens = config.cluster
    weight_tiles = round_up(ceil_div(n, WEIGHT_ROWS), along_n)
    tiles = active * weight_tiles * math.ceil(token_tiles / along_tokens) * along_tokens
    clusters = max(1, sm_count // (along_n * along_tokens))
    waves = math.ceil(tiles / (clusters * along_n * along_tokens))

    multiply = WEIGHT_ROWS * config.token_tile * TILE_K / MACS_PER_CYCLE
    # A pair of SMs splits the tokens of a tile, and each holds its half.
    shared = 2 * TILE_K * (WEIGHT_ROWS + config.token_tile / config.cta_group) / SHARED_BYTES_PER_CYCLE
    read = TILE_K * (WEIGHT_ROWS / along_tokens + config.token_tile / along_n) / L2_BYTES_PER_CYCLE
    steps = ceil_div(k, TILE_K)

    element = 1 + 1 / BLOCK_SIZE
    bytes_moved = active * n * k * element + num_tokens * k * element + num_tokens * n * out_bytes
    return Estimate(
        config,
        waves,
        compute_cycles=waves * steps * max(multiply, shared, read),
        memory_cycles=bytes_moved / HBM_BYTES_PER_CYCLE,
        overhead_cycles=LAUNCH_CYCLES + config.token_tile * DRAIN_CYCLES_PER_COLUMN,
    )


def token_bucket(num_tokens: int) -> int:
    """``num_tokens`` rounded up to 1/16 of the power of two below it: few choices to remember."""
    return round_up(num_tokens, max(1, next_power_of_2(num_tokens) // 32))


def select_estimate(
    num_experts: int, n: int, k: int, num_tokens: int, sm_count: int = SM_COUNT, out_bytes: int = 2
) -> Estimate:
    """The configuration with the least modelled time, with that time, for T = ``num_tokens`` rows
    of E experts, both at least 1, and ``out_bytes`` an output element."""
    return _select(num_experts, n, k, token_bucket(num_tokens), sm_count, out_bytes)


@functools.lru_cache(maxsize=4096)
def _select(num_experts: int, n: int, k: int, num_tokens: int, sm_count: int, out_bytes: int) -> Estimate:
    fitting = (config for config in CONFIGS if config.cluster[0] * config.cluster[1] <= sm_count)
    estimates = (estimate(config, num_experts, n, k, num_tokens, sm_count, out_bytes) for config in fitting)
    # Of equals the smaller cluster: it is easier to place.
    return min(estimates, key=lambda e: (e.cycles, e.config.cluster[0] * e.config.cluster[1]))
