"""The README's table of speed, from records of runs: generation, then layers, then products.

    python -m bench.speed GENERATION.json LAYERS.json PRODUCTS.json

The first is of ``bench.generation``, the others of the suite; one of both kinds may be given once.
Of several tiles or backends the fastest counts, on either side. A job or a contender that a record
lacks has no line.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import generation
from .shapes import MAIN_MODELS, MODELS, Case, moe_case

LAYER_TOKENS = (1, 16, 128, 1024, 8192)
PRODUCT = (32, 4096, 7168)
PRODUCT_ROWS = (16, 128, 256, 2048)
"""Of each expert; DeepSeek-V3's gate and up, an eighth of its experts."""

Line = tuple[str, float, str, float]
"""Job, our ms, whom it is compared with, their ms."""


def generation_lines(record: Mapping[str, Any]) -> Iterator[Line]:
    """A line for each case."""
    for row in record["rows"]:
        ms = row["ms"]
        yield (
            f"a token, {row['case']}" if "batch" in row["case"] else row["case"],
            ms[generation.OURS],
            f"transformers' `{generation.BASELINE}`",
            ms[generation.BASELINE],
        )


def suite_lines(record: Mapping[str, Any]) -> Iterator[Line]:
    """Layers beside SGLang's in FP8, products beside torch's and DeepGEMM's."""
    rows = [row for row in record["rows"] if not row["failure"]]

    def ms(case: Case, wanted: Callable[[Mapping[str, Any]], bool]) -> float | None:
        return min((row["us"] / 1e3 for row in rows if row["case"] == case.name and wanted(row)), default=None)

    jobs = [
        (f"{model.name} layer, {count(tokens, 'token')}", moe_case(model, tokens), {"SGLang FP8": "SGLang fp8"})
        for model in MODELS
        if model.name in MAIN_MODELS
        for tokens in LAYER_TOKENS
    ]
    experts, n, k = PRODUCT
    jobs += [
        (
            f"product of {experts} experts, {n} x {k}, {per} rows each",
            Case("gemm", "main", experts * per, n, k, experts),
            {"torch bf16": "torch bf16", "DeepGEMM FP8": "DeepGEMM"},
        )
        for per in PRODUCT_ROWS
    ]
    for job, case, others in jobs:
        ours = ms(case, lambda row: row["ours"])
        for name, prefix in others.items():
            theirs = ms(case, lambda row, prefix=prefix: row["contender"].startswith(prefix))
            if ours is not None and theirs is not None:
                yield job, ours, name, theirs


def count(number: int, noun: str) -> str:
    """1 token, 2 tokens."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


def table(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of markdown, one figure a cell."""
    lines = ["| job | this library, ms | beside | its time, ms | times as fast |", "| --- | ---: | --- | ---: | ---: |"]
    for record in records:
        for job, ours, name, theirs in (suite_lines if "limits" in record else generation_lines)(record):
            lines.append(f"| {job} | {ours:.3g} | {name} | {theirs:.3g} | {theirs / ours:.2f} |")
    return lines


def main(files: Sequence[str]) -> int:
    """Print the table."""
    print("\n".join(table([json.loads(Path(file).read_text(encoding="utf-8")) for file in files])))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
