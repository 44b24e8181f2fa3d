"""Calls that nobody should make, and calls that hardly anybody makes: tables in support/bad_calls.

Every tensor of a call lies among guard bytes. A bad call raises the error of its row and changes no
byte. An odd one gives the right result on each backend and writes its outputs alone; on a GPU, the
device still works afterwards.
"""

from __future__ import annotations

import re

import cases
import pytest
import torch
from bad_calls import gemm, layouts, moe, operands, operators, quantize, sglang
from bad_calls.row import E4M3, Bad, K, Odd, T
from guards import Guards, check_alive

import hybrid_mxfp8 as mx

ROOMS = {
    "quantize": quantize,
    "layouts": layouts,
    "operands": operands,
    "gemm": gemm,
    "moe": moe,
    "sglang": sglang,
    "operators": operators,
}
BAD = [pytest.param(row, id=f"{room}: {row.what}") for room, module in ROOMS.items() for row in module.BAD]
ODD = [
    pytest.param(row, id=f"{room}: {row.what}", marks=pytest.mark.sanitizer if " counts: " in f" {row.what}" else ())
    for room, module in ROOMS.items()
    for row in getattr(module, "ODD", ())
]


@pytest.mark.parametrize("row", BAD)
def test_bad(row: Bad) -> None:
    """Also where one like it has passed just before, whose plan must say nothing for this."""
    guards = Guards()
    call = row.prepare(guards)
    guards.ready()
    with mx.use_backend("reference"):
        row.good(Guards(size=1 << 20))()
        for _ in range(2):  # what was refused once is refused again
            with pytest.raises(row.error) as caught:
                call()
            assert type(caught.value) is row.error
            assert re.search(row.message, str(caught.value)), str(caught.value)
    guards.check(refused=True)


@pytest.mark.parametrize("row", ODD)
def test_odd(row: Odd, multiplier: str, device: str) -> None:
    guards = Guards(device)
    with cases.unlooked(), mx.use_backend(multiplier):
        call, check = row.prepare(guards)
        guards.ready()
        result = call()
    check_alive(device)
    guards.check()
    check(result)


@pytest.mark.parametrize("row", [pytest.param(row, id=row.what) for row in gemm.GARBAGE_ROWS])
def test_garbage_stays_inside(row: Odd, multiplier: str, device: str) -> None:
    """Layouts of any numbers: outputs may hold anything, and nothing else is written."""
    guards = Guards(device)
    call, _ = row.prepare(guards)
    guards.ready()
    with mx.use_backend(multiplier):
        call()
    check_alive(device)
    guards.check()


def test_gradients_are_refused_only_where_they_would_be_lost() -> None:
    x, groups = torch.ones(T, K, requires_grad=True), cases.layout([T // 2, 0, 0], T)
    for _ in range(2):
        with torch.no_grad():
            mx.quantize_grouped(x, groups, backend="reference")
            mx.moe_forward(**{**moe._good(), "x": moe._good()["x"].requires_grad_()}, backend="reference")
        with pytest.raises(ValueError, match=r"^x: must not require grad"):
            mx.quantize_grouped(x, groups, backend="reference")
        mx.quantize_grouped(x.detach(), groups, backend="reference")


def test_buffers_may_lie_side_by_side() -> None:
    """Also behind the last element of a strided tensor, where a further row would be."""
    groups = cases.layout([1, 2], 3)
    end = 2 * (2 * 128 + 64)
    memory, scales = cases.aligned_bytes(end + 3 * 64), cases.aligned_bytes(groups.scale_rows * 4)
    x = memory[:end].view(torch.bfloat16).as_strided((3, 64), (128, 1))

    def quantize(values: torch.Tensor) -> None:
        out = mx.GroupedMXFP8.unchecked(values.view(E4M3).view(3, 64), scales.view(-1, 4), groups)
        mx.quantize_grouped(x, groups, out=out, backend="reference")

    quantize(memory[end:])
    with pytest.raises(ValueError, match=r"^out: must not overlap x, got"):
        quantize(memory[end - 16 : -16])


def test_out_over_x_has_its_rows() -> None:
    """At the same place, but a row of it over two of x."""
    good, memory = moe._good(), torch.zeros(2 * moe.M, moe.H, dtype=torch.bfloat16)
    good["x"] = memory[: moe.M]
    mx.moe_forward(**good, out=good["x"])
    with pytest.raises(ValueError, match=r"^out: must not overlap x, got"):
        mx.moe_forward(**good, out=memory[::2])


def test_unavailable_backend_error_is_no_value_error() -> None:
    """A caller who catches bad arguments does not catch a missing backend."""
    assert issubclass(mx.BackendUnavailableError, RuntimeError)
    assert not issubclass(mx.BackendUnavailableError, ValueError)
