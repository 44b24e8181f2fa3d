"""Fixtures that compile for GPUs that are not there; see compiling.py."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
from compiling import ARCHS, Compiled, CompileFor, StubDriver, before_the_wait

from hybrid_mxfp8 import env
from hybrid_mxfp8.triton_kernels import abi, launch


@pytest.fixture
def compile_for(monkeypatch: pytest.MonkeyPatch) -> CompileFor:
    """compile_for(arch, module, kernel name, call): what ``call`` launches of that kernel,
    compiled; one launch."""
    if env.triton_interpret():
        pytest.skip("an interpreted function can't be compiled: unset TRITON_INTERPRET")

    def compile_one(arch: int, module: Any, name: str, call: Callable[[], object]) -> Compiled:
        compiled: list[Compiled] = []

        def record(step: launch.KernelLaunch, tensors: object, device: torch.device) -> None:
            if step.kernel is getattr(module, name):
                arguments = (step.kernel, step.arguments, step.constants, dict(step.options))
                kernel = abi.compile_kernel(*arguments)
                compiled.append(Compiled(arch, kernel, (step.programs,)))

        with monkeypatch.context() as patch:
            patch.setattr(triton.runtime.driver, "_active", StubDriver(arch))
            patch.setattr(launch.KernelLaunch, "run", record)
            for module_of_device in ("dispatch.problem", "triton_kernels.backend"):
                found = importlib.import_module(f"hybrid_mxfp8.{module_of_device}")
                patch.setattr(found, "capability", lambda device: divmod(arch, 10))
            call()
        assert len(compiled) == 1, f"{len(compiled)} launches"
        metadata = compiled[0].kernel.metadata
        scratch = (metadata.global_scratch_size, metadata.profile_scratch_size)
        assert scratch == (0, 0), "a launch with scratch memory goes through Triton"
        early = before_the_wait(compiled[0].ptx) if arch >= 90 else re.findall("griddepcontrol.*", compiled[0].ptx)
        if name == "hopper_fp8_gemm_kernel":  # one of its warps waits, as its own tests have it
            assert early.pop().startswith("no wait: 0 reached")
        assert early == [], "the kernel before may still run"
        return compiled[0]

    return compile_one


@pytest.fixture(params=ARCHS, ids=lambda arch: f"sm_{arch}")
def arch(request: pytest.FixtureRequest) -> int:
    """Each architecture that kernels are compiled for."""
    return int(request.param)
