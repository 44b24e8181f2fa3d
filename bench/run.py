"""The command line and the loop over cases.

The main cases come first, and the record is written after every case: a run that is cut
short, by its time budget or from outside, keeps what it has.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from hybrid_mxfp8.commands.bench import add_arguments
from hybrid_mxfp8.commands.terminal import progress

from . import bench_grouped_gemm, bench_moe, bench_quantize, model, plots, report, sglang_moe
from .bench_grouped_gemm import Kept, Weights
from .bench_moe import Layer
from .bench_quantize import Prepared
from .limits import Limits, measure_limits
from .peers import Absent, Contender
from .shapes import Case, cases
from .timing import CudaDevice, Device, Result, measure, one_line, plan

QUICK_BUDGET_S = 50.0
FULL_BUDGET_S = 520.0

RESULTS = Path(__file__).resolve().parent / "results"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m bench``."""
    parser = argparse.ArgumentParser(prog="python -m bench", description="Benchmarks of hybrid_mxfp8.")
    add_arguments(parser)
    try:
        return run(parser.parse_args(argv))
    except BrokenPipeError:
        # The reader, `head` say, has seen enough; without this Python would complain once more
        # when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def run(args: argparse.Namespace) -> int:
    """Do what the options say; 0 if all went well, 1 if one of this library's own cases failed."""
    if args.model:
        report.say(model.report())
        return 0
    if args.from_json is not None:
        try:
            record = report.read_json(args.from_json)
        except (OSError, ValueError) as error:
            print(f"--from-json: {args.from_json}: {error}", file=sys.stderr)
            return 2
        report.say(report.markdown(record))
        if args.plots:
            return _draw(record, args.out or args.from_json.resolve().parent, args.from_json.stem)
        return 0
    wanted = cases(args.quick, args.only, args.case)
    reason = "asked to list only" if args.list else why_not()
    if reason is not None:
        report.say(listing(wanted, reason))
        return 0
    try:
        sglang = sglang_moe.load(args.sglang_kernel)
    except (OSError, SyntaxError, ImportError, AttributeError, TypeError) as error:
        print(f"--sglang-kernel: {args.sglang_kernel}: {error}", file=sys.stderr)
        return 2
    return _measure(args, wanted, sglang)


def why_not() -> str | None:
    """Why nothing can be measured here; None if it can."""
    if not torch.cuda.is_available():
        return "no CUDA GPU here (torch.cuda.is_available() is False)"
    if torch.version.hip is not None:
        return "the suite is for NVIDIA GPUs; this is a ROCm build of PyTorch"
    return None


def listing(wanted: Sequence[Case], reason: str) -> str:
    """What a run would measure, and why this one doesn't."""
    lines = [f"Nothing was measured: {reason}.", f"A run measures these {len(wanted)} cases:"]
    lines += [f"  {case.name}  [{case.source}]" for case in wanted]
    return "\n".join(lines)


def _draw(record: dict[str, Any], folder: Path, stem: str) -> int:
    try:
        written = plots.draw(record, folder, stem)
    except ImportError as error:
        report.say(f"no plots: {error}; pip install matplotlib, then: --from-json FILE --plots")
        return 1
    for path in written:
        report.say(f"wrote {path}")
    return 0


def _measure(args: argparse.Namespace, wanted: Sequence[Case], sglang: ModuleType | str) -> int:
    started = time.monotonic()
    budget_s = (QUICK_BUDGET_S if args.quick else FULL_BUDGET_S) if args.budget is None else args.budget
    device = CudaDevice()
    torch.manual_seed(0)
    machine = report.describe_machine(args.commit)
    capability = (machine["capability"][0], machine["capability"][1])
    limits = measure_limits(device, machine["gpu"], capability, args.quick)
    torch.cuda.empty_cache()
    mode = ("quick" if args.quick else "full") + "".join(f", {part} only" for part in (args.only, args.case) if part)
    record: dict[str, Any] = {
        "schema": report.SCHEMA,
        "mode": mode,
        "machine": machine,
        "method": report.METHOD,
        "limits": dataclasses.asdict(limits),
        "seconds": 0.0,
        "rows": [],
        "absent": [],
        "not_run": [],
    }
    folder = args.out or RESULTS
    card = "".join(c if c.isalnum() else "-" for c in machine["gpu"].lower().removeprefix("nvidia "))
    stem = f"{card}-{machine['date'][:10]}-{mode.replace(', ', '-').replace(' ', '-')}"
    path = folder / f"{stem}.json"

    suite = Suite(device, machine["l2_bytes"], limits, args.quick, sglang=sglang)
    try:
        with progress(len(wanted), desc="bench", unit="case", mininterval=2.0) as bar:
            for case in wanted:
                bar.set_postfix_str(case.name, refresh=False)
                if time.monotonic() - started > budget_s:
                    record["not_run"].append({"case": case.name, "reason": f"the budget of {budget_s:g} s was used up"})
                else:
                    suite.add(case, record)
                    record["seconds"] = round(time.monotonic() - started, 1)
                    report.write_json(record, path)
                bar.update()
    finally:
        report.write_json(record, path)
        (folder / f"{stem}.md").write_text(report.markdown(record), encoding="utf-8")
    suite.close()
    return _conclude(record, path, args.plots)


def _conclude(record: dict[str, Any], path: Path, with_plots: bool) -> int:
    report.say(report.machine_line(record))
    report.say(report.limits_line(record))
    for absent in record["absent"]:
        report.say(f"absent: {absent['name']}: {absent['reason']}")
    failed = [row for row in record["rows"] if row["failure"]]
    for row in failed:
        report.say(f"failed: {row['case']}: {row['contender']}: {row['failure']}")
    unmeasured = [n for n in record["not_run"] if n.get("failed")]
    for entry in unmeasured:
        report.say(f"failed: {entry['case']}: {entry['reason']}")
    report.say(
        f"{len(record['rows'])} rows, {len(record['not_run'])} cases not run, {record['seconds']:g} s; wrote {path}"
    )
    status = _draw(record, path.parent, path.stem) if with_plots else 0
    return 1 if unmeasured or any(row["ours"] for row in failed) else status


class Suite:
    """Runs cases one after another and keeps what they share: weights, and the card's limits."""

    def __init__(
        self,
        timer: Device,
        l2_bytes: int,
        limits: Limits,
        quick: bool,
        place: str = "cuda",
        sglang: ModuleType | str = "not asked for",
    ) -> None:
        self._timer = timer
        self._l2_bytes = l2_bytes
        self._limits = limits
        self._quick = quick
        self._place = place
        self._sglang = sglang
        self._store: Kept[Weights] = Kept()
        self._layers: Kept[Layer] = Kept()

    def close(self) -> None:
        """Free what is kept."""
        self._store.clear()
        self._layers.clear()

    def add(self, case: Case, record: dict[str, Any]) -> None:
        """Measure a case into the record: its rows, absent peers once each, or why it could not
        be prepared.

        Raises:
            RuntimeError: the GPU no longer answers; no later case could be trusted.
        """
        reason = bench_moe.why_not() if case.kind == "moe" else None
        if reason is not None:
            record["not_run"].append({"case": case.name, "reason": reason})
            return
        try:
            self._add(case, record)
        except self._timer.failures as error:
            # A card too small for the case is no failure.
            failed = not isinstance(error, torch.OutOfMemoryError)
            record["not_run"].append({"case": case.name, "reason": one_line(error), "failed": failed})
            self.close()
            self._timer.synchronize()

    def _add(self, case: Case, record: dict[str, Any]) -> None:
        prepared = self._prepare(case)
        known = {(a["name"], a["reason"]) for a in record["absent"]}
        for entry in prepared.field:
            if isinstance(entry, Absent) and (entry.name, entry.reason) not in known:
                record["absent"].append({"name": entry.name, "reason": entry.reason})
        contenders = {entry.name: entry for entry in prepared.field if isinstance(entry, Contender)}
        checks: dict[str, str | None] = {}
        results: dict[str, Result] = {}
        for name, contender in contenders.items():
            try:
                checks[name] = self._check(contender)
            except self._timer.failures as error:
                results[name] = Result(None, failure=one_line(error))
                self._timer.synchronize()
        timing_plan = plan(prepared.sets, prepared.job, self._quick)
        right = {name: contender.call for name, contender in contenders.items() if name not in results}
        results |= measure(right, timing_plan, self._timer, host=[n for n in right if not contenders[n].warm])
        baseline = contenders[prepared.baseline]
        for name, contender in contenders.items():
            record["rows"].append(
                report.make_row(
                    prepared.case,
                    contender,
                    results[name],
                    baseline,
                    results[baseline.name],
                    self._limits,
                    timing_plan,
                    checks.get(name),
                )
            )

    def _check(self, contender: Contender) -> str | None:
        """Run the contender once and look at its result, before anything is timed."""
        if contender.check is None:
            return None
        contender.call(0)
        self._timer.synchronize()
        return contender.check()

    def _prepare(self, case: Case) -> Prepared:
        capability = self._limits.capability
        if case.kind == "quantize":
            return bench_quantize.prepare(case, capability, self._l2_bytes, self._place)
        if case.kind == "moe":
            self._store.clear()
            return bench_moe.prepare(case, self._l2_bytes, self._layers, self._sglang, self._place)
        self._layers.clear()
        return bench_grouped_gemm.prepare(case, capability, self._l2_bytes, self._store, self._place)
