"""Offsets beyond 2^31, and a million tokens.

On a CPU, pages of a new tensor cost nothing until they are written: operands of billions of
elements fit a small machine where only a few rows are used, at the far end.
tests/gpu/test_gpu_sizes.py fills them.
"""

from __future__ import annotations

import cases
import kernels
import pytest
import torch
import truth
from products import check_product, operands

import hybrid_mxfp8 as mx
from hybrid_mxfp8 import reference as routing
from hybrid_mxfp8.core import formats

FAR = 2**31
ON_GPU = cases.device() == "cuda"


@pytest.mark.parametrize("gigabytes", [16], indirect=True)
@pytest.mark.parametrize("stride", [2**30 + 8, FAR + 8])
def test_row_strides_beyond_int32(
    gigabytes: None, backend: str, device: str, stride: int, rng: torch.Generator
) -> None:
    """A stride that fits int32 and whose multiples don't, and one that doesn't."""
    rows = cases.random_rows(3, 64, torch.bfloat16, rng, device)
    x = torch.empty(2 * stride + 64, dtype=torch.bfloat16, device=device).as_strided((3, 64), (stride, 1))
    x.copy_(rows)
    groups = cases.layout([1, 2], device=device)
    for form in (groups, groups.tokens_per_expert):
        got = mx.quantize_grouped(x, form, out=cases.poisoned_output(groups, 64), backend=backend)
        cases.same_bytes(got, mx.quantize_grouped(rows, groups, out=cases.poisoned_output(groups, 64), backend=backend))
    got = mx.quantize_grouped(x, groups, activation="swiglu", backend=backend).dequantize()
    assert torch.equal(got, mx.quantize_grouped(rows, groups, activation="swiglu", backend=backend).dequantize())


@pytest.mark.parametrize("gigabytes", [16], indirect=True)
def test_gather_of_rows_beyond_int32(gigabytes: None, kernels_run: None, device: str, rng: torch.Generator) -> None:
    k = 4096
    x = torch.empty(FAR // k + 5, k, dtype=torch.bfloat16, device=device)
    index = torch.tensor([x.shape[0] - 1, 0, FAR // k], dtype=torch.int32, device=device)
    rows = cases.random_rows(3, k, torch.bfloat16, rng, device)
    x[index.long()] = rows
    groups = cases.layout([3], device=device)
    got = mx.quantize_grouped(x, groups, row_index=index, backend="triton")
    assert torch.equal(got.dequantize(), mx.quantize_grouped(rows, groups, backend="reference").dequantize())


@pytest.mark.parametrize("gigabytes", [16], indirect=True)
def test_weights_beyond_int32(gigabytes: None, multiplier: str, device: str, rng: torch.Generator) -> None:
    """2^32 weights of 4096 experts, of which the first, one in the middle and the last are used."""
    e, n, k = 4096, 1024, 1024
    used = [0, 2049, e - 1]
    few, small = operands([1, 1, 1], 3, n, k, rng, device)
    values = torch.empty(e, n, k, dtype=torch.uint8, device=device)
    scales = torch.empty(e, n, formats.scale_cols(k), dtype=torch.uint8, device=device)
    values[used], scales[used] = small.values.view(torch.uint8), small.scales
    counts = [int(expert in used) for expert in range(e)]
    xq = mx.GroupedMXFP8(few.values, few.scales, cases.layout(counts, device=device))
    wq = mx.ExpertWeights(values.view(torch.float8_e4m3fn), scales)
    assert wq.values.numel() == 2 * FAR
    y = mx.grouped_gemm(xq, wq, out_dtype=torch.float32, backend=multiplier)
    check_product(y, few, small, [1, 1, 1], multiplier)


@pytest.mark.parametrize("gigabytes", [8], indirect=True)
def test_sums_of_rows_beyond_int32(gigabytes: None, kernels_run: None, device: str, rng: torch.Generator) -> None:
    """The layer's last step, and the bias before it, at rows whose offset is beyond."""
    h = 1024
    y = torch.empty(FAR // h + 9, h, dtype=torch.bfloat16, device=device)
    used = torch.tensor([[y.shape[0] - 1, 3], [FAR // h, -1]], dtype=torch.int32, device=device)
    near = torch.tensor([[0, 1], [2, -1]], dtype=torch.int32, device=device)
    far = used[used >= 0].long()
    rows = torch.randn(3, h, generator=rng).bfloat16().to(device)
    y[far] = rows
    ids = torch.tensor([[1, 0], [1, 9]], device=device)
    weights, bias = (torch.randn(2, n, generator=rng).to(device) for n in (2, h))
    kernels.add_expert_bias(y, used, ids, bias)
    routing.add_expert_bias(rows, near, ids, bias)
    assert torch.equal(y[far], rows)
    got, expected = torch.empty(2, h, device=device), torch.empty(2, h, device=device)
    kernels.combine(y, used, ids, weights, bias, got)
    routing.combine(rows, near, ids, weights, bias, expected)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("spread", ["skewed", "one expert"] if ON_GPU else ["skewed"])
def test_a_million_tokens(device: str, spread: str, rng: torch.Generator) -> None:
    """256 experts, of which one has half or all; on a CPU by the reference."""
    backend, t, e, k = "triton" if device == "cuda" else "reference", 1_000_000, 256, 32
    owners = torch.randint(0, e, (t,), generator=rng)
    owners[: t // 2 if spread == "skewed" else t] = 77
    counts = torch.bincount(owners, minlength=e)
    x = torch.randn(t, k, generator=rng).to(device)
    xq = mx.quantize_grouped(x, counts.to(device), backend=backend)
    assert xq.groups.expert_offsets.tolist() == [0, *counts.cumsum(0).tolist()]
    if device == "cuda":
        cases.same_bytes(xq, mx.quantize_grouped(x, xq.groups, out=xq, backend="reference"))
    wq = mx.quantize_weights(torch.randn(e, 8, k, generator=rng).to(device), backend=backend)
    y = mx.grouped_gemm(xq, wq, out_dtype=torch.float32, backend=backend)
    expert = torch.repeat_interleave(torch.arange(e), counts).to(device)
    x, w = xq.dequantize().double(), wq.dequantize().double()
    for rows in torch.arange(t, device=device).split(100_000):  # row by row, not group by group
        exact = (x[rows][:, None, :] * w[expert[rows]]).sum(-1)
        torch.testing.assert_close(y[rows].double(), exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("num_tokens", [0, 1, 2**31 - 129, 2**31 - 128])
def test_the_largest_layouts(num_tokens: int) -> None:
    """Of one expert: 2^31 - 128 rows are the last that fit int32 with padding."""
    groups = mx.GroupLayout.from_counts(torch.tensor([num_tokens]), num_tokens)
    assert groups.expert_offsets.tolist() == [0, num_tokens]
    assert groups.scale_offsets.tolist() == [0, truth.padded(num_tokens, 128)]
    assert groups.scale_offsets[-1] <= groups.scale_rows <= formats.MAX_INT32
    with pytest.raises(ValueError, match="num_tokens: must be at least 0, and with each expert's padding fit int32"):
        mx.GroupLayout.from_counts(torch.tensor([2**31 - 127]), 2**31 - 127)
