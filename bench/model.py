"""A model of the grouped GEMM on a card that is not at hand: waves, bytes, MMA time. Everything
it says is modelled.

For exact group sizes, one tile configuration and one card::

    tiles   = sum over experts of ceil(N / 128) * ceil(tokens / token_tile), in whole clusters
    waves   = ceil(clusters of tiles / clusters that fit on the card)
    step    = max(MMA time, time to bring the step's operands from L2)      one step is 128 of K
    compute = waves * (steps * step + what the epilogue does not hide)
    memory  = bytes of :func:`work.gemm` / streaming rate
    time    = max(compute, memory) + launch

The constants come from datasheets and from published figures other than those that the model is
then compared with, so the comparison can fail. It explains
:func:`hybrid_mxfp8.cutlass_kernels.config.select_estimate`, whose own model knows only the average
group: the choice is shown with this model's time for it, beside the best that this model finds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from hybrid_mxfp8.cutlass_kernels.config import CONFIGS, TILE_K, WEIGHT_ROWS, GemmConfig, select_estimate

from . import work
from .report import table
from .shapes import MODELS, tokens_per_expert

EXPLAINED_TOKENS = (1, 128, 1024, 8192)
"""Tokens of a batch, before routing, for which choices are explained."""


@dataclass(frozen=True)
class Card:
    """A card as the model sees it.

    Attributes:
        name: of the card.
        sms: streaming multiprocessors.
        clock_ghz: of the SMs under load.
        macs_per_cycle: MXFP8 multiply-adds of one SM.
        l2_bytes_per_cycle: what one SM gets from L2 while all ask.
        streaming_tb_s: what a kernel reaches of the memory.
        launch_us: from the launch to the first tile, and the last tile's way out.
        drain_cycles_per_column: of the epilogue, for each token of a tile.
    """

    name: str
    sms: int
    clock_ghz: float
    macs_per_cycle: float
    l2_bytes_per_cycle: float
    streaming_tb_s: float
    launch_us: float
    drain_cycles_per_column: float


B200 = Card(
    name="B200",
    sms=148,
    clock_ghz=1.85,
    # The best published dense MXFP8 rate, 3201 TFLOP/s; the datasheet's 4500 would be 8192 at
    # this clock.
    macs_per_cycle=3201e12 / 2 / 148 / 1.85e9,
    l2_bytes_per_cycle=40,  # assumed: about 11 TB/s for the whole card
    streaming_tb_s=6.2,  # the best published rate of an MXFP8 quantizer, 131072 x 7168; the datasheet says 8
    launch_us=5.0,  # assumed: a prepare kernel, a launch and a last epilogue
    drain_cycles_per_column=8,  # assumed
)

EXPOSED_DRAIN_AT_256 = 0.5
"""Two accumulators of 256 columns leave no memory for scales: half the epilogue is not hidden."""


@dataclass(frozen=True)
class Prediction:
    """What the model says, in µs unless named otherwise. Modelled, never measured."""

    waves: int
    bytes: int
    mma_us: float
    l2_us: float
    compute_us: float
    memory_us: float
    us: float

    @property
    def bound(self) -> str:
        """What takes longest."""
        if self.memory_us >= self.compute_us:
            return "memory"
        return "MMA" if self.mma_us >= self.l2_us else "L2"


def predict(card: Card, config: GemmConfig, counts: Sequence[int], n: int, k: int) -> Prediction:
    """Time of one grouped GEMM with (E,) counts."""
    along_n, along_tokens = config.cluster
    weight_clusters = math.ceil(math.ceil(n / WEIGHT_ROWS) / along_n)
    token_clusters = sum(math.ceil(math.ceil(c / config.token_tile) / along_tokens) for c in counts)
    clusters = weight_clusters * token_clusters
    waves = math.ceil(clusters / max(card.sms // (along_n * along_tokens), 1))
    steps = math.ceil(k / TILE_K)

    mma = WEIGHT_ROWS * config.token_tile * TILE_K / card.macs_per_cycle
    # Weights are shared along the tokens of a cluster, tokens along its N; a pair of SMs is a
    # cluster of 2 along N.
    fetch = TILE_K * (WEIGHT_ROWS / along_tokens + config.token_tile / along_n) / card.l2_bytes_per_cycle
    drain = card.drain_cycles_per_column * config.token_tile
    exposed = drain * EXPOSED_DRAIN_AT_256 if config.token_tile >= 256 else 0.0

    def us(cycles: float) -> float:
        return cycles / card.clock_ghz / 1000

    job = work.gemm(counts, n, k)
    compute_us = us(waves * (steps * max(mma, fetch) + exposed))
    memory_us = job.bytes / card.streaming_tb_s / 1e6
    return Prediction(
        waves=waves,
        bytes=job.bytes,
        mma_us=us(waves * steps * mma),
        l2_us=us(waves * steps * fetch),
        compute_us=compute_us,
        memory_us=memory_us,
        us=max(compute_us, memory_us) + card.launch_us,
    )


@dataclass(frozen=True)
class Published:
    """A figure that others published for a B200, and the configuration to compare it under."""

    who: str
    counts: tuple[int, ...]
    n: int
    k: int
    config: GemmConfig
    us: float
    assumed: str


def _even(tokens: int, experts: int) -> tuple[int, ...]:
    return tuple(tokens_per_expert("uniform", tokens, experts, 0))


SGLANG = GemmConfig(2, 128, (4, 1))
TORCHAO_TFLOP_S = 2303
PUBLISHED = (
    Published("SGLang T 1024", _even(1024, 64), 4096, 4096, SGLANG, 180.1, "16 tokens an expert"),
    Published("SGLang T 32", _even(32, 32), 4096, 7168, SGLANG, 156.7, "1 token an expert"),
    Published(
        f"torchao M 131072, {TORCHAO_TFLOP_S} TF",
        _even(131072, 8),
        7168,
        2048,
        GemmConfig(2, 256, (2, 1)),
        2 * 131072 * 7168 * 2048 / TORCHAO_TFLOP_S / 1e6,
        "even groups, N 7168 and K 2048, and the tile",
    ),
)


def random_counts(tokens: int, experts: int) -> tuple[int, ...]:
    """(E,) counts of rows that each pick an expert at random, as select_estimate expects."""
    draws = np.random.default_rng(0).multinomial(tokens, np.full(experts, 1 / experts))
    return tuple(int(c) for c in draws)


def published_rows(card: Card) -> Iterable[tuple[str, ...]]:
    """Each published figure with the model's."""
    for p in PUBLISHED:
        q = predict(card, p.config, p.counts, p.n, p.k)
        times = f"{q.us:.1f}", f"{p.us:.1f}", f"{100 * (q.us / p.us - 1):+.1f} %"
        yield p.who, p.assumed, str(p.config), str(q.waves), q.bound, *times


def choice_rows(card: Card) -> Iterable[tuple[str, ...]]:
    """select_estimate's choice for each of the models' shapes, randomly routed, with this model's
    time for it, and the best configuration that it knows; of equals the first."""
    for model in MODELS:
        for n, k in model.gemms:
            for rows in (tokens * model.top_k for tokens in EXPLAINED_TOKENS):
                counts = random_counts(rows, model.experts)
                chosen = select_estimate(model.experts, n, k, rows, sm_count=card.sms).config
                found = predict(card, chosen, counts, n, k)
                least, best = min(((predict(card, c, counts, n, k).us, c) for c in CONFIGS), key=lambda pair: pair[0])
                loss_percent = 100 * (found.us / least - 1)
                yield (
                    f"{model.name} {rows}x{n}x{k} E{model.experts}",
                    str(chosen),
                    str(found.waves),
                    f"{found.bytes / 1e6:.0f}",
                    f"{found.mma_us:.1f}",
                    f"{found.l2_us:.1f}",
                    f"{found.memory_us:.1f}",
                    found.bound,
                    f"{found.us:.1f}",
                    str(best) if loss_percent > 0.5 else "the same time",
                    f"{loss_percent:.1f} %",
                )


PUBLISHED_HEADER = "figure|assumed|configuration|waves|bound by|modelled µs|published µs|difference"
CHOICES_HEADER = (
    "shape|chosen|waves|MB|MMA µs|L2 µs|memory µs|bound by|modelled µs|this model's best|lost by the choice"
)


def report(card: Card = B200) -> str:
    """The comparison with published figures and the explanation of every choice, in markdown."""
    return "\n".join(
        [
            f"# Modelled times of the CUTLASS backend on a {card.name}",
            "",
            "Nothing below was measured by this project: it is modelled, from datasheets and other projects' published figures.",
            "",
            "## Modelled against published",
            "",
            *table(PUBLISHED_HEADER.split("|"), published_rows(card)),
            "",
            "## select_estimate's choices, modelled",
            "",
            "Each row picks an expert at random.",
            "",
            *table(CHOICES_HEADER.split("|"), choice_rows(card)),
        ]
    )
