"""Tests that need a CUDA GPU; without one each is skipped, and counted."""

from __future__ import annotations

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
