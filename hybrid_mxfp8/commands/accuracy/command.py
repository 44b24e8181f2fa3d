"""The ``accuracy`` command: a table of what each format keeps, on request JSON and a picture."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from hybrid_mxfp8._version import __version__
from hybrid_mxfp8.commands.accuracy import transformers_model
from hybrid_mxfp8.commands.accuracy.measure import Score, channel_effect, score
from hybrid_mxfp8.commands.demo.command import load
from hybrid_mxfp8.commands.demo.measure import Effect
from hybrid_mxfp8.commands.demo.workload import Operands, Workload
from hybrid_mxfp8.commands.terminal import format_table, progress, wrap

PICTURES = (".png", ".svg", ".pdf")
RATIOS = tuple(2.0**i for i in range(17))


@dataclass(frozen=True)
class Part:
    """A model's grouped GEMMs with each format's scores, and the logits' where they are known."""

    short: str
    workload: Workload
    scores: list[tuple[Operands, list[Score]]]
    logits_db: dict[str, float] | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add = parser.add_argument
    add("--synthetic", action="store_true", help="random numbers even where the real weights are there")
    add("--no-transformers", action="store_true", help="leave the transformers model out")
    add("--json", type=Path, metavar="FILE", help="write every expert's figures as JSON")
    add("--plot", type=Path, metavar="FILE", help="draw a picture, .png, .svg or .pdf (needs matplotlib)")


def run(args: argparse.Namespace) -> int:
    """Print the tables; 0, or 2 where a file can't be written or matplotlib is missing."""
    if problem := _problem(args.json, args.plot):
        print(problem, file=sys.stderr)
        return 2
    workload = load(args.synthetic, 6, None)
    with_model = not args.no_transformers and transformers_model.installed()
    with progress(2 + 2 * with_model) as bar:
        parts = [Part("MiniLM" if workload.real else "synthetic", workload, _scored(workload, bar))]
        if with_model:
            model, logits_db = transformers_model.report()
            parts.append(Part("random Qwen3-MoE", model, _scored(model, bar), logits_db))
    effects = channel_effect(workload.gemms[0].x, RATIOS)
    print(describe(parts, effects))
    if not with_model and not args.no_transformers:
        print("\nA transformers model would be measured too if it were installed: pip install transformers")
    if args.json is not None:
        args.json.write_text(json.dumps(as_json(parts, effects), indent=1) + "\n")
        print(f"\nWritten: {args.json}")
    if args.plot is not None:
        from hybrid_mxfp8.commands.accuracy.plot import draw

        panels = [(f"{part.short}: {operands.name}", scores) for part in parts for operands, scores in part.scores]
        source = "; ".join(part.workload.source.partition(":")[0] for part in parts)
        draw(panels, effects, f"{source}; hybrid_mxfp8 {__version__}", args.plot)
        print(f"\nWritten: {args.plot}")
    return 0


def _problem(json_file: Path | None, picture: Path | None) -> str:
    """Why the files can't be written, found before any work; else empty."""
    for path in (json_file, picture):
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            return f"{path}: {'is a folder' if path.is_dir() else f'there is no folder {path.parent}'}"
    if picture is not None and picture.suffix not in PICTURES:
        return f"--plot: must end in {', '.join(PICTURES)}, got {picture}"
    if picture is not None and importlib.util.find_spec("matplotlib") is None:
        return "--plot: needs matplotlib: pip install matplotlib"
    return ""


def _scored(workload: Workload, bar: Any) -> list[tuple[Operands, list[Score]]]:
    scores = []
    for operands in workload.gemms:
        bar.set_description_str(operands.name)
        scores.append((operands, score(operands)))
        bar.update()
    return scores


def describe(parts: Sequence[Part], effects: Sequence[Effect]) -> str:
    """The report in words and tables."""
    texts = [
        wrap(
            "Each format against fp32: signal-to-noise in dB of tokens x, weights w and product y, means over experts; the "
            "worst expert's product; its calc_diff. Products are accumulated in float64, so the differences are the "
            "formats' alone. FP8 is e4m3 with fp32 scales amax/448."
        )
    ]
    for part in parts:
        texts.append(wrap(f"Numbers: {part.workload.source}.", indent="  "))
        texts += [_score_table(operands, scores) for operands, scores in part.scores]
        if part.logits_db:
            rows = [(name, f"{db:.1f}") for name, db in part.logits_db.items()]
            title = "Logits of the whole model, the experts' operands of all layers in each format"
            texts.append(format_table(("format", "logits dB"), rows, title=title))
    return "\n\n".join([*texts, _effect_table(effects), _conclusion(parts[0], effects[-1])])


def _score_table(operands: Operands, scores: Sequence[Score]) -> str:
    num_experts, n, k = operands.w.shape
    title = f"{operands.name}: {num_experts} experts, {sum(operands.rows)} tokens, N {n}, K {k}"
    header = ("format", "bits", "x dB", "w dB", "y dB", "worst y dB", "worst calc_diff")
    rows = []
    for s in scores:
        means = (f"{s.mean(figure):.1f}" for figure in ("x_db", "w_db", "product_db"))
        rows.append((s.format.name, f"{s.format.bits(k):.2f}", *means, f"{s.worst_db:.1f}", f"{s.worst_diff:.1e}"))
    return format_table(header, rows, title=title)


def _effect_table(effects: Sequence[Effect]) -> str:
    title = (
        "One channel of the first product's tokens grows in all tokens, up to a multiple of the others' rms, as channels "
        "of large models do: what is left of the blocks without it, in dB"
    )
    shown = effects[::4]
    header = ("format", *(f"{effect.ratio:,.0f}x" for effect in shown))
    rows = [(name, *(f"{effect.db[name]:.1f}" for effect in shown)) for name in shown[0].db]
    return format_table(header, rows, title=title)


def _conclusion(part: Part, last: Effect) -> str:
    """The comparison in one sentence."""
    by_format = zip(*(scores for _, scores in part.scores), strict=True)
    db = {s[0].format.name: fmean(each.mean("product_db") for each in s) for s in by_format}
    ours = {name: db[name] for name in db if name.startswith("MXFP8")}
    best = max(ours, key=lambda name: ours[name])
    return wrap(
        f"On {'a real model' if part.workload.real else 'synthetic numbers'}, products keep "
        + ", ".join(f"{db:.1f} dB with {name}" for name, db in ours.items())
        + f", {db['FP8 per row']:.1f} with FP8 per row and {db['FP8 per tensor']:.1f} per tensor; {best} is the best "
        f"rounding of MXFP8 here. With a channel {last.ratio:,.0f} times the others, {best} leaves those at "
        f"{last.db[best]:.1f} dB, FP8 per row at {last.db['FP8 per row']:.1f} and per tensor at "
        f"{last.db['FP8 per tensor']:.1f}."
    )


def as_json(parts: Sequence[Part], effects: Sequence[Effect]) -> dict[str, Any]:
    """Every figure, with what it was measured on; null where it is infinite."""

    def finite(values: dict[str, float]) -> dict[str, float | None]:
        return {name: value if math.isfinite(value) else None for name, value in values.items()}

    def gemm(operands: Operands, scores: Sequence[Score]) -> dict[str, Any]:
        _, n, k = operands.w.shape
        formats = {s.format.name: [finite(asdict(q)) for q in s.experts] for s in scores}
        return {"name": operands.name, "tokens": list(operands.rows), "n": n, "k": k, "formats": formats}

    def workload(part: Part) -> dict[str, Any]:
        gemms, logits_db = [gemm(*pair) for pair in part.scores], part.logits_db and finite(part.logits_db)
        return {"source": part.workload.source, "real": part.workload.real, "logits_db": logits_db, "gemms": gemms}

    transformers = importlib.metadata.version("transformers") if transformers_model.installed() else None
    return {
        "versions": {"hybrid-mxfp8": __version__, "torch": torch.__version__, "transformers": transformers},
        "workloads": list(map(workload, parts)),
        "channel": [{"ratio": effect.ratio, "db": finite(effect.db)} for effect in effects],
    }
