"""What passed once is not checked again; what is wrong is, however much like it looks to a call that passed."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import cases
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import hybrid_mxfp8 as mx
from hybrid_mxfp8.dispatch.seen import Seen
from hybrid_mxfp8.ops import grouped_gemm as ops


def test_full_it_forgets() -> None:
    seen: Seen[int] = Seen(2)
    seen.add("a", 1)
    seen.add("b", 2)
    assert (seen.get("a"), seen.get("b")) == (1, 2)
    seen.add("c", 3)
    assert (seen.get("a"), seen.get("b"), seen.get("c")) == (None, None, 3)


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the long checks that ran."""
    ran: list[str] = []
    for name in ("_check_rows", "_problem", "check_no_overlap", "_check_no_overlap"):
        check = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *a, _c=check, _n=name, **k: (ran.append(_n), _c(*a, **k))[1])
    monkeypatch.setattr(ops, "_rows_seen", Seen(16))
    monkeypatch.setattr(ops, "_products_seen", Seen(16))
    return ran


@pytest.fixture
def x(rng: torch.Generator) -> torch.Tensor:
    return cases.random_rows(9, 64, torch.bfloat16, rng)


@pytest.fixture
def groups() -> mx.GroupLayout:
    return cases.layout([4, 0, 5], 9)


def quantize(x: torch.Tensor, groups: Any, **more: Any) -> mx.GroupedMXFP8:
    return mx.quantize_grouped(x, groups, backend="reference", **more)


def test_a_call_like_an_earlier_one_is_not_checked_again(
    x: torch.Tensor, groups: mx.GroupLayout, checks: list[str], rng: torch.Generator
) -> None:
    wq = mx.quantize_weights(torch.randn(3, 16, 64, generator=rng), backend="reference")
    out = torch.empty(9, 16)
    xq = quantize(x, groups)

    def call() -> None:
        quantize(x, groups, out=xq)
        mx.grouped_gemm(xq, wq, out=out, out_dtype=torch.float32, backend="reference")

    call()
    assert {"_check_rows", "_problem", "check_no_overlap", "_check_no_overlap"} == set(checks)
    checks.clear()
    call()
    assert checks == []


def elsewhere(groups: mx.GroupLayout) -> mx.GroupLayout:
    parts = (groups.tokens_per_expert, groups.expert_offsets, groups.scale_offsets)
    return mx.GroupLayout(*(part.to("meta") for part in parts), groups.num_tokens)


WRONG: dict[str, tuple[str, Callable[[torch.Tensor, mx.GroupLayout], object]]] = {
    "dtype": ("x", lambda x, g: quantize(x.double(), g)),
    "K": ("x", lambda x, g: quantize(x[:, :48], g)),
    "rows": ("x", lambda x, g: quantize(x[:8], g)),
    "stride along columns": ("x", lambda x, g: quantize(x.t().contiguous().t(), g)),
    "grad": ("x", lambda x, g: quantize(x.clone().requires_grad_(), g)),
    "another device": ("x", lambda x, g: quantize(x.to("meta"), g)),
    "a list": ("x", lambda x, g: quantize(x.tolist(), g)),
    "rounding": ("scale_rounding", lambda x, g: quantize(x, g, scale_rounding="up")),
    "unhashable rounding": ("scale_rounding", lambda x, g: quantize(x, g, scale_rounding=["rceil"])),
    "activation": ("activation", lambda x, g: quantize(x, g, activation="gelu")),
    "index dtype": ("row_index", lambda x, g: quantize(x, g, row_index=torch.zeros(9, dtype=torch.int64))),
    "index device": (
        "row_index",
        lambda x, g: quantize(x, g, row_index=torch.arange(9, dtype=torch.int32, device="meta")),
    ),
    "index stride": ("row_index", lambda x, g: quantize(x, g, row_index=torch.zeros(18, dtype=torch.int32)[::2])),
    "counts dtype": ("groups", lambda x, g: quantize(x, g.tokens_per_expert.short())),
    "counts stride": ("groups", lambda x, g: quantize(x, torch.zeros(6, dtype=torch.int32)[::2])),
    "counts device": ("x", lambda x, g: quantize(x, g.tokens_per_expert.to("meta"))),
    "groups device": ("x", lambda x, g: quantize(x, elsewhere(g))),
    "groups": ("groups", lambda x, g: quantize(x, [4, 0, 5])),
    "out": ("out", lambda x, g: quantize(x, g, out=(x, x))),
    "out of fewer rows": ("out", lambda x, g: quantize(x, g, out=quantize(x[:8], cases.layout([3, 0, 5], 8)))),
}


@pytest.mark.parametrize("name", WRONG)
def test_one_thing_changed_is_found(
    name: str, x: torch.Tensor, groups: mx.GroupLayout, checks: list[str], rng: torch.Generator
) -> None:
    index = torch.arange(9, dtype=torch.int32)
    for more in ({}, {"row_index": index}, {"out": quantize(x, groups)}):
        quantize(x, groups, **more)
    quantize(x, groups.tokens_per_expert)
    argument, call = WRONG[name]
    for _ in range(2):
        with pytest.raises((TypeError, ValueError), match=f"^{argument}: "):
            call(x, groups)


def test_the_same_buffer_shape_elsewhere_is_checked(x: torch.Tensor, groups: mx.GroupLayout) -> None:
    """An ``out`` that passed says nothing about one of the same shape over the input's memory."""
    quantize(x, groups, out=quantize(x, groups))
    inside = mx.GroupedMXFP8.unchecked(
        x.view(torch.uint8).view(-1)[: 9 * 64].view(9, 64).view(torch.float8_e4m3fn), quantize(x, groups).scales, groups
    )
    with pytest.raises(ValueError, match=r"^out: must not overlap x"):
        quantize(x, groups, out=inside)


def test_products_are_found_by_all_that_was_checked(
    x: torch.Tensor, groups: mx.GroupLayout, checks: list[str], rng: torch.Generator
) -> None:
    xq = quantize(x, groups)
    wq = mx.quantize_weights(torch.randn(3, 16, 64, generator=rng), backend="reference")
    out = torch.empty(9, 16, dtype=torch.bfloat16)
    mx.grouped_gemm(xq, wq, out=out, backend="reference")
    other = mx.quantize_weights(torch.randn(3, 16, 96, generator=rng), backend="reference")
    fewer = mx.quantize_weights(torch.randn(2, 16, 64, generator=rng), backend="reference")
    two = quantize(x, cases.layout([4, 5], 9))
    for argument, call in (
        ("w", lambda: mx.grouped_gemm(xq, wq.to("meta"), backend="reference")),
        ("w", lambda: mx.grouped_gemm(two, wq, backend="reference")),
        ("w", lambda: mx.grouped_gemm(xq, other, backend="reference")),
        ("w", lambda: mx.grouped_gemm(xq, fewer, backend="reference")),
        ("w", lambda: mx.grouped_gemm(xq, xq, backend="reference")),
        ("x", lambda: mx.grouped_gemm(wq, wq, backend="reference")),
        ("out_dtype", lambda: mx.grouped_gemm(xq, wq, out_dtype=torch.int8, backend="reference")),
        ("out_dtype", lambda: mx.grouped_gemm(xq, wq, out_dtype=["bf16"], backend="reference")),
        ("out", lambda: mx.grouped_gemm(xq, wq, out=out.float(), backend="reference")),
        ("out", lambda: mx.grouped_gemm(xq, wq, out=out[:8], backend="reference")),
        ("out", lambda: mx.grouped_gemm(xq, wq, out=torch.empty(16, 9).bfloat16().t(), backend="reference")),
        ("out", lambda: mx.grouped_gemm(xq, wq, out=out.clone().requires_grad_(), backend="reference")),
        ("workspace", lambda: mx.grouped_gemm(xq, wq, out=out, workspace=out, backend="reference")),
    ):
        for _ in range(2):
            with pytest.raises((TypeError, ValueError), match=f"^{argument}: "):
                call()


def test_a_copy_has_seen_nothing() -> None:
    seen: Seen[int] = Seen(2)
    seen.add("a", 1)
    for copied in (copy.deepcopy(seen), pickle.loads(pickle.dumps(seen))):
        assert copied.get("a") is None
        copied.add("b", 2)
        assert copied.get("b") == 2
        assert seen.get("b") is None


def test_fake_tensors_are_traced_after_real_ones_of_their_looks(
    backend: str, x: torch.Tensor, groups: mx.GroupLayout
) -> None:
    out = mx.quantize_grouped(x, groups, backend=backend)
    with (
        FakeTensorMode(allow_non_fake_inputs=True) as mode,
        pytest.raises(ValueError, match=r"^out: must be None under"),
    ):
        mx.quantize_grouped(mode.from_tensor(x), groups, out=out, backend=backend)
