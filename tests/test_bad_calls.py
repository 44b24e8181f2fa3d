"""Calls that nobody should make, and calls that hardly anybody makes: tables in bad_calls/, one runner.

Every tensor of a call lies among guard bytes. A bad call raises the error of its row and changes no byte. An odd one gives the
right result on each backend and writes its outputs alone.
"""

from __future__ import annotations

import re

import pytest
from bad_calls import gemm, layouts, moe, operands, operators, quantize, sglang
from bad_calls.row import Bad, Odd
from guards import Guards
from tally import Tally

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
BAD = [(room, row) for room, module in ROOMS.items() for row in module.BAD]
ODD = [(room, row) for room, module in ROOMS.items() for row in module.ODD]


def _ids(rows: list[tuple[str, Bad]] | list[tuple[str, Odd]]) -> list[str]:
    return [f"{room}: {row.what}" for room, row in rows]


@pytest.mark.parametrize("row", [row for _, row in BAD], ids=_ids(BAD))
def test_bad(row: Bad, tally: Tally) -> None:
    guards = Guards()
    call = row.prepare(guards)
    guards.ready()
    with pytest.raises(row.error) as caught:
        call()
    assert type(caught.value) is row.error
    assert re.search(row.message, str(caught.value)), str(caught.value)
    tally("guarded buffers", guards.check(refused=True))
    tally("bad calls")


@pytest.mark.parametrize("row", [row for _, row in ODD], ids=_ids(ODD))
def test_odd(row: Odd, backend: str, tally: Tally) -> None:
    guards = Guards()
    call, check = row.prepare(guards)
    guards.ready()
    with mx.use_backend(backend):
        result = call()
    tally("guarded buffers", guards.check())
    check(result)
    tally("odd calls")


@pytest.mark.parametrize("row", gemm.GARBAGE_ROWS, ids=[row.what for row in gemm.GARBAGE_ROWS])
def test_garbage_stays_inside(row: Odd, backend: str, tally: Tally) -> None:
    """Layouts of any numbers: outputs may hold anything, and nothing else is written."""
    guards = Guards()
    call, _ = row.prepare(guards)
    guards.ready()
    with mx.use_backend(backend):
        call()
    tally("guarded buffers", guards.check())


def test_each_row_is_another() -> None:
    for ids in (_ids(BAD), _ids(ODD)):
        assert len(set(ids)) == len(ids)


def test_there_are_enough() -> None:
    """The tables hold what was promised; test_errors and test_bad_commands have more."""
    assert len(BAD) + len(ODD) >= 250
