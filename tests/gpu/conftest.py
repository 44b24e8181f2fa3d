"""Tests that need a CUDA GPU; without one each is skipped, and counted."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from hybrid_mxfp8 import env


@pytest.fixture(autouse=True)
def _gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip(f"needs compute capability 8.9 or newer, got {torch.cuda.get_device_capability()}")
    if env.triton_interpret():
        pytest.skip("runs compiled kernels: unset TRITON_INTERPRET")


@pytest.fixture
def no_sync() -> Iterator[None]:
    """A synchronising PyTorch call is an error for the length of the test."""
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def gigabytes(request: pytest.FixtureRequest) -> Iterator[None]:
    """Skip where the GPU has less free memory than the test's parameter, in GB; give it back afterwards."""
    needed = request.param
    gc.collect()
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / 1e9
    if free < needed:
        pytest.skip(f"needs {needed} GB of free GPU memory, {free:.0f} are free")
    yield
    gc.collect()
    torch.cuda.empty_cache()


@pytest.fixture(params=["portable", "hopper"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each kernel of the triton backend that runs here."""
    if request.param == "hopper" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")
    monkeypatch.setenv("HYBRID_MXFP8_HOPPER_GEMM", "1" if request.param == "hopper" else "0")
    return str(request.param)


@pytest.fixture
def long_way(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that launchers launched; repeated launches are not among them."""
    from hybrid_mxfp8.triton_kernels import launch, quantize
    from hybrid_mxfp8.triton_kernels.gemm import dequantize_tokens as dequantize_tokens
    from hybrid_mxfp8.triton_kernels.gemm import portable as grouped_gemm
    from hybrid_mxfp8.triton_kernels.moe import combine, expert_bias, route

    modules = [combine, dequantize_tokens, expert_bias, grouped_gemm, quantize, route]
    if torch.cuda.get_device_capability() == (9, 0):
        from hybrid_mxfp8.triton_kernels.gemm import hopper as grouped_gemm_hopper

        modules.append(grouped_gemm_hopper)
    launched: list[str] = []

    def counting(kernel: Any, *arguments: Any) -> Any:
        launched.append(kernel.fn.__name__)
        return launch.launch(kernel, *arguments)

    for module in modules:
        monkeypatch.setattr(module, "launch", counting)
    return launched
