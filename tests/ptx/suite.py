"""Every run of the kernels in the emulator, and every seeded fault; the record goes to
bench/results.

    python tests/ptx/suite.py [--only PART] [--match TEXT] [--jobs N] [--out FOLDER]

Some runs renew their lines in the record, all of them the whole of it, and the table in
docs/emulator.md with it. Compiles what is not in the cache: 48 modules of CUTLASS, half a minute
each, and a host module for each mainloop.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # an MMA is too small to share
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # this folder is the package ptx

import numpy as np

from ptx import cutlass_backend, product, triton_backend
from ptx.case import Case, Shape
from ptx.cutlass_backend import Call, Options, Result
from ptx.errors import Fault

MIXED = (0, 1, 63, 64, 65, 129, 257)
"""Tokens of experts: none, one, and around the tiles' edges."""

CONFIGS = tuple(f"{sms}sm_{128 * sms}x{tile}x128_{sms}x1" for sms in (1, 2) for tile in (64, 128, 192, 256))


@dataclass(frozen=True)
class Run:
    """One run: what it shows, and how it is made."""

    group: str
    name: str
    make: Callable[[], list[Result]]


@dataclass
class Record:
    """What a run gave."""

    group: str
    name: str
    passed: bool
    error: float
    races: int
    instructions: int
    seconds: float
    says: str = ""


def gemm(shape: Shape, options: Options, **case: Any) -> Callable[[], list[Result]]:
    """One call of the CUTLASS backend."""

    def make() -> list[Result]:
        return [Call(shape, options, case=Case(shape, options.seed, **case)).run()]

    return make


def replay(options: Options) -> Callable[[], list[Result]]:
    """Several calls with other counts on one workspace, as a captured graph makes them."""

    def make() -> list[Result]:
        calls = [(3, 0, 200, 64), (129, 100, 0, 7), (0, 0, 0, 267), (0, 0, 0, 0), (1, 1, 1, 1)]
        call = Call(Shape(calls[0], 264, 352, extra_rows=13), options)
        results = []
        for number, counts in enumerate(calls):
            call.case.fill(counts, number)
            results.append(call.run(number))
        return results

    return make


def cutlass_runs() -> Iterator[Run]:
    """All of the CUTLASS backend."""
    for mainloop in cutlass_backend.MAINLOOPS:
        pdl = mainloop == "ragged"
        for config in CONFIGS:
            for out in ("bf16", "fp16", "fp32"):
                options = Options(config, mainloop, pdl=pdl, seed=5, sms=6)
                name = f"{mainloop} {config} {out}"
                yield Run("modules", name, gemm(Shape(MIXED, 264, 352, out), options))
        for config in CONFIGS[1], CONFIGS[7]:
            for n, k in ((8, 32), (136, 96), (264, 2880)):
                options = Options(config, mainloop, pdl=pdl, seed=6)
                yield Run("shapes", f"{mainloop} {config} N {n} K {k}", gemm(Shape((3, 0, 129), n, k), options))
            for completion in ("immediate", "random"):
                options = Options(config, mainloop, pdl=pdl, completion=completion, seed=7)
                yield Run(
                    "schedules", f"{mainloop} {config} {completion}", gemm(Shape((3, 0, 129, 64), 264, 352), options)
                )
            few = Options(config, mainloop, pdl=pdl, sms=int(config[0]), seed=8)
            yield Run(
                "rings",
                f"{mainloop} {config} all tiles on one CTA or pair",
                gemm(Shape((300, 64, 1, 200), 392, 1056), few),
            )
            yield Run(
                "calls", f"{mainloop} {config} five calls on one workspace", replay(Options(config, mainloop, pdl=pdl))
            )
        for config in ("2sm_256x256x128_4x1", "2sm_256x256x128_4x2", "1sm_128x128x128_2x2", "1sm_128x128x128_4x1"):
            for clusters in cutlass_backend.CLUSTERS:
                options = Options(config, mainloop, pdl=pdl, sms=16, clusters=clusters, seed=9)
                yield Run("clusters", f"{mainloop} {config} {clusters}", gemm(Shape((3, 0, 300), 1032, 352), options))
    for config in CONFIGS:
        options = Options(config, pdl=False, seed=10)
        yield Run("without PDL", f"ragged {config}", gemm(Shape((3, 0, 129, 64), 136, 352), options))
    for config in CONFIGS[1], CONFIGS[7]:
        options = Options(config, seed=11)
        shape = Shape((3, 70), 136, 160)
        yield Run("padding", f"ragged {config} 0xFF in padding rows", gemm(shape, options, padding_rows=255))
        yield Run("padding", f"ragged {config} 0xFF in padding columns: NaN", gemm(shape, options, padding_columns=255))
        overflow = Shape((3, 70), 136, 160, "fp16")
        yield Run("overflow", f"ragged {config} fp16 that overflows", gemm(overflow, options, scale_shift=12))


def triton_runs() -> Iterator[Run]:
    """All of Triton's kernel for compute capability 10."""
    for arch in ("10.0", "10.3"):
        for tile in triton_backend.BLOCKS_T:
            for out in ("bf16", "fp16", "fp32"):
                shape = Shape((0, 1, 65, 129), 264, 352, out)
                yield Run("triton", f"{arch} {tile} tokens {out}", triton(shape, arch, tile))
    for n, k in ((8, 32), (136, 96), (136, 1056)):
        for tile in (16, 128):
            yield Run("triton", f"10.0 {tile} tokens N {n} K {k}", triton(Shape((3, 0, 65), n, k), "10.0", tile))


def triton(shape: Shape, arch: str, tile: int) -> Callable[[], list[Result]]:
    """One call of it."""
    return lambda: [triton_backend.Call(shape, triton_backend.Options(arch, seed=5, block_t=tile)).run()]


def sm90_runs() -> Iterator[Run]:
    """The quantizer's and the router's kernels, as compiled for Hopper, against their
    references."""
    from ptx import sm90_kernels

    for name, make in sm90_kernels.CASES.items():
        yield Run("sm_90", name, lambda make=make: [sm90_kernels.run(make)])  # type: ignore[misc]


def fault_runs() -> Iterator[Run]:
    """The seeded faults: a run passes if its fault is reported."""
    from ptx import faults

    for fault in faults.FAULTS:

        def make(fault: faults.Seeded = fault) -> list[Result]:
            said = faults.report(fault)
            return [Result(0.0, [] if said else ["not reported"], [], 0, [said])]

        yield Run("faults", fault.name, make)


PARTS: dict[str, Callable[[], Iterator[Run]]] = {
    "cutlass": cutlass_runs, "triton": triton_runs, "sm90": sm90_runs, "faults": fault_runs,
}  # fmt: skip


def execute(run: Run) -> Record:
    """Make a run; its seconds are the process's own, without compilers."""
    started = time.process_time()
    try:
        results = run.make()
    except Fault as fault:
        last = str(fault).splitlines()[-1].strip()
        return Record(run.group, run.name, False, float("nan"), 0, 0, time.process_time() - started, last)
    mark = "" if run.group == "faults" else "known: "
    says = [
        line
        for result in results
        for line in (*result.races, *result.problems, *(f"{mark}{known}" for known in result.known))
    ]
    return Record(
        run.group,
        run.name,
        all(result.passed for result in results),
        max(result.error for result in results),
        sum(len(result.races) for result in results),
        sum(result.instructions for result in results),
        round(time.process_time() - started, 2),
        says[0] if says else "",
    )


def table(records: list[Record]) -> str:
    """As markdown."""
    lines = [
        "| group | run | result | error / bound | races | warp instructions | s | what was said |",
        "|" + " --- |" * 8,
    ]
    for r in records:
        result = "passes" if r.passed else "**fails**"
        if r.group == "faults":
            result = "reported" if r.passed else "**not reported**"
        error = "" if r.group == "faults" else f"{r.error:.3f}"
        said = r.says.replace("|", "\\|")[:160]
        lines.append(
            f"| {r.group} | {r.name} | {result} | {error} | {r.races or ''} | {r.instructions or ''} | {r.seconds:.1f} | {said} |"
        )
    return "\n".join(lines) + "\n"


def summary(records: list[Record]) -> str:
    """A line for each group of runs, as markdown."""
    lines = ["| runs | passed | largest error / bound | races | warp instructions | s |", "|" + " --- |" * 6]
    for group in dict.fromkeys(r.group for r in records):
        mine = [r for r in records if r.group == group]
        passed = f"{sum(r.passed for r in mine)} of {len(mine)}" + (" reported" if group == "faults" else "")
        error = "" if group in ("faults", "sm_90") else f"{max(r.error for r in mine):.3f}"
        total = sum(r.instructions for r in mine)
        lines.append(
            f"| {group} | {passed} | {error} | {sum(r.races for r in mine)} | {total or ''} | {sum(r.seconds for r in mine):.0f} |"
        )
    return "\n".join(lines) + "\n"


def write(records: list[Record], folder: Path, *, whole: bool) -> None:
    """The record of runs, as json and as tables; some of them replace those of before, all of them
    the whole record. What the suite no longer has goes."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / "emulator.json"
    if not whole and kept.is_file():
        before = [Record(**record) for record in json.loads(kept.read_text())["records"]]
        renewed = {(r.group, r.name): r for r in records}
        runs = {(run.group, run.name) for part in PARTS.values() for run in part()}
        before = [r for r in before if (r.group, r.name) in runs]
        records = [renewed.pop((r.group, r.name), r) for r in before] + list(renewed.values())
    passed = sum(r.passed for r in records)
    about = {"date": time.strftime("%Y-%m-%d"), **versions(), "runs": len(records), "failed": len(records) - passed}
    kept.write_text(json.dumps({**about, "records": [asdict(r) for r in records]}, indent=1) + "\n")
    heading = textwrap.fill(", ".join(f"{key} {value}" for key, value in about.items()), 100)
    (folder / "emulator.md").write_text(f"# Runs in the emulator\n\n{heading}\n\n{table(records)}")
    if folder == product.ROOT / "bench" / "results":
        product.pages.replace("emulator.md", "runs", f"{heading}\n\n{summary(records).rstrip()}")


def in_processes(runs: list[Run], jobs: int) -> Iterator[Record]:
    """The runs' records in order; forked, because a run is a closure."""
    _chosen[:] = runs
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("fork")) as pool:
        yield from pool.map(_execute_chosen, range(len(runs)))


_chosen: list[Run] = []


def _execute_chosen(number: int) -> Record:
    return execute(_chosen[number])


def versions() -> dict[str, str]:
    """What the kernels were compiled with."""
    import torch
    import triton as triton_module

    return {
        "nvcc": product.toolchain.find_cuda().version_string,
        "ragged": f"CUTLASS {product.mainloop_headers('ragged').version_string}",
        "pointer_array": f"CUTLASS {product.mainloop_headers('pointer_array').version_string}",
        "triton": triton_module.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def main() -> int:
    """Run them; 0 if all pass."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=(*PARTS,), help="one part")
    parser.add_argument("--match", default="", help="only runs with this in their name or group")
    parser.add_argument("--out", type=Path, default=product.ROOT / "bench" / "results")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at once")
    given = parser.parse_args()
    cutlass_backend.whole_host = True
    chosen = [
        run
        for part, runs in PARTS.items()
        if given.only in (None, part)
        for run in runs()
        if given.match in f"{run.group} {run.name}"
    ]

    records: list[Record] = []
    for record in in_processes(chosen, given.jobs):
        records.append(record)
        print(
            f"{'ok  ' if record.passed else 'FAIL'} {record.group}: {record.name}: error {record.error:.3f}, "
            f"{record.races} races, {record.instructions} instructions, {record.seconds:.1f} s {record.says[:150]}",
            flush=True,
        )
    write(records, given.out, whole=given.only is None and not given.match)
    failed = [record for record in records if not record.passed]
    print(f"{len(records)} runs, {len(failed)} failed")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
