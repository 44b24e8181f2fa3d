"""``python -m hybrid_mxfp8 warmup``: compile the CUTLASS backend ahead of time.

No GPU is needed, so an image can be built anywhere; the cache folder can be copied to another
machine.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch

from hybrid_mxfp8 import env
from hybrid_mxfp8.commands.terminal import positive, progress
from hybrid_mxfp8.cutlass_kernels import verify
from hybrid_mxfp8.cutlass_kernels.config import MODULES, GemmConfig
from hybrid_mxfp8.cutlass_kernels.grouped_gemm import OUT_TYPES, TARGETS, source
from hybrid_mxfp8.cutlass_kernels.jit import build as jit
from hybrid_mxfp8.cutlass_kernels.jit import toolchain
from hybrid_mxfp8.errors import BackendUnavailableError

BYTES_A_JOB = 6 * 2**30  # nvcc peaks at 5 GB for one module
ARCHS = ("10.0a", "10.3a", "10.0f")
SHORT_TYPES = {short: dtype for dtype, (short, _) in OUT_TYPES.items()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add = parser.add_argument
    archs = "target, more than one if repeated: 10.0a for B200, 10.3a for B300, 10.0f for both"
    add("--arch", choices=ARCHS, action="append", help=f"{archs}; default: this machine's GPU, else 10.0a")
    configs = f"tile configurations; default: all of {', '.join(MODULES)}"
    add("--configs", type=_configs, default=MODULES, metavar="NAME,NAME", help=configs)
    types = f"output types, of {', '.join(SHORT_TYPES)}; default: bf16"
    add("--out-dtypes", type=_out_dtypes, default=(torch.bfloat16,), metavar="NAME,NAME", help=types)
    add("--jobs", type=positive, help="compilations at a time; default: as many as CPUs and memory allow")


def run(args: argparse.Namespace) -> int:
    """Compile what is missing and verify what runs here; 0 if all is there and right, 1 if not, 2
    with a line on stderr for a variable that is neither 0 nor 1."""
    try:
        env.trust_cache()
    except ValueError as error:
        print(f"warmup: {error}", file=sys.stderr)
        return 2
    cutlass, cuda = toolchain.find_cutlass(), toolchain.find_cuda()
    print(f"CUTLASS {cutlass.version_string} from {cutlass.origin}, nvcc {cuda.version_string} at {cuda.home}")
    if cutlass.hint:
        print(cutlass.hint)
    archs = args.arch or [default_arch()]
    wanted = [source(m, out, arch) for arch in archs for m in args.configs for out in args.out_dtypes]
    missing = [s for s in wanted if jit.find(s) is None]
    print(f"{len(wanted) - len(missing)} of {len(wanted)} modules are in {jit.cache()}")
    failures = build_all(missing, args.jobs or default_jobs())
    if missing:
        print(f"{len(missing) - len(failures)} built, {len(failures)} failed")
    failures += verify_all(wanted)
    for failure in failures:
        print(failure)
    return 1 if failures else 0


def verify_all(sources: Sequence[jit.Source]) -> list[str]:
    """Verify the modules that this machine's GPU runs; returns what is wrong, a line each."""
    if not torch.cuda.is_available():
        return []
    device = torch.device("cuda", torch.cuda.current_device())
    targets = TARGETS.get(torch.cuda.get_device_capability(device), ())
    failures = []
    for s in sources:
        built = jit.find(s) if s.arch in targets else None
        if built is not None:
            record = verify.verified(built, device)
            print(f"{s.name}: {'verified' if record['ok'] else 'failed'}, {record['reason']}")
            failures += [] if record["ok"] else [f"{s.name}: {record['reason']}"]
    return failures


def build_all(sources: Sequence[jit.Source], jobs: int) -> list[str]:
    """Build, ``jobs`` at a time, with a progress bar; returns what failed, a line each."""
    failures = []
    # Threads, as each build is a process of its own.
    with ThreadPoolExecutor(jobs) as pool, progress(len(sources), unit="module", desc=f"{jobs} at a time") as bar:
        building = {pool.submit(jit.build, s): s.name for s in sources}
        for done in as_completed(building):
            try:
                done.result()
            except BackendUnavailableError as error:
                failures.append(f"{building[done]}: {error}")
            bar.set_postfix_str(building[done])
            bar.update()
    return failures


def default_arch() -> str:
    """The target of this machine's GPU if the backend runs on it, else B200's."""
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
    return TARGETS.get(capability, ARCHS)[0]


def default_jobs() -> int:
    """As many compilers as there are CPUs, and memory for."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cpus, available_memory() // BYTES_A_JOB))


def available_memory() -> int:
    """Bytes that this process can have: the machine's, or its control group's if fewer."""
    memory, group = _read_int(Path("/proc/meminfo"), "MemAvailable:"), Path("/sys/fs/cgroup")
    limit, used = _read_int(group / "memory.max"), _read_int(group / "memory.current")
    available = BYTES_A_JOB if memory is None else memory * 1024
    return available if limit is None or used is None else min(available, limit - used)


def _read_int(file: Path, label: str = "") -> int | None:
    """The number after ``label``; None if there is none."""
    try:
        words = file.read_text().partition(label)[2].split() if label else file.read_text().split()
    except OSError:
        return None
    return int(words[0]) if words and words[0].isdecimal() else None


def _configs(text: str) -> tuple[str, ...]:
    try:
        return tuple(dict.fromkeys(GemmConfig.parse(name).module for name in text.split(",")))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _out_dtypes(text: str) -> tuple[torch.dtype, ...]:
    unknown = [name for name in text.split(",") if name not in SHORT_TYPES]
    if unknown:
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(SHORT_TYPES)}, got {', '.join(unknown)}")
    return tuple(SHORT_TYPES[name] for name in text.split(","))
