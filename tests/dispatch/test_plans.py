"""Plans: which calls share one, what a hit still checks, and what a plan keeps."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import cases
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import hybrid_mxfp8 as mx
from hybrid_mxfp8.dispatch.plan import PLANS, Operands, Plan, PlanCache

T, K, N, E, H, I = 6, 64, 16, 3, 64, 32  # noqa: E741
Arguments = dict[str, Any]


def quantize_arguments() -> Arguments:
    return {"x": torch.randn(T, K, dtype=torch.bfloat16), "groups": cases.layout([3, 0, 3])}


def gemm_arguments() -> Arguments:
    x = torch.randn(T, K, dtype=torch.bfloat16)
    w = torch.randn(E, N, K)
    xq = mx.quantize_grouped(x, cases.layout([3, 0, 3]), backend="reference")
    return {"x": xq, "w": mx.quantize_weights(w, backend="reference")}


def layer_arguments() -> Arguments:
    weights = (torch.randn(E, 2 * I, H), torch.randn(E, H, I))
    w13q, w2q = (mx.quantize_weights(w, backend="reference") for w in weights)
    return {
        "x": torch.randn(5, H, dtype=torch.bfloat16),
        "w13q": w13q,
        "w2q": w2q,
        "topk_ids": torch.tensor([[0, 1], [2, 1], [0, 2], [1, 0], [2, 2]]),
        "topk_weights": torch.rand(5, 2),
    }


CALLS: dict[str, tuple[Callable[..., Any], Callable[[], Arguments]]] = {
    "quantize": (mx.quantize_grouped, quantize_arguments),
    "gemm": (mx.grouped_gemm, gemm_arguments),
    "layer": (mx.moe_forward, layer_arguments),
}


@pytest.fixture(params=CALLS)
def call(request: pytest.FixtureRequest) -> tuple[Callable[..., Any], Arguments]:
    function, make = CALLS[request.param]
    torch.manual_seed(0)
    arguments = make()
    PLANS.clear()
    return function, arguments


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """Those that are made from now on."""
    made: list[Plan] = []
    make = PLANS.make
    monkeypatch.setattr(PLANS, "make", lambda *given: made.append(make(*given)) or made[-1])
    return made


def result(value: Any) -> list[torch.Tensor]:
    """Its bytes, but for scale rows of no expert, which are unspecified."""
    if isinstance(value, mx.GroupedMXFP8):
        return [cases.bits(value.values), value.scales[: int(value.groups.scale_offsets[-1])]]
    return [cases.bits(value)]


def moved(value: Any, how: Callable[[torch.Tensor], torch.Tensor] = torch.clone) -> Any:
    """The same at other addresses."""
    if isinstance(value, torch.Tensor):
        return how(value)
    if isinstance(value, mx.ExpertWeights):
        return mx.ExpertWeights.unchecked(how(value.values), how(value.scales))
    if isinstance(value, mx.GroupedMXFP8):
        return mx.GroupedMXFP8.unchecked(how(value.values), how(value.scales), value.groups)
    return value


def test_equal_calls_share_a_plan_wherever_their_buffers_are(
    call: tuple[Callable[..., Any], Arguments], plans: list[Plan], cpu_backend: str
) -> None:
    function, arguments = call
    first = result(function(**arguments, backend=cpu_backend))
    assert len(plans) == 1
    for _ in range(3):
        arguments = {name: moved(value) for name, value in arguments.items()}
        assert all(map(torch.equal, result(function(**arguments, backend=cpu_backend)), first))
    assert len(plans) == 1


def test_other_contents_of_the_same_buffers_give_other_results(
    call: tuple[Callable[..., Any], Arguments], plans: list[Plan], cpu_backend: str
) -> None:
    """A plan holds no device data."""
    function, arguments = call
    x = arguments["x"]
    before = result(function(**arguments, backend=cpu_backend))
    memory = cases.bits(x.values if isinstance(x, mx.GroupedMXFP8) else x)
    memory.copy_(torch.randint(0, 64, memory.shape, dtype=torch.uint8))
    after = result(function(**arguments, backend=cpu_backend))
    assert not all(map(torch.equal, before, after))
    PLANS.clear()
    assert all(map(torch.equal, result(function(**arguments, backend=cpu_backend)), after))
    assert len(plans) == 2


def wider(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x, x], 1)[:, : x.shape[1]]


def shifted(x: torch.Tensor) -> torch.Tensor:
    """The same off a 16-byte boundary."""
    memory = torch.empty(x.numel() * x.element_size() + 32, dtype=torch.uint8)
    start = -memory.data_ptr() % 16 + x.element_size()
    there = memory[start : start + x.numel() * x.element_size()].view(x.dtype).view(x.shape)
    cases.bits(there).copy_(cases.bits(x))
    return there


CHANGES: dict[str, tuple[str, Callable[[Arguments], Arguments]]] = {
    "dtype of x": ("quantize", lambda a: {"x": a["x"].half()}),
    "row stride": ("quantize", lambda a: {"x": wider(a["x"])}),
    "alignment": ("quantize", lambda a: {"x": shifted(a["x"])}),
    "row index": ("quantize", lambda a: {"row_index": torch.arange(T, dtype=torch.int32)}),
    "rounding": ("quantize", lambda a: {"scale_rounding": "floor"}),
    "scale group": ("quantize", lambda a: {"scale_group": 128}),
    "counts": ("quantize", lambda a: {"groups": torch.tensor([3, 0, 3])}),
    "counts of int32": ("quantize", lambda a: {"groups": torch.tensor([3, 0, 3], dtype=torch.int32)}),
    "fewer tokens": ("quantize", lambda a: {"x": a["x"][:5], "groups": cases.layout([2, 0, 3])}),
    "out dtype": ("gemm", lambda a: {"out_dtype": torch.float32}),
    "out": ("gemm", lambda a: {"out": torch.empty(T, N, dtype=torch.bfloat16)}),
    "weights off a boundary": ("gemm", lambda a: {"w": mx.ExpertWeights(shifted(a["w"].values), a["w"].scales)}),
    "weights in groups of 128": ("gemm", lambda a: {"w": a["w"].regrouped(128)[0]}),
    "w2 in groups of 128": ("layer", lambda a: {"w2q": a["w2q"].regrouped(128)[0]}),
    "groups of 32 asked for": ("layer", lambda a: {"scale_group": 32}),
    "ids of int32": ("layer", lambda a: {"topk_ids": a["topk_ids"].int()}),
    "ids in strides": ("layer", lambda a: {"topk_ids": wider(a["topk_ids"])}),
    "weights of bf16": ("layer", lambda a: {"topk_weights": a["topk_weights"].bfloat16()}),
    "bias": ("layer", lambda a: {"w2_bias": torch.randn(E, H)}),
    "bias of bf16": ("layer", lambda a: {"w13_bias": torch.randn(E, 2 * I).bfloat16()}),
    "activation": ("layer", lambda a: {"activation": "swigluoai"}),
    "out with gaps": ("layer", lambda a: {"out": wider(torch.empty_like(a["x"]))}),
    "out is x": ("layer", lambda a: {"out": a["x"].clone()}),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_a_plan_depends_on_is_in_its_signature(what: str, cpu_backend: str, plans: list[Plan]) -> None:
    """In turns with another call it gives what it gives alone."""
    kind, change = CHANGES[what]
    function, make = CALLS[kind]
    torch.manual_seed(1)
    plain = make()
    PLANS.clear()
    plans.clear()
    changed = {**plain, **change(plain)}
    if what == "out is x":
        changed["x"] = changed["out"]
    kept = changed["x"].clone() if what == "out is x" else None

    def run(arguments: Arguments) -> list[torch.Tensor]:
        if kept is not None and arguments is changed:
            changed["x"].copy_(kept)
        return [t.clone() for t in result(function(**arguments, backend=cpu_backend))]

    alone = run(changed)
    PLANS.clear()
    before = run(plain)
    for _ in range(2):
        assert all(map(torch.equal, run(changed), alone))
        assert all(map(torch.equal, run(plain), before))
    assert len(plans) == 3


# ---------------------------------------------------------------- settings, checks


def test_settings_are_asked_at_each_call(
    call: tuple[Callable[..., Any], Arguments], plans: list[Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    function, arguments = call
    function(**arguments)
    monkeypatch.setenv("HYBRID_MXFP8_BACKEND", "reference")
    function(**arguments)
    with mx.use_backend("auto"):
        function(**arguments)
    assert len(plans) == 3
    for _ in range(2):
        monkeypatch.setenv("HYBRID_MXFP8_BACKEND", "none")
        with pytest.raises(ValueError, match=r"^HYBRID_MXFP8_BACKEND: must be one of auto"):
            function(**arguments)
        with pytest.raises(ValueError, match=r"^backend: must be one of auto"):
            function(**arguments, backend="none")
        monkeypatch.delenv("HYBRID_MXFP8_BACKEND")
        function(**arguments)
    assert len(plans) == 3


def test_fake_tensors_meet_no_plan_of_real_ones(call: tuple[Callable[..., Any], Arguments], cpu_backend: str) -> None:
    """They have the same metadata, and no memory; nor has ``out`` that is real."""
    function, arguments = call
    real = function(**arguments, backend=cpu_backend)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        given = {name: moved(value, mode.from_tensor) for name, value in arguments.items()}
        fake = function(**given, backend=cpu_backend)
        if function is not mx.moe_forward:
            with pytest.raises(ValueError, match=r"^out: must be None under torch\.compile, and for fake and meta"):
                function(**given, backend=cpu_backend, out=real)
    assert [t.shape for t in result(fake)] == [t.shape for t in result(real)]


@pytest.mark.parametrize("over", ["x", "topk_ids", "topk_weights", "w2_bias"])
def test_vmap_loops_over_the_operator(over: str) -> None:
    """Tensors inside vmap have no memory either, whichever argument they are."""
    rest = {**layer_arguments(), "w2_bias": torch.randn(E, H)}
    given = rest.pop(over)
    both = torch.stack([given, given.flip(0)])

    def layer(one: torch.Tensor) -> torch.Tensor:
        return mx.moe_forward(**{over: one}, **rest, backend="reference")

    assert torch.equal(torch.vmap(layer)(both), torch.stack([layer(one) for one in both]))


def test_vmap_over_parts_of_operands() -> None:
    x, counts = torch.randn(T, K), torch.tensor([[3, 0, 3], [1, 4, 1]])
    xq, w = gemm_arguments().values()

    def codes(counts: torch.Tensor) -> torch.Tensor:
        return mx.quantize_grouped(x, counts, backend="reference").values.view(torch.uint8)

    def product(scales: torch.Tensor) -> torch.Tensor:
        return mx.grouped_gemm(xq, mx.ExpertWeights.unchecked(w.values, scales), backend="reference")

    scales = torch.stack([w.scales, w.scales.flip(0)])
    for function, both in ((codes, counts), (product, scales)):
        assert torch.equal(torch.vmap(function)(both), torch.stack([function(one) for one in both]))


# ---------------------------------------------------------------- what is kept


@pytest.mark.parametrize("kind", CALLS)
def test_a_plan_keeps_no_tensor(kind: str, cpu_backend: str) -> None:
    function, make = CALLS[kind]
    arguments = make()
    operands = [value for value in arguments.values() if not isinstance(value, mx.GroupLayout)]
    alive = [weakref.ref(t) for o in operands for t in ([o] if isinstance(o, torch.Tensor) else [o.values, o.scales])]
    function(**arguments, backend=cpu_backend)
    del arguments, operands
    gc.collect()
    assert [reference() for reference in alive] == [None] * len(alive)


def test_full_the_oldest_plan_goes() -> None:
    cache = PlanCache(2)
    plan = Plan(torch.device("cpu"), Operands(), ())
    for signature in ("a", "b", "a", "c"):
        cache.make(signature, (), lambda: plan)
    assert cache.get("c") is plan
    assert [cache.get(key) is None for key in ("a", "b")].count(True) == 1
    assert cache.get(["unhashable"]) is None  # type: ignore[arg-type]
    cache.clear()
    assert cache.get("c") is None
