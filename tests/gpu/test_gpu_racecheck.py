"""A kernel that does little but hand warps their work: what racecheck says of it, it says of
Triton. See tests/support/sanitize.py."""

from __future__ import annotations

import pytest
import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

pytestmark = pytest.mark.gpu

THREADS = 256


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _sum(x_ptr, out_ptr):
    """The sum over all warps of its partition, which meet at barriers of their own."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [8], [0])
    x = gl.load(x_ptr + gl.arange(0, 256, layout=layout))
    gl.store(out_ptr, gl.reduce(x, 0, _add))


@gluon.jit
def _copy(x_ptr, out_ptr):
    gl.store(out_ptr + 1, gl.load(x_ptr))


@gluon.jit
def warp_specialize_control_kernel(x_ptr, out_ptr):
    """Eight warps add up 256 numbers before and within their partition, one copies the first; so
    the Hopper kernel's warps are dealt, which has barriers of eight warps before and in between,
    too."""
    _sum(x_ptr, out_ptr + 2)
    gl.warp_specialize([(_sum, (x_ptr, out_ptr)), (_copy, (x_ptr, out_ptr))], [1], [24])


@pytest.mark.sanitizer
def test_control() -> None:
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs compute capability 9.0 for warp specialization")
    x = torch.arange(5, 5 + THREADS, dtype=torch.int32, device="cuda")
    out = torch.zeros(3, dtype=torch.int32, device="cuda")
    warp_specialize_control_kernel[(132,)](x, out, num_warps=8)
    assert out.tolist() == [x.sum().item(), 5, x.sum().item()]
