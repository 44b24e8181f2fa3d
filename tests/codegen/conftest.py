"""Fixtures that compile for GPUs that are not there; see compiling.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from compiling import ARCHS, Compiled, CompileFor, capture

from hybrid_mxfp8 import env


@pytest.fixture
def compile_for(monkeypatch: pytest.MonkeyPatch) -> CompileFor:
    """compile_for(arch, kernel name, call): the one launch of that kernel in ``call``."""
    if env.triton_interpret():
        pytest.skip("an interpreted function can't be compiled: unset TRITON_INTERPRET")

    def compile_one(arch: int, kernel: str, call: Callable[[], object]) -> Compiled:
        with monkeypatch.context() as patch:
            compiled = capture(arch, kernel, call, patch)
        assert len(compiled) == 1, f"{len(compiled)} launches"
        metadata = compiled[0].kernel.metadata
        scratch = (metadata.global_scratch_size, metadata.profile_scratch_size)
        assert scratch == (0, 0), "a launch with scratch memory is not planned"
        return compiled[0]

    return compile_one


@pytest.fixture(params=ARCHS, ids=lambda arch: f"sm_{arch}")
def arch(request: pytest.FixtureRequest) -> int:
    """Each architecture that kernels are compiled for."""
    return int(request.param)
