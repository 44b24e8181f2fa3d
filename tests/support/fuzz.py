"""``make fuzz``: the state machine of ``fuzz_machine`` for as long as you like, in a few processes, with random seeds.

Each process runs rounds: a round is a number of examples drawn from one seed, so a find is reproduced by its round alone,
with the line that is printed beside it; that also looks, for some minutes, for the shortest sequence of calls that
still shows it. The run ends by itself at the time limit, prints totals, and exits with 0 if nothing was found.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tally

EXAMPLES, STEPS = 10, 25
"""Of a round, and calls of an example: about half a minute in the interpreter."""

GRACE = 180.0
"""Seconds that a round which began in time may go on: a few times what it takes."""


CONTEXT_LOST = 3
"""Exit status of a process whose CUDA context a find has spoilt; another one goes on."""


def run_round(seed: int, shrink: bool = False) -> str:
    """The find of a round as text; empty if there is none."""
    import hypothesis
    from fuzz_machine import Machine
    from hypothesis.stateful import run_state_machine_as_test

    settings = hypothesis.settings(
        max_examples=EXAMPLES,
        stateful_step_count=STEPS,
        phases=[hypothesis.Phase.generate, *([hypothesis.Phase.shrink] if shrink else [])],
        deadline=None,
        database=None,
        derandomize=False,
        print_blob=False,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    machine = hypothesis.seed(seed)(type("Machine", (Machine,), {}))
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            run_state_machine_as_test(machine, settings=settings)
    except BaseException as error:  # whatever a call raises is a find; a process that is told to stop, stops
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        notes = "\n".join(getattr(error, "__notes__", ())) if sys.version_info < (3, 11) else ""
        return f"{said.getvalue()}{''.join(traceback.format_exception(error))}{notes}"
    return ""


def worker(
    number: int, first_seed: int, stride: int, rounds: int | None, shrink: bool, deadline: float, results: Any
) -> None:
    """Rounds until the deadline (of time.time), each reported as (worker, seed, counts, find, seconds)."""
    import torch
    from fuzz_machine import COUNTS

    torch.set_num_threads(1)
    # NumPy's word on exp(large), which the interpreter computes with it: Inf is what is meant.
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton")
    done, seed, parent = 0, first_seed, multiprocessing.parent_process()
    while time.time() < deadline and (rounds is None or done < rounds) and (parent is None or parent.is_alive()):
        COUNTS.clear()
        started = time.time()
        find = run_round(seed, shrink)
        results.put((number, seed, dict(COUNTS), find, time.time() - started))
        if find and "CUDA error" in find:
            results.close()
            results.join_thread()
            os._exit(CONTEXT_LOST)
        done, seed = done + 1, seed + stride


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, help="of the first round; the others count up from it")
    parser.add_argument("--rounds", type=int, help="end after so many rounds of each process")
    parser.add_argument("--shrink", action="store_true", help="shorten a find, for up to five minutes each")
    parser.add_argument("--processes", type=int, help="default: all cores, on a GPU at most 4")
    parser.add_argument("--json", type=Path, help="write the totals there")
    parser.add_argument("--tally", type=Path, help="add the steps to this record of tests/tally.py")
    parser.add_argument("--tally-label", default="CPU, interpreted", help="the record's column")
    options = parser.parse_args(arguments)
    gpu = has_gpu()
    if not gpu:
        os.environ["TRITON_INTERPRET"] = "1"  # inherited by the workers, which import Triton
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    cores = os.cpu_count() or 1
    processes = options.processes or (min(4, cores) if gpu else cores)
    seed = int.from_bytes(os.urandom(4), "big") if options.seed is None else options.seed
    where = f"{processes} processes on {'a GPU' if gpu else 'the CPU, kernels interpreted'}"
    print(f"SEED={seed}: {options.minutes:g} minutes, {where}", flush=True)
    totals, finds = run(processes, seed, options.rounds, options.shrink, time.time() + 60 * options.minutes)
    summary = {"seed": seed, "minutes": options.minutes, "processes": processes, **totals, "finds": finds}
    print(f"SEED={seed}: {totals['examples']} examples, {totals['steps']} steps, {finds} finds", flush=True)
    print(json.dumps(summary), flush=True)
    if options.json:
        options.json.write_text(json.dumps(summary, indent=1) + "\n")
    if options.tally:
        tally.add_to_column(options.tally, options.tally_label, {"fuzz steps": totals["steps"]}, finds)
    return 1 if finds or not totals["steps"] else 0


def has_gpu() -> bool:
    """Whether kernels run compiled: asked in another process, so that this one can fork no CUDA context."""
    import torch

    return torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET", "") in ("", "0")


def run(
    processes: int,
    seed: int,
    rounds: int | None,
    shrink: bool,
    deadline: float,
    work: Callable[..., None] = worker,
    method: str = "spawn",
) -> tuple[Counter[str], int]:
    """All rounds; returns what was counted and the number of finds, of which equal ones are printed once."""
    context = multiprocessing.get_context(method)
    results = context.Queue()

    def start(number: int, first_seed: int) -> Any:
        process = context.Process(target=work, args=(number, first_seed, processes, rounds, shrink, deadline, results))
        process.start()
        return process

    running = {number: start(number, seed + number) for number in range(processes)}
    last = {number: seed + number - processes for number in running}
    totals, finds, printed = Counter({"examples": 0, "steps": 0}), 0, set()
    while running:
        # Who is dead is asked first: all that the dead have reported is in the queue.
        dead = [number for number, process in running.items() if not process.is_alive()]
        while not results.empty():
            number, round_seed, counts, find, seconds = results.get()
            last[number] = round_seed
            totals.update(counts)
            said = f"round {round_seed}: {counts.get('steps', 0)} steps, {seconds:.0f} s{', a find' * bool(find)}"
            print(said, flush=True)
            if find:
                finds += 1
                kind = signature(find)
                print(find if kind not in printed else f"as before: {kind}")
                print(reproduction(round_seed), flush=True)
                printed.add(kind)
        for number in dead:
            status, next_seed = running.pop(number).exitcode, last[number] + processes
            if status not in (0, CONTEXT_LOST):  # it died in a round that it did not report
                finds += 1
                print(f"a process died with status {status} in round {next_seed}", flush=True)
                print(reproduction(next_seed), flush=True)
                last[number], next_seed = next_seed, next_seed + processes
            if status and time.time() < deadline and rounds is None:
                running[number] = start(number, next_seed)
        if time.time() > deadline + GRACE + (300 if shrink else 0):
            for number, process in running.items():
                finds += 1
                process.terminate()
                said = f"a process was stopped in round {last[number] + processes}, {GRACE:.0f} s after its time"
                print(said, reproduction(last[number] + processes), sep="\n", flush=True)
            break
        time.sleep(0.2)
    return totals, finds


def reproduction(seed: int) -> str:
    """The command that runs a round again."""
    return f"reproduce with: make fuzz SEED={seed} FUZZ='--rounds 1 --processes 1 --shrink'"


def signature(find: str) -> str:
    """What tells finds apart: the last line of code and the error."""
    lines = [line.strip(" |") for line in find.splitlines()]
    files = [line for line in lines if line.startswith("File ")]
    errors = [line for line in lines if line.split(":")[0].endswith(("Error", "Exception"))]
    return f"{files[-1] if files else ''} {errors[-1] if errors else ''}"


if __name__ == "__main__":
    sys.exit(main())
