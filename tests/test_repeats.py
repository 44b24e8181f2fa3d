"""A call whose buffers come again repeats its launches: the same ones that the long way makes, and only where nothing differs.

Kernels and what launches them are stand-ins, on CPU tensors; tests/gpu/test_gpu_repeats.py has real ones.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import multiprocessing
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import cases
import pytest
import torch
import triton
from fake_hopper import LAUNCHERS, Arguments, aligned_bytes, check_changed, fp8, moved, run, shrunk, stand_in, warm
from fake_triton import STREAM, CFunction, Device
from test_thin_host import Recorder

import hybrid_mxfp8 as mx
from hybrid_mxfp8.dispatch.registry import BACKENDS, _settled
from hybrid_mxfp8.dispatch.repeats import Places
from hybrid_mxfp8.dispatch.seen import Seen
from hybrid_mxfp8.ops import grouped_gemm as ops

T, E, N, K = 9, 3, 16, 64


@pytest.fixture(params=LAUNCHERS)
def device(request: pytest.FixtureRequest, interpreter: None, monkeypatch: pytest.MonkeyPatch) -> Device:
    """Launchers as in each version of Triton."""
    return stand_in(monkeypatch, request.param)


@pytest.fixture
def quantization(device: Device) -> Arguments:
    groups = cases.layout([4, 0, 5], T)
    out = mx.GroupedMXFP8.unchecked(fp8(T, K), aligned_bytes(groups.scale_rows * 4).view(-1, 4), groups)
    x = aligned_bytes(2 * T * 2 * K).view(torch.bfloat16).view(T, 2 * K)[:, :K]
    return {"x": x, "groups": groups, "out": out, "row_index": torch.zeros(T, dtype=torch.int32)}


@pytest.fixture
def product(device: Device) -> Arguments:
    groups = cases.layout([4, 0, 5], T)
    w = mx.ExpertWeights(fp8(E, N, K), aligned_bytes(E * 128 * 4).view(E, 128, 4))
    size = mx.grouped_gemm_workspace_size(w, T)
    assert size > 0
    return {
        "x": mx.GroupedMXFP8(fp8(T, K), aligned_bytes(groups.scale_rows * 4).view(-1, 4), groups),
        "w": w,
        "out": aligned_bytes(4 * T * N).view(torch.bfloat16)[: T * N].view(T, N),
        "workspace": aligned_bytes(4 * size),
    }


def test_a_quantization_is_repeated(quantization: Arguments, device: Device) -> None:
    (launched,) = warm(mx.quantize_grouped, quantization, device)
    name, _, stream, arguments = launched
    assert (name, stream) == ("quantize_kernel", STREAM)
    out, groups = quantization["out"], quantization["groups"]
    for tensor in (quantization["x"], quantization["row_index"], out.values, out.scales, groups.expert_offsets):
        assert tensor.data_ptr() in arguments
    got = mx.quantize_grouped(**quantization)
    assert (got.values, got.scales, got.groups) == (out.values, out.scales, groups)


def test_a_product_is_repeated(product: Arguments, device: Device) -> None:
    launched = warm(mx.grouped_gemm, product, device)
    assert [(name, stream) for name, _, stream, _ in launched] == [
        ("dequantize_tokens_kernel", STREAM),
        ("hopper_gemm_kernel", STREAM),
    ]
    assert mx.grouped_gemm(**product) is product["out"]


def test_the_portable_product_is_repeated(product: Arguments, device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYBRID_MXFP8_HOPPER_GEMM", "0")
    assert [name for name, *_ in warm(mx.grouped_gemm, product, device)] == ["grouped_gemm_kernel"]


@pytest.mark.parametrize("part", ["values", "scales"])
def test_unaligned_weights_go_to_the_portable_kernel(part: str, product: Arguments, device: Device) -> None:
    """TMA reads from 16-byte boundaries."""
    operand = getattr(product["w"], part)
    there = aligned_bytes(operand.numel() + 8)[8:].view(operand.dtype).view(operand.shape)
    unaligned = _w(product, **{part: there})
    assert [name for name, *_ in run(mx.grouped_gemm, unaligned, device)] == ["grouped_gemm_kernel"]


# ---------------------------------------------------------------- what is not the same call


def _x(arguments: Arguments, **parts: Any) -> Arguments:
    x = arguments["x"]
    parts = {"values": x.values, "scales": x.scales, "groups": x.groups, **parts}
    return {**arguments, "x": mx.GroupedMXFP8.unchecked(**parts)}


def _w(arguments: Arguments, **parts: Any) -> Arguments:
    w = arguments["w"]
    return {**arguments, "w": mx.ExpertWeights.unchecked(**{"values": w.values, "scales": w.scales, **parts})}


def _groups(groups: mx.GroupLayout, **parts: Any) -> mx.GroupLayout:
    return mx.GroupLayout.unchecked(**{**vars(groups), **parts})


def _fewer_tokens(a: Arguments) -> Arguments:
    groups = _groups(a["x"].groups, num_tokens=8)
    smaller = _x(a, values=a["x"].values[:8], scales=a["x"].scales[: groups.scale_rows], groups=groups)
    return {**smaller, "out": a["out"][:8]}


def _fewer_experts(a: Arguments) -> Arguments:
    g = a["x"].groups
    groups = _groups(g, tokens_per_expert=g.tokens_per_expert[:2], expert_offsets=g.expert_offsets[:3], scale_offsets=g.scale_offsets[:3])  # fmt: skip
    smaller = _x(a, scales=a["x"].scales[: groups.scale_rows], groups=groups)
    return _w(smaller, values=a["w"].values[:2], scales=a["w"].scales[:2])


def _fewer_columns(a: Arguments) -> Arguments:
    smaller = _x(a, values=shrunk(a["x"].values, T, 32))
    return _w(smaller, values=shrunk(a["w"].values, E, N, 32))


PRODUCTS: dict[str, Callable[[Arguments], Arguments]] = {
    "x values": lambda a: _x(a, values=moved(a["x"].values)),
    "x scales": lambda a: _x(a, scales=moved(a["x"].scales)),
    "fewer scale rows": lambda a: _x(a, scales=a["x"].scales[:128]),
    "expert offsets": lambda a: _x(
        a, groups=_groups(a["x"].groups, expert_offsets=a["x"].groups.expert_offsets.clone())
    ),
    "scale offsets": lambda a: _x(a, groups=_groups(a["x"].groups, scale_offsets=a["x"].groups.scale_offsets.clone())),
    "w values": lambda a: _w(a, values=moved(a["w"].values)),
    "w scales": lambda a: _w(a, scales=moved(a["w"].scales)),
    "out": lambda a: {**a, "out": moved(a["out"])},
    "workspace": lambda a: {**a, "workspace": moved(a["workspace"])},
    "out dtype": lambda a: {**a, "out": a["out"].view(torch.float16), "out_dtype": torch.float16},
    "fewer tokens": _fewer_tokens,
    "fewer experts": _fewer_experts,
    "fewer outputs": lambda a: {**_w(a, values=shrunk(a["w"].values, E, 8, K)), "out": shrunk(a["out"], T, 8)},
    "fewer columns": _fewer_columns,
    "backend": lambda a: {**a, "backend": "reference"},
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_of_anything_else_is_its_own(name: str, product: Arguments, device: Device) -> None:
    before, after = check_changed(mx.grouped_gemm, product, PRODUCTS[name](product), device)
    assert before != after


def _quantization_of(a: Arguments, tokens: int, k: int, experts: int = E) -> Arguments:
    """Fewer of something, at the same addresses."""
    g = a["groups"]
    groups = _groups(
        g,
        num_tokens=tokens,
        tokens_per_expert=g.tokens_per_expert[:experts],
        expert_offsets=g.expert_offsets[: experts + 1],
        scale_offsets=g.scale_offsets[: experts + 1],
    )
    out = a["out"]
    values, scales = shrunk(out.values, tokens, k), shrunk(out.scales, groups.scale_rows, 4)
    fewer = {"x": a["x"][:tokens, :k], "groups": groups, "row_index": a["row_index"][:tokens]}
    return {**a, **fewer, "out": mx.GroupedMXFP8.unchecked(values, scales, groups)}


def _out(a: Arguments, **parts: Any) -> Arguments:
    out = a["out"]
    parts = {"values": out.values, "scales": out.scales, "groups": out.groups, **parts}
    return {**a, "out": mx.GroupedMXFP8.unchecked(**parts)}


QUANTIZATIONS: dict[str, Callable[[Arguments], Arguments]] = {
    "x": lambda a: {**a, "x": moved(a["x"].as_strided((T, 2 * K), (2 * K, 1)))[:, :K]},
    "row stride": lambda a: {**a, "x": a["x"].as_strided((T, K), (K, 1))},
    "more source rows": lambda a: {**a, "x": a["x"].as_strided((T + 1, K), (K, 1))},
    "dtype": lambda a: {**a, "x": a["x"].view(torch.float16)},
    "expert offsets": lambda a: {
        **a,
        "groups": _groups(a["groups"], expert_offsets=a["groups"].expert_offsets.clone()),
    },
    "scale offsets": lambda a: {**a, "groups": _groups(a["groups"], scale_offsets=a["groups"].scale_offsets.clone())},
    "row index": lambda a: {**a, "row_index": a["row_index"].clone()},
    "no row index": lambda a: {**a, "row_index": None},
    "values": lambda a: _out(a, values=moved(a["out"].values)),
    "scales": lambda a: _out(a, scales=moved(a["out"].scales)),
    "rounding": lambda a: {**a, "scale_rounding": "floor"},
    "activation": lambda a: {**_quantization_of(a, T, 32), "x": a["x"], "activation": "swiglu"},
    "fewer tokens": lambda a: _quantization_of(a, 8, K),
    "fewer columns": lambda a: _quantization_of(a, T, 32),
    "fewer experts": lambda a: _quantization_of(a, T, K, 2),
    "backend": lambda a: {**a, "backend": "reference"},
}


@pytest.mark.parametrize("name", QUANTIZATIONS)
def test_a_quantization_of_anything_else_is_its_own(name: str, quantization: Arguments, device: Device) -> None:
    before, after = check_changed(mx.quantize_grouped, quantization, QUANTIZATIONS[name](quantization), device)
    assert before != after


def test_what_is_in_force_is_asked_at_each_call(
    product: Arguments, quantization: Arguments, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    hopper = warm(mx.grouped_gemm, product, device)
    quantized = warm(mx.quantize_grouped, quantization, device)
    monkeypatch.setenv("HYBRID_MXFP8_HOPPER_GEMM", "0")
    assert [name for name, *_ in warm(mx.grouped_gemm, product, device)] == ["grouped_gemm_kernel"]
    assert run(mx.grouped_gemm, {**product, "backend": "reference"}, device) == []
    monkeypatch.setenv("HYBRID_MXFP8_HOPPER_GEMM", "yes")
    with pytest.raises(ValueError, match="HYBRID_MXFP8_HOPPER_GEMM: must be 0 or 1"):
        mx.grouped_gemm(**product)
    monkeypatch.setenv("HYBRID_MXFP8_HOPPER_GEMM", "1")
    assert run(mx.grouped_gemm, product, device) == hopper
    with mx.use_backend("reference"):
        assert run(mx.grouped_gemm, product, device) == run(mx.quantize_grouped, quantization, device) == []
    monkeypatch.setenv("HYBRID_MXFP8_BACKEND", "reference")
    assert run(mx.grouped_gemm, product, device) == run(mx.quantize_grouped, quantization, device) == []
    assert run(mx.grouped_gemm, {**product, "backend": "triton"}, device) == hopper
    monkeypatch.setenv("HYBRID_MXFP8_BACKEND", "none")
    for function, arguments in ((mx.grouped_gemm, product), (mx.quantize_grouped, quantization)):
        with pytest.raises(ValueError, match="HYBRID_MXFP8_BACKEND: must be one of auto"):
            function(**arguments)
        with pytest.raises(ValueError, match="backend: must be one of auto"):
            function(**arguments, backend="none")
    monkeypatch.delenv("HYBRID_MXFP8_BACKEND")
    assert run(mx.grouped_gemm, product, device) == hopper
    assert run(mx.quantize_grouped, quantization, device) == quantized


def test_the_stream_is_that_of_the_call(product: Arguments, quantization: Arguments, device: Device) -> None:
    for function, arguments in ((mx.grouped_gemm, product), (mx.quantize_grouped, quantization)):
        before = warm(function, arguments, device)
        device.stream = 8
        assert run(function, arguments, device) == [(name, grid, 8, given) for name, grid, _, given in before]
        assert set(device.with_tensors) == {False}
        device.stream = STREAM


def test_buffers_that_no_longer_pass_are_refused(product: Arguments, quantization: Arguments, device: Device) -> None:
    warm(mx.grouped_gemm, product, device)
    warm(mx.quantize_grouped, quantization, device)
    out, workspace = product["out"], product["workspace"]
    for changed, message in (
        ({"out": out.view(torch.float16)}, "out: dtype"),
        ({"out": out.view(-1)}, "out: must have shape"),
        ({"out": out.as_strided((T, N), (1, T))}, "out: must be contiguous"),
        ({"workspace": workspace[:8]}, "workspace: must have at least"),
        ({"workspace": workspace.view(torch.int8)}, "workspace: dtype"),
        ({"out": [out]}, "out: must be a torch.Tensor"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"^{message}"):
            mx.grouped_gemm(**{**product, **changed})
    overlapping = _groups(product["x"].groups, tokens_per_expert=out.view(torch.int32).view(-1)[:E])
    with pytest.raises(ValueError, match=r"^out: must not overlap tokens_per_expert"):
        mx.grouped_gemm(**_x(product, groups=overlapping))
    out.requires_grad_()
    with pytest.raises(ValueError, match=r"^out: must not require grad"):
        mx.grouped_gemm(**product)
    with torch.no_grad():
        mx.grouped_gemm(**product)
    quantized = quantization["out"]
    for changed, error in (
        (_out(quantization, values=shrunk(quantized.values, T - 1, K)), "out: must have shape"),
        (_out(quantization, scales=shrunk(quantized.scales, 128, 4)), "out: must have shape"),
        ({**quantization, "out": quantized.values}, "out: must be a GroupedMXFP8"),
        ({**quantization, "x": quantization["x"].detach().requires_grad_()}, "x: must not require grad"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"^{error}"):
            mx.quantize_grouped(**changed)


# ---------------------------------------------------------------- what must not be repeated


def test_hooks_see_every_launch(product: Arguments, quantization: Arguments, device: Device) -> None:
    """A profiler's hooks are called by Triton, so while there are any it launches; afterwards calls repeat again."""
    runtime: Any = triton.knobs.runtime
    for function, arguments in ((mx.grouped_gemm, product), (mx.quantize_grouped, quantization)):
        before = warm(function, arguments, device)
        for hooks in (runtime.launch_enter_hook, runtime.launch_exit_hook):
            hooks.add(print)
            try:
                for _ in range(2):
                    assert run(function, arguments, device) == before
                    assert device.by_triton == [name for name, *_ in before]
            finally:
                hooks.remove(print)
            assert run(function, arguments, device) == before
            assert device.with_tensors == [False] * len(before)


def test_calls_first_made_under_hooks_are_repeated_without(product: Arguments, device: Device) -> None:
    runtime: Any = triton.knobs.runtime
    runtime.launch_enter_hook.add(print)
    try:
        launched = [run(mx.grouped_gemm, product, device) for _ in range(3)]
    finally:
        runtime.launch_enter_hook.remove(print)
    for with_tensors in ({True}, {False}):
        launched.append(run(mx.grouped_gemm, product, device))
        assert set(device.with_tensors) == with_tensors
    assert all(each == launched[0] for each in launched)


def test_a_forked_child_does_not_repeat(product: Arguments, quantization: Arguments, device: Device) -> None:
    """Handles of the parent's are of no use there. Triton's dispatch must meet PyTorch's check of CUDA, and its error."""
    calls = ((mx.grouped_gemm, product), (mx.quantize_grouped, quantization))
    for function, arguments in calls:
        warm(function, arguments, device)

    def child() -> None:
        results.put([(run(f, a, device) and list(device.by_triton)) for f, a in calls])

    context = multiprocessing.get_context("fork")
    results = context.Queue()
    process = context.Process(target=child, daemon=True)
    process.start()
    assert results.get(timeout=60) == [["dequantize_tokens_kernel", "hopper_gemm_kernel"], ["quantize_kernel"]]
    process.join(60)
    for function, arguments in calls:
        run(function, arguments, device)
        assert set(device.with_tensors) == {False}


def test_an_unknown_triton_launches_itself(product: Arguments, device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    from hybrid_mxfp8.triton_kernels import launch

    assert [launch._launcher_is_known(f"3.{minor}.0") for minor in range(5, 11)] == [False, *[True] * 4, False]
    monkeypatch.setattr(launch, "_launcher_is_known", lambda: False)
    launched = [run(mx.grouped_gemm, product, device) for _ in range(4)]
    assert all(each == launched[0] for each in launched)
    assert device.by_triton == ["dequantize_tokens_kernel", "hopper_gemm_kernel"]


def test_a_backend_that_is_not_settled_is_asked_at_each_call(
    product: Arguments, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where cutlass comes first it may become available any time: the triton backend's launches are not repeated there."""
    made: list[torch.Tensor] = []
    cutlass = dataclasses.replace(
        BACKENDS["cutlass"],
        hardware=lambda device: True,
        can_run=lambda problem: (bool(made), "not yet"),
        workspace_size=BACKENDS["triton"].workspace_size,
        grouped_gemm=lambda x, w, out, workspace: made.append(out),
    )
    monkeypatch.setitem(BACKENDS, "cutlass", cutlass)
    _settled.cache_clear()
    for _ in range(4):
        assert len(run(mx.grouped_gemm, product, device)) == 2
    made.append(product["out"])
    assert run(mx.grouped_gemm, product, device) == []
    assert len(made) == 2
    assert len(run(mx.grouped_gemm, {**product, "backend": "triton"}, device)) == 2


def test_a_workspace_of_its_own_is_not_repeated(product: Arguments, device: Device) -> None:
    """Allocated below the public function, it is somebody else's memory after the call."""
    from hybrid_mxfp8.triton_kernels.gemm.portable import grouped_gemm

    x, w = product["x"], product["w"]
    operands = (x.values, x.scales, x.groups, w.values, w.scales, product["out"])
    for _ in range(2):
        assert grouped_gemm(*operands) is None
        assert grouped_gemm(*operands, product["workspace"]) is not None


@pytest.mark.parametrize("fused", [True, False])
def test_the_layout_of_counts_is_new_each_time(
    fused: bool, quantization: Arguments, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hybrid_mxfp8.triton_kernels import quantize

    if not fused:
        monkeypatch.setattr(quantize, "FUSED_COUNTS_MAX_ELEMENTS", 0)
    counts = quantization["groups"].tokens_per_expert
    results = []
    for _ in range(4):
        device.take()
        results.append(mx.quantize_grouped(**{**quantization, "groups": counts}))
        ((_, _, _, arguments),) = device.launches
        groups = results[-1].groups
        assert (groups.tokens_per_expert if fused else groups.expert_offsets).data_ptr() in arguments
    assert len({result.groups.expert_offsets.data_ptr() for result in results}) == 4


# ---------------------------------------------------------------- what it costs, and keeps


def test_no_tensor_is_kept(product: Arguments, quantization: Arguments, device: Device) -> None:
    for function, arguments in ((mx.grouped_gemm, product), (mx.quantize_grouped, quantization)):
        warm(function, arguments, device)
        owners = (arguments["x"], arguments["out"], arguments.get("w"), arguments.get("groups"))
        parts = [part for owner in owners if owner is not None for part in getattr(owner, "__dict__", {}).values()]
        tensors = [t for t in (*arguments.values(), *parts) if isinstance(t, torch.Tensor)]
        assert len(tensors) >= 5
        references = [weakref.ref(t) for t in tensors]
        arguments.clear()
        del owners, parts, tensors
        gc.collect()
        assert [r() for r in references] == [None] * len(references)


@pytest.mark.parametrize(
    ("given", "allocations"), [((), 2), (("out",), 1), (("workspace",), 1), (("out", "workspace"), 0)], ids=str
)
def test_allocations_of_a_product(given: tuple[str, ...], allocations: int, product: Arguments, device: Device) -> None:
    arguments = {name: value for name, value in product.items() if name in ("x", "w", *given)}
    for _ in range(4):
        with Recorder() as recorder:
            mx.grouped_gemm(**arguments)
        assert len(recorder.allocations) == allocations, recorder.names
    assert len(run(mx.grouped_gemm, arguments, device)) == 2


def test_no_workspace_is_allocated_for_no_tokens(product: Arguments, device: Device) -> None:
    empty = mx.quantize_grouped(torch.empty(0, K), cases.layout([0, 0, 0], 0), backend="reference")
    with Recorder() as recorder:
        assert mx.grouped_gemm(empty, product["w"]).shape == (0, N)
    assert len(recorder.allocations) == 1
    assert device.launches == []


def test_outputs_that_come_again_are_found_again(product: Arguments, device: Device) -> None:
    """Not given, they and the workspace lie where PyTorch's allocator puts them; the launches are for these addresses."""
    operands = {"x": product["x"], "w": product["w"]}
    for _ in range(6):
        device.take()
        out = mx.grouped_gemm(**operands)
        (_, _, _, expansion), (_, _, _, multiplication) = device.launches
        assert multiplication[0] == out.data_ptr()
        assert expansion[2] == multiplication[1], "the two launches have different workspaces"


def test_places_are_bounded(product: Arguments, device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    places = Places(2)
    monkeypatch.setattr(ops, "_places", places)
    outs = [moved(product["out"]) for _ in range(5)]
    for _ in range(3):
        for out in outs:
            (_, (_, _, _, arguments)) = run(mx.grouped_gemm, {**product, "out": out}, device)
            assert arguments[0] == out.data_ptr()
            assert len(places._found) <= 2


def test_a_known_place_costs_no_other(device: Device) -> None:
    """Full, the memory forgets everything, but not to write down anew what it knows."""
    seen: Seen[int] = Seen(2)
    for value in range(3):
        for key in ("a", "b"):
            seen.add(key, value)
    assert (seen.get("a"), seen.get("b")) == (2, 2)


@pytest.mark.parametrize(("current", "switched"), [(0, []), (1, [0])], ids=["same", "other"])
def test_the_device_is_made_current(
    current: int, switched: list[int], device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hybrid_mxfp8.triton_kernels import launch
    from hybrid_mxfp8.triton_kernels.c_launcher import CLauncher

    inside: list[int] = []
    asked: list[int] = []

    @contextlib.contextmanager
    def switch(index: int) -> Any:
        asked.append(index)
        inside.append(index)
        yield
        inside.pop()

    monkeypatch.setattr(launch, "_several_gpus", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(torch.cuda, "device", switch)

    def stream_of(index: int) -> int:
        assert inside == switched
        return 100 + index

    c_launcher = CLauncher(CFunction("k", device, False, 5), stream_of, ("function",), False, None)
    x = torch.zeros(3)
    made = launch.Launched(launch.Loaded(None, 0, c_launcher), c_launcher, 5, ("function", x, 3))
    assert made.repeat()()
    assert device.launches == [("k", (5, 1, 1), 100, (x.data_ptr(), 3))]
    assert asked == switched


def test_calls_together_are_repeated_or_none() -> None:
    from hybrid_mxfp8.dispatch.repeats import Together, together

    ran: list[str] = []

    def part(name: str, able: bool) -> Any:
        return SimpleNamespace(repeat=lambda: lambda: (ran.append(name), able)[1])

    a, b = part("a", True), part("b", False)
    for parts in ((None, a), (a, None), (a, a, None)):
        assert together(*parts) is None
    assert together(a, b, a) == Together((a, b, a))
    assert Together((a, a)).repeat()()
    assert ran == ["a", "a"]
    assert not Together((a, b, a)).repeat()()
    assert ran == ["a", "a", "a", "b"]
