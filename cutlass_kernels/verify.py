"""Whether a compiled module computes what it should on this GPU: tried once, before it is used.

A process of its own multiplies small ragged cases by the module and by the reference, because an
illegal address would poison this one. The outcome is kept beside the module, for each GPU and
driver. A module that failed is not tried again until that folder is deleted, unless the failure
says nothing of the module, such as that of a GPU without free memory.

    python -m hybrid_mxfp8.cutlass_kernels.verify FOLDER     the child: prints the largest error
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hybrid_mxfp8 import env
from hybrid_mxfp8.core.layout import GroupLayout
from hybrid_mxfp8.core.operands import ExpertWeights, GroupedMXFP8
from hybrid_mxfp8.cutlass_kernels.config import SM_COUNT, GemmConfig
from hybrid_mxfp8.dispatch import device as devices
from hybrid_mxfp8.dispatch.module_cache import MANIFEST, Module, build_once, digest, trust_problem
from hybrid_mxfp8.dispatch.problem import Support
from hybrid_mxfp8.errors import BackendUnavailableError
from hybrid_mxfp8.reference import grouped_matmul, quantize

logger = logging.getLogger("hybrid_mxfp8")

RECORD = "record.json"
TRANSIENT = re.compile(r"out of memory|No module named|cannot import")
"""Of failures that say nothing of the module: a full GPU, an environment in disorder."""

SECONDS = 120.0  # how long a child may take; loading torch and CUDA is most of it

CASES = (
    ((3, 0, 130, 1), 140, 136, 96),  # ragged, an empty expert, rows without one, odd N and K
    ((0, 257, 64), 321, 512, 1152),  # several tiles along N and the tokens, more steps than stages
)
"""Tokens of each expert, T, N and K."""

ACCUMULATION = 2e-5  # of fp32 sums, relative to the magnitudes'; reasons: tests/tolerances.py
Record = dict[str, Any]  # ok, reason, gpu, driver, torch, date


def find(module: Module, device: torch.device) -> Record | None:
    """The record of a module on a GPU and the driver of this machine; None if there is none."""
    return read_record(_folder(module, device))


def verified(module: Module, device: torch.device, child: Sequence[str] = ()) -> Record:
    """The record of an intact module on a GPU; made now, by a child process, if there is none.
    ``child`` is a command that tests give, to print the error in place of this file."""
    folder = _folder(module, device)

    def verify(private: Path) -> None:
        record = _run(module, device, tuple(child))
        if TRANSIENT.search(record["reason"]):
            raise BackendUnavailableError(record["reason"])
        (private / RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")

    # Not kept for others where the cache cannot be written, or the failure is transient.
    with contextlib.suppress(BackendUnavailableError):
        if read_record(folder) is None:
            build_once(folder, verify, lambda: read_record(folder) is not None)
    return read_record(folder) or _run(module, device, tuple(child))


def _folder(module: Module, device: torch.device) -> Path:
    key = digest((_name(device), driver_version()))[:8]
    return module.folder.with_name(f"{module.folder.name}.verified-{key}")


def read_record(folder: Path) -> Record | None:
    """The record in a folder; None if there is none that is whole, and this user's or root's."""
    if trust_problem(folder) or trust_problem(folder / RECORD):
        return None
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    whole = isinstance(record, dict) and isinstance(record.get("ok"), bool) and isinstance(record.get("reason"), str)
    return record if whole else None


@functools.cache
def _run(module: Module, device: torch.device, child: tuple[str, ...]) -> Record:
    logger.info("verifying %s on %s, once", module.folder.name, _name(device))
    ok, reason = _outcome([*(child or (sys.executable, "-m", __spec__.name)), str(module.folder), str(device)])
    about = {"gpu": _name(device), "driver": driver_version(), "torch": torch.__version__}
    return {"ok": ok, "reason": reason, **about, "date": time.strftime("%Y-%m-%d")}


def _outcome(command: Sequence[str]) -> Support:
    try:
        done = subprocess.run(
            command,
            env=env.child_environment(PYTHONPATH=os.pathsep.join(filter(None, sys.path))),  # imports as here
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False, f"did not end in {SECONDS:.0f} s"
    lines = done.stdout.split()
    if done.returncode != 0 or not lines:
        said = done.stderr.strip().splitlines()
        errors = [line for line in said if re.match(r"[\w.]+Error: ", line)]  # CUDA's go on for lines
        return False, ": ".join([f"ended with code {done.returncode}", *(errors or said)[-1:]])
    error = float(lines[-1])
    if not error <= 1:
        return False, f"its largest error is {error:.3g} times the bound"
    return True, f"largest error {error:.2g} of the bound"


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


@functools.cache
def driver_version() -> str:
    """NVIDIA's driver, as NVML says; empty where there is no GPU."""
    if not torch.cuda.is_available():
        return ""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return ""
    text = ctypes.create_string_buffer(96)
    failed = nvml.nvmlInit_v2() or nvml.nvmlSystemGetDriverVersion(text, len(text))
    nvml.nvmlShutdown()
    return "" if failed else text.value.decode()


def largest_error(module: Any, config: GemmConfig, out_dtype: torch.dtype, device: torch.device) -> float:
    """Over all cases, in units of the bound; infinite if a row without an expert was written."""
    worst, rounding = 0.0, torch.finfo(out_dtype).eps / 2
    sm_count = devices.multiprocessors(device) or SM_COUNT
    for counts, num_tokens, n, k in CASES:
        x, w = _operands(counts, num_tokens, n, k)
        ref = torch.full((num_tokens, n), torch.nan, dtype=torch.float64)
        magnitude = torch.zeros_like(ref)
        groups = x.groups
        offsets = groups.expert_offsets, groups.scale_offsets
        grouped_matmul(x.values, x.scales, *offsets, w.values, w.scales, ref)
        x_values, w_values = ((t.view(torch.uint8) & 0x7F).view(t.dtype) for t in (x.values, w.values))
        grouped_matmul(x_values, x.scales, *offsets, w_values, w.scales, magnitude)
        bound = rounding * ref.abs() + ACCUMULATION * magnitude
        out = torch.full((num_tokens, n), torch.nan, dtype=out_dtype, device=device)
        size = module.workspace_size(len(counts), n, k, num_tokens, sm_count)
        workspace = torch.full((size,), 0xFF, dtype=torch.uint8, device=device)
        sent = [t.view(torch.uint8).to(device) for t in (x.values, x.scales, w.values, w.scales)]
        sent += [t.to(device) for t in (groups.tokens_per_expert, *offsets)]
        for pdl in (True, False):
            module.grouped_gemm(*sent, out, workspace, *config.cluster, sm_count, pdl)
            y = out.cpu().double()
            if not torch.equal(y.isnan(), ref.isnan()):
                return float("inf")
            worst = max(worst, float(((y - ref).abs() / bound)[: sum(counts)].max()))
    return worst


def _operands(counts: Sequence[int], num_tokens: int, n: int, k: int) -> tuple[GroupedMXFP8, ExpertWeights]:
    generator = torch.Generator().manual_seed(n)
    groups = GroupLayout.from_counts(torch.tensor(counts, dtype=torch.int32), num_tokens)
    # A spread of magnitudes, so that a scale taken from elsewhere shows.
    x, w = (
        (torch.randn(*shape, k // 32, 32, generator=generator)
         * torch.exp2(torch.randint(-3, 4, (*shape, k // 32, 1), generator=generator))).reshape(*shape, k)
        for shape in ((num_tokens,), (len(counts), n))
    )  # fmt: skip
    return GroupedMXFP8.from_linear_scales(*quantize(x), groups), ExpertWeights.from_linear_scales(*quantize(w))


def main(folder: str, device: str) -> None:
    """Print the largest error of the module in ``folder``, built by jit/build.py for our kernel."""
    import tvm_ffi

    definitions = json.loads(Path(folder, MANIFEST).read_text(encoding="utf-8"))["definitions"]
    cta_group, tile = int(definitions["HYBRID_MXFP8_CTA_GROUP"]), int(definitions["HYBRID_MXFP8_TOKEN_TILE"])
    types = {"cutlass::bfloat16_t": torch.bfloat16, "cutlass::half_t": torch.float16, "float": torch.float32}
    config = GemmConfig(cta_group, tile, (cta_group, 1))
    module = tvm_ffi.load_module(str(Module(Path(folder)).library))
    print(largest_error(module, config, types[definitions["HYBRID_MXFP8_OUT"]], torch.device(device)))


if __name__ == "__main__":
    main(*sys.argv[1:])
