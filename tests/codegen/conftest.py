"""Fixtures that compile for GPUs that are not there; see compiling.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import triton
from compiling import ARCHS, CapturingLauncher, Compiled, CompileFor, StubDriver

from hybrid_mxfp8 import env
from hybrid_mxfp8.triton_kernels import launch


@pytest.fixture
def compile_for(monkeypatch: pytest.MonkeyPatch) -> CompileFor:
    """compile_for(arch, module, kernel name, call): run ``call`` with that kernel's launch replaced; one launch."""
    if env.triton_interpret():
        pytest.skip("an interpreted function can't be compiled: unset TRITON_INTERPRET")

    def compile_one(arch: int, module: Any, name: str, call: Callable[[], object]) -> Compiled:
        compiled: list[Compiled] = []
        with monkeypatch.context() as patch:
            patch.setattr(triton.runtime.driver, "_active", StubDriver(arch))
            patch.setattr(launch, "_loaded", {})  # nothing that is loaded comes of this
            patch.setattr(module, name, CapturingLauncher(getattr(module, name), arch, compiled))
            call()
        assert len(compiled) == 1, f"{len(compiled)} launches"
        metadata = compiled[0].kernel.metadata
        scratch = (metadata.global_scratch_size, metadata.profile_scratch_size)
        assert scratch == (0, 0), "a launch with scratch memory is not repeated"
        return compiled[0]

    return compile_one


@pytest.fixture(params=ARCHS, ids=lambda arch: f"sm_{arch}")
def arch(request: pytest.FixtureRequest) -> int:
    """Each architecture that kernels are compiled for."""
    return int(request.param)
