"""Operands: what they stand for, how they come from row-major scales, and how they move."""

from __future__ import annotations

import copy
import io
import pickle

import cases
import numpy as np
import pytest
import torch
import truth

import hybrid_mxfp8 as mx


def test_tokens_dequantize_to_rows_and_zeros_beyond(rng: torch.Generator) -> None:
    counts, num_tokens = cases.RAGGED["rows beyond the groups"]
    x = cases.random_rows(num_tokens, 96, torch.float32, rng)
    groups = cases.layout(counts, num_tokens)
    out = cases.poisoned_output(groups, 96)
    got = mx.quantize_grouped(x, groups, out=out, backend="reference").dequantize()
    expected = truth.dequantize(*truth.quantize(truth.doubles(x)))
    expected[sum(counts) :] = 0
    assert got.dtype == torch.float32
    assert np.array_equal(truth.doubles(got), expected)


def test_weights_from_linear_scales_and_back(device: str, rng: torch.Generator) -> None:
    w = cases.random_rows(3 * 40, 96, torch.bfloat16, rng).reshape(3, 40, 96)
    wq = mx.quantize_weights(w.to(device), backend="reference")
    codes, scales = truth.quantize(truth.doubles(w.reshape(120, 96)))
    linear = wq.linear_scales()
    assert np.array_equal(truth.as_bytes(linear).reshape(120, 3), scales)
    assert wq.dequantize().dtype == torch.float32
    assert np.array_equal(truth.doubles(wq.dequantize()).reshape(120, 96), truth.dequantize(codes, scales))
    typed = (wq.values.view(torch.uint8), linear.view(torch.float8_e8m0fnu))
    spread = [torch.stack([part, part], -1)[..., 0] for part in (typed[0], linear)]
    for again in (mx.ExpertWeights.from_linear_scales(*pair) for pair in ((wq.values, linear), typed, spread)):
        cases.same_bytes(again, wq)
        assert again.values.dtype == torch.float8_e4m3fn
    for e, n in ((0, 24), (3, 0)):
        nothing = (torch.zeros(e, n, k, dtype=torch.uint8) for k in (96, 3))
        assert mx.ExpertWeights.from_linear_scales(*nothing).scales.shape == (e, -(-n // 128) * 128, 4)


@pytest.mark.parametrize("k", [32, 96, 128, 160])
@pytest.mark.parametrize("case", cases.RAGGED)
def test_tokens_from_linear_scales_and_back(case: str, k: int, device: str, rng: torch.Generator) -> None:
    """Of tokens that arrive quantized come the bytes that quantizing them gives, without a sync."""
    counts, num_tokens = cases.RAGGED[case]
    groups = cases.layout(counts, num_tokens, device)
    x = cases.random_rows(num_tokens, k, torch.float32, rng)
    codes, scales = (torch.from_numpy(part).to(device) for part in truth.quantize(truth.doubles(x)))
    expected = mx.quantize_grouped(x.to(device), groups, backend="reference")
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    xq = mx.GroupedMXFP8.from_linear_scales(codes, scales, groups)
    back = xq.linear_scales()
    typed = codes.view(torch.float8_e4m3fn), scales.view(torch.float8_e8m0fnu)
    spread = [torch.stack([part, part], -1)[..., 0] for part in (codes, scales)]
    others = [mx.GroupedMXFP8.from_linear_scales(*pair, groups) for pair in (typed, spread)]
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("default")
    used, owned = int(groups.scale_offsets[-1]), sum(counts)
    assert xq.groups is groups
    assert (xq.values.data_ptr(), xq.values.dtype) == (codes.data_ptr(), torch.float8_e4m3fn)
    assert torch.equal(xq.scales[:used], expected.scales[:used])
    assert not xq.scales[used:].any()
    assert torch.equal(back[:owned], scales[:owned])
    assert not back[owned:].any()
    assert torch.equal(xq.dequantize(), expected.dequantize())
    for other in others:
        cases.same_bytes(other, xq)


def test_operands_say_what_they_are_and_weights_move(device: str, rng: torch.Generator) -> None:
    wq = mx.quantize_weights(torch.randn(3, 40, 96, generator=rng), backend="reference")
    xq = mx.quantize_grouped(torch.randn(7, 96, generator=rng), cases.layout([3, 0, 4]), backend="reference")
    assert repr(wq) == "ExpertWeights(num_experts=3, n=40, k=96, scale_group=32, device='cpu')"
    tokens = mx.quantize_tokens(torch.randn(7, 96, generator=rng), backend="reference")
    assert repr(tokens) == "MXFP8Tokens(num_tokens=7, hidden=96, scale_group=32, dtype=float32, device='cpu')"
    assert repr(xq) == "GroupedMXFP8(num_tokens=7, k=96, num_experts=3, scale_group=32, device='cpu')"
    same, elsewhere, there = wq.to("cpu"), wq.to(torch.device("meta")), wq.to(device)
    assert (same.values.data_ptr(), same.scales.data_ptr()) == (wq.values.data_ptr(), wq.scales.data_ptr())
    assert (elsewhere.values.device.type, elsewhere.scales.device.type) == ("meta", "meta")
    assert (elsewhere.num_experts, elsewhere.n, elsewhere.k) == (3, 40, 96)
    assert there.device.type == device
    cases.same_bytes(there.to("cpu"), wq)


@pytest.mark.parametrize("given", [torch.bfloat16, torch.uint8, None, "nowhere"])
def test_weights_move_to_devices_alone(given: object, rng: torch.Generator) -> None:
    """Tensor.to takes a dtype as well, which would make numbers of the bytes."""
    wq = mx.quantize_weights(torch.randn(1, 8, 32, generator=rng), backend="reference")
    with pytest.raises(ValueError, match=f"^device: must be a torch.device or the name of one, got {given!r}$"):
        wq.to(given)


def test_operands_travel(rng: torch.Generator) -> None:
    """Pickled, deep-copied and saved: the same bytes, checked again on arrival."""
    xq = mx.quantize_grouped(torch.randn(23, 96, generator=rng), cases.layout([20, 3]), backend="reference")
    wq = mx.quantize_weights(torch.randn(2, 16, 64, generator=rng), scale_group=128, backend="reference")
    tokens = mx.quantize_tokens(torch.randn(5, 96, generator=rng), backend="reference")
    all_of_them = (xq, wq, tokens)
    file = io.BytesIO()
    torch.save(all_of_them, file)
    file.seek(0)
    saved = torch.load(file, weights_only=False)
    for x, w, t in (pickle.loads(pickle.dumps(all_of_them)), copy.deepcopy(all_of_them), saved):
        assert torch.equal(t.dequantize(), tokens.dequantize())
        assert t.dtype == torch.float32
        cases.same_bytes(x, xq)
        cases.same_bytes(w, wq)
        assert (x.scale_group, w.scale_group, w.to("cpu").scale_group) == (32, 128, 128)
        assert torch.equal(x.groups.expert_offsets, xq.groups.expert_offsets)
        assert x.groups.num_tokens == 23
