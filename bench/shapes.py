"""What is measured: shapes, how tokens are spread over experts, and the list of cases.

Pure: nothing here touches a GPU. T counts rows after routing, so a model's T is tokens times top-k.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

Distribution = Literal["uniform", "random", "zipf", "one_hot", "mostly_empty"]
DISTRIBUTIONS: tuple[Distribution, ...] = get_args(Distribution)
Kind = Literal["quantize", "gemm", "moe"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Variant = Literal["plain", "counts", "gather", "swiglu"]

ACTIVE_SHARE_WHEN_MOSTLY_EMPTY = 16
"""``mostly_empty`` gives tokens to one expert in this many."""


def tokens_per_expert(distribution: Distribution, num_tokens: int, num_experts: int, seed: int) -> list[int]:
    """(E,) counts that sum to ``num_tokens``; the seed only moves them among experts, so every
    seed costs the same.

    - uniform: as even as integers allow
    - random: each token goes to an expert drawn at random
    - zipf: the expert of rank r gets a share proportional to 1/r
    - one_hot: one expert gets all
    - mostly_empty: one expert in 16 (at least one), each as many as the others
    """
    if num_experts < 1 or num_tokens < 0:
        raise ValueError(f"num_experts: must be at least 1 and num_tokens at least 0, got {num_experts}, {num_tokens}")
    ranks = np.arange(num_experts)
    if distribution == "random":
        drawn = np.random.default_rng(0).integers(num_experts, size=max(num_tokens, 1))
        weights = np.bincount(drawn, minlength=num_experts).astype(float)
    elif distribution == "uniform":
        weights = np.ones(num_experts)
    elif distribution == "zipf":
        weights = 1.0 / (ranks + 1)
    elif distribution == "one_hot":
        weights = (ranks == 0).astype(float)
    elif distribution == "mostly_empty":
        weights = (ranks < max(num_experts // ACTIVE_SHARE_WHEN_MOSTLY_EMPTY, 1)).astype(float)
    else:
        raise ValueError(f"distribution: must be one of {', '.join(DISTRIBUTIONS)}, got {distribution!r}")
    exact = weights / weights.sum() * num_tokens
    counts = np.floor(exact).astype(np.int64)
    # Largest remainder; a stable sort gives ties to the lower rank.
    order = np.argsort(-(exact - counts), kind="stable")
    counts[order[: num_tokens - int(counts.sum())]] += 1
    return [int(c) for c in counts[np.random.default_rng(seed).permutation(num_experts)]]


@dataclass(frozen=True)
class ModelShape:
    """A mixture-of-experts layer: E experts of (2I, H) and (H, I), of which a token visits some."""

    name: str
    experts: int
    hidden: int
    intermediate: int
    top_k: int

    @property
    def gemms(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """(N, K) of the two products: up and gate, then down."""
        return (2 * self.intermediate, self.hidden), (self.hidden, self.intermediate)


MODELS: tuple[ModelShape, ...] = (
    ModelShape("DeepSeek-V3", 256, 7168, 2048, 8),
    ModelShape("Kimi-K2", 384, 7168, 2048, 8),
    ModelShape("Qwen3-235B-A22B", 128, 4096, 1536, 8),
    ModelShape("Qwen3-30B-A3B", 128, 2048, 768, 8),
    ModelShape("GLM-4.5", 160, 5120, 1536, 8),
    ModelShape("gpt-oss-120b", 128, 2880, 2880, 4),
    ModelShape("Llama-4-Scout", 16, 5120, 8192, 1),
    ModelShape("Llama-4-Maverick", 128, 5120, 8192, 1),
    ModelShape("Mixtral-8x7B", 8, 4096, 14336, 2),
)
MODEL_TOKENS = (1, 16, 128, 1024, 8192)
"""Tokens of a batch, before routing."""


@dataclass(frozen=True)
class Case:
    """One comparison: contenders that do the same job on the same inputs, timed in turns.

    Attributes:
        kind: quantize, gemm, or moe (a whole layer, routing and combine included).
        source: who set the shape: ``main``, ``SGLang``, ``torchao`` or a model.
        num_tokens: T; of moe M, before routing.
        n: N; 0 for quantize; of moe I.
        k: K; of moe H.
        num_experts: E.
        distribution: of T rows over E experts.
        variant: of quantize: ``plain``; ``counts``: with the group offsets computed in the timed
            call; ``gather``: rows picked by index; ``swiglu``: silu(gate) * up first.
        top_k: of moe, experts of a token, drawn evenly.
    """

    kind: Kind
    source: str
    num_tokens: int
    n: int
    k: int
    num_experts: int
    distribution: Distribution = "uniform"
    variant: Variant = "plain"
    top_k: int = 1

    @property
    def name(self) -> str:
        """Kind, variant, shape and distribution; unique in a run, whatever the source."""
        shape = f"{self.num_tokens}x{self.k}" if self.kind == "quantize" else f"{self.num_tokens}x{self.n}x{self.k}"
        variant = "" if self.variant == "plain" else f" {self.variant}"
        if self.kind == "moe":
            shape = f"{self.num_tokens}x{self.k}x{self.n}"
            variant = f" top-{self.top_k}"
        return f"{self.kind}{variant} {shape} E{self.num_experts} {self.distribution}"


def moe_case(model: ModelShape, tokens: int, source: str = "main") -> Case:
    """One layer of a model."""
    return Case("moe", source, tokens, model.intermediate, model.hidden, model.experts, top_k=model.top_k)


# The main shapes: (T, K, E, distribution) and (T, N, K, E).
MAIN_QUANTIZE: tuple[tuple[int, int, int, Distribution], ...] = (
    (131072, 7168, 8, "uniform"),
    (16384, 7168, 256, "zipf"),
    (8192, 2048, 8, "uniform"),
    (1024, 7168, 256, "uniform"),
    (256, 7168, 256, "uniform"),
    (8, 4096, 128, "uniform"),
)
MAIN_GEMMS: tuple[tuple[int, int, int, int], ...] = (
    (32, 4096, 7168, 32),
    (256, 4096, 7168, 32),
    (2048, 4096, 7168, 32),
    (8192, 4096, 7168, 32),
    (16384, 7168, 2048, 8),
)
MAIN_COUNTS = ((8, 4096, 128), (256, 7168, 256))
"""(T, K, E) of decode, where offsets are computed in the timed call."""
MAIN_FUSIONS = ((16384, 7168, 256), (16384, 2048, 256))
"""(T, K, E) of prefill, for gather and for SwiGLU."""
MAIN_MODELS = ("Qwen3-30B-A3B", "DeepSeek-V3")
"""Models, one layer of each at every one of MODEL_TOKENS."""


def _main_cases() -> list[Case]:
    cases = [Case("quantize", "main", t, 0, k, e, d) for t, k, e, d in MAIN_QUANTIZE]
    cases += [Case("quantize", "main", t, 0, k, e, variant="counts") for t, k, e in MAIN_COUNTS]
    for variant in ("gather", "swiglu"):
        cases += [Case("quantize", "main", t, 0, k, e, variant=variant) for t, k, e in MAIN_FUSIONS]
    cases += [Case("gemm", "main", t, n, k, e) for t, n, k, e in MAIN_GEMMS]
    cases += [moe_case(model, tokens) for model in MODELS if model.name in MAIN_MODELS for tokens in MODEL_TOKENS]
    return cases


def _sglang_cases() -> list[Case]:
    shapes = [(t, 4096, 4096, 64) for t in (1024, 2048, 4096)]
    powers = [32 << i for i in range(9)]  # 32 .. 8192
    shapes += [(t, 4096, 7168, 32) for t in powers] + [(t, 7168, 2048, 32) for t in powers]
    return [
        Case(kind, "SGLang", t, 0 if kind == "quantize" else n, k, e)
        for kind in ("quantize", "gemm")
        for t, n, k, e in shapes
    ]


def _torchao_cases() -> list[Case]:
    shapes = ((131072, 2048, 7168), (131072, 7168, 2048), (8192, 7168, 2048))
    groups = (1, 2, 4, 8)
    cases = [Case("quantize", "torchao", t, 0, k, g) for t, _, k in shapes for g in groups]
    return cases + [Case("gemm", "torchao", t, n, k, g) for t, n, k in shapes for g in groups]


def _model_cases() -> list[Case]:
    """Every model's GEMMs. Cases of one weight are neighbours."""
    cases = []
    for model in MODELS:
        for n, k in model.gemms:
            rows = [tokens * model.top_k for tokens in MODEL_TOKENS]
            cases += [Case("quantize", model.name, t, 0, k, model.experts) for t in rows]
            cases += [Case("gemm", model.name, t, n, k, model.experts) for t in rows]
    return cases


def _skew_cases() -> list[Case]:
    cases: list[Case] = []
    for distribution in DISTRIBUTIONS:
        for t in (256, 16384):
            cases.append(Case("quantize", "distribution", t, 0, 7168, 256, distribution))
        for t in (256, 8192):
            cases.append(Case("gemm", "distribution", t, 4096, 7168, 32, distribution))
    return cases


def _fp8_cases() -> list[Case]:
    """Sizes between the main ones and beyond, where FP8 of other libraries is the measure."""
    gemms = [
        Case("gemm", "DeepGEMM", 32 * per, 4096, 7168, 32, d) for per in (128, 2048) for d in ("uniform", "random")
    ]
    qwen = next(model for model in MODELS if model.name == "Qwen3-30B-A3B")
    return gemms + [moe_case(qwen, tokens, "SGLang") for tokens in (4, 64, 256, 512, 2048, 4096)]


def cases(quick: bool = False, only: Kind | None = None, part: str = "") -> list[Case]:
    """The cases of a run, the main ones first, each shape once; ``part``: in their names."""
    wanted = _main_cases()
    if not quick:
        wanted += _sglang_cases() + _fp8_cases() + _skew_cases() + _torchao_cases() + _model_cases()
    first = {case.name: case for case in reversed(wanted)}
    return [case for case in wanted if first[case.name] is case and only in (None, case.kind) and part in case.name]
