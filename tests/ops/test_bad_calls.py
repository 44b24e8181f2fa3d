"""Calls that nobody should make, and calls that hardly anybody makes: tables in support/bad_calls.

Every tensor of a call lies among guard bytes. A bad call raises the error of its row and changes no
byte. An odd one gives the right result on each backend and writes its outputs alone; on a GPU, the
device still works afterwards.
"""

from __future__ import annotations

import re
from typing import Any

import cases
import pytest
import torch
from bad_calls import gemm, layouts, moe, operands, operators, quantize, sglang
from bad_calls.row import E4M3, Bad, E, K, N, Odd, T, weights
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
    for row in module.ODD
]


@pytest.mark.parametrize("row", BAD)
def test_bad(row: Bad) -> None:
    guards = Guards()
    call = row.prepare(guards)
    guards.ready()
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


def operand(k: int = K, experts: int = E) -> mx.GroupedMXFP8:
    return cases.poisoned_output(cases.layout([T // 2] + [0] * (experts - 1), T), k)


def strided(*shape: int) -> torch.Tensor:
    return torch.ones(*shape, 2, dtype=torch.bfloat16)[..., 0]


CHANGED: dict[str, tuple[Any, dict[str, Any], list[tuple[dict[str, Any], str]]]] = {
    "quantize_grouped": (
        mx.quantize_grouped,
        {"x": torch.ones(T, K), "groups": operand().groups, "out": operand(), "backend": "reference"},
        [
            ({"x": torch.ones(T, K).double()}, "x: dtype must be bfloat16 or float16 or float32, got float64"),
            ({"x": torch.ones(T - 1, K)}, f"x: must have T = groups.num_tokens = {T} rows, got {T - 1}"),
            ({"x": torch.ones(T, 48)}, "x: K must be a positive multiple of 32, got 48"),
            ({"x": strided(T, K)}, f"x: must have unit stride along its columns, got strides ({2 * K}, 2)"),
            ({"x": torch.ones(T, K, requires_grad=True)}, "x: must not require grad (MXFP8 quantization has no backward"),
            ({"x": [[0.0]]}, "x: must be a torch.Tensor (R, K), got list"),
            ({"scale_rounding": ["rceil"]}, "scale_rounding: must be one of rceil, floor, even, got ['rceil']"),
            ({"activation": ["swiglu"]}, "activation: must be None, 'swiglu'"),
            ({"out": operand(64)}, f"out: must have shape (T, K) = ({T}, {K}), got ({T}, 64)"),
            ({"out": operand(experts=1)}, "out: must have shape (S, C) = (384, 4), got (128, 4)"),
            ({"backend": "none"}, "backend: must be one of auto, cutlass, triton, reference, got 'none'"),
        ],
    ),
    "quantize_grouped of counts": (
        mx.quantize_grouped,
        {"x": torch.ones(T, K), "groups": torch.tensor([T - 1, 0, 1]), "backend": "reference"},
        [({"groups": torch.tensor([T - 1, T - 1, T])}, f"groups: must have a sum of at most num_tokens = {T} (counts, not offsets?")],
    ),
    "grouped_gemm": (
        mx.grouped_gemm,
        {"x": operand(), "w": weights(), "out": torch.empty(T, N, dtype=torch.bfloat16), "backend": "reference"},
        [
            ({"w": weights(e=E + 1)}, f"w: must have x's E = {E} experts, got {E + 1} (from_ends takes offsets without"),
            ({"w": weights(k=64)}, f"x: must have w's K = 64, got {K}"),
            ({"out_dtype": ["bf16"]}, "out_dtype: must be bfloat16 or float16 or float32, got ['bf16']"),
            ({"out_dtype": torch.float16}, "out: dtype must be float16, got bfloat16"),
            ({"out": torch.empty(T, N)}, "out: dtype must be bfloat16, got float32"),
            ({"out": strided(T, N)}, f"out: must be contiguous, got shape ({T}, {N}) with strides"),
            ({"out": torch.empty(T + 1, N, dtype=torch.bfloat16)}, f"out: must have shape (T, N) = ({T}, {N}), got"),
            ({"workspace": torch.empty(64)}, "workspace: dtype must be uint8, got float32"),
            ({"backend": "none"}, "backend: must be one of auto, cutlass, triton, reference, got 'none'"),
        ],
    ),
    "moe_forward": (
        mx.moe_forward,
        {**moe._good(), "out": torch.empty(moe.M, moe.H, dtype=torch.bfloat16), "backend": "reference"},
        [
            ({"x": torch.zeros(moe.M, 32)}, "x: must have shape (M, H) with topk_ids' M and w13q's H = (7, 64), got (7, 32)"),
            ({"w2q": moe.w2(e=3)}, "w13q: must be (E, 2I, H) = (3, 64, 64), as w2q is (E, H, I), got (4, 64, 64)"),
            ({"topk_ids": torch.zeros(7, 2)}, "topk_ids: dtype must be int32 or int64, got float32"),
            ({"topk_weights": torch.zeros(7, 2, requires_grad=True)}, "topk_weights: must not require grad"),
            ({"activation": ["gelu"]}, "activation: must be 'swiglu' (silu(gate) * up, elsewhere called 'silu'), 'swigluoai'"),
            ({"w13_bias": torch.zeros(4, 32)}, "w13_bias: must have shape (E, N) = (4, 64), got (4, 32)"),
            ({"out": torch.empty(7, 64)}, "out: dtype must be bfloat16, got float32"),
            ({"out": torch.empty(7, 32, dtype=torch.bfloat16)}, "out: must have shape (M, H) = (7, 64), got (7, 32)"),
            ({"workspace": object()}, "workspace: must be a MoEWorkspace, got object"),
            ({"backend": "none"}, "backend: must be one of auto, cutlass, triton, reference, got 'none'"),
        ],
    ),
}  # fmt: skip
"""Each public function, arguments that it takes, and what is wrong with it then."""


@pytest.mark.parametrize("name", CHANGED)
def test_a_call_that_passed_says_nothing_for_one_like_it(name: str) -> None:
    call, good, changes = CHANGED[name]
    for changed, message in changes:
        call(**good)
        for _ in range(2):
            with pytest.raises((TypeError, ValueError), match=f"^{re.escape(message)}"):
                call(**{**good, **changed})


def test_gradients_are_refused_only_where_they_would_be_lost() -> None:
    x, groups = torch.ones(T, K, requires_grad=True), operand().groups
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
