"""The compiled quantizer, bit for bit against the reference, which the CPU tests hold against the definition."""

from __future__ import annotations

import cases
import pytest
import swiglu_truth
import torch
import truth
from gpu_truth import GPU, same_bytes
from hypothesis import given, settings
from hypothesis import strategies as st

import hybrid_mxfp8 as mx
from hybrid_mxfp8 import reference

pytestmark = pytest.mark.gpu


def into_poison(
    backend: str,
    x: torch.Tensor,
    groups: mx.GroupLayout | torch.Tensor,
    rounding: str = "rceil",
    row_index: torch.Tensor | None = None,
) -> mx.GroupedMXFP8:
    """Quantize into buffers that held poison."""
    rows = x.shape[0] if row_index is None else row_index.shape[0]
    layout = groups if isinstance(groups, mx.GroupLayout) else mx.GroupLayout.from_counts(groups, rows)
    out = cases.poisoned_output(layout, x.shape[1])
    return mx.quantize_grouped(x, groups, scale_rounding=rounding, row_index=row_index, out=out, backend=backend)


def check(
    x: torch.Tensor, groups: mx.GroupLayout, rounding: str = "rceil", row_index: torch.Tensor | None = None
) -> None:
    """Kernel against reference, both on the GPU."""
    kernel = into_poison("triton", x, groups, rounding, row_index)
    same_bytes(kernel, into_poison("reference", x, groups, rounding, row_index))


@pytest.mark.parametrize("rounding", truth.ROUNDINGS)
@pytest.mark.parametrize("pattern", ["every_code", "every_amax"])
@pytest.mark.parametrize("dtype", cases.HALF_DTYPES, ids=["bf16", "fp16"])
def test_every_code(pattern: str, dtype: torch.dtype, rounding: str) -> None:
    """All 65,536 codes, as elements and as the amax of a block; the reference computes on the CPU, so it is judged too."""
    x = getattr(cases, pattern)(dtype)
    expected = into_poison("reference", x, cases.layout([x.shape[0]]), rounding)
    x = x.to(GPU)
    groups = cases.layout([x.shape[0]], device=GPU)
    same_bytes(into_poison("triton", x, groups, rounding), expected)
    same_bytes(into_poison("reference", x, groups, rounding), expected)


@pytest.mark.parametrize("case", cases.RAGGED)
def test_tokens_that_arrive_quantized(case: str, request: pytest.FixtureRequest) -> None:
    """From row-major scales the kernel's bytes, without a sync."""
    counts, num_tokens = cases.RAGGED[case]
    groups = cases.layout(counts, num_tokens, device=GPU)
    x = torch.randn(num_tokens, 160, device=GPU)
    xq = mx.quantize_grouped(x, groups, backend="triton")
    request.getfixturevalue("no_sync")
    linear = xq.linear_scales()
    again = mx.GroupedMXFP8.from_linear_scales(xq.values, linear, groups)
    back = again.linear_scales()
    torch.cuda.set_sync_debug_mode("default")
    used, owned = int(groups.scale_offsets[-1]), sum(counts)
    assert torch.equal(again.scales[:used], xq.scales[:used])
    assert torch.equal(back, linear)
    assert torch.equal(linear[:owned].cpu(), reference.quantize(x.cpu())[1][:owned])


@pytest.mark.parametrize("rounding", truth.ROUNDINGS)
def test_fp32_exponents_and_mantissa_edges(rounding: str) -> None:
    x = cases.fp32_edges()
    expected = into_poison("reference", x, cases.layout([x.shape[0]]), rounding)
    groups = cases.layout([x.shape[0]], device=GPU)
    same_bytes(into_poison("triton", x.to(GPU), groups, rounding), expected)
    same_bytes(into_poison("reference", x.to(GPU), groups, rounding), expected)


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=["bf16", "fp16", "fp32"])
def test_zero_tiny_and_non_finite_blocks(dtype: torch.dtype) -> None:
    x = cases.special_rows(dtype)
    expected = into_poison("reference", x, cases.layout([3, 5]))
    same_bytes(into_poison("triton", x.to(GPU), cases.layout([3, 5], device=GPU)), expected)


@pytest.mark.sanitizer
@pytest.mark.parametrize("k", [32, 160, 2880])
@pytest.mark.parametrize("name", cases.RAGGED)
def test_ragged(name: str, k: int, rng: torch.Generator) -> None:
    counts, num_tokens = cases.RAGGED[name]
    check(cases.random_rows(num_tokens, k, torch.bfloat16, rng, GPU), cases.layout(counts, num_tokens, GPU))


@settings(max_examples=60)
@given(
    shape=cases.ragged(max_experts=40, max_tokens=2000),
    k=st.sampled_from([32, 64, 96, 288, 1056, 4096]),
    dtype=st.sampled_from(cases.DTYPES),
    rounding=st.sampled_from(truth.ROUNDINGS),
    seed=st.integers(0, 2**31),
)
def test_any_layout(shape: cases.Ragged, k: int, dtype: torch.dtype, rounding: str, seed: int) -> None:
    x = cases.random_rows(shape.num_tokens, k, dtype, torch.Generator().manual_seed(seed), GPU)
    check(x, cases.layout(shape.counts, shape.num_tokens, GPU), rounding)


@pytest.mark.parametrize("k", [160, 7168])
@pytest.mark.parametrize("num_tokens", [64, 300, 3000])
@pytest.mark.parametrize("num_experts", [1, 3, 128, 256, 1000, 1024, 3000])
def test_experts_and_rows(num_experts: int, num_tokens: int, k: int, rng: torch.Generator) -> None:
    """Every configuration, and both forms of groups: a layout, and counts that the kernel scans."""
    owners = torch.randint(0, num_experts, (num_tokens,), generator=rng)
    counts = torch.bincount(owners, minlength=num_experts).to(torch.int32).to(GPU)
    x = cases.random_rows(num_tokens, k, torch.bfloat16, rng, GPU)
    groups = mx.GroupLayout.from_counts(counts, num_tokens)
    expected = into_poison("reference", x, groups)
    same_bytes(into_poison("triton", x, groups), expected)
    scanned = into_poison("triton", x, counts)
    same_bytes(scanned, expected)
    for name in ("tokens_per_expert", "expert_offsets", "scale_offsets"):
        assert torch.equal(getattr(scanned.groups, name), getattr(groups, name))


@pytest.mark.sanitizer
@pytest.mark.parametrize("form", ["layout", "counts"])
@pytest.mark.parametrize("name", {**cases.HOSTILE, **cases.HUGE})
def test_hostile_counts_stay_in_their_buffers(name: str, form: str, rng: torch.Generator) -> None:
    """Buffers inside larger ones, whose bytes around must keep."""
    given_counts, num_tokens = {**cases.HOSTILE, **cases.HUGE}[name]
    counts = torch.tensor(given_counts, device=GPU)
    groups = mx.GroupLayout.from_counts(counts, num_tokens)
    x = cases.random_rows(num_tokens, 96, torch.bfloat16, rng, GPU)
    expected = into_poison("reference", x, groups)
    guard = 1 << 20
    around = torch.full((num_tokens * 96 + 2 * guard,), cases.POISON, dtype=torch.uint8, device=GPU)
    scales_around = torch.full((groups.scale_rows * 4 + 2 * guard,), cases.POISON, dtype=torch.uint8, device=GPU)
    values = around[guard : guard + num_tokens * 96].view(num_tokens, 96).view(torch.float8_e4m3fn)
    scales = scales_around[guard : guard + groups.scale_rows * 4].view(groups.scale_rows, 4)
    out = mx.GroupedMXFP8(values, scales, groups)
    mx.quantize_grouped(x, groups if form == "layout" else counts, out=out, backend="triton")
    same_bytes(out, expected)
    for buffer in (around, scales_around):
        assert bool((buffer[:guard] == cases.POISON).all())
        assert bool((buffer[-guard:] == cases.POISON).all())


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=["bf16", "fp16", "fp32"])
def test_row_strides_and_unaligned_rows(dtype: torch.dtype, rng: torch.Generator) -> None:
    wide = cases.random_rows(40, 256, dtype, rng, GPU)
    groups = cases.layout([10, 30], device=GPU)
    odd = torch.empty(40 * 257 + 1, dtype=dtype, device=GPU).normal_().as_strided((40, 96), (257, 1), 1)
    for x in (wide[:, 32:128], wide[:, 7:103], wide[:1, :96].expand(40, 96), odd):
        check(x, groups)


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=["bf16", "fp16", "fp32"])
def test_gather(dtype: torch.dtype, rng: torch.Generator) -> None:
    x = cases.random_rows(17, 160, dtype, rng, GPU)
    index = torch.randint(0, 17, (70,), generator=rng, dtype=torch.int32)
    index[5], index[6], index[7], index[8] = -1, 17, 2**31 - 1, -(2**31)
    check(x, cases.layout([30, 0, 40], device=GPU), row_index=index.to(GPU))


@pytest.mark.sanitizer
@pytest.mark.parametrize("rounding", truth.ROUNDINGS)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=["bf16", "fp16", "fp32"])
def test_swiglu(dtype: torch.dtype, rounding: str, rng: torch.Generator) -> None:
    """Against float64, within what a GPU's exponential and division may be off; see swiglu_truth.py."""
    x = 4 * torch.randn(700, 320, generator=rng)
    x[:80] *= 30
    x = x.to(dtype)
    groups = cases.layout([300, 0, 400], device=GPU)
    out = cases.poisoned_output(groups, 160)
    for backend in ("triton", "reference"):
        got = mx.quantize_grouped(
            x.to(GPU), groups, activation="swiglu", scale_rounding=rounding, out=out, backend=backend
        )
        swiglu_truth.check(got, x, [300, 0, 400], rounding)


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize(
    "activation",
    [mx.SwiGLU(1.702, 1.0, 7.0), mx.SwiGLU(limit=2.5), mx.SwiGLU(alpha=0.5), mx.SwiGLU(beta=-0.25)],
    ids=lambda activation: activation.spec,
)
def test_other_swiglus(dtype: torch.dtype, activation: mx.SwiGLU, rng: torch.Generator) -> None:
    x = 4 * torch.randn(700, 320, generator=rng)
    x[:80] *= 30
    x[80, ::3] = 7.0
    x = x.to(dtype)
    groups = cases.layout([300, 0, 400], device=GPU)
    out = cases.poisoned_output(groups, 160)
    for backend in ("triton", "reference"):
        got = mx.quantize_grouped(x.to(GPU), groups, activation=activation, out=out, backend=backend)
        swiglu_truth.check(got, x, [300, 0, 400], "rceil", activation=activation)


def test_what_a_limit_does_to_non_finite_values() -> None:
    """As torch.clamp: infinite values are cut, NaN stays; the reference says it of the CPU."""
    x = torch.ones(4, 64)
    x[0, 0] = x[0, 33] = float("inf")
    x[1, 0], x[1, 32] = 3.0, float("-inf")
    x[2, 5], x[3, 40] = float("nan"), float("nan")
    activation, groups = mx.SwiGLU(limit=3.0), cases.layout([4])
    expected = mx.quantize_grouped(x, groups, activation=activation, backend="reference").dequantize()
    got = mx.quantize_grouped(x.to(GPU), cases.layout([4], device=GPU), activation=activation, backend="triton")
    torch.testing.assert_close(got.dequantize().cpu(), expected, rtol=2**-3, atol=0, equal_nan=True)


@pytest.mark.parametrize("experts", [4, 100])
def test_most_rows_are_nobodys(experts: int, rng: torch.Generator) -> None:
    """Where experts are spread over GPUs: so many rows that programs beyond the groups leave at once, and write nothing."""
    t, k = 6000, 512
    counts = torch.randint(0, 12, (experts,), generator=rng).tolist()
    x = cases.random_rows(t, k, torch.bfloat16, rng, GPU)
    check(x, cases.layout(counts, t, device=GPU))
    index = torch.randint(0, t, (t,), generator=rng, dtype=torch.int32)
    index[sum(counts) :] = 2**31 - 1
    check(x, cases.layout(counts, t, device=GPU), row_index=index.to(GPU))


def test_swiglu_spreads_non_finite_values_over_their_block() -> None:
    x = torch.ones(3, 128)
    x[0, 2], x[1, 64 + 40] = float("nan"), float("inf")
    x[2, 3] = -500.0  # exp(500) is Inf and the product zero, not NaN
    got = mx.quantize_grouped(x.to(GPU), cases.layout([3], device=GPU), activation="swiglu").dequantize()
    nan = torch.zeros(3, 64, dtype=torch.bool)
    nan[0, :32] = nan[1, 32:] = True
    assert torch.equal(torch.isnan(got).cpu(), nan)
    assert float(got[2, 3]) == 0


@pytest.mark.sanitizer
@pytest.mark.parametrize("rounding", truth.ROUNDINGS)
@pytest.mark.parametrize(
    ("e", "n", "k"), [(1, 1, 32), (3, 8, 96), (2, 136, 160), (2, 128, 128), (1, 300, 1056), (4, 2880, 2880)]
)
def test_weights(e: int, n: int, k: int, rounding: str, rng: torch.Generator) -> None:
    w = cases.random_rows(e * n, k, torch.bfloat16, rng, GPU).reshape(e, n, k)
    expected = mx.quantize_weights(w, scale_rounding=rounding, backend="reference")
    same_bytes(mx.quantize_weights(w, scale_rounding=rounding, backend="triton"), expected)


def test_weights_with_strides(rng: torch.Generator) -> None:
    base = cases.random_rows(4 * 50, 256, torch.float16, rng, GPU).reshape(4, 50, 256)
    for w in (base[::2, :, 32:128], base[:, 3:43, :96], base.transpose(0, 1)[:, :, :64], base[:1].expand(3, 50, 256)):
        expected = mx.quantize_weights(w.contiguous(), backend="reference")
        same_bytes(mx.quantize_weights(w, backend="triton"), expected)


@pytest.mark.parametrize("gigabytes", [30], indirect=True)
def test_more_than_2_31_elements(gigabytes: None, rng: torch.Generator) -> None:
    """Offsets beyond int32 in x, values and row strides: a pattern of rows that repeats, checked in every row."""
    k, pattern = 7168, 1009
    num_tokens = 2**31 // k + 3 * pattern
    base = cases.random_rows(pattern, k, torch.bfloat16, rng, GPU)
    x = torch.empty(num_tokens, k, dtype=torch.bfloat16, device=GPU)
    for start in range(0, num_tokens, pattern):
        x[start : start + pattern] = base[: num_tokens - start]
    assert x.numel() > 2**31
    counts = [5, num_tokens - 5 - 131, 0, 131]
    got = mx.quantize_grouped(x, cases.layout(counts, device=GPU), backend="triton")
    del x
    codes, scales = reference.quantize(base)
    codes = codes.view(torch.uint8)
    values = got.values.view(torch.uint8)
    for start in range(0, num_tokens, pattern):
        part = values[start : start + pattern]
        assert torch.equal(part, codes[: part.shape[0]])
    linear = scales.repeat(num_tokens // pattern + 1, 1)[:num_tokens]
    start = 0
    for count, first in zip(counts, got.groups.scale_offsets.tolist(), strict=False):
        rows = -(-count // 128) * 128
        expected = mx.swizzle_scales(linear[start : start + count])
        assert torch.equal(got.scales[first : first + rows], expected)
        start += count


@pytest.mark.parametrize("gigabytes", [20], indirect=True)
def test_more_than_2_31_weights(gigabytes: None, rng: torch.Generator) -> None:
    e, n, k = 67, 4480, 7168
    assert e * n * k > 2**31
    one = cases.random_rows(n, k, torch.bfloat16, rng, GPU)
    w = torch.empty(e, n, k, dtype=torch.bfloat16, device=GPU)
    for expert in range(e):
        w[expert] = one.roll(expert, 0)
    got = mx.quantize_weights(w, backend="triton")
    del w
    codes, scales = reference.quantize(one)
    codes = codes.view(torch.uint8)
    for expert in range(e):
        assert torch.equal(got.values[expert].view(torch.uint8), codes.roll(expert, 0))
        assert torch.equal(got.scales[expert], mx.swizzle_scales(scales.roll(expert, 0)))


def test_no_sync(no_sync: None) -> None:
    x = torch.empty(64, 256, dtype=torch.bfloat16, device=GPU).normal_()
    counts = torch.full((4,), 16, dtype=torch.int32, device=GPU)
    groups = mx.GroupLayout.from_counts(counts, 64)
    for given_groups in (groups, counts):
        mx.quantize_grouped(x, given_groups, backend="triton")
        mx.quantize_grouped(x, given_groups, activation="swiglu", backend="triton")
    mx.quantize_grouped(x, groups, row_index=torch.zeros(64, dtype=torch.int32, device=GPU), backend="triton")
    mx.quantize_weights(x.view(4, 16, 256), backend="triton")


def test_weights_move_there_and_back(rng: torch.Generator) -> None:
    w = torch.randn(3, 40, 96, generator=rng)
    here = mx.quantize_weights(w, backend="reference")
    there = here.to("cuda")
    quantized = mx.quantize_weights(w.cuda(), backend="triton")
    assert there.device.type == "cuda"
    for moved in (there, quantized):
        back = moved.to("cpu")
        assert torch.equal(back.values.view(torch.uint8), here.values.view(torch.uint8))
        assert torch.equal(back.scales, here.scales)
