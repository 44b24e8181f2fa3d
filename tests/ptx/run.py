"""Run a grouped GEMM's kernels in the emulator, on operands made from a seed.

    python tests/ptx/run.py --backend cutlass --config 2sm_256x256x128_2x1 --mainloop ragged \
        --counts 3,0,129,64 --n 264 --k 352 --out-dtype bf16 --seed 5 [--pdl 0]

The last line has the largest error in units of its bound, the races, the instructions of warps and
the seconds. Exits 1 on any
fault: a rule of PTX that is broken, a race, an error above the bound, rows that are missing or too
    many.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # an MMA is too small to share
sys.path[0] = str(Path(__file__).resolve().parents[1])  # this folder is the package ptx

from ptx.case import Shape  # noqa: E402
from ptx.errors import Fault  # noqa: E402
from ptx.scheduler import COMPLETIONS  # noqa: E402


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=("cutlass", "triton"), default="cutlass")
    parser.add_argument(
        "--config", default="1sm_128x128x128_1x1", help="of the cutlass backend, as explain() prints it"
    )
    parser.add_argument("--mainloop", choices=("ragged", "pointer_array"), default="ragged")
    parser.add_argument("--counts", default="3,0,129,64", help="tokens of each expert")
    parser.add_argument("--n", type=int, default=264)
    parser.add_argument("--k", type=int, default=352)
    parser.add_argument("--out-dtype", choices=("bf16", "fp16", "fp32"), default="bf16")
    parser.add_argument("--seed", type=int, default=0, help="of operands, schedule and elected lanes")
    parser.add_argument("--pdl", type=int, choices=(0, 1), help="default: as the product launches this mainloop")
    parser.add_argument("--sms", type=int, default=4)
    parser.add_argument("--clusters", choices=("preferred", "fallback", "mixed"), default="preferred")
    parser.add_argument("--completion", choices=COMPLETIONS, default="late", help="of asynchronous operations")
    parser.add_argument("--arch", choices=("10.0", "10.3"), default="10.0", help="of the triton backend")
    return parser.parse_args()


def main() -> int:
    """Run it; 0 if nothing is wrong."""
    given = arguments()
    shape = Shape(tuple(int(count) for count in given.counts.split(",")), given.n, given.k, given.out_dtype)
    started = time.perf_counter()
    try:
        if given.backend == "cutlass":
            from ptx import cutlass_backend as cutlass

            pdl = given.mainloop == "ragged" if given.pdl is None else bool(given.pdl)
            options = cutlass.Options(
                given.config, given.mainloop, given.sms, pdl, given.clusters, given.completion, given.seed
            )
            call = cutlass.Call(shape, options)
        else:
            from ptx import triton_backend as triton

            call = triton.Call(shape, triton.Options(given.arch, given.completion, given.seed))
        started = time.perf_counter()
        result = call.run()
    except Fault as fault:
        print(f"{type(fault).__name__}: {fault}")
        print(f"fault after {time.perf_counter() - started:.2f} s")
        return 1
    for line in (*(f"known: {race}" for race in result.known), *result.races, *result.problems):
        print(line)
    print(
        f"error {result.error:.3f} of its bound, {len(result.races)} races, {result.instructions} instructions, "
        f"{time.perf_counter() - started:.2f} s"
    )
    return int(not result.passed)


if __name__ == "__main__":
    sys.exit(main())
