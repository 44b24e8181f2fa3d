"""``make sanitize``: the GPU tests marked ``sanitizer`` under each tool of NVIDIA's
compute-sanitizer, with a report.

The tests run in a few processes at once, each with a time limit, and first once with no tool: that
fills the compilers' caches, and shows what fails by itself. The exit status is 0 only if every
test passed or was skipped, every tool came to its summary with nothing found, and every kernel
that this GPU can run was launched under every tool.
"""

from __future__ import annotations

import argparse
import ast
import datetime
import functools
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PLAIN = "no tool"

TOOLS: dict[str, str] = {
    "racecheck": "shared memory touched by threads in no order",
    "memcheck": "reads and writes outside of allocations, and misaligned ones",
    "initcheck": "reads of global memory that nothing has written",
    "synccheck": "wrong uses of barriers",
}
"""The slowest first, so that it doesn't end alone."""

TESTS_PER_PROCESS = {PLAIN: 1000, "racecheck": 8}
"""Of other tools 40: a process starts in ten seconds, a test takes from a tenth of one to ten."""

ERROR_EXIT = 86
"""What compute-sanitizer exits with when it found something; none of pytest's codes."""

ONLY_ON: dict[str, tuple[tuple[int, int], ...]] = {
    "hopper_gemm_kernel": ((9, 0),),
    "hopper_fp8_gemm_kernel": ((9, 0),),
    "dequantize_tokens_kernel": ((9, 0),),
    "grouped_gemm_blackwell_kernel": ((10, 0), (10, 3)),
}
"""Kernels that some compute capabilities alone run."""

CONTROL = ROOT / "tests" / "gpu" / "test_gpu_racecheck.py"
CONTROL_KERNEL = "warp_specialize_control_kernel"
"""It does nothing but hand out warps. See :func:`dispatch_lines`."""

# ---------------------------------------------------------------- what a tool said


@functools.cache
def dispatch_lines() -> dict[str, set[tuple[str, int]]]:
    """Of each kernel that specializes warps, the lines (file, number) that Triton's own code for
    it is attributed to.

    There the default warps leave a byte in shared memory that says which partition each other
    warp is to run, and these read it. Racecheck reports that as a race; see ``DISPATCH``. Reports
    of such places alone are counted apart, and only while the control, a kernel that does nothing
    else, is reported too. What a kernel itself does with shared memory is on other lines.
    """
    lines: dict[str, set[tuple[str, int]]] = {}
    for path in (*sorted((ROOT / "triton_kernels").rglob("*.py")), CONTROL):
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef) and any(map(_specializes, ast.walk(function))):
                # A choice between two such calls, made while compiling, may stand in their place.
                calls = [
                    node.lineno
                    for node in ast.walk(function)
                    if isinstance(node, (ast.Call, ast.If)) and any(map(_specializes, ast.walk(node)))
                ]
                first = min([function.lineno, *(decorator.lineno for decorator in function.decorator_list)])
                lines[function.name] = {(path.name, line) for line in (first, function.lineno, *calls)}
    return lines


def _specializes(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "warp_specialize"


@dataclass
class Findings:
    """One process's output."""

    reported: int = 0
    finished: bool = False  # the tool came to its end
    dispatch: Counter[str] = field(default_factory=Counter)  # races of dispatch_lines alone, by kernel
    places: Counter[str] = field(default_factory=Counter)  # all else that was found, and where


_LINE = re.compile(r"^[.sxXFE]*={9} (.*)$", re.MULTILINE)
"""A line of the tool, which may follow pytest's dots."""

_SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard)")
_KIND = re.compile(
    r"(?:Error: |Warning: )?(Invalid __\w+__ \w+|Uninitialized __\w+__ memory \w+|Misaligned \w+|Barrier error detected"
    r"|Program hit \w+|Internal Sanitizer Error)"
)
_PLACE = re.compile(r"\s*at (?:0x[0-9a-f]+ in )?([^(+]+)")
_RACE = re.compile(r".*Race reported between .*(?:\n\s+and .*)*")
_ACCESS = re.compile(r"(Read|Write) access at (\w+)\+0x[0-9a-f]+ in ([\w.]+):(\d+)")


def parse(text: str) -> Findings:
    """What compute-sanitizer printed among a program's own lines."""
    said, found, kind = "\n".join(_LINE.findall(text)), Findings(), "Report"
    for race in _RACE.findall(said):
        accesses = _ACCESS.findall(race)
        kernel = accesses[0][1] if accesses else ""
        known = {(kernel, *line) for line in dispatch_lines().get(kernel, ())}
        inside = [(where, file, int(line)) in known for _, where, file, line in accesses]
        if len(inside) == len(race.splitlines()) and all(inside):
            found.dispatch[kernel] += 1
        else:
            places = [f"{access} in {where}, {file}:{line}" for access, where, file, line in accesses]
            found.places[f"Race: {'; '.join(places) or race}"] += 1
    for line in _RACE.sub("", said).splitlines():
        if summary := _SUMMARY.match(line):
            found.finished = True
            found.reported += int(summary[1])
        elif named := _KIND.match(line):
            kind = named[1]
            found.reported += kind == "Internal Sanitizer Error"  # the tool's own failure is in no summary
        elif place := _PLACE.match(line):
            found.places[f"{kind} in {place[1]}"] += 1
    return found


# ---------------------------------------------------------------- what is run


def find_sanitizer() -> str:
    """compute-sanitizer on PATH, else in the CUDA toolkit."""
    homes = filter(None, (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"))
    folders = [f"{home}/{part}" for home in homes for part in ("bin", "compute-sanitizer")]
    found = shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ["PATH"], *folders]))
    return found or sys.exit(
        "compute-sanitizer: neither on PATH nor under CUDA_HOME or /usr/local/cuda; it is part of the CUDA toolkit"
    )


OPTIONS = {
    "--target-processes": "application-only",  # not the compilers that a test may start
    "--error-exitcode": str(ERROR_EXIT),
    "--show-backtrace": "no",  # the host's is of Python's interpreter
    "--print-limit": "100",
}
TOOL_OPTIONS = {
    "memcheck": {
        "--padding": "256",  # so that what leaves a buffer does not land in the next one
        "--report-api-errors": "no",  # some calls are to fail; the launcher and PyTorch raise for the others
    },
    "racecheck": {"--racecheck-num-workers": "1"},  # else as many threads as cores, each job: they starve each other
}


def environment(threads: int) -> dict[str, str]:
    """Of a job: each tensor is an allocation of its own, or its neighbours hide a fault."""
    path = os.pathsep.join(filter(None, (str(ROOT / "tests" / "support"), os.environ.get("PYTHONPATH"))))
    changes = {"PYTHONPATH": path, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": str(threads)}
    return {**{k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}, **changes}


PYTEST = (sys.executable, "-m", "pytest")  # a script that starts the interpreter would not be instrumented


def collect(env: Mapping[str, str]) -> list[str]:
    """Ids of the tests that are marked for this, without those of the reference."""
    asked = [*PYTEST, "--collect-only", "-q", "-m", "sanitizer", "-k", "not [reference", "tests"]
    done = subprocess.run(asked, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    ids = [line for line in done.stdout.splitlines() if line.startswith("tests/") and "::" in line]
    if done.returncode or not ids:
        sys.exit(f"no tests could be collected:\n{done.stdout}{done.stderr}")
    return ids


class Job(NamedTuple):
    """Tests of one file, under one tool, in one process."""

    tool: str
    file: str
    tests: tuple[str, ...]


def split(tool: str, tests: Iterable[str]) -> list[Job]:
    """Jobs of at most TESTS_PER_PROCESS tests, of nearly equal size within a file."""
    jobs = []
    for file, group in itertools.groupby(sorted(tests), lambda test: test.partition("::")[0]):
        ids = tuple(group)
        parts = -(-len(ids) // TESTS_PER_PROCESS.get(tool, 40))
        # Every parts-th test: neighbours are parameters of one test, which is often the slow one.
        jobs += [Job(tool, file, ids[part::parts]) for part in range(parts)]
    return jobs


@dataclass
class Result:
    """What came of a job."""

    job: Job
    seconds: float
    found: Findings
    ran: dict[str, Any]  # what ``launched`` wrote down, its tests' outcomes and kernels
    fault: str  # why its outcome does not count

    @property
    def clean(self) -> bool:
        """Whether it came to its end and nothing was found."""
        return not (self.fault or self.sums["failed"] or self.sums["errors"])

    @property
    def sums(self) -> Counter[str]:
        """The figures of the report; ``errors`` are what was reported and not counted apart."""
        counted = {name: self.ran.get(name, 0) for name in ("passed", "skipped", "failed")}
        errors = self.found.reported - sum(self.found.dispatch.values())
        bad = bool(self.fault or counted["failed"])
        return Counter(counted, tests=len(self.job.tests), errors=errors, processes=1, bad=bad, seconds=self.seconds)


def run_job(job: Job, sanitizer: str, env: Mapping[str, str], limit: float) -> Result:
    """Run a job to its end or its time limit."""
    started = time.monotonic()
    status: int | None = None
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "record.json"
        argv = [*PYTEST, "-p", "launched", "-p", "no:cacheprovider", "--launched", str(record), "-q", *job.tests]
        if job.tool != PLAIN:
            options = {"--tool": job.tool} | OPTIONS | TOOL_OPTIONS.get(job.tool, {})
            argv = [sanitizer, *itertools.chain(*options.items()), *argv]
        # A session of its own, so that the limit ends sanitizer, tests and their compilers alike.
        process = subprocess.Popen(
            argv, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        try:
            output, _ = process.communicate(timeout=limit)
            status = process.returncode
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
        ran = json.loads(record.read_text()) if record.exists() else {}
    found = parse(output) if job.tool != PLAIN else Findings(finished=True)
    fault = ""
    if status is None:
        fault = "stopped at its time limit"
    elif not ran:
        fault = f"ended with status {status} before its tests did"
    elif not found.finished:
        fault = f"no summary from {job.tool}"
    elif ran["passed"] + ran["skipped"] + ran["failed"] < len(job.tests):
        fault = "not every test ran"
    elif status != (ERROR_EXIT if found.reported else bool(ran["failed"])):
        fault = f"ended with status {status}"
    result = Result(job, time.monotonic() - started, found, ran, fault)
    say = fault or f"{result.sums['errors']} errors, {result.sums['failed']} tests failed"
    print(f"{job.tool:<10} {job.file} {len(job.tests)} tests, {result.seconds:.0f} s: {say}", flush=True)
    if not result.clean:  # at once: what is cut short later has said it
        print(f"{found.places.most_common(5)}\n{output[-3000:]}", flush=True)
    return result


# ---------------------------------------------------------------- the report


def kernels_in_source() -> set[str]:
    """Names of all that ``triton_kernels`` launches: what stands first in a ``KernelLaunch.of``."""
    sources = [path.read_text() for path in (ROOT / "triton_kernels").rglob("*.py")]
    return {name for text in sources for name in re.findall(r"KernelLaunch\.of\(\s*(\w+_kernel)\b", text)}


def expected_kernels(capability: tuple[int, ...]) -> set[str]:
    """The kernels that a GPU can run."""
    return {name for name in kernels_in_source() if capability in ONLY_ON.get(name, (capability,))}


def describe_machine(sanitizer: str) -> dict[str, str]:
    """GPU, compute capability, driver and versions, as text."""

    def said(*argv: str) -> str:
        return subprocess.run(argv, capture_output=True, text=True, check=False).stdout.strip()

    fields = {"GPU": "name", "compute capability": "compute_cap", "driver": "driver_version"}
    line, *_ = said("nvidia-smi", f"--query-gpu={','.join(fields.values())}", "--format=csv,noheader").splitlines()
    version = re.search(r"[Vv]ersion ([\d.]+)", said(sanitizer, "--version"))
    return {
        **dict(zip(fields, line.split(", "), strict=True)),
        **{name: metadata.version(name) for name in ("torch", "triton")},
        "compute-sanitizer": version[1] if version else "unknown",
    }


DISPATCH = """That is the code with which Triton hands warps their work, where racecheck misses that a barrier
of the whole block stands between write and read: a kernel that does nothing else is reported too,
and `tests/codegen/test_codegen_hopper.py` reads the barriers in the machine code."""


def markdown(
    machine: Mapping[str, str], reached: Mapping[str, set[str]], results: Sequence[Result], expected: set[str]
) -> str:
    """The report as a page; ``reached``: the kernels that each tool has seen."""
    date = datetime.datetime.now(tz=datetime.timezone.utc).strftime("%Y-%m-%d")
    lines = [f"# compute-sanitizer on {machine['GPU']}", "", f"Made by `make sanitize` on {date}."]
    lines += [textwrap.fill(", ".join(f"{name} {value}" for name, value in machine.items()) + ".", 100), ""]
    lines += [f"- {tool}: {TOOLS[tool]}" for tool in reached]
    columns = ("tests", "skipped", "failed", "errors", "processes", "seconds")
    lines += ["", f"| tool | file | {' | '.join(columns)} | |", "| --- | --- |" + " ---: |" * 6 + " --- |"]
    for (tool, file), group in itertools.groupby(results, key=lambda result: result.job[:2]):
        parts = list(group)
        sums = sum((part.sums for part in parts), Counter())
        faults = Counter(part.fault for part in parts if part.fault)
        what = "; ".join(f"{fault} ({n} of {len(parts)})" for fault, n in faults.items())
        figures = " | ".join(f"{sums[column]:.0f}" for column in columns)
        lines.append(f"| {tool} | {Path(file).name} | {figures} | {what} |")
    lines += ["", "Totals:", ""]
    for tool in reached:
        sums = sum((result.sums for result in results if result.job.tool == tool), Counter())
        cut = f"{sums['bad']} of {sums['processes']} processes failed or cut"
        lines.append(f"- {tool}: {sums['passed']} tests passed, {sums['errors']} errors, {cut}")
    everywhere = sorted(set.intersection(*reached.values()))
    launched = "Kernels launched under every tool: " + ", ".join(f"`{k}`" for k in everywhere) + "."
    lines += ["", textwrap.fill(launched, 100)]
    if dispatch := sum((result.found.dispatch for result in results), Counter()):
        counts = ", ".join(f"`{k}` {n} times" for k, n in sorted(dispatch.items()))
        lines += ["", textwrap.fill(f"Counted apart: {counts}.", 100), DISPATCH]
    for tool, kernels in reached.items():
        if missing := sorted(expected - kernels):
            lines.append(f"**Not launched under {tool}**: {', '.join(missing)}.")
    found = Counter(f"{result.job.tool}: {what}" for result in results for what in result.found.places.elements())
    if found:
        lines += ["", "Found:", "", *(f"- {what} ({n} times)" for what, n in sorted(found.items()))]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--files", nargs="+", metavar="NAME", help="only files whose name contains one of these")
    parser.add_argument("--jobs", type=int, default=4, help="processes at once")
    parser.add_argument("--limit", type=float, default=300, help="seconds that one process may take")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="folder of the report")
    options = parser.parse_args(arguments)
    sanitizer = find_sanitizer()
    machine = describe_machine(sanitizer)
    capability = tuple(map(int, machine["compute capability"].split(".")))
    env = environment(max(1, (os.cpu_count() or 1) // options.jobs))
    tests, expected = collect(env), expected_kernels(capability)
    if options.files:
        tests, expected = [t for t in tests if any(name in t.split("::")[0] for name in options.files)], set()

    results: list[Result] = []
    for jobs in (split(PLAIN, tests), [job for tool in options.tools for job in split(tool, tests)]):
        with ThreadPoolExecutor(options.jobs) as pool:
            results += pool.map(lambda job: run_job(job, sanitizer, env, options.limit), jobs)
    if not any(CONTROL_KERNEL in result.found.dispatch for result in results):
        for result in results:
            result.found.places.update(result.found.dispatch)  # errors, then
            result.found.dispatch.clear()
    reached = {
        tool: {kernel for result in results if result.job.tool == tool for kernel in result.ran.get("kernels", ())}
        for tool in options.tools
    }

    name = re.search(r"\b[A-Z]+\d+\w*", machine["GPU"])  # H100 of NVIDIA H100 80GB HBM3
    report = options.out / f"sanitizers_{(name[0] if name else 'gpu').lower()}.md"
    options.out.mkdir(parents=True, exist_ok=True)
    page = markdown(machine, reached, results, expected)
    report.write_text(page)
    print(page)
    return int(not all(result.clean for result in results) or any(expected - k for k in reached.values()))


if __name__ == "__main__":
    sys.exit(main())
