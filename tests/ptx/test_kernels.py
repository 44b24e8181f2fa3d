"""A representative part of the runs: one module of CUTLASS, Triton's kernels, the quantizer, and
some faults.

All of them: ``make ptx``. The first run compiles the module to PTX, and its host side; later ones
find both in the cache.
"""

from __future__ import annotations

import dataclasses

import pytest

from ptx import cutlass_backend, product
from ptx.case import Case, Shape
from ptx.errors import Fault


@pytest.fixture(scope="module", autouse=True)
def _compiler() -> None:
    """Skip where nothing compiles."""
    if product.env.triton_interpret():
        pytest.skip("an interpreted function can't be compiled: unset TRITON_INTERPRET")
    try:
        product.toolchain.find_cuda()
    except product.BackendUnavailableError as error:
        pytest.skip(str(error))
    if not product.installed_headers("ragged"):
        pytest.skip("the ragged mainloop needs CUTLASS 4.4: pip install sgl-deep-gemm")


TWO = "2sm_256x256x128_2x1"
"""The only module that is compiled here, and its host side."""


@pytest.mark.parametrize("completion", ["late", "immediate", "random"])
def test_cutlass(completion: str) -> None:
    options = cutlass_backend.Options(TWO, completion=completion, seed=5)
    result = cutlass_backend.run(Shape((3, 0, 129), 136, 352), options)
    assert result.races == result.problems == []
    assert result.error <= 1


@pytest.mark.parametrize("clusters", ["preferred", "fallback", "mixed"])
def test_clusters(clusters: str) -> None:
    options = cutlass_backend.Options("2sm_256x256x128_4x1", sms=8, clusters=clusters, seed=9)
    result = cutlass_backend.run(Shape((3, 0, 70), 1032, 96), options)
    assert result.races == result.problems == []
    assert result.error <= 1


def test_padding_rows_are_harmless_and_padding_columns_are_not() -> None:
    shape, options = Shape((3, 70), 136, 160), cutlass_backend.Options(TWO)
    for padding in ({"padding_rows": 255}, {"padding_columns": 255}):
        result = cutlass_backend.Call(shape, options, case=Case(shape, 1, **padding)).run()
        assert result.passed, result


@pytest.mark.parametrize("block_t", [16, 128, 256])
def test_triton(block_t: int) -> None:
    from ptx import triton_backend

    options = triton_backend.Options("10.0", seed=5, block_t=block_t)
    result = triton_backend.Call(Shape((0, 1, 65), 136, 352), options).run()
    assert result.races == result.problems == []
    assert result.error <= 1


def test_quantizer_and_router() -> None:
    from ptx import sm90_kernels

    names = [name for name in sm90_kernels.CASES if name.startswith(("tokens of a layer", "group_offsets of counts"))]
    for name in (*names, "quantize_grouped, rceil, groups of 128", "route, three launches"):
        result = sm90_kernels.run(sm90_kernels.CASES[name])
        assert result.races == result.problems == [], name


def test_a_kernel_that_does_not_wait_for_the_one_before_is_reported() -> None:
    from ptx import sm90_kernels

    kernels = sm90_kernels.CASES["route, three launches"]()
    with pytest.raises(Fault, match="which the kernel before writes, before"):
        sm90_kernels.emulated(kernels, lambda ptx: ptx.replace("griddepcontrol.wait;", ""))


FAULTS = (
    ("MMA does not wait for its operands", "shared memory"),
    ("tcgen05.wait::ld removed", "race in tensor memory"),
    ("transaction count too small", "hang"),
    ("fence.proxy.async removed", "no fence.proxy.async in between"),
    ("fence.mbarrier_init removed, two CTAs", "mbarrier"),
    ("peer bit kept, two CTAs", "hang"),
    ("tensor map copied without bar.warp.sync", "race in shared memory"),
    ("first griddepcontrol.wait removed", "before griddepcontrol.wait"),
    ("scale byte of the second MMA, A", "wrong numbers"),
    ("dealloc removed", "not freed"),
)


@pytest.mark.parametrize(("name", "said"), FAULTS, ids=[name for name, _ in FAULTS])
def test_a_seeded_fault_is_reported(name: str, said: str) -> None:
    from ptx import faults

    (fault,) = (f for f in faults.FAULTS if f.name == name)
    assert said in faults.report(dataclasses.replace(fault, options={"config": TWO, "sms": 2}))
