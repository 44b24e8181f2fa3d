"""Calls that nobody should make, and calls that hardly anybody makes: tables in support/bad_calls.

Every tensor of a call lies among guard bytes. A bad call raises the error of its row and changes no
byte. An odd one gives the right result on each backend and writes its outputs alone; on a GPU, the
device still works afterwards.
"""

from __future__ import annotations

import contextlib
import functools
import re
from typing import Any

import cases
import pytest
import sglang_case
import torch
from bad_calls import gemm, layouts, moe, operands, operators, quantize, sglang
from bad_calls.row import E4M3, Bad, E, K, N, Odd, T
from guards import Guards, check_alive
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

import hybrid_mxfp8 as mx

MODULES = (quantize, layouts, operands, gemm, moe, sglang, operators)
ROOMS = {module.__name__.partition(".")[2]: module for module in MODULES}
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


def made_on(device: str, quantized: dict[str, Any], product: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What each function makes of tensors there; SGLang's of these arguments."""
    ones = functools.partial(torch.ones, device=device)
    counts = ones(E, dtype=torch.int32)
    groups, w = mx.GroupLayout.from_ends(counts.long(), T), mx.quantize_weights(ones(E, N, K))
    x = ones(T, 2 * K, dtype=torch.float16)
    xq, of_counts = (mx.quantize_grouped(x, given, activation="swiglu") for given in (groups, counts))
    layer = mx.MXFP8Experts.from_weights(ones(E, 2 * K, 2 * K), ones(E, 2 * K, K))
    sglang_case.grouped_quant(**quantized)
    return {
        "layout": groups.scale_offsets, "weights": w.scales, "values": xq.values, "scales": of_counts.scales,
        "product": mx.grouped_gemm(xq, w, out_dtype=torch.float16),
        "layer": layer(x, ones(T, 2, dtype=torch.int64), ones(T, 2)),
        "sglang": sglang_case.moe_grouped_gemm(**product),
    }  # fmt: skip


@pytest.mark.parametrize("fake", [False, True], ids=["meta", "fake"])
def test_shapes_where_there_is_no_memory(fake: bool) -> None:
    tables = sglang._tokens(), sglang._product()
    with FakeTensorMode() if fake else contextlib.nullcontext() as mode:
        placed = mode.from_tensor if mode else lambda tensor: tensor.to("meta")
        there = [{k: placed(v) if isinstance(v, torch.Tensor) else v for k, v in table.items()} for table in tables]
        made = made_on("cpu" if fake else "meta", *there)
    assert {name: tuple(tensor.shape) for name, tensor in made.items()} == {
        "layout": (E + 1,), "weights": (E, 128, 4), "values": (T, K), "scales": (384, 4), "product": (T, N),
        "layer": (T, 2 * K), "sglang": (sglang.T, sglang.N),
    }  # fmt: skip
    assert (made["product"].dtype, made["layer"].dtype) == (torch.float16, torch.float16)
    # Of 2**25 experts at most nine have any of nine tokens, so that padding fits int32.
    assert mx.GroupLayout.from_counts(torch.empty(2**25, dtype=torch.int32, device="meta"), 9).scale_rows == 1152


def test_gradients_are_refused_only_where_they_would_be_lost() -> None:
    x, groups = torch.ones(T, K, requires_grad=True), cases.layout([T // 2, 0, 0], T)
    for _ in range(2):
        with torch.no_grad():
            mx.quantize_grouped(x, groups, backend="reference")
            mx.moe_forward(**{**moe._good(), "x": moe._good()["x"].requires_grad_()}, backend="reference")
        with pytest.raises(ValueError, match=r"^x: must not require grad"):
            mx.quantize_grouped(x, groups, backend="reference")
        mx.quantize_grouped(x.detach(), groups, backend="reference")


def test_tangents_are_refused() -> None:
    """Of forward-mode AD: by calls whose plan there is, which other tensors still make."""
    plain = {**moe._all(), "backend": "reference"}
    mx.moe_forward(**plain)
    with forward_ad.dual_level():
        for name in ("x", "topk_weights", "w13_bias", "w2_bias", "out"):
            with pytest.raises(ValueError, match=rf"^{name}: must have no tangent .* got a dual tensor$"):
                mx.moe_forward(**plain | {name: forward_ad.make_dual(plain[name], plain[name].clone())})
        assert torch.equal(mx.moe_forward(**plain | {"out": None}), plain["out"])
    with pytest.raises(ValueError, match=r"^x: must have no tangent"):
        torch.func.jvp(lambda x: mx.quantize_tokens(x).scales, (plain["x"],), (plain["x"],))


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
    memory = torch.zeros(2 * moe.M, moe.H, dtype=torch.bfloat16)
    good = {**moe._good(), "x": memory[: moe.M]}
    mx.moe_forward(**good, out=good["x"])
    with pytest.raises(ValueError, match=r"^out: must not overlap x, got"):
        mx.moe_forward(**good, out=memory[::2])


def test_unavailable_backend_error_is_no_value_error() -> None:
    """A caller who catches bad arguments does not catch a missing backend."""
    assert issubclass(mx.BackendUnavailableError, RuntimeError)
    assert not issubclass(mx.BackendUnavailableError, ValueError)
