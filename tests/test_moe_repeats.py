"""An MoE layer whose buffers come again repeats all of its launches, on stand-ins; tests/gpu/test_gpu_moe_repeats.py has kernels."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
from fake_hopper import LAUNCHERS, Arguments, aligned_bytes, check_changed, fp8, moved, run, shrunk, stand_in, warm
from fake_triton import STREAM, Device
from test_thin_host import Recorder

import hybrid_mxfp8 as mx
from hybrid_mxfp8.ops import workspace as moe_workspace

M, TOP_K, E, H, I = 5, 2, 3, 64, 32  # noqa: E741

PRODUCT = ["dequantize_tokens_kernel", "hopper_gemm_kernel"]
LAYER = ["rank_kernel", "quantize_kernel", *PRODUCT, "quantize_kernel", *PRODUCT, "combine_kernel"]
BIASED = [*LAYER[:4], "expert_bias_kernel", *LAYER[4:]]


@pytest.fixture(params=LAUNCHERS)
def device(request: pytest.FixtureRequest, interpreter: None, monkeypatch: pytest.MonkeyPatch) -> Device:
    """Launchers as in each version of Triton."""
    return stand_in(monkeypatch, request.param)


def bf16(*shape: int) -> torch.Tensor:
    return moved(torch.zeros(shape, dtype=torch.bfloat16))


def weights(n: int, k: int) -> mx.ExpertWeights:
    return mx.ExpertWeights(fp8(E, n, k), aligned_bytes(E * 128 * 4).view(E, 128, 4))


@pytest.fixture
def layer(device: Device) -> Arguments:
    w13q, w2q = weights(2 * I, H), weights(H, I)
    return {
        "x": shrunk(bf16(2 * M, 2 * H), M, H),
        "w13q": w13q,
        "w2q": w2q,
        "topk_ids": moved(torch.zeros(M, TOP_K, dtype=torch.int32)),
        "topk_weights": shrunk(bf16(2 * M, 2 * TOP_K), M, TOP_K),
        "w13_bias": bf16(E, 2 * I),
        "w2_bias": bf16(E, H),
        "workspace": mx.MoEWorkspace(w13q, w2q, max_tokens=8, top_k=TOP_K),
        "out": shrunk(bf16(2 * M, 2 * H), M, H),
    }


def names(launches: list[Any]) -> list[str]:
    return [name for name, *_ in launches]


def test_a_layer_is_repeated(layer: Arguments, device: Device) -> None:
    launched = warm(mx.moe_forward, layer, device)
    assert names(launched) == BIASED
    assert {stream for _, _, stream, _ in launched} == {STREAM}
    for name, kernel in (
        ("x", 1),
        ("topk_ids", 0),
        ("w13_bias", 4),
        ("topk_weights", -1),
        ("w2_bias", -1),
        ("out", -1),
    ):
        assert layer[name].data_ptr() in launched[kernel][3]
    assert mx.moe_forward(**layer) is layer["out"]
    assert names(warm(mx.moe_forward, {**layer, "w13_bias": None, "w2_bias": None}, device)) == LAYER


def test_long_routing_is_repeated(layer: Arguments, device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    from hybrid_mxfp8.triton_kernels.moe import route

    monkeypatch.setattr(route, "ONE_LAUNCH_MAX_SLOTS", 0)
    layer["workspace"] = mx.MoEWorkspace(layer["w13q"], layer["w2q"], max_tokens=8, top_k=TOP_K)
    launched = warm(mx.moe_forward, layer, device)
    assert names(launched) == ["count_kernel", "sum_kernel", "scatter_kernel", *BIASED[1:]]


def test_a_module_is_repeated(layer: Arguments, device: Device) -> None:
    """Whose weights are new views of its buffers in each call."""
    module = mx.MXFP8Experts(layer["w13q"], layer["w2q"], workspace=layer["workspace"])
    arguments = (layer["x"], layer["topk_ids"], layer["topk_weights"])
    outputs = [module(*arguments) for _ in range(2)]
    del outputs
    for _ in range(4):
        device.take()
        y = module(*arguments)
        assert names(device.launches) == LAYER
        assert y.data_ptr() in device.launches[-1][3]


# ---------------------------------------------------------------- what is not the same call


def _weights(w: mx.ExpertWeights, **parts: Any) -> mx.ExpertWeights:
    return mx.ExpertWeights.unchecked(**{"values": w.values, "scales": w.scales, **parts})


def _narrower(a: Arguments) -> Arguments:
    """H of 32, at the same addresses."""
    w13q = _weights(a["w13q"], values=shrunk(a["w13q"].values, E, 2 * I, 32))
    w2q = _weights(a["w2q"], values=shrunk(a["w2q"].values, E, 32, I))
    return {
        **a,
        "x": shrunk(a["x"], M, 32),
        "out": shrunk(a["out"], M, 32),
        "w13q": w13q,
        "w2q": w2q,
        "w2_bias": shrunk(a["w2_bias"], E, 32),
        "workspace": mx.MoEWorkspace(w13q, w2q, max_tokens=8, top_k=TOP_K),
    }


def _in(dtype: torch.dtype) -> Callable[[Arguments], Arguments]:
    return lambda a: {
        **a,
        "x": a["x"].view(dtype),
        "out": a["out"].view(dtype),
        "workspace": mx.MoEWorkspace(a["w13q"], a["w2q"], max_tokens=8, top_k=TOP_K, dtype=dtype),
    }


CHANGES: dict[str, Callable[[Arguments], Arguments]] = {
    "x": lambda a: {**a, "x": moved(a["x"])},
    "row stride of x": lambda a: {**a, "x": a["x"].as_strided((M, H), (2 * H, 1))},
    "out": lambda a: {**a, "out": moved(a["out"])},
    "row stride of out": lambda a: {**a, "out": a["out"].as_strided((M, H), (2 * H, 1))},
    "out is x": lambda a: {**a, "out": a["x"]},
    "dtype": _in(torch.float16),
    "fewer tokens": lambda a: {**a, **{name: a[name][:4] for name in ("x", "topk_ids", "topk_weights", "out")}},
    "fewer columns": _narrower,
    "choices": lambda a: {**a, "topk_ids": moved(a["topk_ids"])},
    "dtype of choices": lambda a: {**a, "topk_ids": moved(a["topk_ids"].long())},
    "weights": lambda a: {**a, "topk_weights": moved(a["topk_weights"])},
    "dtype of weights": lambda a: {**a, "topk_weights": a["topk_weights"].view(torch.float16)},
    "w13 values": lambda a: {**a, "w13q": _weights(a["w13q"], values=moved(a["w13q"].values))},
    "w13 scales": lambda a: {**a, "w13q": _weights(a["w13q"], scales=moved(a["w13q"].scales))},
    "w2 values": lambda a: {**a, "w2q": _weights(a["w2q"], values=moved(a["w2q"].values))},
    "w2 scales": lambda a: {**a, "w2q": _weights(a["w2q"], scales=moved(a["w2q"].scales))},
    "w13 bias": lambda a: {**a, "w13_bias": moved(a["w13_bias"])},
    "dtype of w13 bias": lambda a: {**a, "w13_bias": a["w13_bias"].view(torch.float16)},
    "no w13 bias": lambda a: {**a, "w13_bias": None},
    "w2 bias": lambda a: {**a, "w2_bias": moved(a["w2_bias"])},
    "dtype of w2 bias": lambda a: {**a, "w2_bias": a["w2_bias"].view(torch.float16)},
    "no w2 bias": lambda a: {**a, "w2_bias": None},
    "workspace": lambda a: {**a, "workspace": mx.MoEWorkspace(a["w13q"], a["w2q"], max_tokens=8, top_k=TOP_K)},
    "backend": lambda a: {**a, "backend": "reference"},
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_layer_of_anything_else_is_its_own(name: str, layer: Arguments, device: Device) -> None:
    before, after = check_changed(mx.moe_forward, layer, CHANGES[name](layer), device)
    assert before != after


def test_what_is_in_force_is_asked_at_each_call(
    layer: Arguments, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    hopper = warm(mx.moe_forward, layer, device)
    monkeypatch.setenv("HYBRID_MXFP8_HOPPER_GEMM", "0")
    portable = names(warm(mx.moe_forward, layer, device))
    assert portable == [name.replace("hopper", "grouped") for name in BIASED if name != "dequantize_tokens_kernel"]
    monkeypatch.delenv("HYBRID_MXFP8_HOPPER_GEMM")
    assert run(mx.moe_forward, layer, device) == hopper
    with mx.use_backend("reference"):
        assert run(mx.moe_forward, layer, device) == []
    with pytest.raises(ValueError, match="backend: must be one of auto"):
        mx.moe_forward(**layer, backend="none")
    assert run(mx.moe_forward, layer, device) == hopper
    assert set(device.with_tensors) == {False}


def test_a_workspace_grows_where_the_hopper_kernel_is_switched_on(
    layer: Arguments, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it gave a batch before is not what that kernel needs."""
    monkeypatch.setenv("HYBRID_MXFP8_HOPPER_GEMM", "0")
    workspace = mx.MoEWorkspace(layer["w13q"], layer["w2q"], max_tokens=8, top_k=TOP_K)
    layer["workspace"] = workspace
    run(mx.moe_forward, layer, device)
    assert workspace._largest.gemm is None
    monkeypatch.setenv("HYBRID_MXFP8_HOPPER_GEMM", "1")
    launched = run(mx.moe_forward, layer, device)
    assert workspace._largest.gemm is not None
    given = [arguments[2] for name, _, _, arguments in launched if name == "dequantize_tokens_kernel"]
    assert given == [workspace._largest.gemm.data_ptr()] * 2


def test_what_no_longer_passes_is_refused(layer: Arguments, device: Device) -> None:
    warm(mx.moe_forward, layer, device)
    out = layer["out"]
    for changed, message in (
        ({"out": out.view(torch.float16)}, "out: dtype"),
        ({"out": out[:4]}, "out: must have shape"),
        ({"out": out.as_strided((M, H), (1, M))}, "out: must have unit stride"),
        ({"out": layer["w13q"].values.view(torch.bfloat16).view(-1)[: M * H].view(M, H)}, "out: must not overlap w13q.values"),
        ({"out": [out]}, "out: must be a torch.Tensor"),
        ({"x": layer["x"].detach().requires_grad_()}, "x: must not require grad"),
        ({"activation": "gelu"}, "activation: must be 'swiglu'"),
        ({"workspace": object()}, "workspace: must be a MoEWorkspace"),
    ):  # fmt: skip
        with pytest.raises((TypeError, ValueError), match=f"^{message}"):
            mx.moe_forward(**{**layer, **changed})
    device.take()
    mx.moe_forward(**layer)
    assert set(device.with_tensors) == {False}


# ---------------------------------------------------------------- what must not be repeated


@pytest.mark.parametrize("name", ["topk_ids", "topk_weights"])
def test_copies_are_not_repeated(name: str, layer: Arguments, device: Device) -> None:
    """The launches read the contiguous copy, which is somebody else's memory after the call."""
    layer[name] = moved(torch.zeros(M, 2 * TOP_K, dtype=layer[name].dtype))[:, ::2]
    for _ in range(5):
        assert names(run(mx.moe_forward, layer, device)) == BIASED
        assert layer[name].data_ptr() not in device.launches[0 if name == "topk_ids" else -1][3]
    assert device.with_tensors == [True] * len(BIASED)


def test_without_a_workspace_nothing_is_repeated(layer: Arguments, device: Device) -> None:
    layer["workspace"] = None
    for _ in range(5):
        assert names(run(mx.moe_forward, layer, device)) == BIASED
    assert device.with_tensors == [True] * len(BIASED)


def test_hooks_see_every_launch(layer: Arguments, device: Device) -> None:
    before = warm(mx.moe_forward, layer, device)
    runtime: Any = triton.knobs.runtime
    runtime.launch_enter_hook.add(print)
    try:
        assert run(mx.moe_forward, layer, device) == before
        assert device.by_triton == BIASED
    finally:
        runtime.launch_enter_hook.remove(print)
    assert run(mx.moe_forward, layer, device) == before
    assert device.with_tensors == [False] * len(BIASED)


def test_a_workspace_of_another_thread_is_refused(layer: Arguments, device: Device) -> None:
    warm(mx.moe_forward, layer, device)
    errors: list[str] = []

    def other() -> None:
        with pytest.raises(ValueError, match=r"^workspace: must be used by one thread") as caught:
            mx.moe_forward(**layer)
        errors.append(str(caught.value))

    with layer["workspace"].in_use():
        device.take()
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert (len(errors), device.launches) == (1, [])


def test_views_may_go(layer: Arguments, device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is repeated writes the workspace's memory, which stays."""
    monkeypatch.setattr(moe_workspace, "KEPT_BATCH_SIZES", 1)
    workspace = layer["workspace"]
    other = CHANGES["fewer tokens"](layer)
    warm(mx.moe_forward, layer, device)
    run(mx.moe_forward, other, device)
    assert [key[0] for key in workspace._views] == [4]
    run(mx.moe_forward, layer, device)
    assert set(device.with_tensors) == {False}


def test_a_copy_of_a_workspace_repeats_nothing(layer: Arguments, device: Device) -> None:
    before = warm(mx.moe_forward, layer, device)
    copied = {**layer, "workspace": copy.deepcopy(layer["workspace"])}
    for with_tensors in (True, True, False):
        after = run(mx.moe_forward, copied, device)
        assert set(device.with_tensors) == {with_tensors}
        assert names(after) == names(before)
        assert after != before


# ---------------------------------------------------------------- what it costs, and keeps


def test_a_repeated_layer_allocates_nothing(layer: Arguments, device: Device) -> None:
    warm(mx.moe_forward, layer, device)
    with Recorder() as recorder:
        mx.moe_forward(**layer)
    assert recorder.names == []


def test_no_tensor_is_kept(layer: Arguments, device: Device) -> None:
    """Not even by the workspace, which stays."""
    workspace = layer["workspace"]
    warm(mx.moe_forward, layer, device)
    tensors = [t for t in layer.values() if isinstance(t, torch.Tensor)]
    tensors += [t for w in (layer["w13q"], layer["w2q"]) for t in (w.values, w.scales)]
    references = [weakref.ref(t) for t in tensors]
    layer.clear()
    del tensors
    gc.collect()
    assert [r() for r in references] == [None] * len(references)
    assert len(workspace.places._found) == 1
