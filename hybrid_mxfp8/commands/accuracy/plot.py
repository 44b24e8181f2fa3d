"""The report's picture: signal-to-noise of each expert by format, and beside a large channel."""

from __future__ import annotations

import math
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from hybrid_mxfp8.commands.accuracy.measure import Score
from hybrid_mxfp8.commands.demo.measure import Effect

COLOURS: Final = {
    "bf16": "#7f7f7f",
    "MXFP8 rceil": "#1b6ca8",
    "MXFP8 floor": "#4fa3d9",
    "MXFP8 even": "#16897a",
    "FP8 per row": "#e08e2b",
    "FP8 per tensor": "#c0392b",
}
FIGURES: Final = (("tokens", "x_db", "o", 0.26), ("weights", "w_db", "s", 0.0), ("product", "product_db", "D", -0.26))
"""Label, figure, marker and height in its row."""


def draw(panels: Sequence[tuple[str, Sequence[Score]]], effects: Sequence[Effect], source: str, path: Path) -> None:
    """Write the picture, ``source`` printed below, in the format that the file's ending names."""
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(max(3.1 * len(panels), 9.3), 8.2), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(1.15, 1), hspace=0.03)
    axes = upper.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
    for letter, axis, (title, scores) in zip(string.ascii_lowercase, axes, panels, strict=False):
        _experts(axis, f"{letter}  {title}", scores)
    every = [getattr(q, name) for _, scores in panels for s in scores[1:] for q in s.experts for _, name, *_ in FIGURES]
    shown = [value for value in every if math.isfinite(value)]
    axes[0].set_xlim(min(shown) - 1, max(shown) + 1)
    upper.supxlabel("signal-to-noise, dB; a small mark is an expert, a large one their mean", fontsize=9)
    legend = axes[0].get_legend_handles_labels()
    upper.legend(*legend, loc="outside upper right", ncols=3, fontsize=8, frameon=False)
    left, right = lower.subplots(1, 2, width_ratios=(1.5, 1))
    _channel(left, effects)
    _differences(right, panels)
    figure.supxlabel(source, fontsize=7.5, color="0.35")
    figure.savefig(path, dpi=150)


def _frame(axis: Any, title: str, grid: str, rows: Sequence[str] = ()) -> None:
    """Title, grid and, where the vertical axis is a list, its rows with lines between them."""
    axis.set_title(title, fontsize=9)
    axis.tick_params(labelsize=8)
    axis.grid(axis=grid, alpha=0.3)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for row in range(1, len(rows)):
        axis.axhline(row - 0.5, color="0.9", linewidth=0.8)
    if rows:
        axis.set_yticks(range(len(rows)), rows)
        axis.set_ylim(len(rows) - 0.5, -0.5)


def _experts(axis: Any, title: str, scores: Sequence[Score]) -> None:
    bf16, *shown = scores
    for label, figure, marker, height in FIGURES:
        for row, score in enumerate(shown):
            colour = COLOURS[score.format.name]
            values = [getattr(q, figure) for q in score.experts]
            axis.plot(values, [row + height] * len(values), marker, color=colour, ms=3, alpha=0.35, mew=0)
            axis.plot(score.mean(figure), row + height, marker, color=colour, ms=7, mec="white", mew=0.8)
        axis.plot([], [], marker, color="0.4", ms=6, label=label)
    below = f"\nbf16: product {bf16.mean('product_db'):.0f} dB"
    _frame(axis, title + below, "x", [score.format.name for score in shown])


def _beside(axis: Any, text: str, at: tuple[float, float], **style: Any) -> None:
    """A label beside the frame, where neither marks nor lines cross it."""
    axis.annotate(text, at, xycoords=("axes fraction", "data"), va="center", **style)


def _channel(axis: Any, effects: Sequence[Effect]) -> None:
    ratios = [effect.ratio for effect in effects]
    for name, colour in COLOURS.items():
        style = "--" if name in ("bf16", "MXFP8 floor", "MXFP8 even") else "-"
        axis.plot(ratios, [effect.db[name] for effect in effects], style, color=colour, linewidth=1.8)
    axis.set_xscale("log", base=2)
    axis.set_xlim(ratios[0], ratios[-1])
    low, high = axis.get_ylim()
    at = math.inf
    for name in sorted(COLOURS, key=lambda name: -effects[-1].db[name]):
        # Labels at the lines' ends, pushed apart where those meet.
        at = min(effects[-1].db[name], at - (high - low) * 0.055)
        _beside(axis, name, (1.01, at), fontsize=8, color=COLOURS[name])
    axis.set_xlabel("rms of that channel / rms of the others", fontsize=8)
    axis.set_ylabel("signal-to-noise, dB", fontsize=8)
    _frame(axis, "One channel grows in all tokens: what is left of the other blocks", "both")


def _differences(axis: Any, panels: Sequence[tuple[str, Sequence[Score]]]) -> None:
    names = [score.format.name for score in panels[0][1][1:]]
    for i, (_, (_, *scores)) in enumerate(panels):
        for row, score in enumerate(scores):
            height = row - 0.4 + (i + 0.5) * 0.8 / len(panels)
            axis.plot(score.worst_diff, height, "o", color=COLOURS[score.format.name], ms=5)
            text = f"{string.ascii_lowercase[i]}  {score.worst_diff:.1e}"
            _beside(axis, text, (1.02, height), fontsize=6.5, color="0.35")
    axis.axvline(1e-3, color="0.4", linewidth=1, linestyle=":")
    axis.set_xscale("log")
    axis.set_xlabel("calc_diff, less is better", fontsize=8)
    _frame(axis, "Worst calc_diff of an expert's product, by panel; dotted: 1e-3", "x", names)
