"""Pictures from a record: time and percent of the card's limit against tokens."""

from __future__ import annotations

import textwrap
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .report import machine_line
from .shapes import KINDS

MIN_POINTS = 3
MAX_PANELS = 6
Row = Mapping[str, Any]
Series = dict[str, list[Row]]
"""Contender to rows in order of tokens."""


def panels(rows: Sequence[Row], kind: str) -> dict[str, Series]:
    """Rows of one kind by shape, where an evenly spread, plain job was measured at enough numbers
    of tokens.

    The shapes with most points come first.
    """
    shapes: dict[str, Series] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if (
            row["kind"] != kind
            or row["failure"]
            or row["distribution"] != "uniform"
            or row["variant"] != "plain"
            or row["warm"]
        ):
            continue
        shape = f"K {row['k']}, E {row['experts']}"
        shapes[f"N {row['n']}, {shape}" if row["n"] else shape][row["contender"]].append(row)
    found = {}
    for shape, series in shapes.items():
        lines = {
            name: sorted(points, key=lambda row: row["tokens"])
            for name, points in series.items()
            if len(points) >= MIN_POINTS
        }
        if lines:
            found[shape] = lines
    most = sorted(found, key=lambda shape: -max(len(points) for points in found[shape].values()))
    return {shape: found[shape] for shape in most[:MAX_PANELS]}


def draw(record: Mapping[str, Any], folder: Path, stem: str) -> list[Path]:
    """Two pictures a kind, ``STEM-KIND-time.png`` and ``STEM-KIND-limit.png``; returns what was
    written.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    written = []
    folder.mkdir(parents=True, exist_ok=True)
    for kind in KINDS:
        shapes = panels(record["rows"], kind)
        if not shapes:
            continue
        for column, label, name in (("us", "µs", "time"), ("percent_of_limit", "% of the card's limit", "limit")):
            path = folder / f"{stem}-{kind}-{name}.png"
            _picture(shapes, kind, column, label, machine_line(record), path)
            written.append(path)
    return written


def _picture(shapes: Mapping[str, Series], kind: str, column: str, label: str, machine: str, path: Path) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    columns = min(len(shapes), 3)
    rows = -(-len(shapes) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.4 * rows + 0.8), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    names = list(dict.fromkeys(name for series in shapes.values() for name in series))
    colours = {name: f"C{i}" for i, name in enumerate(names)}
    for axis, (shape, series) in zip(axes.flat, shapes.items(), strict=False):
        for name, points in series.items():
            tokens = [p["tokens"] for p in points]
            line = "-" if points[0]["ours"] else "--"
            axis.plot(tokens, [p[column] for p in points], line, marker="o", ms=3, color=colours[name], label=name)
            if column == "us":
                low, high = [p["p10_us"] for p in points], [p["p90_us"] for p in points]
                axis.fill_between(tokens, low, high, color=colours[name], alpha=0.2, linewidth=0)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(lambda tokens, _: f"{tokens:.0f}")
        if column == "us":
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter(LogFormatter())
            axis.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
        else:
            axis.set_ylim(0, max(105.0, axis.get_ylim()[1]))
            axis.axhline(100, color="0.5", linewidth=0.8)
        axis.set_title(shape, fontsize=9)
        axis.set_xlabel("tokens (T)", fontsize=8)
        axis.set_ylabel(label, fontsize=8)
        axis.tick_params(which="both", labelsize=7)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(shapes) :]:
        axis.set_visible(False)
    handles: dict[str, Any] = {}
    for axis in axes.flat[: len(shapes)]:
        for handle, name in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(name, handle)
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=2, fontsize=8)
    # About 15 characters an inch.
    figure.suptitle(textwrap.fill(f"{kind}: {machine}", int(15 * figure.get_figwidth())), fontsize=8)
    figure.savefig(path, dpi=130)
