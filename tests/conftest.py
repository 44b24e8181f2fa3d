"""Fixtures of every test: seeded generators, backends and devices, no settings from outside.

Kernels are interpreted on the CPU, ``TRITON_INTERPRET=1 pytest tests --ignore=tests/codegen
--ignore=tests/gpu``, or compiled on a GPU, ``pytest -m gpu tests``: the same tests, wherever
``device`` is. An interpreted function can't be compiled, so tests/codegen and tests/gpu run in
processes of their own, without that variable.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import cases
import pytest
import torch
from hypothesis import HealthCheck, settings

from hybrid_mxfp8 import env
from hybrid_mxfp8.dispatch.registry import AUTO, requested

# Derandomized: the same examples each run, so that a failure is one everybody sees.
settings.register_profile(
    "repeatable",
    derandomize=True,
    deadline=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("repeatable")

INTERPRETED = env.triton_interpret()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test that takes ``device`` runs on a GPU, too."""
    for item in items:
        if "device" in getattr(item, "fixturenames", ()):
            item.add_marker("gpu")


@pytest.fixture(autouse=True, scope="session")
def _cache_of_this_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is built goes to no cache of the user's."""
    with pytest.MonkeyPatch.context() as patch:
        if not os.environ.get("HYBRID_MXFP8_CACHE_DIR"):
            workers: Path = tmp_path_factory.getbasetemp()
            shared = workers.parent if "PYTEST_XDIST_WORKER" in os.environ else workers
            patch.setenv("HYBRID_MXFP8_CACHE_DIR", str(shared / "hybrid_mxfp8_cache"))
        yield


@pytest.fixture(autouse=True)
def _no_outside_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("BACKEND", "CONFIG", "PDL", "HOPPER_GEMM"):
        monkeypatch.delenv(f"HYBRID_MXFP8_{name}", raising=False)
    cases.forget_calls()  # tests pretend to have other devices and backends
    assert requested(None) == AUTO, "an earlier test left a backend asked for"


@pytest.fixture
def rng() -> torch.Generator:
    """A seeded CPU generator."""
    return torch.Generator().manual_seed(20240917)


@pytest.fixture
def toolkit(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """A CUDA toolkit, CUTLASS, a source and a cache, all of them fake (FakeToolkit)."""
    from fake_toolkit import open_fake_toolkit

    with open_fake_toolkit(monkeypatch) as made:
        yield made


@pytest.fixture
def interpreter() -> None:
    """Skip where kernels can't run on the CPU."""
    if not INTERPRETED:
        pytest.skip("runs kernels on the CPU: set TRITON_INTERPRET=1")


@pytest.fixture
def device() -> str:
    """Where operands are: the GPU, unless kernels are interpreted or there is none."""
    return cases.device()


@pytest.fixture
def kernels_run(device: str) -> None:
    """Skip where kernels run nowhere."""
    if device == "cpu" and not INTERPRETED:
        pytest.skip("runs kernels: set TRITON_INTERPRET=1, or use a GPU")
    if device == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip(f"needs compute capability 8.9 or newer, got {torch.cuda.get_device_capability()}")


@pytest.fixture(params=["reference", "triton"])
def backend(request: pytest.FixtureRequest, device: str) -> str:
    """Each backend that runs everywhere; triton interpreted, or on a GPU."""
    if request.param == "triton":
        request.getfixturevalue("kernels_run")
    return str(request.param)


@pytest.fixture(params=["reference", "triton"] if INTERPRETED else ["reference"])
def cpu_backend(request: pytest.FixtureRequest) -> str:
    """Each backend that runs on the CPU."""
    return str(request.param)


@pytest.fixture(params=["portable"] if INTERPRETED else ["portable", "hopper"])
def kernel(request: pytest.FixtureRequest, kernels_run: None, device: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each kernel of the triton backend that multiplies here."""
    if request.param == "hopper" and (device == "cpu" or torch.cuda.get_device_capability() != (9, 0)):
        pytest.skip("needs a GPU of compute capability 9.0")
    monkeypatch.setenv("HYBRID_MXFP8_HOPPER_GEMM", "1" if request.param == "hopper" else "0")
    return str(request.param)


@pytest.fixture(params=["reference", "portable"] if INTERPRETED else ["reference", "portable", "hopper"])
def multiplier(request: pytest.FixtureRequest, device: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each way to multiply here, as the backend to ask for."""
    if request.param == "reference":
        return "reference"
    request.getfixturevalue("kernels_run")
    if request.param == "hopper" and (device == "cpu" or torch.cuda.get_device_capability() != (9, 0)):
        pytest.skip("needs a GPU of compute capability 9.0")
    monkeypatch.setenv("HYBRID_MXFP8_HOPPER_GEMM", "1" if request.param == "hopper" else "0")
    return "triton"


@pytest.fixture
def no_sync(device: str) -> Iterator[None]:
    """A synchronising PyTorch call is an error for the length of the test."""
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    yield
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """torch.compile knows nothing of other tests, and they nothing of this."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def gigabytes(request: pytest.FixtureRequest, device: str) -> Iterator[None]:
    """Skip where the GPU has less free memory than the parameter, in GB; give it back afterwards.

    On a CPU, memory that is reserved and hardly touched costs nothing.
    """
    gc.collect()
    torch.cuda.empty_cache()  # nothing without a GPU
    if device == "cuda" and (free := torch.cuda.mem_get_info()[0] / 1e9) < request.param:
        pytest.skip(f"needs {request.param} GB of free GPU memory, {free:.0f} are free")
    yield
    gc.collect()
    torch.cuda.empty_cache()
