"""Pictures from a record: time and percent of the card's limit against a model's tokens."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .report import machine_line
from .shapes import KINDS, MODELS

MIN_POINTS = 3
MAX_PANELS = 6
JOBS = {
    "quantize": "Quantizing tokens",
    "gemm": "Grouped GEMM",
    "moe": "MoE layer",
}
Row = Mapping[str, Any]
Series = dict[str, list[tuple[int, Row]]]
"""Contender to its points: the batch's tokens, before routing, and the row; in that order."""


def job_of(row: Row) -> tuple[str, int] | None:
    """The panel that a row belongs to, and the tokens of its batch; None if no model has its shape.

    Rows of T count a token once for each expert that it visits. Where a row has fewer experts than
    the model, those are a part of them, as with experts spread over GPUs. Routing is even in both.
    """
    kind, n, k, experts = row["kind"], row["n"], row["k"], row["experts"]
    for model in sorted(MODELS, key=lambda model: model.experts != experts):
        if kind == "moe":
            jobs = {(model.intermediate, model.hidden): ""}
        elif kind == "quantize":
            jobs = {(0, model.intermediate): ", before down", (0, model.hidden): ", before gate and up"}
        else:
            jobs = dict(zip(model.gemms, (", gate and up", ", down"), strict=True))
        if model.experts % experts or (n, k) not in jobs:
            continue
        share = f"{experts} of {model.experts}" if experts < model.experts else str(experts)
        tokens = row["tokens"] if kind == "moe" else row["tokens"] * model.experts // (model.top_k * experts)
        return f"{model.name}{jobs[n, k]}\n{share} experts, top-{model.top_k}", tokens
    return None


def panels(rows: Sequence[Row], kind: str) -> dict[str, Series]:
    """Rows of one kind by title, where an evenly spread, plain job was measured at enough numbers
    of tokens.

    Those with most points come first.
    """
    found: dict[str, Series] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        plain = row["distribution"] == "uniform" and row["variant"] == "plain" and not row["warm"]
        if row["kind"] != kind or row["failure"] or not plain or (job := job_of(row)) is None:
            continue
        title, tokens = job
        found[title][row["contender"]].append((tokens, row))
    drawn = {}
    for title, series in found.items():
        lines = {
            name: sorted(points, key=lambda p: p[0]) for name, points in series.items() if len(points) >= MIN_POINTS
        }
        if lines:
            drawn[title] = lines
    most = sorted(drawn, key=lambda title: -max(len(points) for points in drawn[title].values()))
    return {title: drawn[title] for title in most[:MAX_PANELS]}


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
        jobs = panels(record["rows"], kind)
        if not jobs:
            continue
        for column, name in (("us", "time"), ("percent_of_limit", "limit")):
            path = folder / f"{stem}-{kind}-{name}.png"
            _picture(jobs, kind, column, machine_line(record), path)
            written.append(path)
    return written


def _picture(jobs: Mapping[str, Series], kind: str, column: str, machine: str, path: Path) -> None:
    from matplotlib.figure import Figure

    columns = min(len(jobs), 3)
    rows = -(-len(jobs) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.3 * rows + 1), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    names = list(dict.fromkeys(name for series in jobs.values() for name in series))
    handles: dict[str, Any] = {}
    for axis, (title, series) in zip(axes.flat, jobs.items(), strict=False):
        for name, points in series.items():
            tokens = [t for t, _ in points]
            i = names.index(name)
            # Later lines are thinner, so that one below another can be seen.
            style: dict[str, Any] = {"color": f"C{i}", "linewidth": max(3.0 - i, 1.2), "marker": "o", "ms": 4 - i / 2}
            line = "-" if points[0][1]["ours"] else "--"
            (handles[name],) = axis.plot(tokens, [row[column] for _, row in points], line, **style)
            if column == "us":
                low, high = [row["p10_us"] for _, row in points], [row["p90_us"] for _, row in points]
                axis.fill_between(tokens, low, high, color=f"C{i}", alpha=0.2, linewidth=0)
        _tokens_axis(axis, sorted({t for points in series.values() for t, _ in points}))
        (_time_axis if column == "us" else _limit_axis)(axis)
        axis.set_title(title, fontsize=9)
        axis.tick_params(which="both", labelsize=7)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(jobs) :]:
        axis.set_visible(False)
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=len(handles), fontsize=8)
    what = (
        "time, median; band: 10th to 90th percentile"
        if column == "us"
        else "least time that memory and tensor cores allow, over the time"
    )
    card, _, versions = machine.partition("), ")
    figure.suptitle(f"{JOBS[kind]}: {what}\n{card})\n{versions}", fontsize=9)
    figure.savefig(path, dpi=130)


def _tokens_axis(axis: Any, tokens: Sequence[int]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(tokens, [str(t) if t % 1024 else f"{t // 1024}k" for t in tokens])
    axis.set_xticks([], minor=True)
    axis.set_xlabel("tokens", fontsize=8)


def _time_axis(axis: Any) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_yscale("log")
    low, high = axis.get_ylim()
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low > 15 else (1, 1.5, 2, 3, 4, 5, 6, 8)))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(lambda us, _: f"{us:,.0f}" if us >= 10 else f"{us:g}")
    axis.set_ylabel("µs", fontsize=8)


def _limit_axis(axis: Any) -> None:
    axis.set_ylim(0, max(105.0, axis.get_ylim()[1]))
    axis.axhline(100, color="0.5", linewidth=0.8)
    axis.set_ylabel("% of the card's limit", fontsize=8)
