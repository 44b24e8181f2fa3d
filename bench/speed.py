"""The README's table of speed, from records of runs: generation, then layers, then products.

    python -m bench.speed GENERATION.json LAYERS.json PRODUCTS.json

The first is of ``bench.generation``, the others of the suite; one of both kinds may be given once.
Of several tiles or backends the fastest counts, on either side. A job or a contender that a record
lacks has no line.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .generation import DEFAULT, GROUPED, OURS
from .shapes import MAIN_MODELS, MODEL_TOKENS, MODELS, Case, moe_case

LAYERS = {
    f"{model.name} layer, batch {tokens}": moe_case(model, tokens)
    for model in MODELS
    if model.name in MAIN_MODELS
    for tokens in MODEL_TOKENS
}
PRODUCTS = {
    f"product of 32 experts, 4096 x 7168, {rows} rows each": Case("gemm", "main", 32 * rows, 4096, 7168, 32)
    for rows in (16, 128, 256, 2048)
}
"""DeepSeek-V3's gate and up, an eighth of its experts."""
PEERS = {"moe": {"SGLang FP8": "SGLang fp8"}, "gemm": {"torch bf16": "torch bf16", "DeepGEMM FP8": "DeepGEMM fp8"}}
"""How they are called in the table, and how the names of their contenders begin."""

Line = tuple[str, float, str, float]
"""Job, our ms, whom it is compared with, their ms."""


def generation_lines(record: Mapping[str, Any]) -> Iterator[Line]:
    """A line for each case, with the faster of transformers' ways to run experts in bf16."""
    for row in record["rows"]:
        ms = row["ms"]
        fastest = min(DEFAULT, GROUPED, key=ms.__getitem__)
        yield row["case"], ms[OURS], "transformers" + " grouped_mm" * (fastest == GROUPED), ms[fastest]


def suite_lines(record: Mapping[str, Any]) -> Iterator[Line]:
    """A line for each layer or product and each peer that have a time."""
    for job, case in (LAYERS | PRODUCTS).items():
        timed = [row for row in record["rows"] if row["case"] == case.name and not row["failure"]]
        ours = [row["us"] / 1e3 for row in timed if row["ours"]]
        for name, prefix in PEERS[case.kind].items():
            theirs = [row["us"] / 1e3 for row in timed if row["contender"].startswith(prefix)]
            if ours and theirs:
                yield job, min(ours), name, min(theirs)


def table(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of markdown, one figure a cell."""
    lines = ["| job | this library, ms | beside | its time, ms | times as fast |", "| --- | ---: | --- | ---: | ---: |"]
    for record in records:
        for job, ours, name, theirs in (suite_lines if "limits" in record else generation_lines)(record):
            lines.append(f"| {job} | {ours:.3g} | {name} | {theirs:.3g} | {theirs / ours:.2f} |")
    return lines


def read(file: str) -> Mapping[str, Any]:
    """A record; SystemExit for what is none."""
    try:
        record: Mapping[str, Any] = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        sys.exit(f"{file}: must be the JSON of a run: {error}")
    return record


if __name__ == "__main__":
    print("\n".join(table([read(file) for file in sys.argv[1:]])))
