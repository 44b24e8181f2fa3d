"""``make fuzz``: the state machine of ``fuzz_machine`` for as long as you like, with random seeds.

Each round is a number of examples drawn from one seed, in a process of its own: a find, a crash or
a hang is reproduced by its round alone, with the line printed beside it, which also looks, for some
minutes, for the shortest sequence of calls that still shows it. The run ends by itself at the time
limit, prints totals, and exits with 0 if nothing was found.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

EXAMPLES, STEPS = 10, 25
"""Of a round, and calls of an example: about half a minute in the interpreter."""

LONGEST_ROUND = 600.0
"""Seconds after which a round counts as hanging: many times what it takes. Shrinking has as much
again."""


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
    except (KeyboardInterrupt, SystemExit):  # a process that is told to stop, stops
        raise
    except BaseException as error:  # whatever a call raises is a find
        notes = "\n".join(getattr(error, "__notes__", ())) if sys.version_info < (3, 11) else ""
        return f"{said.getvalue()}{''.join(traceback.format_exception(error))}{notes}"
    return ""


def report_round(seed: int, shrink: bool) -> None:
    """Run a round here, and print what came of it as JSON."""
    import torch
    from fuzz_machine import COUNTS

    torch.set_num_threads(1)
    # NumPy's word on exp(large), which the interpreter computes with it: Inf is what is meant.
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton")
    print(json.dumps({"find": run_round(seed, shrink), "counts": dict(COUNTS)}))


def round_in_a_process(seed: int, shrink: bool) -> tuple[Counter[str], str]:
    """Counts and find of a round; a process that dies or hangs is a find, too."""
    command = [sys.executable, __file__, "--one-round", str(seed), *(["--shrink"] if shrink else [])]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=LONGEST_ROUND * (2 if shrink else 1)
        )
    except subprocess.TimeoutExpired:
        return Counter(), "the round did not end"
    if done.returncode:
        return Counter(), f"the process died with status {done.returncode}\n{done.stderr}"
    said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return Counter(said["counts"]), str(said["find"])


def run(processes: int, seed: int, rounds: int | None, shrink: bool, deadline: float) -> tuple[Counter[str], int]:
    """All rounds; returns what was counted and the number of finds."""
    totals, finds = Counter({"examples": 0, "steps": 0}), 0

    def rounds_of(number: int) -> None:
        nonlocal finds
        done = 0
        while time.time() < deadline and (rounds is None or done < rounds):
            this, started = seed + number + done * processes, time.time()
            counts, find = round_in_a_process(this, shrink)
            totals.update(counts)
            finds += bool(find)
            said = f"round {this}: {counts['steps']} steps, {time.time() - started:.0f} s"
            command = f"make fuzz SEED={this} FUZZ='--rounds 1 --processes 1 --shrink'"
            print(f"{said}\n{find}\nreproduce with: {command}" if find else said, flush=True)
            done += 1

    with ThreadPoolExecutor(processes) as pool:
        list(pool.map(rounds_of, range(processes)))
    return totals, finds


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, help="of the first round; the others count up from it")
    parser.add_argument("--rounds", type=int, help="end after so many rounds of each process")
    parser.add_argument("--shrink", action="store_true", help="shorten a find, for some minutes each")
    parser.add_argument("--processes", type=int, help="default: all cores, on a GPU at most 4")
    parser.add_argument("--one-round", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one_round is not None:
        report_round(options.one_round, options.shrink)
        return 0
    import torch

    gpu = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET", "") in ("", "0")
    if not gpu:
        os.environ["TRITON_INTERPRET"] = "1"  # inherited by the rounds, which import Triton
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    cores = os.cpu_count() or 1
    processes = options.processes or (min(4, cores) if gpu else cores)
    seed = int.from_bytes(os.urandom(4), "big") if options.seed is None else options.seed
    where = f"{processes} processes on {'a GPU' if gpu else 'the CPU, kernels interpreted'}"
    print(f"SEED={seed}: {options.minutes:g} minutes, {where}", flush=True)
    totals, finds = run(processes, seed, options.rounds, options.shrink, time.time() + 60 * options.minutes)
    print(f"SEED={seed}: {totals['examples']} examples, {totals['steps']} steps, {finds} finds", flush=True)
    return 1 if finds or not totals["steps"] else 0


if __name__ == "__main__":
    sys.exit(main())
