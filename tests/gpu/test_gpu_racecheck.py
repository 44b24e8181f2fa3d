"""A kernel that only hands warps their work: what racecheck says of it, it says of Triton. See tests/sanitize.py."""

from __future__ import annotations

import pytest
import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

pytestmark = pytest.mark.gpu


@gluon.jit
def _store(place_ptr, value):
    gl.store(place_ptr, value)


@gluon.jit
def warp_specialize_control_kernel(out_ptr):
    """One partition stores 1, the other 2; neither touches shared memory."""
    gl.warp_specialize([(_store, (out_ptr, 1)), (_store, (out_ptr + 1, 2))], [1], [24])


@pytest.mark.sanitizer
def test_control() -> None:
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs compute capability 9.0 for warp specialization")
    out = torch.zeros(2, dtype=torch.int32, device="cuda")
    warp_specialize_control_kernel[(1,)](out, num_warps=4)
    assert out.tolist() == [1, 2]
