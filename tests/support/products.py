"""Operands of products, and products held against float64."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import cases
import tolerances
import torch
import truth

import hybrid_mxfp8 as mx

Plain = tuple[truth.Bytes, truth.Bytes]
"""Codes and row-major scales."""

TRUTH_ELEMENTS = 2**26
"""Multiplications beyond which a GPU computes the truth itself."""


def through_bf16(backend: str) -> bool:
    """Whether operands pass through bf16 where kernels run here."""
    return backend == "triton" and cases.device() == "cuda" and torch.cuda.get_device_capability() < (10, 0)


def operands(
    counts: Sequence[int], num_tokens: int, n: int, k: int, rng: torch.Generator, device: str = "cpu",
    backend: str = "reference",
) -> tuple[mx.GroupedMXFP8, mx.ExpertWeights]:  # fmt: skip
    """Quantized normal data; whatever is not to be read is poison."""
    groups = cases.layout(counts, num_tokens, device)
    x = cases.random_rows(num_tokens, k, torch.bfloat16, rng, device)
    w = cases.random_rows(len(counts) * n, k, torch.bfloat16, rng, device).reshape(len(counts), n, k) * 0.05
    xq = mx.quantize_grouped(x, groups, out=cases.poisoned_output(groups, k), backend=backend)
    return xq, mx.quantize_weights(w, backend=backend)


def from_bytes(x: Plain, w: Plain, counts: Sequence[int], device: str) -> tuple[mx.GroupedMXFP8, mx.ExpertWeights]:
    """Operands of these codes and row-major scales, which no quantizer need be able to make."""
    groups = cases.layout(counts)
    values, stored = truth.grouped_bytes(*x, counts, groups.scale_rows, cases.POISON)
    swizzled = torch.from_numpy(stored).reshape(groups.scale_rows, -1)
    xq = mx.GroupedMXFP8(torch.from_numpy(values).view(torch.float8_e4m3fn), swizzled, groups)
    wq = mx.ExpertWeights.from_linear_scales(*(torch.from_numpy(part).to(device) for part in w))
    return cases.to_device(xq, device), wq


def linear_scales(xq: mx.GroupedMXFP8, counts: Sequence[int]) -> truth.Bytes:
    """(T, K/32) of tokens; zero in rows that no expert owns."""
    linear = torch.zeros(xq.groups.num_tokens, xq.k // 32, dtype=torch.uint8)
    stored, start = xq.scales.cpu(), 0
    for count, first in zip(counts, xq.groups.scale_offsets.tolist(), strict=False):
        rows = stored[first : first + truth.padded(count, 128)]
        linear[start : start + count] = mx.unswizzle_scales(rows, count, xq.k // 32)
        start += count
    found: truth.Bytes = linear.numpy()
    return found


def plain_operands(xq: mx.GroupedMXFP8, wq: mx.ExpertWeights, counts: Sequence[int]) -> tuple[Plain, Plain]:
    """Codes and row-major scales of both operands."""
    w = truth.as_bytes(wq.values), truth.as_bytes(wq.linear_scales())
    return (truth.as_bytes(xq.values), linear_scales(xq, counts)), w


def check_product(
    y: torch.Tensor, xq: mx.GroupedMXFP8, wq: mx.ExpertWeights, counts: Sequence[int], backend: str = "triton"
) -> None:
    """Rows of each expert within their bounds; rows beyond must still be the NaN they were."""
    assert bool(torch.isnan(y[sum(counts) :]).all())
    half = through_bf16(backend)
    if y.device.type == "cpu" or xq.values.numel() * wq.n < TRUTH_ELEMENTS:
        tolerances.check_gemm(y, *plain_operands(xq, wq, counts), counts, bf16_formulation=half)
        return
    x, worst = xq.dequantize(), 0.0
    for e, (start, end) in enumerate(itertools.pairwise(itertools.accumulate(counts, initial=0))):
        if start == end:
            continue
        one = mx.ExpertWeights(wq.values[e : e + 1], wq.scales[e : e + 1])
        xd, wd = x[start:end].double(), one.dequantize()[0].double()
        ref, magnitude = xd @ wd.T, xd.abs() @ wd.abs().T
        nan = torch.isnan(ref)
        assert torch.equal(torch.isnan(y[start:end]), nan), f"expert {e}: NaN where truth has none, or the reverse"
        bound = tolerances.HALF_ULP[y.dtype] * ref.abs() + tolerances.ACCUMULATION * magnitude
        bound += tolerances.SMALLEST[y.dtype]
        if half:
            bound += tolerances.BF16_DROPPED * (xd.abs().sum(1)[:, None] + wd.abs().sum(1)[None, :])
        error = torch.where(nan, 0, (y[start:end].double() - ref).abs() / bound)
        worst = max(worst, float(error.max()))
    assert worst <= 1.0, f"largest error is {worst:.3g} times its bound"


def check(
    xq: mx.GroupedMXFP8, wq: mx.ExpertWeights, counts: Sequence[int], dtype: torch.dtype, backend: str
) -> torch.Tensor:
    """Multiply into poison, and compare."""
    out = cases.poisoned_product(xq.groups.num_tokens, wq.n, dtype, xq.values.device)
    y = mx.grouped_gemm(xq, wq, out_dtype=dtype, out=out, backend=backend)
    assert y.data_ptr() == out.data_ptr()
    check_product(y, xq, wq, counts, backend)
    return y
