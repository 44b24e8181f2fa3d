"""Errors, as a table: type, and a message that names the argument, what was expected and what came.

Every call is made on good arguments with one thing changed, with buffers full of poison, which must stay: an error
comes before any launch.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import cases
import pytest
import torch

import hybrid_mxfp8 as mx
from hybrid_mxfp8.dispatch.registry import BACKENDS

T, E, N, K = 40, 3, 24, 96
E4M3 = torch.float8_e4m3fn
META = torch.device("meta")


@dataclass(frozen=True)
class Case:
    """One bad call: the changed arguments, and what the error says."""

    changes: dict[str, Any] = field(repr=False)
    error: type[Exception]
    message: str


def groups(num_tokens: int = T, num_experts: int = E) -> mx.GroupLayout:
    return cases.layout([num_tokens // 2] + [0] * (num_experts - 1), num_tokens)


def grouped(num_tokens: int = T, k: int = K, num_experts: int = E) -> mx.GroupedMXFP8:
    return cases.poisoned_output(groups(num_tokens, num_experts), k)


def weights(e: int = E, n: int = N, k: int = K) -> mx.ExpertWeights:
    return mx.quantize_weights(torch.ones(e, n, k), backend="reference")


def on_meta(x: Any) -> Any:
    """The same operand on another device."""
    if isinstance(x, mx.GroupLayout):
        return mx.GroupLayout(
            x.tokens_per_expert.to(META), x.expert_offsets.to(META), x.scale_offsets.to(META), x.num_tokens
        )
    if isinstance(x, mx.GroupedMXFP8):
        return mx.GroupedMXFP8(x.values.to(META), x.scales.to(META), on_meta(x.groups))
    if isinstance(x, mx.ExpertWeights):
        return mx.ExpertWeights(x.values.to(META), x.scales.to(META))
    return x.to(META)


def unaligned(size: int, dtype: torch.dtype, by: int) -> torch.Tensor:
    """A tensor that starts ``by`` elements after a 256-byte boundary."""
    buffer = torch.zeros(size + 256 + by, dtype=dtype)
    start = -buffer.data_ptr() % 256 // buffer.element_size() + by
    return buffer[start : start + size]


def memory(x: torch.Tensor) -> bytes:
    return x.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def raises(case: Case, call: Callable[..., Any], good: dict[str, Any]) -> None:
    arguments = {**good, **case.changes}
    before = [memory(x) for x in tensors(arguments)]
    with pytest.raises(case.error) as caught:
        call(**arguments)
    assert type(caught.value) is case.error
    assert re.search(case.message, str(caught.value)), str(caught.value)
    assert [memory(x) for x in tensors(arguments)] == before


def tensors(arguments: dict[str, Any]) -> list[torch.Tensor]:
    """All tensors that have memory."""
    found: list[torch.Tensor] = []
    for value in arguments.values():
        if isinstance(value, torch.Tensor):
            found.append(value.detach())
        elif isinstance(value, mx.GroupedMXFP8 | mx.ExpertWeights):
            found += [value.values, value.scales]
    return [x for x in found if x.device.type == "cpu"]


QUANTIZE_GROUPED = [
    Case({"x": [1.0]}, TypeError, r"^x: must be a torch\.Tensor \(R, K\), got list$"),
    Case({"x": torch.ones(T, K, dtype=torch.float64)}, TypeError, r"^x: dtype must be bfloat16 or float16 or float32, got float64$"),
    Case({"x": torch.ones(T, K, dtype=torch.int32)}, TypeError, r"^x: dtype must be .*, got int32$"),
    Case({"x": torch.ones(T * K)}, ValueError, rf"^x: must have shape \(R, K\), got \({T * K},\)$"),
    Case({"x": torch.ones(1, T, K)}, ValueError, rf"^x: must have shape \(R, K\), got \(1, {T}, {K}\)$"),
    Case({"x": torch.ones(T, 40), "out": None}, ValueError, r"^x: K must be a positive multiple of 32, got 40$"),
    Case({"x": torch.ones(T, 0), "out": None}, ValueError, r"^x: K must be a positive multiple of 32, got 0$"),
    Case({"x": torch.ones(T, K, device=META)}, ValueError, r"^x: must be on cpu, as the other arguments, got meta$"),
    Case({"x": torch.ones(K, T).T}, ValueError, rf"^x: must have unit stride along its columns, got strides \(1, {T}\)$"),
    Case({"x": torch.ones(T, 2 * K)[:, ::2]}, ValueError, r"^x: must have unit stride along its columns, got strides"),
    Case({"x": torch.ones(T + 1, K)}, ValueError, rf"^x: must have T = groups\.num_tokens = {T} rows, got {T + 1}$"),
    Case({"x": torch.ones(T, K, requires_grad=True)}, ValueError, r"^x: must not require grad .*, got requires_grad=True$"),
    Case({"groups": torch.ones(3)}, TypeError, r"^groups: dtype must be int32 or int64, got float32$"),
    Case({"groups": on_meta(groups())}, ValueError, r"^x: must be on meta, as the other arguments, got cpu$"),
    Case({"scale_rounding": "ceil"}, ValueError, r"^scale_rounding: must be one of rceil, floor, even, got 'ceil'$"),
    Case({"scale_rounding": None}, ValueError, r"^scale_rounding: must be one of rceil, floor, even, got None$"),
    Case({"scale_rounding": ["rceil"]}, ValueError, r"^scale_rounding: must be one of rceil, floor, even, got \['rceil'\]$"),
    Case({"activation": "gelu"}, ValueError, r"^activation: must be None, 'swiglu' .*, got 'gelu'$"),
    Case({"activation": "swiglu", "x": torch.ones(T, 65)}, ValueError, r"^x: must have an even number of columns, .*, got 65$"),
    Case({"activation": "swiglu", "x": torch.ones(T, 80)}, ValueError, r"^x: K must be a positive multiple of 32, got 40$"),
    Case({"row_index": [0] * T}, TypeError, r"^row_index: must be a torch\.Tensor \(T,\), got list$"),
    Case({"row_index": torch.zeros(T, dtype=torch.int64)}, TypeError, r"^row_index: dtype must be int32, got int64$"),
    Case({"row_index": torch.zeros(T, 1, dtype=torch.int32)}, ValueError, rf"^row_index: must have shape \(T,\), got \({T}, 1\)$"),
    Case({"row_index": torch.zeros(T - 1, dtype=torch.int32)}, ValueError, rf"^row_index: must have T = groups.num_tokens = {T} rows, got {T - 1}$"),
    Case({"row_index": torch.zeros(2 * T, dtype=torch.int32)[::2]}, ValueError, r"^row_index: must be contiguous, got shape"),
    Case({"row_index": torch.zeros(T, dtype=torch.int32, device=META)}, ValueError, r"^row_index: must be on cpu, .*, got meta$"),
    Case({"out": torch.ones(T, K)}, TypeError, r"^out: must be a GroupedMXFP8, got Tensor$"),
    Case({"out": grouped(k=64)}, ValueError, rf"^out: must have shape \(T, K\) = \({T}, {K}\), got \({T}, 64\)$"),
    Case({"out": grouped(T + 1)}, ValueError, rf"^out: must have shape \(T, K\) = \({T}, {K}\), got \({T + 1}, {K}\)$"),
    Case({"out": grouped(num_experts=1)}, ValueError, r"^out: must have shape \(S, C\) = \(384, 4\), got \(128, 4\)$"),
    Case({"out": on_meta(grouped())}, ValueError, r"^out: must be on cpu, as the other arguments, got meta$"),
    Case({"backend": "cuda"}, ValueError, r"^backend: must be one of auto, cutlass, triton, reference, got 'cuda'$"),
]  # fmt: skip


@pytest.mark.parametrize("case", QUANTIZE_GROUPED, ids=lambda case: f"{case.error.__name__} {case.message}")
def test_quantize_grouped(case: Case) -> None:
    raises(case, mx.quantize_grouped, {"x": torch.ones(T, K), "groups": groups(), "out": grouped()})


QUANTIZE_WEIGHTS = [
    Case({"w": None}, TypeError, r"^w: must be a torch\.Tensor \(E, N, K\), got NoneType$"),
    Case({"w": torch.ones(E, N, K, dtype=torch.float64)}, TypeError, r"^w: dtype must be .*, got float64$"),
    Case({"w": torch.ones(N, K)}, ValueError, rf"^w: must have shape \(E, N, K\), got \({N}, {K}\)$"),
    Case({"w": torch.ones(E, N, 48)}, ValueError, r"^w: K must be a positive multiple of 32, got 48$"),
    Case({"w": torch.ones(E, K, N).mT}, ValueError, r"^w: must have unit stride along K, got strides"),
    Case({"w": torch.ones(E, N, K, requires_grad=True)}, ValueError, r"^w: must not require grad"),
    Case({"scale_rounding": "up"}, ValueError, r"^scale_rounding: must be one of rceil, floor, even, got 'up'$"),
    Case({"backend": 1}, ValueError, r"^backend: must be one of auto, cutlass, triton, reference, got 1$"),
]


@pytest.mark.parametrize("case", QUANTIZE_WEIGHTS, ids=lambda case: f"{case.error.__name__} {case.message}")
def test_quantize_weights(case: Case) -> None:
    raises(case, mx.quantize_weights, {"w": torch.ones(E, N, K)})


GROUPED_GEMM = [
    Case({"x": torch.ones(T, K)}, TypeError, r"^x: must be a GroupedMXFP8 \(from quantize_grouped\), got Tensor$"),
    Case({"w": torch.ones(E, N, K)}, TypeError, r"^w: must be an ExpertWeights \(from quantize_weights\), got Tensor$"),
    Case({"w": weights(e=E + 1)}, ValueError, rf"^w: must have x's E = {E} experts, got {E + 1} \(from_ends takes E ends, without the leading 0\)$"),
    Case({"w": weights(e=E + 2)}, ValueError, rf"^w: must have x's E = {E} experts, got {E + 2}$"),
    Case({"w": weights(k=64)}, ValueError, rf"^w: must have x's K = {K}, got 64$"),
    Case({"w": weights(n=20)}, ValueError, r"^w: N must be a positive multiple of 8, got 20$"),
    Case({"w": on_meta(weights())}, ValueError, r"^w: must be on cpu, as x, got meta$"),
    Case({"out_dtype": torch.float64}, TypeError, r"^out_dtype: must be bfloat16 or float16 or float32, got float64$"),
    Case({"out_dtype": "bf16"}, TypeError, r"^out_dtype: must be bfloat16 or float16 or float32, got bf16$"),
    Case({"out": [0.0]}, TypeError, r"^out: must be a torch\.Tensor \(T, N\), got list$"),
    Case({"out": torch.ones(T, N)}, TypeError, r"^out: dtype must be bfloat16, got float32$"),
    Case({"out_dtype": torch.float16}, TypeError, r"^out: dtype must be float16, got bfloat16$"),
    Case({"out": torch.ones(T * N, dtype=torch.bfloat16)}, ValueError, rf"^out: must have shape \(T, N\), got \({T * N},\)$"),
    Case({"out": torch.ones(T, N + 8, dtype=torch.bfloat16)}, ValueError, rf"^out: must have shape \(T, N\) = \({T}, {N}\), got \({T}, {N + 8}\)$"),
    Case({"out": torch.ones(N, T, dtype=torch.bfloat16).T}, ValueError, r"^out: must be contiguous, got shape"),
    Case({"out": torch.ones(T, 2 * N, dtype=torch.bfloat16)[:, :N]}, ValueError, r"^out: must be contiguous, got shape"),
    Case({"out": torch.ones(T, N, dtype=torch.bfloat16, device=META)}, ValueError, r"^out: must be on cpu, .*, got meta$"),
    Case({"out": unaligned(T * N, torch.bfloat16, 4).view(T, N)}, ValueError, r"^out: must start at a 16-byte boundary, got address 0x"),
    Case({"out": torch.ones(T, N, dtype=torch.bfloat16, requires_grad=True)}, ValueError, r"^out: must not require grad"),
    Case({"workspace": 5}, TypeError, r"^workspace: must be a torch\.Tensor \(bytes,\), got int$"),
    Case({"workspace": torch.ones(64)}, TypeError, r"^workspace: dtype must be uint8, got float32$"),
    Case({"workspace": torch.ones(8, 8, dtype=torch.uint8)}, ValueError, r"^workspace: must have shape \(bytes,\), got \(8, 8\)$"),
    Case({"workspace": torch.ones(8, dtype=torch.uint8, device=META)}, ValueError, r"^workspace: must be on cpu, .*, got meta$"),
    Case({"workspace": torch.ones(64, dtype=torch.uint8)[::2]}, ValueError, r"^workspace: must be contiguous, got shape"),
    Case({"workspace": unaligned(256, torch.uint8, 16)}, ValueError, r"^workspace: must start at a 256-byte boundary, got address 0x"),
    Case({"backend": "blas"}, ValueError, r"^backend: must be one of auto, cutlass, triton, reference, got 'blas'$"),
]  # fmt: skip


@pytest.mark.parametrize("case", GROUPED_GEMM, ids=lambda case: f"{case.error.__name__} {case.message}")
def test_grouped_gemm(case: Case) -> None:
    good = {"x": grouped(), "w": weights(), "out": cases.poisoned_product(T, N, torch.bfloat16)}
    raises(case, mx.grouped_gemm, good)


EXPLAIN = [case for case in GROUPED_GEMM if not ({"out", "workspace"} & case.changes.keys() or "^out:" in case.message)]


@pytest.mark.parametrize("case", EXPLAIN, ids=lambda case: f"{case.error.__name__} {case.message}")
def test_explain(case: Case) -> None:
    raises(case, mx.explain, {"x": grouped(), "w": weights()})


def test_workspace_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    needy = dataclasses.replace(BACKENDS["reference"], workspace_size=lambda problem: 1000)
    monkeypatch.setitem(BACKENDS, "reference", needy)
    case = Case({"workspace": torch.ones(999, dtype=torch.uint8)}, ValueError, r"^workspace: must have at least 1000 bytes, got 999$")  # fmt: skip
    good = {"x": grouped(), "w": weights(), "out": cases.poisoned_product(T, N, torch.bfloat16), "backend": "reference"}
    raises(case, mx.grouped_gemm, good)


WORKSPACE_SIZE = [
    Case({"w": 3}, TypeError, r"^w: must be an ExpertWeights, got int$"),
    Case({"w": weights(n=20)}, ValueError, r"^w: N must be a positive multiple of 8, got 20$"),
    Case({"num_tokens": 3.0}, TypeError, r"^num_tokens: must be an int, got float$"),
    Case({"num_tokens": True}, TypeError, r"^num_tokens: must be an int, got bool$"),
    Case({"num_tokens": -1}, ValueError, r"^num_tokens: must be at least 0, .*, got -1$"),
    Case({"out_dtype": torch.int8}, TypeError, r"^out_dtype: must be .*, got int8$"),
    Case({"backend": "none"}, ValueError, r"^backend: must be one of auto, .*, got 'none'$"),
]


@pytest.mark.parametrize("case", WORKSPACE_SIZE, ids=lambda case: f"{case.error.__name__} {case.message}")
def test_grouped_gemm_workspace_size(case: Case) -> None:
    raises(case, mx.grouped_gemm_workspace_size, {"w": weights(), "num_tokens": T})


LAYOUT = [
    Case({"given": [1, 2]}, TypeError, r"^NAME: must be a torch\.Tensor \(E,\), got list$"),
    Case({"given": torch.ones(2)}, TypeError, r"^NAME: dtype must be int32 or int64, got float32$"),
    Case({"given": torch.ones(2, dtype=torch.int16)}, TypeError, r"^NAME: dtype must be int32 or int64, got int16$"),
    Case({"given": torch.ones(2, dtype=torch.bool)}, TypeError, r"^NAME: dtype must be int32 or int64, got bool$"),
    Case({"given": torch.ones(2, 1, dtype=torch.int32)}, ValueError, r"^NAME: must have shape \(E,\), got \(2, 1\)$"),
    Case({"given": torch.tensor(3)}, ValueError, r"^NAME: must have shape \(E,\), got \(\)$"),
    Case({"num_tokens": torch.tensor(3)}, TypeError, r"^num_tokens: must be an int, got Tensor$"),
    Case({"num_tokens": 3.0}, TypeError, r"^num_tokens: must be an int, got float$"),
    Case({"num_tokens": True}, TypeError, r"^num_tokens: must be an int, got bool$"),
    Case({"num_tokens": -1}, ValueError, r"^num_tokens: must be at least 0, .*, got -1$"),
    Case({"num_tokens": 2**31}, ValueError, r"^num_tokens: .* fit int32, got 2147483648$"),
    Case({"num_tokens": 2**31 - 200}, ValueError, r"^num_tokens: .* fit int32, got 2147483448$"),
]


@pytest.mark.parametrize(
    ("build", "name"), [(mx.GroupLayout.from_counts, "tokens_per_expert"), (mx.GroupLayout.from_ends, "offs")]
)
@pytest.mark.parametrize("case", LAYOUT, ids=lambda case: f"{case.error.__name__} {case.message}")
def test_group_layout(build: Callable[..., mx.GroupLayout], name: str, case: Case) -> None:
    case = Case(case.changes, case.error, case.message.replace("NAME", name))
    good = {"given": torch.tensor([2, 3], dtype=torch.int32), "num_tokens": 5}
    raises(case, lambda given, num_tokens: build(given, num_tokens), good)


def test_many_experts_of_few_tokens_fit_int32() -> None:
    """At most as many are padded as there are tokens: of 2**25 experts nine can have any."""
    counts = torch.empty(2**25, dtype=torch.int32, device=META)
    assert mx.GroupLayout.from_counts(counts, 9).num_tokens == 9


SCALES = groups().scale_rows
GROUPED_MXFP8 = [
    Case({"groups": [2, 3]}, TypeError, r"^groups: must be a GroupLayout, got list$"),
    Case({"values": torch.zeros(T, K)}, TypeError, r"^values: dtype must be float8_e4m3fn, got float32$"),
    Case({"values": torch.zeros(T * K, dtype=E4M3)}, ValueError, r"^values: must have shape \(T, K\), got"),
    Case({"values": torch.zeros(T + 1, K, dtype=E4M3)}, ValueError, rf"^values: must have T = groups\.num_tokens = {T} rows, got {T + 1}$"),
    Case({"values": torch.zeros(T, 40, dtype=E4M3)}, ValueError, r"^values: K must be a positive multiple of 32, got 40$"),
    Case({"values": torch.zeros(K, T, dtype=E4M3).T}, ValueError, r"^values: must be contiguous, got shape"),
    Case({"values": torch.zeros(T, K, dtype=E4M3, device=META)}, ValueError, r"^values: must be on cpu, .*, got meta$"),
    Case({"scales": torch.zeros(SCALES, 4)}, TypeError, r"^scales: dtype must be uint8, got float32$"),
    Case({"scales": torch.zeros(T, 3, dtype=torch.uint8)}, ValueError, rf"^scales: must have shape \(S, C\) = \({SCALES}, 4\), got \({T}, 3\)$"),
    Case({"scales": torch.zeros(4, SCALES, dtype=torch.uint8).T}, ValueError, r"^scales: must be contiguous, got shape"),
    Case({"scales": torch.zeros(SCALES, 4, dtype=torch.uint8, device=META)}, ValueError, r"^scales: must be on cpu, .*, got meta$"),
]  # fmt: skip


@pytest.mark.parametrize("case", GROUPED_MXFP8, ids=lambda case: f"{case.error.__name__} {case.message}")
def test_grouped_mxfp8(case: Case) -> None:
    good = {
        "values": torch.zeros(T, K, dtype=E4M3),
        "scales": torch.zeros(SCALES, 4, dtype=torch.uint8),
        "groups": groups(),
    }
    raises(case, mx.GroupedMXFP8, good)


EXPERT_WEIGHTS = [
    Case({"values": torch.zeros(E, N, K)}, TypeError, r"^values: dtype must be float8_e4m3fn, got float32$"),
    Case({"values": torch.zeros(N, K, dtype=E4M3)}, ValueError, r"^values: must have shape \(E, N, K\), got"),
    Case({"values": torch.zeros(E, N, 40, dtype=E4M3)}, ValueError, r"^values: K must be a positive multiple of 32, got 40$"),
    Case({"values": torch.zeros(E, K, N, dtype=E4M3).mT}, ValueError, r"^values: must be contiguous, got shape"),
    Case({"scales": torch.zeros(E, N, 3, dtype=torch.uint8)}, ValueError, rf"^scales: must have shape \(E, roundup\(N, 128\), C\) = \({E}, 128, 4\), got"),
    Case({"scales": torch.zeros(E, 128, 4, dtype=torch.int8)}, TypeError, r"^scales: dtype must be uint8, got int8$"),
    Case({"scales": torch.zeros(E, 128, 4, dtype=torch.uint8, device=META)}, ValueError, r"^scales: must be on cpu, .*, got meta$"),
    Case({"scales": torch.zeros(E, 4, 128, dtype=torch.uint8).mT}, ValueError, r"^scales: must be contiguous, got shape"),
]  # fmt: skip


@pytest.mark.parametrize("case", EXPERT_WEIGHTS, ids=lambda case: f"{case.error.__name__} {case.message}")
def test_expert_weights(case: Case) -> None:
    good = {"values": torch.zeros(E, N, K, dtype=E4M3), "scales": torch.zeros(E, 128, 4, dtype=torch.uint8)}
    raises(case, mx.ExpertWeights, good)


FROM_LINEAR = [
    Case({"values": torch.zeros(E, N, K)}, TypeError, r"^values: dtype must be float8_e4m3fn or uint8, got float32$"),
    Case({"values": torch.zeros(E, N, 40, dtype=torch.uint8)}, ValueError, r"^values: K must be a positive multiple of 32, got 40$"),
    Case({"scales": torch.zeros(E, N, 3)}, TypeError, r"^scales: dtype must be uint8 or float8_e8m0fnu, got float32$"),
    Case({"scales": torch.zeros(E, N, 4, dtype=torch.uint8)}, ValueError, rf"^scales: must have shape \(E, N, K/32\) = \({E}, {N}, 3\), got \({E}, {N}, 4\)$"),
    Case({"scales": torch.zeros(E, 128, 4, dtype=torch.uint8)}, ValueError, r"^scales: must have shape \(E, N, K/32\)"),
    Case({"scales": torch.zeros(E, N, 3, dtype=torch.uint8, device=META)}, ValueError, r"^scales: must be on cpu, .*, got meta$"),
]  # fmt: skip


@pytest.mark.parametrize("case", FROM_LINEAR, ids=lambda case: f"{case.error.__name__} {case.message}")
def test_from_linear_scales(case: Case) -> None:
    good = {"values": torch.zeros(E, N, K, dtype=torch.uint8), "scales": torch.zeros(E, N, 3, dtype=torch.uint8)}
    raises(case, mx.ExpertWeights.from_linear_scales, good)


def test_swizzle_and_unswizzle() -> None:
    u8 = torch.zeros(128, 4, dtype=torch.uint8)
    with pytest.raises(TypeError, match=r"^linear: dtype must be uint8 or float8_e8m0fnu, got float32$"):
        mx.swizzle_scales(u8.float())
    with pytest.raises(ValueError, match=r"^linear: must have shape \(\.\.\., rows, cols\), got \(4,\)$"):
        mx.swizzle_scales(u8[0])
    with pytest.raises(TypeError, match=r"^swizzled: dtype must be uint8 or float8_e8m0fnu, got int32$"):
        mx.unswizzle_scales(u8.int(), 3, 3)
    with pytest.raises(
        ValueError, match=r"^swizzled: must end in dimensions \(256, 4\) for 129 rows and 3 columns, got \(128, 4\)$"
    ):
        mx.unswizzle_scales(u8, 129, 3)


def test_gradients_are_refused_only_where_they_would_be_lost() -> None:
    x = torch.ones(T, K, requires_grad=True)
    with torch.no_grad():
        assert mx.quantize_grouped(x, groups(), backend="reference").values.shape == (T, K)
    assert mx.quantize_grouped(x.detach(), groups(), backend="reference").values.shape == (T, K)


def test_unavailable_backend_error_is_no_value_error() -> None:
    """A caller who catches bad arguments does not catch a missing backend."""
    assert issubclass(mx.BackendUnavailableError, RuntimeError)
    assert not issubclass(mx.BackendUnavailableError, ValueError)
