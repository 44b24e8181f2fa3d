"""The numbers that this library set itself, and how far a run's rows meet them. Pure.

They are for an H100. Another card is measured against them all the same; the report names the card.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from .bench_moe import BASELINE, bf16_bytes, quantized_bytes
from .bench_quantize import ALONE, FROM_COUNTS, GATHER, OURS, SWIGLU, WARM
from .shapes import (
    COUNTS_TARGETS,
    FUSION_TARGETS,
    GEMM_TARGETS,
    MODELS,
    MOE_TARGETS,
    QUANTIZE_TARGETS,
    Case,
    moe_case,
)

Row = Mapping[str, Any]

QUANTIZE_US = (965.0, 125.0, 17.8, 8.0, 5.5, 2.2)
GEMM_RATIOS = (1.9, 1.9, 1.6, 1.0, 1.0)
MAX_WARM_US = 10.0
"""Jobs this short fit in an H100's L2 cache, and are judged with their operands there too.

The bounds come from a prototype whose operands were: 1024x7168 over 256 experts moves 29 MB,
which memory at 3.35 TB/s can't do in the 8 µs that are wanted.
"""
COUNTS_EXTRA_US = 1.0
GATHER_RATIO = 1.03
"""Gather may cost this factor over rows in place: T indices, and what equal kernels differ by."""
SWIGLU_RATIO = 1.6
HOST_US = 12.0
MOE_RATIOS = {1: 1.8, 16: 1.8, 128: 1.8, 8192: 1.0}
"""By tokens of the batch."""
MOE_MEMORY_RATIO = 0.52
MOE_OURS = ("moe_forward (cutlass)", "moe_forward (triton)")
GEMM_OURS = ("grouped_gemm (cutlass)", "grouped_gemm (triton)")


@dataclass(frozen=True)
class Target:
    """A target and what a run measured.

    Attributes:
        name: what is measured, unit included.
        relation: which side of ``wanted`` is right.
        wanted: the bound.
        measured: None if the run lacks the rows.
        met: None likewise.
    """

    name: str
    relation: Literal["<=", ">="]
    wanted: float
    measured: float | None
    met: bool | None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def _target(name: str, relation: Literal["<=", ">="], wanted: float, measured: float | None) -> Target:
    if measured is None:
        return Target(name, relation, wanted, None, None)
    return Target(name, relation, wanted, measured, measured <= wanted if relation == "<=" else measured >= wanted)


class _Rows:
    """Rows by case and contender; a row that failed has no numbers."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = {(row["case"], row["contender"]): row for row in rows}

    def value(self, case: Case, contender: str, column: str) -> float | None:
        row = self._rows.get((case.name, contender))
        return None if row is None else row.get(column)

    def best(self, case: Case, contenders: Sequence[str], column: str) -> float | None:
        """The value of whichever contender ran fastest."""
        ran = [
            (us, self.value(case, name, column))
            for name in contenders
            if (us := self.value(case, name, "us")) is not None
        ]
        return min(ran, key=lambda pair: pair[0])[1] if ran else None


def evaluate(rows: Sequence[Row]) -> list[Target]:
    """Every target with what ``rows`` say about it."""
    table = _Rows(rows)
    targets = []
    for (t, k, e, distribution), wanted in zip(QUANTIZE_TARGETS, QUANTIZE_US, strict=True):
        case = Case("quantize", "target", t, 0, k, e, distribution)
        targets.append(_target(f"{case.name}: µs", "<=", wanted, table.value(case, OURS, "us")))
        if wanted <= MAX_WARM_US:
            warm = table.value(case, WARM, "us")
            targets.append(_target(f"{case.name}: µs, operands in L2", "<=", wanted, warm))
    for t, k, e in COUNTS_TARGETS:
        case = Case("quantize", "target", t, 0, k, e, variant="counts")
        both, alone = table.value(case, FROM_COUNTS, "us"), table.value(case, ALONE, "us")
        extra = None if both is None or alone is None else both - alone
        targets.append(_target(f"{case.name}: µs more than quantize alone", "<=", COUNTS_EXTRA_US, extra))
    for t, k, e in FUSION_TARGETS:
        case = Case("quantize", "target", t, 0, k, e, variant="gather")
        fused, alone = table.value(case, GATHER, "us"), table.value(case, ALONE, "us")
        factor = None if fused is None or alone is None else fused / alone
        targets.append(_target(f"{case.name}: time over rows in place", "<=", GATHER_RATIO, factor))
    for t, k, e in FUSION_TARGETS:
        case = Case("quantize", "target", t, 0, k, e, variant="swiglu")
        ratio = table.value(case, SWIGLU, "ratio")
        targets.append(_target(f"{case.name}: ratio to silu_mul, then quantize", ">=", SWIGLU_RATIO, ratio))
    for (t, n, k, e), wanted in zip(GEMM_TARGETS, GEMM_RATIOS, strict=True):
        case = Case("gemm", "target", t, n, k, e)
        ratio = table.best(case, GEMM_OURS, "ratio")
        targets.append(_target(f"{case.name}: ratio to torch bf16", ">=", wanted, ratio))
    for model in (model for model in MODELS if model.name in MOE_TARGETS):
        for tokens, wanted in MOE_RATIOS.items():
            case = moe_case(model, tokens)
            ratio = table.best(case, MOE_OURS, "ratio")
            targets.append(_target(f"{model.name} layer, {tokens} tokens: ratio to {BASELINE}", ">=", wanted, ratio))
        case = moe_case(model, 1)
        ran = table.best(case, MOE_OURS, "us") is not None
        memory = quantized_bytes(case) / bf16_bytes(case) if ran else None
        targets.append(
            _target(f"{model.name} layer: memory of the experts over bf16's", "<=", MOE_MEMORY_RATIO, memory)
        )
    t, k, e, distribution = QUANTIZE_TARGETS[-1]
    decode = Case("quantize", "target", t, 0, k, e, distribution)
    host = table.value(decode, OURS, "host_us")
    targets.append(_target(f"{decode.name}: host µs of an eager call", "<=", HOST_US, host))
    t, n, k, e = GEMM_TARGETS[0]
    product = Case("gemm", "target", t, n, k, e)
    host = table.best(product, GEMM_OURS, "host_us")
    targets.append(_target(f"{product.name}: host µs of an eager call", "<=", HOST_US, host))
    return targets
