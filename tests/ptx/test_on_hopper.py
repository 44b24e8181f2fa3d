"""On a Hopper GPU: the GPU and the emulator run the same PTX, and every byte agrees. See
on_hopper.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ptx import on_hopper
from ptx.hopper_programs import Hopper, programs

PROGRAMS = programs()


@pytest.fixture(scope="module")
def gpu() -> on_hopper.Gpu:
    """The GPU, if it is a Hopper."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")
    return on_hopper.Gpu()


@pytest.mark.gpu
@pytest.mark.parametrize("program", PROGRAMS, ids=[p.name for p in PROGRAMS])
def test_program(gpu: on_hopper.Gpu, program: Hopper) -> None:
    until = program.extra.get("ignore", program.output)
    np.testing.assert_array_equal(gpu.run(program)[:until], on_hopper.emulated(program)[:until])


@pytest.mark.gpu
def test_quantizer_and_router(gpu: on_hopper.Gpu) -> None:
    assert not [(name, problems) for name, problems in on_hopper.product_on_gpu() if problems]
