"""Groups of 128: how weights get them, how they are found, and which products are told of them."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cases
import moe_truth
import numpy as np
import pytest
import torch
import truth
from stand_ins import replace_backend
from torch._subclasses.fake_tensor import FakeTensorMode

import hybrid_mxfp8 as mx
from hybrid_mxfp8.checkpoint import load_experts, save_experts
from hybrid_mxfp8.dispatch import device as devices
from hybrid_mxfp8.dispatch import reference_backend
from hybrid_mxfp8.ops.experts import group_into_squares_


def random_weights(rng: torch.Generator, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales (2, 24, ...): near and far scales, both ends, zero blocks, NaN."""
    codes = torch.randint(0, 256, (2, 24, k), generator=rng)
    codes = torch.where(codes % 128 == 127, 0, codes)
    scales = 120 + torch.randint(-9, 10, (2, 24, k // 32), generator=rng)
    scales[0, :4] = torch.randint(0, 255, (4, k // 32), generator=rng)
    codes[0, 4, :32], scales[0, 4, 0] = 0x80, 250  # -0 under the largest scale
    codes[0, 5] = 0
    codes[0, 6, 3], codes[0, 7, 31] = 0x7F, 0xFF
    scales[0, 8, -1] = 255
    return codes, scales


@pytest.mark.parametrize("squares", [False, True], ids=["", "squares"])
@pytest.mark.parametrize("k", [32, 96, 128, 160, 288])
def test_regrouped_weights(device: str, k: int, squares: bool, rng: torch.Generator) -> None:
    """By the definition: the largest scale of blocks that are not zeros, elements rounded once."""
    codes, scales = (part.to(device, torch.uint8) for part in random_weights(rng, k))
    w = dataclasses.replace(mx.ExpertWeights.from_linear_scales(codes, scales), scale_group=32)
    got, db = w.regrouped(128, squares=squares)
    plain_codes, plain = (truth.as_bytes(part).reshape(48, -1) for part in (codes, scales))
    counts = (plain_codes.reshape(48, -1, 32) & 0x7F).any(axis=2) | (plain == 255)
    shared = truth.largest_of_group(np.where(counts, plain, 0), 128)
    if squares:  # each expert's 24 rows are in one
        shared = np.repeat(shared.reshape(2, 24, -1).max(axis=1), 24, axis=0)
    values = truth.dequantize(plain_codes, plain) / np.repeat(truth.scale_factors(shared), 32, axis=1)
    expected = truth.encode_e4m3(values)
    assert np.array_equal(truth.as_bytes(got.linear_scales()).reshape(48, -1), shared)
    got_codes = truth.as_bytes(got.values).reshape(48, -1)
    nan = np.isnan(values)
    assert np.array_equal(got_codes[~nan], expected[~nan])
    assert ((got_codes[nan] & 0x7F) == 0x7F).all()
    assert (got.scale_group, got.squares, got.device) == (128, False, w.device), "scales above 1"
    before, after = truth.dequantize(plain_codes, plain), truth.dequantize(expected, shared)
    kept = ~np.isnan(after - before)
    signal, noise = ((part[kept] ** 2).sum() for part in (before, after - before))
    assert db == (pytest.approx(10 * math.log10(signal / noise)) if noise else math.inf)


def test_groups_that_are_there_stay(rng: torch.Generator) -> None:
    w = mx.quantize_weights(torch.randn(2, 8, 160, generator=rng), scale_group=128)
    for given, group in ((w, 128), (w, 32), (mx.quantize_weights(torch.ones(1, 8, 32)), 32)):
        again, db = given.regrouped(group)
        assert (again.values.data_ptr(), again.scales.data_ptr()) == (given.values.data_ptr(), given.scales.data_ptr())
        assert (again.scale_group, db) == (group, math.inf)


def test_squares(rng: torch.Generator, tmp_path: Path) -> None:
    """Of 128 rows, the last of fewer: kept by a device, a checkpoint, a module; not by one scale
    that differs or is above 1. Their product is as exact as that of groups."""
    w = torch.randn(2, 200, 288, generator=rng) * torch.logspace(-3, 0, 288)
    groups = mx.quantize_weights(w, scale_group=128)
    squares, db = groups.regrouped(128, squares=True)
    assert (groups.squares, squares.squares) == (False, True)
    assert db > 60
    linear = squares.linear_scales()
    assert torch.equal(linear[:, 0], groups.linear_scales()[:, :128].amax(1))
    assert torch.equal(linear[:, 199], groups.linear_scales()[:, 128:].amax(1))
    assert "squares=True" in repr(squares.to("cpu"))
    again, db = squares.regrouped(128)
    assert (again.values is squares.values, again.squares, db) == (True, False, math.inf)
    save_experts(tmp_path / "w.safetensors", {"w": squares})
    assert load_experts(tmp_path / "w.safetensors", "w").squares
    module = mx.MXFP8Experts(*(mx.quantize_weights(torch.ones(1, n, 32), scale_group=128) for n in (64, 32)))
    assert not module.w13q.squares
    module.load_state_dict({**module.state_dict()})
    assert module.w13q.squares
    linear[:, :128, :4] = 128
    assert not mx.ExpertWeights.from_linear_scales(squares.values, linear).squares, "above 1"
    linear[:, :128, 0] = 255
    assert not mx.ExpertWeights.from_linear_scales(squares.values, linear).squares, "a block of a group"
    linear[:, :128, :4] = 255
    assert mx.ExpertWeights.from_linear_scales(squares.values, linear).squares
    linear[1, 7, 8] += 1
    assert not mx.ExpertWeights.from_linear_scales(squares.values, linear).squares
    with pytest.raises(ValueError, match=r"^values: must have data, got tensors on meta$"):
        groups.to("meta").regrouped(128, squares=True)
    with FakeTensorMode():
        fake = group_into_squares_(mx.quantize_weights(torch.ones(1, 8, 64), scale_group=128))
        with pytest.raises(ValueError, match=r"^values: must have data, got fake tensors$"):
            fake.regrouped(128, squares=True)
    for make in (
        lambda: groups.regrouped(32, squares=True),
        lambda: mx.ExpertWeights(groups.values, groups.scales, 32, True),
    ):
        with pytest.raises(ValueError, match=r"^squares: must be False for groups of 32, got True$"):
            make()


@pytest.mark.parametrize("name", ["normal", "student t", "outlier channels", "blocks 2**-8 .. 2**8"])
def test_what_regrouping_costs(name: str, rng: torch.Generator) -> None:
    """Of a product: nothing beside MXFP8's own 28.5 dB."""
    x, w = torch.randn(64, 1024, generator=rng), torch.randn(64, 1024, generator=rng)
    if name == "student t":
        x = x / torch.randn(3, 64, 1024, generator=rng).square().mean(0).sqrt()
    elif name == "outlier channels":
        x[:, torch.randperm(1024, generator=rng)[:10]] *= 4096
    elif name != "normal":
        w *= torch.exp2(torch.randint(-8, 9, (64, 32), generator=rng)).repeat_interleave(32, 1)
    xq, wq = (mx.quantize_weights(t[None]) for t in (x, w))
    regrouped = [q.regrouped(128)[0] for q in (xq, wq)]
    exact = xq.dequantize()[0].double() @ wq.dequantize()[0].double().T
    product = regrouped[0].dequantize()[0].double() @ regrouped[1].dequantize()[0].double().T
    assert mx.signal_to_noise_db(exact, product) > 90
    for t, q in ((x, regrouped[0]), (w, regrouped[1])):  # scales of rceil grow with amax: one way or the other
        assert torch.equal(q.scales, mx.quantize_weights(t[None], scale_group=128).scales)


@pytest.mark.parametrize("k", [96, 160, 256])
def test_groups_are_found(k: int, rng: torch.Generator, tmp_path: Path) -> None:
    """From scales, from a checkpoint, from a state_dict; one scale that differs is enough."""
    w = cases.random_rows(2 * 24, k, torch.float32, rng).view(2, 24, k)
    of_128, of_32 = (mx.quantize_weights(w, scale_group=group) for group in (128, 32))
    for given in (of_128, of_32):
        linear = given.linear_scales()
        assert mx.ExpertWeights.from_linear_scales(given.values, linear).scale_group == given.scale_group
        save_experts(tmp_path / "w.safetensors", {"w": given}, force=True)
        assert load_experts(tmp_path / "w.safetensors", "w").scale_group == given.scale_group
    for block in range(k // 32):
        linear = of_128.linear_scales()
        linear[1, 23, block] += 1
        alone = block % 4 == 0 and block + 1 == k // 32  # a group of its own
        found = mx.ExpertWeights.from_linear_scales(of_128.values, linear).scale_group
        assert found == (128 if alone else 32)


def test_a_module_looks_at_what_it_loads(rng: torch.Generator) -> None:
    """Its groups are not in the state_dict; those of its own weights would be wrong."""
    layer = moe_truth.spread_scales(moe_truth.make_layer(rng, hidden=128, intermediate=64, dtype=torch.float32), rng)
    one, two = (mx.MXFP8Experts.from_weights(layer.w13, layer.w2, scale_group=group) for group in (32, 128))
    meta = mx.MXFP8Experts(*(w.to("meta") for w in (one.w13q, one.w2q)))
    batch = (layer.x, layer.ids, layer.weights)
    y = one(*batch), two(*batch)
    assert not torch.equal(*y)
    states = {32: one.state_dict(), 128: two.state_dict()}
    states = {group: {name: t.clone() for name, t in state.items()} for group, state in states.items()}
    for module in (one, two, meta):
        for group in (128, 32):
            module.load_state_dict(states[group], assign=True)
            assert (module.w13q.scale_group, module.w2q.scale_group) == (group, group)
            assert torch.equal(module(*batch), y[group == 128])


def test_hopper_gets_groups_of_128(rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = moe_truth.make_layer(rng)
    for capability, group in (((9, 0), 128), ((8, 9), 32), ((10, 0), 32), (None, 32)):
        monkeypatch.setattr(devices, "capability", lambda device, capability=capability: capability)
        made = [mx.MXFP8Experts.from_weights(layer.w13, layer.w2, scale_group=given) for given in (None, 32, 128)]
        found = [(w.scale_group, w.squares) for experts in made for w in (experts.w13q, experts.w2q)]
        preferred = (group, group == 128)  # squares, but not where a group is asked for
        assert found == [preferred] * 2 + [(32, False)] * 2 + [(128, False)] * 2
        assert mx.quantize_weights(layer.w2).scale_group == 32


@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
def test_products_know_their_group(rng: torch.Generator, monkeypatch: pytest.MonkeyPatch, compiled: bool) -> None:
    """128 where both operands have it; and what a layer quantizes gets the group of its product."""
    seen: list[int] = []

    def noting(steps: Callable[..., Any]) -> Callable[..., Any]:
        return lambda problem, buffers: (seen.append(problem.scale_group), steps(problem, buffers))[1]

    quantizer = reference_backend.QUANTIZER
    monkeypatch.setattr(reference_backend, "QUANTIZER", quantizer._replace(quantize=noting(quantizer.quantize)))
    replace_backend(monkeypatch, "reference", plan=noting(reference_backend.BACKEND.plan))

    def groups_of(call: Callable[[], torch.Tensor]) -> list[int]:
        seen.clear()
        cases.forget_calls()
        torch._dynamo.reset()
        (torch.compile(call, fullgraph=True, backend="eager") if compiled else call)()
        return list(seen)

    x, groups = torch.randn(6, 64, generator=rng), cases.layout([2, 4])
    w = torch.randn(2, 16, 64, generator=rng)
    with mx.use_backend("reference"):
        for x_group, w_group in ((32, 32), (32, 128), (128, 32), (128, 128)):
            xq, wq = mx.quantize_grouped(x, groups, scale_group=x_group), mx.quantize_weights(w, scale_group=w_group)
            assert groups_of(lambda xq=xq, wq=wq: mx.grouped_gemm(xq, wq)) == [min(x_group, w_group)]
            assert mx.grouped_gemm_workspace_size(wq, 6) == 0
        layer = moe_truth.make_layer(rng)
        for w13_group, w2_group, asked in ((32, 128, None), (128, 32, 128), (128, 128, 32)):
            w13q = mx.quantize_weights(layer.w13, scale_group=w13_group)
            batch = w13q, mx.quantize_weights(layer.w2, scale_group=w2_group), layer.ids, layer.weights
            up, down = min(w13_group, asked or 128), min(w2_group, asked or 128)
            seen_of_layer = groups_of(lambda b=batch, asked=asked: mx.moe_forward(layer.x, *b, scale_group=asked))
            assert seen_of_layer == [up, up, down, down]


def test_a_workspace_serves_both(rng: torch.Generator) -> None:
    """Of one layer in groups of 32 and one in groups of 128."""
    layer = moe_truth.make_layer(rng)
    batch = (layer.x, layer.ids, layer.weights)
    modules = [mx.MXFP8Experts.from_weights(layer.w13, layer.w2, scale_group=group) for group in (32, 128)]
    expected = [module(*batch) for module in modules]
    workspace = mx.MoEWorkspace(modules[1].w13q, modules[1].w2q, max_tokens=9, top_k=2)
    for module, y in zip(modules, expected, strict=True):
        module.workspace = workspace
        assert torch.equal(module(*batch), y)


@pytest.mark.parametrize("change", ["copy_", "setattr", "address", "assign", "state_dict"])
def test_module_looks_again_at_changed_scales(change: str, rng: torch.Generator) -> None:
    """However other weights get into its buffers: groups of 128 are not claimed of groups of 32."""
    w = [torch.randn(2, n, k, generator=rng) * torch.logspace(-3, 3, k) for n, k in ((128, 256), (256, 64))]
    of_32, module = (mx.MXFP8Experts.from_weights(*w, scale_group=g, backend="reference") for g in (32, 128))
    assert module.w13q.scale_group == module.w2q.scale_group == 128
    state = {name: tensor.clone() for name, tensor in of_32.state_dict().items()}
    if change == "assign":
        module.load_state_dict(state, assign=True)
    for name, tensor in state.items():
        if change == "setattr":
            setattr(module, name, tensor)
        elif change == "address":  # another tensor, where the one that was looked at lay
            memory = bytearray(getattr(module, name).numpy().tobytes())
            for content in (bytes(memory), tensor.numpy().tobytes()):
                memory[:] = content
                setattr(module, name, torch.frombuffer(memory, dtype=torch.uint8).view(tensor.shape))
                _ = module.w13q, module.w2q
        elif change != "assign":
            (module.state_dict()[name] if change == "state_dict" else getattr(module, name)).copy_(tensor)
    assert module.w13q.scale_group == module.w2q.scale_group == 32
    assert copy.deepcopy(module).w13q.scale_group == 32


def test_a_module_looks_at_loads_that_leave_no_trace(rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of inference mode count no writes, and a compiled call reads no counter."""
    w = [torch.randn(2, n, k, generator=rng) * torch.logspace(-3, 3, k) for n, k in ((128, 256), (256, 64))]
    x, ids, weights = torch.randn(3, 256, generator=rng), torch.tensor([[0], [1], [1]]), torch.ones(3, 1)
    state = mx.MXFP8Experts.from_weights(*w, scale_group=32, backend="reference").state_dict()
    with torch.inference_mode():
        module = mx.MXFP8Experts.from_weights(*w, scale_group=128, backend="reference")
        module.load_state_dict(state)
        assert module.w13q.scale_group == module.w2q.scale_group == 32
    seen: list[int] = []
    plan = reference_backend.BACKEND.plan
    replace_backend(monkeypatch, "reference", plan=lambda p, b: (seen.append(p.scale_group), plan(p, b))[1])
    cases.forget_calls()
    torch._dynamo.reset()
    module = mx.MXFP8Experts.from_weights(*w, scale_group=128, backend="reference")
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    compiled(x, ids, weights)
    of_128 = {name: t.clone() for name, t in module.state_dict().items()}
    module.load_state_dict(state)
    compiled(x, ids, weights)
    for name, t in of_128.items():
        getattr(module, name).copy_(t)
    _ = module.w13q, module.w2q  # as the class advises
    cases.forget_calls()
    compiled(x, ids, weights)
    assert seen == [128, 128, 32, 32, 128, 128]
