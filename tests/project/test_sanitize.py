"""``make sanitize`` with stand-ins for compute-sanitizer, pytest and nvidia-smi: what it runs, reads and reports."""

from __future__ import annotations

import ast
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import launched
import pytest
import sanitize
from sanitize import ERROR_EXIT, Job

ROOT = Path(__file__).parent.parent
HELP = "--target-processes --error-exitcode --show-backtrace --print-limit --padding"


# ---------------------------------------------------------------- what a tool said

CLEAN = """============================= test session starts ==============================
========= COMPUTE-SANITIZER
.....
========= 5 passed in 2.00s ==========
========= ERROR SUMMARY: 0 errors
"""

INVALID = """========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 2 bytes
=========     at quantize_kernel+0x1a40 in quantize.py:210
=========     by thread (31,0,0) in block (7,0,0)
=========     Access at 0x7f00 is out of bounds
=========
========= Invalid __global__ read of size 16 bytes
=========     at 0x1230 in quantize_kernel
=========     by thread (0,0,0) in block (1,0,0)
=========
========= Program hit cudaErrorInvalidValue (error 1) due to "invalid argument" on CUDA API call to cudaMemcpy.
========= ERROR SUMMARY: 3 errors
"""

RACE = """========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at hopper_gemm_kernel+0x10 in a.py:10
=========     and Read access at hopper_gemm_kernel+0x90 in a.py:20 [16 hazards]
=========
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""

TEMPLATE = """========= COMPUTE-SANITIZER
========= Uninitialized __global__ memory read of size 4 bytes
=========     at void at::native::vectorized_elementwise_kernel<(int)4>(int, float*)+0x340
========= Warning: some kernel could not be checked
========= ERROR SUMMARY: 1 error
"""


def dispatch(kernel: str, *, also: int | None = None) -> str:
    """A report of Triton's own code in a kernel, and of one more line if wanted."""
    (file,) = {name for name, _ in sanitize.dispatch_lines()[kernel]}
    first, *_, last = sorted(line for _, line in sanitize.dispatch_lines()[kernel])
    more = "" if also is None else f"=========     and Write access at {kernel}+0x99 in {file}:{also} [1 hazards]\n"
    return f"""..========= Error: Race reported between Read access at {kernel}+0x150 in {file}:{first}
=========     and Write access at {kernel}+0x1140 in {file}:{first} [66 hazards]
=========     and Write access at {kernel}+0x2a50 in {file}:{last} [41 hazards]
{more}=========
"""


CONTROL_KERNEL = "warp_specialize_control_kernel"


@pytest.mark.parametrize("kernel", ["hopper_gemm_kernel", CONTROL_KERNEL])
def test_what_triton_does_to_hand_out_warps_is_counted_apart(kernel: str) -> None:
    tail = "========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)\n"
    found = sanitize.parse(dispatch(kernel) + dispatch(kernel) + tail)
    assert (found.reported, dict(found.dispatch)) == (2, {kernel: 2})
    found = sanitize.parse(dispatch(kernel) + dispatch(kernel, also=1) + tail)
    assert (found.reported, dict(found.dispatch)) == (2, {kernel: 1})
    (race,) = found.races
    assert race.endswith(":1")
    assert sanitize.parse(RACE).races == {
        "Write in hopper_gemm_kernel, a.py:10; Read in hopper_gemm_kernel, a.py:20": 1
    }
    assert not sanitize.parse(RACE).dispatch
    assert not sanitize.parse(dispatch(kernel).replace(f"{kernel}+", "quantize_kernel+")).dispatch


def test_without_the_control_it_counts() -> None:
    job = Job("racecheck", "tests/gpu/a.py", ("t",))
    tail = "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)\n"
    record = {"passed": 1, "skipped": 0, "failed": 0, "kernels": []}
    result = sanitize.judge(job, dispatch("hopper_gemm_kernel") + tail, ERROR_EXIT, record, 1.0)
    control = sanitize.judge(job, dispatch(CONTROL_KERNEL) + tail, ERROR_EXIT, record, 1.0)
    assert result.clean
    assert [r.errors for r in sanitize.without_control([result, control])] == [0, 0]
    (alone,) = sanitize.without_control([result])
    assert (alone.errors, alone.clean, alone.dispatch) == (1, False, {})


def test_nothing_found() -> None:
    found = sanitize.parse(CLEAN)
    assert (found.reported, found.finished, found.kinds, found.warnings) == (0, True, {}, {})


def test_errors_their_kinds_and_their_kernels() -> None:
    found = sanitize.parse(INVALID)
    assert found.reported == 3
    assert found.kernels == {"quantize_kernel": 2}
    assert found.kinds == {
        "Invalid __global__ write": 1,
        "Invalid __global__ read": 1,
        "Program hit cudaErrorInvalidValue": 1,
    }


def test_hazards() -> None:
    found = sanitize.parse(RACE.replace("========= Error", "..s.========= Error"))
    assert found.kinds == {"Race reported": 1}, "among pytest's dots, too"
    found = sanitize.parse(RACE)
    assert (found.reported, found.finished) == (1, True)
    assert found.kinds == {"Race reported": 1}
    assert found.kernels == {"hopper_gemm_kernel": 2}
    assert sanitize.parse("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)").finished


def test_kernels_of_libraries_and_warnings() -> None:
    found = sanitize.parse(TEMPLATE)
    assert found.reported == 1
    assert list(found.kernels) == ["void at::native::vectorized_elementwise_kernel<"]
    assert found.warnings == {"some kernel could not be checked": 1}


def test_a_tool_that_did_not_finish() -> None:
    found = sanitize.parse(
        "========= COMPUTE-SANITIZER\n========= Internal Sanitizer Error: oh\nERROR SUMMARY: 0 errors\n"
    )
    assert not found.finished
    assert found.reported == 1


RECORD = {"passed": 2, "skipped": 0, "failed": 0, "kernels": ["a"]}
JOB = Job("memcheck", "f.py", ("f.py::a", "f.py::b"))


@pytest.mark.parametrize(
    ("output", "status", "record", "fault"),
    [
        (CLEAN, 0, RECORD, ""),
        (CLEAN, None, None, "stopped at its time limit"),
        (CLEAN, None, RECORD, "stopped at its time limit"),
        (CLEAN, -11, None, "ended with status -11 before its tests did"),
        ("", 0, RECORD, "no summary from memcheck"),
        (CLEAN, 0, {**RECORD, "passed": 1}, "not every test ran"),
        (CLEAN, 3, RECORD, "ended with status 3"),
        (INVALID, 0, RECORD, "ended with status 0"),
    ],
)
def test_faults_of_a_process(output: str, status: int | None, record: dict[str, Any] | None, fault: str) -> None:
    result = sanitize.judge(JOB, output, status, record, 1.0)
    assert result.fault == fault
    assert result.clean == (fault == "")


def test_a_failed_test_and_a_found_error_are_not_clean() -> None:
    failed = sanitize.judge(JOB, CLEAN, 1, {**RECORD, "passed": 1, "failed": 1}, 1.0)
    assert not failed.clean
    assert failed.fault == ""
    found = sanitize.judge(JOB, INVALID, ERROR_EXIT, RECORD, 1.0)
    assert (found.errors, found.clean, found.fault) == (3, False, "")


# ---------------------------------------------------------------- what is run


def test_command() -> None:
    argv = sanitize.command("cs", HELP, JOB, "pytest", Path("r.json"))
    assert argv[:3] == ["cs", "--tool", "memcheck"]
    assert ("--error-exitcode", str(ERROR_EXIT)) in itertools.pairwise(argv)
    assert "--padding" in argv
    assert argv[argv.index("pytest") :] == [
        "pytest", "-p", "launched", "-p", "no:cacheprovider", "--launched", "r.json", "-q", "f.py::a", "f.py::b",
    ]  # fmt: skip
    assert "--padding" not in sanitize.command("cs", HELP, Job("racecheck", "f", ("t",)), "pytest", Path("r"))
    assert sanitize.command("cs", HELP, Job(sanitize.PLAIN, "f", ("t",)), "pytest", Path("r"))[0] == "pytest"


def test_options_that_this_version_lacks_are_left_out() -> None:
    argv = sanitize.command("cs", HELP.replace("--padding", ""), JOB, "pytest", Path("r.json"))
    assert "--padding" not in argv
    assert "256" not in argv


@pytest.mark.parametrize("tool", [sanitize.PLAIN, *sanitize.TOOLS])
def test_each_test_runs_once_under_each_tool(tool: str) -> None:
    tests = [f"tests/gpu/{file}.py::test[{i}]" for file, n in (("a", 130), ("b", 1), ("c", 12)) for i in range(n)]
    jobs = sanitize.split(tool, tests)
    assert sorted(test for job in jobs for test in job.tests) == sorted(tests)
    for job in jobs:
        assert 0 < len(job.tests) <= sanitize.TESTS_PER_PROCESS[tool]
        assert {test.split("::")[0] for test in job.tests} == {job.file}


def test_the_environment_separates_allocations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    env = sanitize.environment(3)
    assert env["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
    assert "TRITON_INTERPRET" not in env


def test_sanitizer_is_found_in_the_toolkit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tool = script(tmp_path / "cuda" / "bin" / "compute-sanitizer", "exit 0")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    assert sanitize.find_sanitizer(path=str(tmp_path)) == str(tool)


# ---------------------------------------------------------------- all of it, on stand-ins


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)
    return path


# compute-sanitizer: runs its program, then says what the test wants of the tool.
SANITIZER = """
case "$1" in --help) echo '{help}'; exit ;; --version) echo 'Version 2025.1.0 (build x)'; exit ;; esac
tool=$2; while [[ "$1" == --* ]]; do shift 2; done
"$@"; status=$?
case $tool in {cases} esac
[ $tool = racecheck ] && echo '========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)' && exit $status
echo '========= ERROR SUMMARY: 0 errors'; exit $status
"""

# pytest: lists three tests, or leaves the record of a run of those given.
PYTEST = """
for word; do [ "$previous" = --launched ] && record=$word; [[ "$word" == *::* ]] && n=$((n + 1)); previous=$word; done
if [ -z "$record" ]; then
  printf 'tests/gpu/a.py::one\\ntests/gpu/a.py::two[x y]\\ntests/gpu/b.py::three\\n\\n3 tests collected\\n'; exit
fi
{behaviour}
echo '{{"passed": '$n', "skipped": 0, "failed": 0, "kernels": {kernels}}}' >$record
"""


def run_main(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    *arguments: str,
    cases: str = "",
    behaviour: str = "",
    kernels: set[str] | None = None,
) -> tuple[int, dict[str, Any], str]:
    """Exit status, JSON and page."""
    names = json.dumps(sorted(sanitize.expected_kernels((9, 0)) if kernels is None else kernels))
    folder = tmp_path / "bin"
    script(folder / "compute-sanitizer", SANITIZER.format(help=HELP, cases=cases))
    script(folder / "pytest", PYTEST.format(behaviour=behaviour, kernels=names))
    script(folder / "nvidia-smi", "echo 'NVIDIA H100 80GB HBM3, 9.0, 575.1'")
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    out = tmp_path / "out"
    status = sanitize.main(["--out", str(out), "--pytest", str(folder / "pytest"), "--jobs", "2", *arguments])
    return status, json.loads((out / "sanitizers_h100.json").read_text()), (out / "sanitizers_h100.md").read_text()


def test_a_clean_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status, record, page = run_main(tmp_path, monkeypatch)
    assert status == 0
    assert record["machine"]["driver"] == "575.1"
    assert record["machine"]["compute-sanitizer"] == "2025.1.0"
    ran = {(result["tool"], result["file"]): result["passed"] for result in record["results"]}
    assert ran == {
        (tool, f"tests/gpu/{f}.py"): n for tool in (sanitize.PLAIN, *sanitize.TOOLS) for f, n in (("a", 2), ("b", 1))
    }
    assert "| racecheck | a.py | 2 | 0 | 0 | 0 | 1 |" in page
    assert "- memcheck: 3 tests passed, 0 errors, 0 of 2 processes failed or cut" in page


def test_an_error_fails_the_run_and_names_the_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = tmp_path / "said"
    said.write_text(INVALID)
    status, record, page = run_main(tmp_path, monkeypatch, cases=f"memcheck) cat {said}; exit {ERROR_EXIT} ;;")
    assert status == 1
    assert sum(result["errors"] for result in record["results"]) == 6
    assert "- memcheck: quantize_kernel (4 times)" in page
    assert "Invalid __global__ write of size 2" in capsys.readouterr().out


def test_a_crash_fails_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status, _, page = run_main(tmp_path, monkeypatch, "--tools", "memcheck", behaviour="kill -SEGV $$")
    assert status == 1
    assert "ended with status" in page
    assert "2 of 2 processes failed or cut" in page


def test_a_hang_is_cut_with_its_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = tmp_path / "survived"
    hang = f"(sleep 3; touch {mark}) & sleep 60"
    started = time.monotonic()
    status, _, page = run_main(tmp_path, monkeypatch, "--tools", "memcheck", "--limit", "1", behaviour=hang)
    assert status == 1
    assert "stopped at its time limit (1 of 1)" in page
    assert time.monotonic() - started < 50
    time.sleep(3)
    assert not mark.exists()


def test_what_does_not_fit_the_time_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status, record, _ = run_main(tmp_path, monkeypatch, "--within", "0")
    assert status == 1
    assert {result["fault"] for result in record["results"]} == {"not started in time"}


def test_a_kernel_that_no_test_launched_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    some = sanitize.expected_kernels((9, 0)) - {"combine_kernel"}
    status, record, page = run_main(tmp_path, monkeypatch, kernels=some)
    assert status == 1
    assert record["not_launched"] == {tool: ["combine_kernel"] for tool in sanitize.TOOLS}
    assert "**Not launched under racecheck**: combine_kernel." in page


def test_a_second_run_adds_to_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tools may be run one after another; each replaces what an earlier run said of it, and a failure stays one."""
    wrong = f"memcheck) echo '========= ERROR SUMMARY: 2 errors'; exit {ERROR_EXIT} ;;"
    assert run_main(tmp_path, monkeypatch, "--tools", "memcheck", "--add", cases=wrong)[0] == 1
    status, record, page = run_main(tmp_path, monkeypatch, "--tools", "racecheck,synccheck", "--add")
    assert status == 1
    assert record["tools"] == ["racecheck", "memcheck", "synccheck"]
    assert "- memcheck: 3 tests passed, 4 errors" in page
    assert run_main(tmp_path, monkeypatch, "--tools", "memcheck", "--add")[0] == 0
    assert run_main(tmp_path, monkeypatch, "--tools", "initcheck")[1]["tools"] == ["initcheck"]


def test_an_unknown_tool_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        sanitize.main(["--tools", "memchek"])
    assert "expected some of racecheck, memcheck, initcheck, synccheck, got memchek" in capsys.readouterr().err


# ---------------------------------------------------------------- kernels, and the tests that reach them


def test_all_launched_kernels_are_known_by_name() -> None:
    """What the source jits under a name of a kernel is what it launches, and the exceptions name kernels."""
    jitted = {
        node.name
        for path in launched.ROOM.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
        and node.name.endswith("_kernel")
        and any(".jit" in ast.unparse(decorator) for decorator in node.decorator_list)
    }
    assert launched.kernels_in_source() == jitted
    assert set(sanitize.ONLY_ON) <= jitted
    assert sanitize.expected_kernels((9, 0)) == jitted - {"grouped_gemm_blackwell_kernel"}
    assert sanitize.expected_kernels((8, 0)) == jitted - set(sanitize.ONLY_ON)


def test_compiled_kernels_are_those_that_were_launched(monkeypatch: pytest.MonkeyPatch, interpreter: None) -> None:
    from hybrid_mxfp8.triton_kernels import launch

    kernel = SimpleNamespace(metadata=SimpleNamespace(name="some_kernel"))
    loaded = launch.Loaded(kernel, 0, None)
    monkeypatch.setattr(launch, "_loaded", {"key": loaded, "another": loaded})
    assert launched.compiled_kernels() == {"some_kernel"}


def test_outcomes_are_written_down(tmp_path: Path) -> None:
    (tmp_path / "test_a.py").write_text(
        "import pytest\ndef test_good(): pass\ndef test_bad(): assert 0\n@pytest.mark.skip\ndef test_not(): pass\n"
        "@pytest.fixture\ndef broken(): raise ValueError\ndef test_error(broken): pass\n"
    )
    argv = [sys.executable, "-m", "pytest", "-p", "launched", "--launched", "record.json", "-q", "test_a.py"]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "tests"), "PYTEST_ADDOPTS": ""}
    subprocess.run(argv, cwd=tmp_path, env=env, capture_output=True, check=False)
    assert json.loads((tmp_path / "record.json").read_text()) == {"passed": 1, "skipped": 1, "failed": 2, "kernels": []}


def test_marked_tests_stand_in_every_file_that_launches_kernels() -> None:
    """The collection that the command makes, for real."""
    tests = sanitize.collect(str(Path(sys.executable).with_name("pytest")), sanitize.environment(1))
    files = {Path(file).name for file in sanitize.by_file(tests)}
    assert files >= {
        "test_cutlass_gpu.py",
        "test_gpu_groups.py",
        "test_gpu_grouped_gemm.py",
        "test_gpu_hopper.py",
        "test_gpu_moe.py",
        "test_gpu_quantize.py",
        "test_gpu_sglang.py",
    }
