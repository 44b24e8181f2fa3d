"""Rows to JSON and markdown.

The JSON is the record: what a run printed, with card, versions, date and method. Tables and plots
are made from it alone, so they can be made again anywhere.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .limits import Limits, rate_over_bf16
from .peers import Contender
from .shapes import Case
from .timing import Plan, Result, ratio

SCHEMA = 1

METHOD = (
    "Device time: CUDA-graph replay of calls that rotate through input sets larger than L2 together; each sample is the"
    " second of two replays in a row; contenders take turns every round; µs is the median of the rounds, p10 and p90"
    " their spread; ratio is the median of the rounds' ratios baseline/contender. Bytes count operands once, scales and"
    " their padding included. % of limit: the least time at the ceilings measured in this run over the measured time."
    " Host µs: wall time of an eager call without sync, median of batches. Inputs are random normal. Launch"
    " gaps within the graph are part of the time."
)

ROOT = Path(__file__).resolve().parent.parent


def commit() -> str | None:
    """The repository's commit, with ``+`` if tracked files differ; None outside of one."""
    if shutil.which("git") is None:
        return None

    def git(*arguments: str) -> str | None:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    head = git("rev-parse", "--short=12", "HEAD")
    if head is None:
        return None
    return head + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def driver_version() -> str | None:
    """NVIDIA's driver, as nvidia-smi says; None without it."""
    if shutil.which("nvidia-smi") is None:
        return None
    done = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=False,
    )
    lines = done.stdout.split()
    return lines[0] if done.returncode == 0 and lines else None


def describe_machine(commit_label: str | None = None) -> dict[str, Any]:
    """GPU, driver, versions, date and commit of this run; needs a GPU."""
    import torch

    import hybrid_mxfp8

    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "gpu": properties.name,
        "capability": [properties.major, properties.minor],
        "sms": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
        "driver": driver_version(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "hybrid_mxfp8": hybrid_mxfp8.__version__,
        "commit": commit_label or commit(),
    }


def _round(value: float | None) -> float | None:
    """To four significant digits: what timing can tell apart."""
    return None if value is None else float(f"{value:.4g}")


def make_row(
    case: Case,
    contender: Contender,
    result: Result,
    baseline: Contender,
    baseline_result: Result | None,
    limits: Limits,
    plan: Plan,
    check: str | None,
) -> dict[str, Any]:
    """One line of the record; a contender that failed has ``failure`` and no numbers."""
    row: dict[str, Any] = {
        "kind": case.kind,
        "case": case.name,
        "source": case.source,
        "variant": case.variant,
        "tokens": case.num_tokens,
        "n": case.n,
        "k": case.k,
        "experts": case.num_experts,
        "distribution": case.distribution,
        "contender": contender.name,
        "ours": contender.ours,
        "warm": contender.warm,
        "baseline": baseline.name,
        "note": contender.note,
        "check": check,
        "failure": result.failure,
        "bytes": contender.work.bytes,
        "flops": contender.work.flops,
        "sets": plan.sets,
        "calls": plan.calls,
    }
    timing = result.timing
    if timing is None:
        return row
    us = timing.median_us
    limit_us = None if contender.warm else limits.time_us(contender.work, contender.precision)
    base = None if contender.warm or baseline_result is None else baseline_result.timing
    return row | {
        "us": _round(us),
        "p10_us": _round(timing.p10_us),
        "p90_us": _round(timing.p90_us),
        "rounds": len(timing.samples_us),
        "tb_s": _round(contender.work.bytes / us / 1e6),
        "tflop_s": _round(contender.work.flops / us / 1e6) if contender.work.flops else None,
        "limit_us": _round(limit_us),
        "percent_of_limit": _round(100 * limit_us / us) if limit_us else None,
        "ratio": _round(ratio(base, timing)) if base else None,
        "host_us": _round(result.host_us),
    }


def write_json(record: Mapping[str, Any], path: Path) -> None:
    """Write the record so that a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def read_json(path: Path) -> dict[str, Any]:
    """A record that ``write_json`` wrote.

    Raises:
        ValueError: the file is no such record.
    """
    record = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        raise ValueError(f"must be a record of schema {SCHEMA}, written by this suite")
    return record


def _cell(value: float | str | None) -> str:
    if value is None:
        return "–"
    if isinstance(value, str):
        return value.replace("|", "\\|")
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def table(header: Sequence[str], rows: Iterable[Sequence[float | str | None]]) -> list[str]:
    """Lines of a markdown table."""
    lines = ["| " + " | ".join(header) + " |", "| " + " | ".join("---" for _ in header) + " |"]
    return lines + ["| " + " | ".join(_cell(cell) for cell in row) + " |" for row in rows]


def rows_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The columns of one kind."""
    with_flops = any(row["flops"] for row in rows)
    header = ["case", "contender", "µs", "p10–p90", "TB/s", "% of limit", "ratio", "host µs", "note"]
    if with_flops:
        header.insert(5, "TFLOP/s")
    lines = []
    for row in rows:
        if row["failure"]:
            failed: list[float | str | None] = [row["case"], row["contender"], *[None] * (len(header) - 3)]
            lines.append([*failed, f"failed: {row['failure']}"])
            continue
        spread = f"{_cell(row['p10_us'])}–{_cell(row['p90_us'])}"
        cells = [row["case"], row["contender"], row["us"], spread, row["tb_s"]]
        if with_flops:
            cells.append(row["tflop_s"])
        lines.append([*cells, row["percent_of_limit"], row["ratio"], row["host_us"], row["note"]])
    return table(header, lines)


def machine_line(record: Mapping[str, Any]) -> str:
    """Card, versions, commit and date in one line."""
    m = record["machine"]
    parts = [f"{m['gpu']} (compute capability {m['capability'][0]}.{m['capability'][1]}, {m['sms']} SMs)"]
    parts += [f"{name} {m[name]}" for name in ("driver", "torch", "triton", "hybrid_mxfp8", "commit") if m[name]]
    return ", ".join([*parts, m["date"][:10]])


def limits_line(record: Mapping[str, Any]) -> str:
    """The ceilings of a run."""
    limits = record["limits"]
    text = (
        f"Ceilings measured in this run: {limits['read_tb_s']:.2f} TB/s reading, {limits['copy_tb_s']:.2f} TB/s copying,"
        f" {limits['bf16_tflop_s']:.0f} TFLOP/s in a bf16 matmul"
    )
    factor = rate_over_bf16("mxfp8", (limits["capability"][0], limits["capability"][1]))
    if factor != 1.0:
        text += f" (times {factor:g} for MXFP8)"
    if limits["datasheet_tb_s"]:
        text += (
            f"; datasheet: {limits['datasheet_tb_s']:g} TB/s,"
            f" {limits['datasheet_bf16_tflop_s']:g} TFLOP/s of dense bf16"
        )
    return text + "."


def markdown(record: Mapping[str, Any]) -> str:
    """The whole report."""
    lines = [f"# hybrid_mxfp8 benchmark, {record['mode']}", "", machine_line(record), "", limits_line(record), ""]
    lines += [record["method"], ""]
    for kind in dict.fromkeys(row["kind"] for row in record["rows"]):
        rows = [row for row in record["rows"] if row["kind"] == kind]
        lines += [f"## {kind}", "", *rows_table(rows), ""]
    if record["absent"]:
        lines += ["## Absent", "", *(f"- {a['name']}: {a['reason']}" for a in record["absent"]), ""]
    if record["not_run"]:
        lines += ["## Not run", "", *(f"- {n['case']}: {n['reason']}" for n in record["not_run"]), ""]
    return "\n".join(lines)


def say(text: str) -> None:
    """A line on stdout, in UTF-8 wherever the terminal allows."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "replace").decode(encoding), flush=True)
