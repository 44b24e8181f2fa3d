"""Fixtures of every test: seeded generators, the backends that can run here, and no settings from outside.

Kernels run on the CPU through Triton's interpreter: ``TRITON_INTERPRET=1 pytest tests --ignore=tests/codegen
--ignore=tests/gpu``. An interpreted function can't be compiled, so tests/codegen and tests/gpu run in
processes of their own, without that variable.
"""

from __future__ import annotations

import cases
import pytest
import torch
from hypothesis import HealthCheck, settings

from hybrid_mxfp8 import env
from hybrid_mxfp8.dispatch.registry import AUTO, requested

pytest_plugins = ["tally"]

# Derandomized: the same examples each run, so that a failure is one everybody sees.
settings.register_profile(
    "repeatable",
    derandomize=True,
    deadline=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _no_outside_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("BACKEND", "CONFIG", "PDL", "HOPPER_GEMM"):
        monkeypatch.delenv(f"HYBRID_MXFP8_{name}", raising=False)
    cases.forget_calls()
    assert requested(None) == AUTO, "an earlier test left a backend asked for"


@pytest.fixture
def rng() -> torch.Generator:
    """A seeded CPU generator."""
    return torch.Generator().manual_seed(20240917)


@pytest.fixture
def interpreter() -> None:
    """Skip where kernels can't run on the CPU."""
    if not env.triton_interpret():
        pytest.skip("runs kernels on the CPU: set TRITON_INTERPRET=1")


@pytest.fixture(params=["reference", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend that runs on a CPU; triton needs its interpreter."""
    if request.param == "triton":
        request.getfixturevalue("interpreter")
    return str(request.param)
