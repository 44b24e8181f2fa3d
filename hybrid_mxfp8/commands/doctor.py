"""``python -m hybrid_mxfp8 doctor``: what is installed here, and which backends can run.

:func:`examine` collects facts as plain data, which ``--json`` prints, and :func:`render` makes
them readable. Nothing here needs Triton, a GPU or a compiler, and nothing is created.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hybrid_mxfp8 import env
from hybrid_mxfp8._version import __version__
from hybrid_mxfp8.commands import cache as caches
from hybrid_mxfp8.commands.terminal import format_table, size
from hybrid_mxfp8.cutlass_kernels import grouped_gemm, verify
from hybrid_mxfp8.cutlass_kernels.jit import build as jit
from hybrid_mxfp8.cutlass_kernels.jit import toolchain
from hybrid_mxfp8.dispatch import launcher
from hybrid_mxfp8.dispatch.device import default_device
from hybrid_mxfp8.dispatch.registry import AUTO, backends, requested
from hybrid_mxfp8.errors import BackendUnavailableError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--json", action="store_true", help="print the facts as JSON")


def run(args: argparse.Namespace) -> int:
    """Print the facts; 0, whatever they are."""
    facts = examine()
    print(json.dumps(facts, indent=2) if args.json else render(facts))
    return 0


def examine() -> dict[str, Any]:
    """All facts, as JSON can hold them."""
    return {
        "versions": versions(),
        "gpus": gpus(),
        **tools(),
        "host_compiler": host_compiler(),
        "launcher": _answer(launcher.status),
        "device": str(default_device()),
        "backends": {name: {"available": ok, "reason": reason} for name, (ok, reason) in backends().items()},
        "default_backend": _answer(lambda: requested(None), "invalid: "),
        "cache": cache(env.cache_dir()),
        **cached(env.cache_dir()),
        "environment": env.variables_set(),
        "settings_problems": settings_problems(),
    }


def versions() -> dict[str, str]:
    """Versions of this package, Python, and what it builds on."""
    kinds = {"ROCm": torch.version.hip, "CUDA": torch.version.cuda}
    build = next((f"{kind} {version}" for kind, version in kinds.items() if version is not None), "CPUs alone")
    return {
        "hybrid_mxfp8": __version__,
        "Python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "torch": f"{torch.__version__}, built for {build}",
        "Triton": _distribution("triton"),
        **{name: _distribution(name) for name in ("apache-tvm-ffi", "safetensors", "transformers")},
        **({"NVIDIA driver": driver} if (driver := verify.driver_version()) else {}),
    }


def _distribution(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def gpus() -> list[dict[str, str]]:
    """Name and compute capability of each GPU that PyTorch sees."""
    found = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [{"name": gpu.name, "compute_capability": f"{gpu.major}.{gpu.minor}"} for gpu in found]


def tools() -> dict[str, Any]:
    """CUDA compilers and copies of the CUTLASS headers that were found, and whose are used."""
    try:
        used = toolchain.find_cutlass().origin
    except BackendUnavailableError:
        used = ""
    return {
        "compilers": [_tool(cuda, cuda.nvcc) for cuda in toolchain.cuda_candidates()],
        "cutlass_headers": [_tool(cutlass, cutlass.include) for cutlass in toolchain.cutlass_candidates()],
        "cutlass_used": used,
    }


def _tool(found: toolchain.CutlassHeaders | toolchain.CudaCompiler, path: Path) -> dict[str, str]:
    return dict(origin=found.origin, path=str(path), version=found.version_string, problem=found.problem)


def host_compiler() -> str:
    """The compiler that nvcc hands host code to; or that there is none, and what to install."""
    for cuda in toolchain.cuda_candidates():
        if cuda.host:
            return f"{cuda.host}, {toolchain.first_line(cuda.host) or 'which prints no version'}"
        if cuda.problem == toolchain.NO_HOST_COMPILER:
            return cuda.problem
    return "not asked for: there is no nvcc that works"


def _answer(question: Callable[[], str], before: str = "") -> str:
    """What ``question`` returns, or what is wrong with the environment variable that it reads."""
    try:
        return question()
    except ValueError as error:
        return f"{before}{error}"


def cache(folder: Path) -> dict[str, Any]:
    """Whether the cache folder exists, whether this user can write or create it, and its bytes."""
    # os.path's tests answer False for a path that cannot be, such as one too long; Path's raise.
    nearest = next((p for p in (folder, *folder.absolute().parents) if os.path.exists(p)), folder)
    exists = os.path.isdir(folder)
    return {
        "path": str(folder),
        "exists": exists,
        "writable": os.path.isdir(nearest) and os.access(nearest, os.W_OK | os.X_OK),
        "bytes": sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) if exists else 0,
    }


def cached(folder: Path) -> dict[str, Any]:
    """What was compiled and verified here, and why the modules are not loaded, if they aren't."""
    try:
        found = [{"kind": e.kind, "bytes": e.num_bytes, "about": e.about} for e in caches.entries(folder)]
        jit.check_cache()
    except (BackendUnavailableError, OSError, ValueError) as error:
        return {"cached": [], "modules_problem": str(error)}
    return {"cached": [entry for entry in found if entry["kind"] != "lock"], "modules_problem": ""}


def settings_problems() -> list[str]:
    """What is wrong with the variables that no other fact covers."""
    found = []
    for read in (env.pdl, env.hopper_gemm, env.verify, grouped_gemm.forced_config):
        try:
            read()
        except ValueError as error:
            found.append(str(error))
    return found


def render(facts: dict[str, Any]) -> str:
    """The facts as a page of plain text."""
    folder = facts["cache"]
    state = f"{folder['bytes'] / 2**20:.1f} MiB" if folder["exists"] else "not there yet"
    lines = [
        *facts["versions"].items(),
        *(("GPU", f"{gpu['name']}, compute capability {gpu['compute_capability']}") for gpu in facts["gpus"]),
        *([] if facts["gpus"] else [("GPU", "none that PyTorch sees")]),
        *_found("nvcc", facts["compilers"]),
        ("host compiler", facts["host_compiler"]),
        ("launcher", facts["launcher"]),
        *_found("CUTLASS headers", facts["cutlass_headers"], facts["cutlass_used"]),
        ("cache folder", f"{folder['path']}, {state}, {'writable' if folder['writable'] else 'not writable'}"),
        *((entry["kind"], f"{entry['about']}, {size(entry['bytes'])}") for entry in facts["cached"]),
        *([("modules", facts["modules_problem"])] if facts["modules_problem"] else []),
        *facts["environment"].items(),
        *(("setting", problem) for problem in facts["settings_problems"]),
    ]
    width = max(len(name) for name, _ in lines)
    page = "\n".join(f"{name:<{width}}  {value}" for name, value in lines)
    answers = [(name, "yes" if a["available"] else "no", a["reason"]) for name, a in facts["backends"].items()]
    table = format_table(("backend", "runs", f"why, on {facts['device']}"), answers, left=(0, 1, 2))
    return f"{page}\n\n{table}\n\nCalls that name no backend use: {facts['default_backend']}{_meaning(facts)}"


def _meaning(facts: dict[str, Any]) -> str:
    """What the default backend means on this machine."""
    name, answers = facts["default_backend"], facts["backends"]
    if name == AUTO:
        return f", which is {next(name for name, answer in answers.items() if answer['available'])} here"
    if name in answers and not answers[name]["available"]:
        return f", which can't run here: {answers[name]['reason']}"
    return ""


def _found(what: str, candidates: list[dict[str, str]], used: str = "") -> list[tuple[str, str]]:
    found = []
    for c in candidates:
        problem, mark = f" ({c['problem']})" if c["problem"] else "", " (used)" if c["origin"] == used else ""
        found.append((what, f"{c['version'] or '?'} from {c['origin']}, {c['path']}{problem}{mark}"))
    return found or [(what, "not found (only the cutlass backend needs them)")]
