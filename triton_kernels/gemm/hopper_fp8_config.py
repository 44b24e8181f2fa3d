"""Which tile the Hopper FP8 grouped GEMM takes. Plain ints, no Gluon."""

from __future__ import annotations

from dataclasses import dataclass

from hybrid_mxfp8.core.formats import MAX_INT32, SCALE_TILE_BYTES, ceil_div, grouped_scale_rows, scale_cols
from hybrid_mxfp8.triton_kernels.gemm.hopper_config import SHARED_MEMORY, hopper_takes

MAX_EXPERTS = 512
"""The warp that feeds the others holds all experts' offsets in registers."""


@dataclass(frozen=True)
class HopperFp8Config:
    """A tile of 128 weight rows by ``block_t`` tokens, in stages of 128 columns.

    Attributes:
        block_t: tokens of a tile: 32, 64, 128 or 256.
        chunk: tokens of one product, two of which run at a time: ``block_t`` or a part of it.
        steps: stages after which all products are waited for: 1 or 2.
        small_t: a tile of so few tokens multiplies no more than these: 16 or 32, at most ``chunk``.
        num_stages: depth of the ring in shared memory.
    """

    block_t: int
    chunk: int
    steps: int
    small_t: int
    num_stages: int

    @property
    def box(self) -> int:
        """Tokens that TMA loads at once; a tile loads as many times as it needs."""
        return max(self.block_t // 8, 16)

    @property
    def shared_memory(self) -> int:
        """Bytes of the ring: codes, scales as they lie in memory and as fp32, what tile it is, and
        three barriers a stage."""
        scale_tiles = 1 + ceil_div(self.block_t, 128)
        rows = 128 + self.block_t
        return self.num_stages * (rows * 128 + scale_tiles * SCALE_TILE_BYTES + rows * 4 + 16 + 24)

    def is_valid(self) -> bool:
        """The single statement of what the kernel takes."""
        return (
            self.block_t in (32, 64, 128, 256)
            and self.chunk in (32, 64, 128)
            and self.chunk <= self.block_t
            and self.steps in (1, 2)
            and self.steps * self.block_t // self.chunk >= 2
            and self.small_t in (16, 32)
            and self.small_t <= self.chunk
            and self.num_stages >= 3
            and self.shared_memory <= SHARED_MEMORY
        )


def select_hopper_fp8_config(num_tokens: int, num_experts: int) -> HopperFp8Config:
    """Tile by the average number of tokens an expert gets. Pure.

    Numbers: µs on an H100, each token going to an expert at random, (N, K, E) = (4096, 7168, 32);
    bench/results/hopper_fp8_h100.md has all, and spread evenly.
    """
    average = num_tokens / max(num_experts, 1)
    if average <= 16:
        # 16: 335; 337 with 64 weight rows, 340 with 64 tokens.
        return HopperFp8Config(32, 32, 2, 16, 9)
    if average <= 64:
        # 64: 369; 370 with 256 tokens, 453 with 64, which half of the experts exceed.
        return HopperFp8Config(128, 128, 2, 32, 6)
    if average <= 192 or average > 512:
        # 128: 457, and 508 with 128 tokens. 2048: 4668 and 4996. That 192 tokens, 4 deviations
        # below 256, fit one tile is modelled.
        return HopperFp8Config(256, 64, 1, 32, 4)
    # 256: 763, and 859 with 256 tokens, of which half of the experts need a second tile.
    return HopperFp8Config(128, 128, 2, 32, 6)


def hopper_fp8_takes(num_tokens: int, num_experts: int, n: int, k: int) -> bool:
    """Whether 32 bits reach everything, as for the bf16 kernel, and every scale tile of the tokens;
    and whether the experts are few enough."""
    token_scale_tiles = grouped_scale_rows(num_tokens, num_experts) // 128 * (scale_cols(k) // 4)
    return num_experts <= MAX_EXPERTS and token_scale_tiles <= MAX_INT32 and hopper_takes(num_tokens, num_experts, n, k)
