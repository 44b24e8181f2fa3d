"""Offsets beyond 2^31 and many experts on a CPU: memory that is reserved and hardly touched, used at its far end.

Pages of a new tensor cost nothing until they are written. So operands of billions of elements fit a small machine where
only a few rows of them are used; the index arithmetic is the same. tests/gpu/test_gpu_sizes.py fills them.
"""

from __future__ import annotations

from typing import Any

import cases
import kernels
import pytest
import tolerances
import torch
import truth
from products import operands, plain_operands

import hybrid_mxfp8 as mx
from hybrid_mxfp8.core import formats
from hybrid_mxfp8.reference import routing

FAR = 2**31


def test_row_strides_beyond_int32(backend: str, rng: torch.Generator, tally: Any) -> None:
    """A stride that fits int32 and whose multiples don't, and one that doesn't."""
    rows = cases.random_rows(3, 64, torch.bfloat16, rng)
    expected = mx.quantize_grouped(rows, cases.layout([1, 2]), backend="reference").dequantize()
    for stride in (2**30 + 8, FAR + 8):
        x = torch.empty(2 * stride + 64, dtype=torch.bfloat16).as_strided((3, 64), (stride, 1))
        x.copy_(rows)
        assert torch.equal(mx.quantize_grouped(x, cases.layout([1, 2]), backend=backend).dequantize(), expected)
        tally("sizes")


def test_gather_of_rows_beyond_int32(interpreter: None, rng: torch.Generator, tally: Any) -> None:
    k = 4096
    x = torch.empty(FAR // k + 5, k, dtype=torch.bfloat16)
    rows = torch.tensor([x.shape[0] - 1, 0, FAR // k], dtype=torch.int32)
    x[rows.long()] = cases.random_rows(3, k, torch.bfloat16, rng)
    got = mx.quantize_grouped(x, cases.layout([3]), row_index=rows, backend="triton")
    expected = mx.quantize_grouped(x[rows.long()], cases.layout([3]), backend="reference")
    assert torch.equal(got.dequantize(), expected.dequantize())
    tally("sizes")


def test_weights_beyond_int32(backend: str, rng: torch.Generator, tally: Any) -> None:
    """2^32 weights of 4096 experts, of which the first, one in the middle and the last are used."""
    e, n, k = 4096, 1024, 1024
    used = [0, 2049, e - 1]
    small = mx.quantize_weights(torch.randn(3, n, k, generator=rng) * 0.05, backend="reference")
    values = torch.empty(e, n, k, dtype=torch.uint8)
    scales = torch.empty(e, n, formats.scale_cols(k), dtype=torch.uint8)
    values[used], scales[used] = small.values.view(torch.uint8), small.scales
    wq = mx.ExpertWeights(values.view(torch.float8_e4m3fn), scales)
    assert wq.values.numel() == 2 * FAR
    counts = [0] * e
    for expert in used:
        counts[expert] = 1
    x = cases.random_rows(3, k, torch.bfloat16, rng)
    xq = mx.quantize_grouped(x, cases.layout(counts), backend="reference")
    y = mx.grouped_gemm(xq, wq, out_dtype=torch.float32, backend=backend)
    few = mx.quantize_grouped(x, cases.layout([1, 1, 1]), backend="reference")
    tolerances.check_gemm(y, *plain_operands(few, small, [1, 1, 1]), [1, 1, 1])
    tally("sizes")


def test_sums_of_rows_beyond_int32(interpreter: None, rng: torch.Generator, tally: Any) -> None:
    """The layer's last step, and the bias before it, at rows whose offset is beyond."""
    h = 1024
    y = torch.empty(FAR // h + 9, h, dtype=torch.bfloat16)
    used = torch.tensor([[y.shape[0] - 1, 3], [FAR // h, -1]], dtype=torch.int32)
    near = torch.tensor([[0, 1], [2, -1]], dtype=torch.int32)
    rows = torch.randn(3, h, generator=rng).bfloat16()
    y[used[used >= 0].long()] = rows
    ids = torch.tensor([[1, 0], [1, 9]])
    weights, bias = torch.rand(2, 2, generator=rng), torch.randn(2, h, generator=rng)
    kernels.add_expert_bias(y, used, ids, bias)
    routing.add_expert_bias(rows, near, ids, bias)
    assert torch.equal(y[used[used >= 0].long()], rows)
    got, expected = torch.empty(2, h), torch.empty(2, h)
    kernels.combine(y, used, ids, weights, bias, got)
    routing.combine(rows, near, ids, weights, bias, expected)
    assert torch.equal(got, expected)
    tally("sizes", 2)


def test_a_thousand_experts_with_a_token_each(backend: str, rng: torch.Generator, tally: Any) -> None:
    """E = 1024: a token each (interpreted, every eighth: a program is 10 ms), and all tokens with one expert."""
    step = 8 if backend == "triton" else 1
    alone = [int(e % step == 0) for e in range(1024)]
    for each in (alone, [0] * 700 + [sum(alone)] + [0] * 323):
        xq, wq = operands(each, sum(each), 8, 32, rng)
        y = mx.grouped_gemm(xq, wq, out_dtype=torch.float32, backend=backend)
        tolerances.check_gemm(y, *plain_operands(xq, wq, each), each)
        tally("sizes")


def test_a_million_tokens(rng: torch.Generator, tally: Any) -> None:
    """Quantized, multiplied and laid out by the reference: 256 experts, of which one has half of the tokens."""
    t, e = 1_000_000, 256
    owners = torch.randint(0, e, (t,), generator=rng)
    owners[: t // 2] = 77
    counts = torch.bincount(owners, minlength=e)
    x = torch.randn(t, 32, generator=rng)
    xq = mx.quantize_grouped(x, counts, backend="reference")
    assert xq.groups.expert_offsets.tolist() == [0, *counts.cumsum(0).tolist()]
    wq = mx.quantize_weights(torch.randn(e, 8, 32, generator=rng), backend="reference")
    y = mx.grouped_gemm(xq, wq, out_dtype=torch.float32, backend="reference")
    expert = torch.repeat_interleave(torch.arange(e), counts)
    x, w = xq.dequantize().double(), wq.dequantize().double()
    for rows in torch.arange(t).split(100_000):  # row by row, not group by group as the reference goes
        exact = (x[rows][:, None, :] * w[expert[rows]]).sum(-1)
        torch.testing.assert_close(y[rows].double(), exact, rtol=1e-6, atol=1e-30)
    tally("sizes", 2)


@pytest.mark.parametrize("num_tokens", [0, 1, 2**31 - 129, 2**31 - 128])
def test_the_largest_layouts(num_tokens: int) -> None:
    """Offsets up to the end of int32, of one expert: 2^31 - 128 rows are the last that fit with their padding."""
    groups = mx.GroupLayout.from_counts(torch.tensor([num_tokens]), num_tokens)
    assert groups.expert_offsets.tolist() == [0, num_tokens]
    assert groups.scale_offsets.tolist() == [0, truth.padded(num_tokens, 128)]
    assert groups.scale_rows >= groups.scale_offsets[-1]
    assert groups.scale_rows <= formats.MAX_INT32
    with pytest.raises(ValueError, match="num_tokens: must be at least 0, and with each expert's padding fit int32"):
        mx.GroupLayout.from_counts(torch.tensor([2**31 - 127]), 2**31 - 127)
