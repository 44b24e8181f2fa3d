"""``make sanitize``: the GPU tests marked ``sanitizer`` under each tool of NVIDIA's
compute-sanitizer, with a report.

The tests are split by file, and further where a tool is slow, and run in a few processes at once,
each with a time limit. Before them the same tests run once with no tool: that fills the
compilers' caches, and shows what fails by itself. The report says what ran, what was found and
which kernels were launched under which tool. The exit status is 0 only if every test passed or
was skipped, every tool came to its summary with nothing found, and every kernel that this GPU can
run was launched under every tool.
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
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from launched import kernels_in_source

ROOT = Path(__file__).resolve().parents[2]
PLAIN = "no tool"

TOOLS: dict[str, str] = {
    "racecheck": "shared memory touched by threads in no order",
    "memcheck": "reads and writes outside of allocations, and misaligned ones",
    "initcheck": "reads of global memory that nothing has written",
    "synccheck": "wrong uses of barriers",
}
"""The slowest first, so that it doesn't end alone."""

TESTS_PER_PROCESS = {PLAIN: 1000, "racecheck": 12, "memcheck": 40, "initcheck": 40, "synccheck": 40}
"""Where a process starts in ten seconds and a test takes from a tenth of one to ten."""

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
    warp is to run, and these read it. Racecheck reports that as a race, though a barrier of the
    whole block stands between each write and the read, which tests/codegen/test_codegen_hopper.py
    reads in the machine code. Reports of such places alone are counted apart, and only while the
    control, a kernel that does nothing else, is reported too. What a kernel itself does with
    shared memory is on other lines.
    """
    lines: dict[str, set[tuple[str, int]]] = {}
    for path in (*sorted((ROOT / "triton_kernels").rglob("*.py")), CONTROL):
        for function in ast.walk(ast.parse(path.read_text())):
            if not isinstance(function, ast.FunctionDef):
                continue
            calls = [node.lineno for node in ast.walk(function) if _specializes(node)]
            if calls:
                # A choice between two such calls that is made while compiling may be given in
                # their place.
                choices = [
                    node.lineno
                    for node in ast.walk(function)
                    if isinstance(node, ast.If) and any(map(_specializes, ast.walk(node)))
                ]
                first = min([function.lineno, *(decorator.lineno for decorator in function.decorator_list)])
                lines[function.name] = {(path.name, line) for line in (first, function.lineno, *calls, *choices)}
    return lines


def _specializes(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "warp_specialize"


@dataclass
class Findings:
    """One process's output: how much its tool reported, and whether the tool came to its end.

    ``dispatch``: races of :func:`dispatch_lines` alone, by kernel; ``places``: all else that was
    found, and where.
    """

    reported: int = 0
    finished: bool = False
    dispatch: Counter[str] = field(default_factory=Counter)
    places: Counter[str] = field(default_factory=Counter)


_LINE = re.compile(r"^[.sxXFE]*={9} (.*)$", re.MULTILINE)
"""A line of the tool, which may follow pytest's dots."""

_SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard)")
_KIND = re.compile(
    r"(?:Error: |Warning: )?(Invalid __\w+__ \w+|Uninitialized __\w+__ memory \w+|Misaligned \w+|Barrier error detected"
    r"|Program hit \w+|Internal Sanitizer Error)"
)
_PLACE = re.compile(r"\bat (?:0x[0-9a-f]+ in ([^\s:]+)|(\S.*?)\+0x[0-9a-f]+)")
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
        for old, new in _PLACE.findall(line):
            found.places[f"{kind} in {(old or new).split('(')[0]}"] += 1
    return found


# ---------------------------------------------------------------- what is run


class Job(NamedTuple):
    """Tests of one file, under one tool, in one process."""

    tool: str
    file: str
    tests: tuple[str, ...]


def find_sanitizer() -> str | None:
    """compute-sanitizer on PATH, else in the CUDA toolkit."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [str(Path(home) / part) for home in homes if home for part in ("bin", "compute-sanitizer")]
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=":".join(folders))


def command(sanitizer: str, job: Job, pytest: str, record: Path) -> list[str]:
    """The process of a job."""
    tests = [pytest, "-p", "launched", "-p", "no:cacheprovider", "--launched", str(record), "-q", *job.tests]
    if job.tool == PLAIN:
        return tests
    options = {
        "--tool": job.tool,
        "--target-processes": "application-only",  # not the compilers that a test may start
        "--error-exitcode": str(ERROR_EXIT),
        "--show-backtrace": "no",  # the host's is of Python's interpreter
        "--print-limit": "100",
    }
    if job.tool == "memcheck":
        options["--padding"] = "256"  # so that what leaves a buffer does not land in the next one
        # The launcher asks for one parameter too many, to see that there is none; it and PyTorch
        # raise for the calls that must not fail.
        options["--report-api-errors"] = "no"
    return [sanitizer, *(word for option in options.items() for word in option), *tests]


def environment(threads: int) -> dict[str, str]:
    """Of a job: each tensor is an allocation of its own, or its neighbours hide a fault."""
    path = os.pathsep.join(filter(None, (str(ROOT / "tests" / "support"), os.environ.get("PYTHONPATH"))))
    changes = {"PYTHONPATH": path, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": str(threads)}
    return {**{k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}, **changes}


def split(tool: str, tests: Iterable[str]) -> list[Job]:
    """Jobs of at most TESTS_PER_PROCESS tests, of nearly equal size within a file."""
    jobs = []
    for file, group in itertools.groupby(sorted(tests), lambda test: test.partition("::")[0]):
        ids = list(group)
        parts = -(-len(ids) // TESTS_PER_PROCESS[tool])
        # Every parts-th test: neighbours are parameters of one test, which is often the slow one.
        jobs += [Job(tool, file, tuple(ids[part::parts])) for part in range(parts)]
    return jobs


def collect(pytest: str, environment: Mapping[str, str]) -> list[str]:
    """Ids of the tests that are marked for this."""
    asked = [pytest, "--collect-only", "-q", "-m", "sanitizer", "tests"]
    done = subprocess.run(asked, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    ids = [line for line in done.stdout.splitlines() if line.startswith("tests/") and "::" in line]
    if done.returncode or not ids:
        sys.exit(f"no tests could be collected:\n{done.stdout}{done.stderr}")
    return ids


@dataclass(kw_only=True)
class Result(Findings):
    """What came of a job."""

    tool: str
    file: str
    tests: int
    passed: int = 0
    skipped: int = 0
    failed: int = 0
    kernels: list[str] = field(default_factory=list)
    seconds: float
    fault: str = ""
    output_tail: str

    @property
    def errors(self) -> int:
        """What was reported and not counted apart."""
        return self.reported - sum(self.dispatch.values())

    @property
    def clean(self) -> bool:
        """Whether all is well."""
        return not (self.fault or self.failed or self.errors)


def run_job(job: Job, sanitizer: str, pytest: str, threads: int, limit: float) -> Result:
    """Run a job to its end or its time limit."""
    started = time.monotonic()
    status: int | None = None
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "record.json"
        argv, env = command(sanitizer, job, pytest, record), environment(threads)
        # A session of its own, so that the limit ends the sanitizer, the tests and their compilers
        # alike.
        process = subprocess.Popen(
            argv, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        try:
            output, _ = process.communicate(timeout=limit)
            status = process.returncode
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
        outcomes = json.loads(record.read_text()) if record.exists() else {}
    found = parse(output) if job.tool != PLAIN else Findings(finished=True)
    result = Result(
        tool=job.tool, file=job.file, tests=len(job.tests), seconds=time.monotonic() - started,
        output_tail=output[-3000:], **vars(found), **outcomes,
    )  # fmt: skip
    if status is None:
        result.fault = "stopped at its time limit"
    elif not outcomes:
        result.fault = f"ended with status {status} before its tests did"
    elif not found.finished:
        result.fault = f"no summary from {job.tool}"
    elif result.passed + result.skipped + result.failed < len(job.tests):
        result.fault = "not every test ran"
    elif status != (ERROR_EXIT if found.reported else bool(result.failed)):
        result.fault = f"ended with status {status}"
    say = result.fault or f"{result.errors} errors, {result.failed} tests failed"
    print(f"{job.tool:<10} {job.file} {len(job.tests)} tests, {result.seconds:.0f} s: {say}", flush=True)
    return result


# ---------------------------------------------------------------- the report


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


DISPATCH = """That is the code with which Triton hands warps their work, where racecheck misses that a barrier of the
whole block stands between write and read: a kernel that does nothing else is reported too, and
`tests/codegen/test_codegen_hopper.py` reads the barriers in the machine code.
"""


def markdown(machine: Mapping[str, str], tools: Sequence[str], results: Sequence[Result], expected: set[str]) -> str:
    """The report as a page."""
    date = datetime.datetime.now(tz=datetime.timezone.utc).strftime("%Y-%m-%d")
    lines = [f"# compute-sanitizer on {machine['GPU']}", "", f"Made by `make sanitize` on {date}."]
    lines += [", ".join(f"{name} {value}" for name, value in machine.items()) + ".", ""]
    lines += [f"- {tool}: {TOOLS[tool]}" for tool in tools]
    lines += ["", "| tool | file | tests | skipped | failed | errors | processes | seconds | |"]
    lines += ["| --- | --- |" + " ---: |" * 6 + " --- |"]
    for (tool, file), group in itertools.groupby(results, key=lambda result: (result.tool, result.file)):
        parts = list(group)
        sums = [sum(getattr(part, name) for part in parts) for name in ("tests", "skipped", "failed", "errors")]
        faults = Counter(part.fault for part in parts if part.fault)
        what = "; ".join(f"{fault} ({n} of {len(parts)})" for fault, n in faults.items())
        seconds = sum(part.seconds for part in parts)
        cells = [tool, Path(file).name, *map(str, sums), str(len(parts)), f"{seconds:.0f}", what]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "Totals: "]
    for tool in tools:
        parts = [result for result in results if result.tool == tool]
        passed, errors = sum(p.passed for p in parts), sum(p.errors for p in parts)
        bad = sum(bool(p.fault or p.failed) for p in parts)
        lines.append(f"- {tool}: {passed} tests passed, {errors} errors, {bad} of {len(parts)} processes failed or cut")
    reached = launched_under(tools, results)
    everywhere = sorted(set.intersection(*reached.values()))
    lines += ["", "Kernels launched under every tool: " + ", ".join(f"`{k}`" for k in everywhere) + "."]
    if dispatch := sum((result.dispatch for result in results), Counter()):
        lines += ["", "Counted apart: " + ", ".join(f"`{k}` {n} times" for k, n in sorted(dispatch.items())) + "."]
        lines.append(DISPATCH)
    for tool, kernels in reached.items():
        if missing := sorted(expected - kernels):
            lines.append(f"**Not launched under {tool}**: {', '.join(missing)}.")
    found = Counter(f"{result.tool}: {what}" for result in results for what in result.places.elements())
    if found:
        lines += ["", "Found:", ""] + [f"- {what} ({n} times)" for what, n in sorted(found.items())]
    return "\n".join(lines) + "\n"


def launched_under(tools: Sequence[str], results: Sequence[Result]) -> dict[str, set[str]]:
    """The kernels that each tool has seen."""
    return {tool: {kernel for r in results if r.tool == tool for kernel in r.kernels} for tool in tools}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tools", default=",".join(TOOLS), help="which, by commas")
    parser.add_argument("--files", default="", help="only files whose name contains one of these, by commas")
    parser.add_argument("--jobs", type=int, default=4, help="processes at once")
    parser.add_argument("--limit", type=float, default=300, help="seconds that one process may take")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="folder of the report")
    parser.add_argument("--pytest", default=str(Path(sys.executable).with_name("pytest")))
    options = parser.parse_args(arguments)
    tools = [tool for tool in options.tools.split(",") if tool]
    if unknown := set(tools) - set(TOOLS):
        parser.error(f"--tools: expected some of {', '.join(TOOLS)}, got {', '.join(sorted(unknown))}")
    sanitizer = find_sanitizer()
    if sanitizer is None:
        sys.exit(
            "compute-sanitizer: neither on PATH nor under CUDA_HOME or /usr/local/cuda; it is part of the CUDA toolkit"
        )
    machine = describe_machine(sanitizer)
    capability = tuple(map(int, machine["compute capability"].split(".")))
    tests, expected = collect(options.pytest, environment(1)), expected_kernels(capability)
    if wanted := [name for name in options.files.split(",") if name]:
        tests, expected = [t for t in tests if any(name in t.split("::")[0] for name in wanted)], set()

    threads = max(1, (os.cpu_count() or 1) // options.jobs)
    results: list[Result] = []
    for jobs in (split(PLAIN, tests), [job for tool in tools for job in split(tool, tests)]):
        with ThreadPoolExecutor(options.jobs) as pool:
            results += pool.map(lambda job: run_job(job, sanitizer, options.pytest, threads, options.limit), jobs)
    if not any(CONTROL_KERNEL in result.dispatch for result in results):
        for result in results:
            result.dispatch.clear()  # so that they are errors

    name = re.search(r"\b[A-Z]+\d+\w*", machine["GPU"])  # H100 of NVIDIA H100 80GB HBM3
    report = options.out / f"sanitizers_{(name[0] if name else 'gpu').lower()}.md"
    options.out.mkdir(parents=True, exist_ok=True)
    page = markdown(machine, tools, results, expected)
    report.write_text(page)
    print(page)
    for result in results:
        if not result.clean:
            print(f"==== {result.tool}, {result.file}: {result.fault or 'see below'}\n{result.output_tail}")
    complete = all(expected <= kernels for kernels in launched_under(tools, results).values())
    return 0 if complete and all(result.clean for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
