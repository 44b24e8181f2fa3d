"""Which tile the Hopper FP8 grouped GEMM takes. Plain ints, no Gluon."""

from __future__ import annotations

from dataclasses import dataclass

from hybrid_mxfp8.core.formats import MAX_INT32, SCALE_TILE_BYTES, grouped_scale_rows, scale_cols
from hybrid_mxfp8.triton_kernels.gemm.hopper_config import SHARED_MEMORY, hopper_takes

MAX_EXPERTS = 512  # the warp that feeds the others holds all experts' offsets in registers


@dataclass(frozen=True)
class HopperFp8Config:
    """A tile of 128 weight rows by ``block_t`` tokens, in stages of 128 columns. One with at most
    half as many tokens multiplies half."""

    block_t: int  # tokens of a tile: 32, 64 or 128
    num_stages: int  # of the ring; each warpgroup multiplies one, and waits for the next meanwhile
    squares: bool = False  # weights have one scale for 128x128: 128 tokens of a whole tile are rows

    @property
    def w_words(self) -> int:
        """Words of a weights' scale tile that are loaded: all, or the first line of a square's."""
        return 32 if self.squares else 128

    @property
    def registers(self) -> tuple[int, int]:
        """Of a thread on average, and of one that multiplies. Narrow tiles leave room for blocks of
        the next kernel, which then start while this one ends: a layer of 4, 16, 64 and 256 tokens
        takes 5, 3, 2 and 2 % less. The wide tile gains nothing from fewer registers."""
        return {32: (88, 104), 64: (104, 128), 128: (168, 224)}[self.block_t]

    @property
    def shared_memory(self) -> int:
        """Bytes: codes, two scale tiles, scales as fp32, the tile's place, 3 barriers a stage. Of
        squares it is less."""
        rows = 128 + self.block_t
        return self.num_stages * (rows * 128 + 2 * SCALE_TILE_BYTES + rows * 4 + 128 + 24)

    def is_valid(self) -> bool:
        """The single statement of what the kernel takes."""
        return self.block_t in (32, 64, 128) and self.num_stages >= 3 and self.shared_memory <= SHARED_MEMORY


def select_hopper_fp8_config(num_tokens: int, num_experts: int, squares: bool) -> HopperFp8Config:
    """Tile by the average number of tokens an expert gets, and by whether weights have one scale
    for 128x128. Pure. Numbers: µs on an H200, (N, K, E) = (4096, 7168, 32) and (1536, 2048, 128),
    each token going to an expert at random; bench/results/hopper_fp8.md has all, and spread evenly.
    """
    if num_tokens <= 16 * num_experts:
        # Squares, 4 tokens an expert: 215.6 and 94.5, in tiles of 128 tokens 238.8 and 97.1; 16 an
        # expert: 219.9 and 101.3, in tiles of 128 224.3 and 101.2.
        return HopperFp8Config(32, 10 if squares else 9, squares)
    if num_tokens <= 40 * num_experts:
        # Layers of Qwen3-30B-A3B, squares, 24 and 32 tokens an expert: 182.7 and 190.9, in tiles of
        # 128 187.6 and 194.6, of 32 184.3 and 212.4; at 48 as long as in tiles of 128.
        return HopperFp8Config(64, 8 if squares else 7, squares)
    return HopperFp8Config(128, 6, squares)


def hopper_fp8_takes(num_tokens: int, num_experts: int, n: int, k: int) -> bool:
    """As for the bf16 kernel, with the tokens' scale tiles, and few enough experts."""
    token_scale_tiles = grouped_scale_rows(num_tokens, num_experts) // 128 * (scale_cols(k) // 4)
    return num_experts <= MAX_EXPERTS and token_scale_tiles <= MAX_INT32 and hopper_takes(num_tokens, num_experts, n, k)
