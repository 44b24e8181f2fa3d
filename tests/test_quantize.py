"""The quantizer kernel, interpreted, bit for bit against the reference and against the definition."""

from __future__ import annotations

import math
from typing import Any

import cases
import numpy as np
import pytest
import swiglu_truth
import torch
import truth
from hypothesis import given
from hypothesis import strategies as st

import hybrid_mxfp8 as mx
from hybrid_mxfp8 import reference
from hybrid_mxfp8.triton_kernels.quantize import QuantizeConfig, select_quantize_config

interpreted = pytest.mark.usefixtures("interpreter")


def same_bytes(a: mx.GroupedMXFP8 | mx.ExpertWeights, b: mx.GroupedMXFP8 | mx.ExpertWeights) -> None:
    for name in ("values", "scales"):
        x, y = getattr(a, name).view(torch.uint8), getattr(b, name).view(torch.uint8)
        assert torch.equal(x, y), f"{name}: {int((x != y).sum())} of {x.numel()} bytes differ"


def both(
    x: torch.Tensor, groups: mx.GroupLayout, rounding: str = "rceil", row_index: torch.Tensor | None = None
) -> tuple[mx.GroupedMXFP8, mx.GroupedMXFP8]:
    """The kernel's and the reference's result, each in buffers that held poison."""
    kernel = into_poison("triton", x, groups, rounding, row_index)
    return kernel, into_poison("reference", x, groups, rounding, row_index)


def into_poison(
    backend: str,
    x: torch.Tensor,
    groups: mx.GroupLayout,
    rounding: str = "rceil",
    row_index: torch.Tensor | None = None,
) -> mx.GroupedMXFP8:
    out = cases.poisoned_output(groups, x.shape[1])
    got = mx.quantize_grouped(x, groups, scale_rounding=rounding, row_index=row_index, out=out, backend=backend)
    assert got.values.data_ptr() == out.values.data_ptr()
    assert got.scales.data_ptr() == out.scales.data_ptr()
    return got


def filled_like(x: torch.Tensor, byte: int) -> torch.Tensor:
    return torch.full_like(x.view(torch.uint8), byte).view(x.dtype)


@interpreted
@pytest.mark.parametrize("rounding", truth.ROUNDINGS)
@pytest.mark.parametrize("pattern", ["every_code", "every_amax"])
@pytest.mark.parametrize("dtype", cases.HALF_DTYPES, ids=["bf16", "fp16"])
def test_every_code(pattern: str, dtype: torch.dtype, rounding: str, tally: Any) -> None:
    x = getattr(cases, pattern)(dtype)
    same_bytes(*both(x, cases.layout([x.shape[0]]), rounding))
    tally("codes", 65536)


@interpreted
@pytest.mark.parametrize("rounding", truth.ROUNDINGS)
def test_fp32_exponents_and_mantissa_edges(rounding: str) -> None:
    x = cases.fp32_edges()
    same_bytes(*both(x, cases.layout([x.shape[0]]), rounding))


@interpreted
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=["bf16", "fp16", "fp32"])
def test_zero_tiny_and_non_finite_blocks(dtype: torch.dtype) -> None:
    x = cases.special_rows(dtype)
    same_bytes(*both(x, cases.layout([3, 5])))


@interpreted
@pytest.mark.parametrize("name", cases.RAGGED)
@pytest.mark.parametrize("k", [32, 160, 256])
def test_ragged(name: str, k: int, rng: torch.Generator) -> None:
    """Against the definition itself: rows beyond the groups and slack keep their poison, all other padding is zero."""
    counts, num_tokens = cases.RAGGED[name]
    x = cases.random_rows(num_tokens, k, torch.bfloat16, rng)
    groups = cases.layout(counts, num_tokens)
    kernel, plain = both(x, groups)
    same_bytes(kernel, plain)
    codes, scales = truth.quantize(truth.doubles(x))
    values, stored = truth.grouped_bytes(codes, scales, counts, groups.scale_rows, cases.POISON)
    assert np.array_equal(truth.as_bytes(kernel.values), values)
    assert np.array_equal(truth.as_bytes(kernel.scales).reshape(-1), stored)


@interpreted
@given(
    shape=cases.ragged(),
    k=st.sampled_from([32, 64, 96, 128, 288, 1056]),
    dtype=st.sampled_from(cases.DTYPES),
    rounding=st.sampled_from(truth.ROUNDINGS),
    seed=st.integers(0, 2**31),
)
def test_any_layout(shape: cases.Ragged, k: int, dtype: torch.dtype, rounding: str, seed: int) -> None:
    x = cases.random_rows(shape.num_tokens, k, dtype, torch.Generator().manual_seed(seed))
    same_bytes(*both(x, cases.layout(shape.counts, shape.num_tokens), rounding))


@interpreted
@pytest.mark.parametrize("num_experts", [1, 2, 3, 127, 128, 1000, 1024, 1500])
def test_number_of_experts(num_experts: int, rng: torch.Generator) -> None:
    counts = [0] * num_experts
    for e in torch.randint(0, num_experts, (150,), generator=rng).tolist():
        counts[e] += 1
    x = cases.random_rows(150, 64, torch.bfloat16, rng)
    same_bytes(*both(x, cases.layout(counts)))


@interpreted
@pytest.mark.parametrize("name", cases.HOSTILE)
def test_hostile_counts_stay_in_their_buffers(name: str, rng: torch.Generator) -> None:
    """Buffers inside larger ones, whose bytes around must keep."""
    counts, num_tokens = cases.HOSTILE[name]
    groups = cases.layout(counts, num_tokens)
    x = cases.random_rows(num_tokens, 96, torch.bfloat16, rng)
    around = torch.full((1024 + num_tokens * 96 + 1024,), 0xA5, dtype=torch.uint8)
    scales_around = torch.full((1024 + groups.scale_rows * 4 + 1024,), 0xA5, dtype=torch.uint8)
    values = around[1024 : 1024 + num_tokens * 96].view(num_tokens, 96)
    scales = scales_around[1024 : 1024 + groups.scale_rows * 4].view(groups.scale_rows, 4)
    out = mx.GroupedMXFP8(values.view(torch.float8_e4m3fn), scales, groups)
    mx.quantize_grouped(x, groups, out=out, backend="triton")
    expected = mx.GroupedMXFP8(filled_like(out.values, 0xA5), filled_like(out.scales, 0xA5), groups)
    same_bytes(out, mx.quantize_grouped(x, groups, out=expected, backend="reference"))
    for buffer in (around, scales_around):
        assert bool((buffer[:1024] == 0xA5).all())
        assert bool((buffer[-1024:] == 0xA5).all())


@interpreted
def test_groups_put_together_by_hand_that_lie_stay_in_their_buffers() -> None:
    """Offsets beyond T and S, as a hand-made layout may have them: nothing outside is written."""
    groups = mx.GroupLayout.unchecked(
        torch.tensor([64, 64], dtype=torch.int32),
        torch.tensor([0, 64, 128], dtype=torch.int32),
        torch.tensor([0, 4096, 8192], dtype=torch.int32),
        40,
    )
    around = torch.full((groups.scale_rows * 4 + 2048,), 0xA5, dtype=torch.uint8)
    scales = around[1024:-1024].view(groups.scale_rows, 4)
    values = torch.zeros(40, 32, dtype=torch.uint8).view(torch.float8_e4m3fn)
    mx.quantize_grouped(torch.ones(40, 32), groups, out=mx.GroupedMXFP8(values, scales, groups), backend="triton")
    assert bool((around[:1024] == 0xA5).all())
    assert bool((around[-1024:] == 0xA5).all())


@interpreted
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=["bf16", "fp16", "fp32"])
def test_row_strides(dtype: torch.dtype, rng: torch.Generator) -> None:
    wide = cases.random_rows(40, 256, dtype, rng)
    groups = cases.layout([10, 30])
    for x in (wide[:, 32:128], wide[:, 7:103], wide[:1, :96].expand(40, 96)):
        assert not x.is_contiguous()
        kernel, plain = both(x, groups)
        same_bytes(kernel, plain)
        same_bytes(kernel, into_poison("reference", x.contiguous(), groups))


@interpreted
def test_rows_of_stride_one() -> None:
    """Rows that overlap; Triton makes a stride of 1 a constant."""
    x = torch.arange(96, dtype=torch.float32).as_strided((40, 32), (1, 1))
    same_bytes(*both(x, cases.layout([10, 30])))


@interpreted
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=["bf16", "fp16", "fp32"])
def test_gather(dtype: torch.dtype, rng: torch.Generator) -> None:
    x = cases.random_rows(17, 160, dtype, rng)
    index = torch.randint(0, 17, (70,), generator=rng, dtype=torch.int32)
    groups = cases.layout([30, 0, 40])
    kernel, plain = both(x, groups, row_index=index)
    same_bytes(kernel, plain)
    same_bytes(kernel, into_poison("reference", x[index.long()], groups))


@interpreted
def test_gather_of_rows_outside_reads_zeros(backend: str, rng: torch.Generator) -> None:
    x = cases.random_rows(4, 64, torch.bfloat16, rng)
    index = torch.tensor([0, -1, 4, 3, 2**31 - 1, -(2**31)], dtype=torch.int32)
    out = cases.poisoned_output(cases.layout([6]), 64)
    got = mx.quantize_grouped(x, cases.layout([6]), row_index=index, out=out, backend=backend)
    dequantized = got.dequantize()
    assert bool((dequantized[[1, 2, 4, 5]] == 0).all())
    assert bool((got.values.view(torch.uint8)[[1, 2, 4, 5]] == 0).all())
    plain = mx.quantize_grouped(x[[0, 3]], cases.layout([2]), backend="reference").dequantize()
    assert torch.equal(dequantized[[0, 3]], plain)


@interpreted
def test_gather_from_no_rows(backend: str) -> None:
    groups = cases.layout([3])
    out = cases.poisoned_output(groups, 32)
    index = torch.zeros(3, dtype=torch.int32)
    got = mx.quantize_grouped(torch.empty(0, 32), groups, row_index=index, out=out, backend=backend)
    assert bool((got.values.view(torch.uint8) == 0).all())
    assert bool((got.scales[:128] == 0).all())


@interpreted
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("rounding", truth.ROUNDINGS)
def test_swiglu(backend: str, dtype: torch.dtype, rounding: str, rng: torch.Generator) -> None:
    x = 4 * torch.randn(70, 320, generator=rng)
    x[:8] *= 30
    x = x.to(dtype)
    groups = cases.layout([30, 0, 40])
    out = cases.poisoned_output(groups, 160)
    got = mx.quantize_grouped(x, groups, activation="swiglu", scale_rounding=rounding, out=out, backend=backend)
    swiglu_truth.check(got, x, [30, 0, 40], rounding)


ACTIVATIONS = {
    "swigluoai": mx.SwiGLU(1.702, 1.0, 7.0),
    "limit alone": mx.SwiGLU(limit=2.5),
    "alpha alone": mx.SwiGLU(alpha=0.5),
    "beta alone": mx.SwiGLU(beta=-0.25),
}


@interpreted
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_other_swiglus(backend: str, dtype: torch.dtype, name: str, rng: torch.Generator) -> None:
    """A limit meets both signs of gate and up, and the cut values themselves."""
    activation = ACTIVATIONS[name]
    x = 4 * torch.randn(70, 320, generator=rng)
    x[:8] *= 30
    x[8, ::3] = 7.0
    x = x.to(dtype)
    groups = cases.layout([30, 0, 40])
    out = cases.poisoned_output(groups, 160)
    got = mx.quantize_grouped(x, groups, activation=activation, out=out, backend=backend)
    swiglu_truth.check(got, x, [30, 0, 40], "rceil", activation=activation)
    same = mx.quantize_grouped(x, groups, activation="swigluoai", backend=backend)
    assert torch.equal(same.values.view(torch.uint8), got.values.view(torch.uint8)) == (name == "swigluoai")


@interpreted
def test_what_a_limit_does_to_non_finite_values(backend: str) -> None:
    """As torch.clamp: infinite values are cut, NaN stays. A gate of -Inf has no limit."""
    x = torch.ones(4, 64)
    x[0, 0] = x[0, 33] = float("inf")
    x[1, 0], x[1, 32] = 3.0, float("-inf")
    x[2, 5], x[3, 40] = float("nan"), float("nan")
    got = mx.quantize_grouped(x, cases.layout([4]), activation=mx.SwiGLU(limit=3.0), backend=backend).dequantize()
    cut = 3 / (1 + math.exp(-3))
    assert got[0, 0].item() == pytest.approx(cut, rel=2**-4)
    assert got[0, 1].item() == pytest.approx(3 / (1 + math.exp(-1)), rel=2**-4)
    assert got[1, 0].item() == pytest.approx(-3 * cut, rel=2**-4)
    assert bool(got[2:].isnan().all())
    assert not got[:2].isnan().any()


@interpreted
def test_swiglu_of_gathered_rows_with_strides(rng: torch.Generator) -> None:
    x = torch.randn(20, 300, generator=rng)[:, 5:261]
    index = torch.randint(0, 20, (40,), generator=rng, dtype=torch.int32)
    index[3] = 20
    got = mx.quantize_grouped(x, cases.layout([40]), activation="swiglu", row_index=index, backend="triton")
    rows = torch.where((index < 20)[:, None], x[index.clamp_max(19).long()], 0)
    swiglu_truth.check(got, rows, [40], "rceil")


@interpreted
def test_swiglu_spreads_non_finite_values_over_their_block(backend: str) -> None:
    x = torch.ones(3, 128)
    x[0, 2], x[1, 64 + 40] = float("nan"), float("inf")
    x[2, 3] = -500.0  # exp(500) is Inf and the product zero, not NaN
    got = mx.quantize_grouped(x, cases.layout([3]), activation="swiglu", backend=backend).dequantize()
    nan = torch.zeros(3, 64, dtype=torch.bool)
    nan[0, :32] = nan[1, 32:] = True
    assert torch.equal(torch.isnan(got), nan)
    assert got[2, 3] == 0


@interpreted
@pytest.mark.parametrize("rounding", truth.ROUNDINGS)
@pytest.mark.parametrize(
    ("e", "n", "k"), [(1, 1, 32), (3, 8, 96), (2, 136, 160), (2, 128, 128), (1, 300, 1056), (5, 40, 64)]
)
def test_weights(e: int, n: int, k: int, rounding: str, rng: torch.Generator) -> None:
    w = cases.random_rows(e * n, k, torch.bfloat16, rng).reshape(e, n, k)
    got = mx.quantize_weights(w, scale_rounding=rounding, backend="triton")
    same_bytes(got, mx.quantize_weights(w, scale_rounding=rounding, backend="reference"))
    for expert in range(e):
        codes, scales = truth.quantize(truth.doubles(w[expert]), rounding)
        assert np.array_equal(truth.as_bytes(got.values[expert]), codes)
        assert np.array_equal(truth.as_bytes(got.scales[expert]).reshape(-1), truth.swizzle(scales))


@interpreted
def test_weights_with_strides(rng: torch.Generator) -> None:
    base = cases.random_rows(4 * 50, 256, torch.float16, rng).reshape(4, 50, 256)
    for w in (base[::2, :, 32:128], base[:, 3:43, :96], base.transpose(0, 1)[:, :, :64], base[:1].expand(3, 50, 256)):
        contiguous = mx.quantize_weights(w.contiguous(), backend="reference")
        same_bytes(mx.quantize_weights(w, backend="triton"), contiguous)
        same_bytes(mx.quantize_weights(w, backend="reference"), contiguous)


@interpreted
def test_weights_write_every_padding_byte(rng: torch.Generator) -> None:
    from hybrid_mxfp8.triton_kernels.quantize import quantize_weights

    w = cases.random_rows(3 * 136, 160, torch.bfloat16, rng).reshape(3, 136, 160)
    values = torch.full((3, 136, 160), cases.POISON, dtype=torch.uint8).view(torch.float8_e4m3fn)
    scales = torch.full((3, 256, 8), cases.POISON, dtype=torch.uint8)
    quantize_weights(w, values, scales, scale_rounding="rceil")
    same_bytes(mx.ExpertWeights(values, scales), mx.quantize_weights(w, backend="reference"))


@pytest.mark.parametrize(("counts", "num_tokens"), [([], 0), ([], 5), ([0, 0], 0), ([0, 0], 9)])
def test_nothing_to_do_writes_nothing(backend: str, counts: list[int], num_tokens: int) -> None:
    groups = cases.layout(counts, num_tokens)
    out = cases.poisoned_output(groups, 64)
    mx.quantize_grouped(torch.ones(num_tokens, 64), groups, out=out, backend=backend)
    assert bool((out.values.view(torch.uint8) == cases.POISON).all())
    assert bool((out.scales == cases.POISON).all())


@pytest.mark.parametrize(("e", "n"), [(0, 8), (3, 0)])
def test_no_weights(backend: str, e: int, n: int) -> None:
    wq = mx.quantize_weights(torch.empty(e, n, 64), backend=backend)
    assert wq.values.shape == (e, n, 64)
    assert wq.scales.shape == (e, 0 if n == 0 else 128, 4)


@interpreted
def test_out_is_written_again_with_another_layout(rng: torch.Generator) -> None:
    """Buffers of an earlier result, reused for other groups of the same shapes: no byte of the first shows."""
    x = cases.random_rows(150, 96, torch.bfloat16, rng)
    first = mx.quantize_grouped(x, cases.layout([150, 0, 0]), backend="triton")
    groups = cases.layout([1, 2, 3], 150)
    second = mx.quantize_grouped(x.flip(0), groups, out=first, backend="triton")
    assert second.scales.data_ptr() == first.scales.data_ptr()
    assert second.groups is groups
    used = int(groups.scale_offsets[-1])
    plain = mx.quantize_grouped(x.flip(0), groups, backend="reference")
    assert torch.equal(second.scales[:used], plain.scales[:used])
    assert torch.equal(second.values.view(torch.uint8)[:6], plain.values.view(torch.uint8)[:6])


@pytest.mark.parametrize(
    ("num_rows", "k", "num_experts", "interpreted", "expected"),
    [
        (1, 32, 1, False, QuantizeConfig(1, 128, 16, 1)),
        (8, 4096, 128, False, QuantizeConfig(1, 1024, 16, 4)),
        (2**20 // 2048, 2048, 8, False, QuantizeConfig(1, 1024, 16, 4)),
        (2**20 // 2048 + 1, 2048, 8, False, QuantizeConfig(4, 1024, 16, 4)),
        (256, 7168, 256, False, QuantizeConfig(4, 1024, 16, 4)),
        (131072, 7168, 8, False, QuantizeConfig(2, 2048, 16, 8, True)),
        (8192, 1024, 64, False, QuantizeConfig(2, 1024, 16, 8, True)),
        (16384, 7168, 65, False, QuantizeConfig(8, 512, 4, 4, True)),
        (300, 2880, 4, True, QuantizeConfig(128, 1024, 8, 4, True)),
        (3, 160, 4, True, QuantizeConfig(4, 256, 8, 4, True)),
    ],
)
def test_select_quantize_config(
    num_rows: int, k: int, num_experts: int, interpreted: bool, expected: QuantizeConfig
) -> None:
    assert select_quantize_config(num_rows, k, num_experts, interpreted) == expected


@pytest.mark.parametrize("num_rows", [1, 100, 5000, 10**6])
@pytest.mark.parametrize("k", [32, 64, 128, 160, 2880, 7168, 65536])
@pytest.mark.parametrize("num_experts", [1, 1024])
@pytest.mark.parametrize("interpreted", [False, True])
def test_every_config_is_valid(num_rows: int, k: int, num_experts: int, interpreted: bool) -> None:
    config = select_quantize_config(num_rows, k, num_experts, interpreted)
    assert config.block_cols % 128 == 0
    for power in (config.block_rows, config.block_cols, config.padding_tiles, config.num_warps):
        assert power & (power - 1) == 0


def test_kernel_bytes_do_not_depend_on_the_config(
    interpreter: None, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every tile that a GPU would use, interpreted, over rows most of which no expert owns."""
    from hybrid_mxfp8.triton_kernels import quantize

    x = cases.random_rows(60, 672, torch.bfloat16, rng)
    groups = cases.layout([5, 0, 17], 60)
    expected = mx.quantize_grouped(x, groups, out=cases.poisoned_output(groups, 672), backend="reference")
    for config in (
        QuantizeConfig(1, 128, 1, 2),
        QuantizeConfig(1, 1024, 16, 4),
        QuantizeConfig(8, 512, 4, 4),
        QuantizeConfig(8, 512, 4, 4, skip_unowned=True),
        QuantizeConfig(2, 2048, 16, 8, skip_unowned=True),
    ):
        monkeypatch.setattr(quantize, "select_quantize_config", lambda *args, config=config: config)
        out = cases.poisoned_output(groups, 672)
        same_bytes(mx.quantize_grouped(x, groups, out=out, backend="triton"), expected)


def test_reference_quantizes_each_row_alone(rng: torch.Generator) -> None:
    x = cases.random_rows(6, 64, torch.float32, rng)
    values, scales = reference.quantize(x)
    for row in range(6):
        one_values, one_scales = reference.quantize(x[row])
        assert torch.equal(one_values.view(torch.uint8), values[row].view(torch.uint8))
        assert torch.equal(one_scales, scales[row])
