"""The Hopper grouped GEMM's tile and what lies where in its workspace. No Gluon."""

from __future__ import annotations

from dataclasses import dataclass

from hybrid_mxfp8.core.formats import MAX_INT32, ceil_div, round_up, scale_cols, token_tiles_bound

COLUMN_GROUP = 64  # columns of bf16 tokens that are reordered among themselves
AVERAGES = (56, 128)  # tokens an expert up to which the first and the second tile are taken
MAX_TOKENS = MAX_INT32 - 256  # the most rows that the kernel takes
TILE_WORDS = 4  # int32 words of each entry in the list of token tiles
SHARED_MEMORY = 232448  # bytes of shared memory that a program can have on compute capability 9.0


@dataclass(frozen=True)
class HopperGemmConfig:
    """A tile of 128 weight rows by ``block_t`` tokens, fed in stages of ``block_k`` columns."""

    block_t: int  # 16, 32, 64, 128 or 256
    small_block_t: int  # 16, 32 or 64: what a tile of so few tokens loads and multiplies
    block_k: int  # 64 or 128
    num_stages: int  # depth of the ring in shared memory
    fused_dequantize: bool = False  # by spare warps, of all but the first tiles' tokens

    @property
    def shared_memory(self) -> int:
        """Bytes of the ring: weights, bf16 tokens, a scale tile and two barriers a stage."""
        return self.num_stages * (128 * self.block_k + 2 * self.block_t * self.block_k + 512 + 16)

    def is_valid(self) -> bool:
        """The single statement of what the kernel takes; with Triton 3.8 ``plan`` widens
        ``small_block_t`` afterwards."""
        return (
            self.block_t in (16, 32, 64, 128, 256)
            and self.small_block_t in (16, 32, 64)
            and self.small_block_t <= self.block_t
            and self.block_k in (64, 128)
            and self.num_stages >= 2
            and self.shared_memory <= SHARED_MEMORY
        )


def select_hopper_config(num_tokens: int, num_experts: int) -> HopperGemmConfig:
    """Tile by the average number of tokens an expert gets, the only thing the host knows. Pure.

    What an expert gets beyond or below the average, the kernel sees: tiles of few tokens do less,
    and the last tiles are cut so that all programs get one. Numbers: µs on an H100 (2026-11-24,
    torch 2.11, Triton 3.6, CUDA-graph replay, normal data), dequantize_tokens included, (N, K, E) =
    (4096, 7168, 32) if not said otherwise; bench/results/hopper_gemm_attempts.md has them all.
    """
    average = num_tokens / max(num_experts, 1)
    if average <= AVERAGES[0]:
        # T 32: 335; 337 with tiles of 16 alone. T 256: 342 and 345; all on one expert 38 and 107. T
        # 1024: 368; 367 with small_block_t 32 and 6 stages. T 2048: 385; 395 with 6 stages; 392
        # with tiles of 128. But no router spreads tokens evenly, and an expert of 65 takes two
        # tiles. In another run, T 2048: 409 and with 128 421 where they are spread evenly, 474 and
        # 417 where each goes to an expert at random; T 1792: 382 and 389, 400 and 402.
        return HopperGemmConfig(64, 16, 128, 5)
    if average <= AVERAGES[1]:
        # T 4096: 458; 660 with 256 tokens, half of them padding.
        return HopperGemmConfig(128, 64, 128, 4)
    # T 8192: 700; 768 with all tokens dequantized before; 878 with 128 tokens. T 16384, (7168,
    # 2048, 8): 738, and 741 dequantized before, in runs where torch's bf16 took 736 and 709.
    return HopperGemmConfig(256, 64, 64, 5, fused_dequantize=True)


def largest_batches(num_tokens: int, num_experts: int) -> tuple[int, ...]:
    """The largest batch of up to ``num_tokens`` rows of each configuration."""
    rows = min(num_tokens, MAX_TOKENS)
    ends = (average * max(num_experts, 1) for average in AVERAGES)
    return (*(end for end in ends if end < rows), rows)


def tiles_at_once(programs: int, row_tiles: int) -> int:
    """How many token tiles the first ``programs`` tiles in the grid's order belong to."""
    return ceil_div(programs, row_tiles)


def hopper_takes(num_tokens: int, num_experts: int, n: int, k: int) -> bool:
    """Whether 32 bits reach every weight row, scale tile, and output of 512 rows."""
    scale_tiles = num_experts * ceil_div(n, 128) * (scale_cols(k) // 4)
    return num_tokens <= MAX_TOKENS and max(num_experts * n + 128, scale_tiles, 512 * n) <= MAX_INT32


@dataclass(frozen=True)
class WorkspaceLayout:
    """The workspace of one call: int32 words (1 + max_tiles, 4), then tokens (T, padded_k) in bf16,
    columns reordered in each 64, those from K on zero.

    The words are the number of token tiles and the slices of rows that the product's spare warps
    have taken; then of each tile its expert, first row, the expert's end row, and how many of its
    slices are written.
    """

    num_tokens: int  # T
    padded_k: int  # K rounded up to whole column groups
    max_tiles: int  # the most token tiles that T rows over E experts can need

    @classmethod
    def of(cls, num_tokens: int, num_experts: int, k: int, config: HopperGemmConfig) -> WorkspaceLayout:
        """The layout for T tokens of K columns in tiles of ``config.block_t``."""
        return cls(num_tokens, round_up(k, COLUMN_GROUP), token_tiles_bound(num_tokens, num_experts, config.block_t))

    @property
    def tokens_at(self) -> int:
        """Where the bf16 tokens start: a multiple of 256 bytes."""
        return round_up((1 + self.max_tiles) * TILE_WORDS * 4, 256)

    @property
    def size(self) -> int:
        """Bytes."""
        return self.tokens_at + self.num_tokens * self.padded_k * 2
