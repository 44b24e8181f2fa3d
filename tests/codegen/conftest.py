"""Fixtures that compile for GPUs that are not there; see compiling.py."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
from compiling import ARCHS, MULTIPROCESSORS, Compiled, CompileFor, StubDriver, before_the_wait

from hybrid_mxfp8 import env
from hybrid_mxfp8.triton_kernels import abi, launch


@pytest.fixture
def compile_for(monkeypatch: pytest.MonkeyPatch) -> CompileFor:
    """compile_for(arch, kernel, call): what ``call`` launches of that kernel, compiled; one launch,
    and nothing spills. ``stack``: bytes of local memory that are known."""
    if env.triton_interpret():
        pytest.skip("an interpreted function can't be compiled: unset TRITON_INTERPRET")

    def compile_one(arch: int, kernel: Any, call: Callable[[], object], stack: int = 0) -> Compiled:
        found: list[Compiled] = []

        def record(step: launch.KernelLaunch, tensors: object, device: torch.device) -> None:
            if step.kernel is kernel:
                made = abi.compile_kernel(step.kernel, step.arguments, step.constants, dict(step.options))
                found.append(Compiled(arch, made, (step.programs,)))

        with monkeypatch.context() as patch:
            patch.setattr(triton.runtime.driver, "_active", StubDriver(arch))
            patch.setattr(launch.KernelLaunch, "run", record)
            for asks in ("dispatch.problem", "triton_kernels.backend"):
                patch.setattr(f"hybrid_mxfp8.{asks}.capability", lambda device: divmod(arch, 10))
            module = sys.modules[kernel.fn.__module__]  # one that asks for the size of a GPU, maybe
            patch.setattr(module, "multiprocessors", lambda device: MULTIPROCESSORS, raising=False)
            call()
        (compiled,) = found
        metadata = compiled.kernel.metadata
        scratch = (metadata.global_scratch_size, metadata.profile_scratch_size)
        assert scratch == (0, 0), "a launch with scratch memory goes through Triton"
        early = before_the_wait(compiled.ptx) if arch >= 90 else re.findall("griddepcontrol.*", compiled.ptx)
        if kernel.fn.__name__ == "hopper_fp8_gemm_kernel":  # one of its warps waits, as its own tests have it
            assert early.pop().startswith("no wait: 0 reached")
        assert early == [], "the kernel before may still run"
        assert compiled.usage["STACK"] <= stack, "spills"
        return compiled

    return compile_one


@pytest.fixture(params=ARCHS, ids=lambda arch: f"sm_{arch}")
def arch(request: pytest.FixtureRequest) -> int:
    """Each architecture that kernels are compiled for."""
    return int(request.param)
