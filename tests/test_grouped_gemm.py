"""The grouped GEMM of each backend against float64 truth, and backend against backend."""

from __future__ import annotations

from collections.abc import Sequence

import cases
import pytest
import tolerances
import torch
import triton
import truth
from hypothesis import given, settings
from hypothesis import strategies as st

import hybrid_mxfp8 as mx
from hybrid_mxfp8.reference import unswizzle_scales
from hybrid_mxfp8.triton_kernels.gemm import portable as kernel_module
from hybrid_mxfp8.triton_kernels.gemm.portable import (
    Formulation,
    TritonGemmConfig,
    select_formulation,
    select_gemm_config,
    token_tiles_bound,
)

interpreted = pytest.mark.usefixtures("interpreter")
DTYPE_IDS = ["bf16", "fp16", "fp32"]


def operands(
    counts: Sequence[int], num_tokens: int, n: int, k: int, rng: torch.Generator
) -> tuple[mx.GroupedMXFP8, mx.ExpertWeights]:
    """Quantized normal data; whatever is not to be read is poison."""
    groups = cases.layout(counts, num_tokens)
    x = cases.random_rows(num_tokens, k, torch.bfloat16, rng)
    w = cases.random_rows(len(counts) * n, k, torch.bfloat16, rng).reshape(len(counts), n, k) * 0.05
    xq = mx.quantize_grouped(x, groups, out=cases.poisoned_output(groups, k), backend="reference")
    return xq, mx.quantize_weights(w, backend="reference")


def plain_operands(
    xq: mx.GroupedMXFP8, wq: mx.ExpertWeights, counts: Sequence[int]
) -> tuple[tuple[truth.Bytes, truth.Bytes], tuple[truth.Bytes, truth.Bytes]]:
    """Codes and row-major scales of both operands."""
    linear = torch.zeros(xq.groups.num_tokens, xq.k // 32, dtype=torch.uint8)
    start = 0
    for count, first in zip(counts, xq.groups.scale_offsets.tolist(), strict=False):
        rows = xq.scales[first : first + truth.padded(count, 128)]
        linear[start : start + count] = unswizzle_scales(rows, count, xq.k // 32)
        start += count
    w = (truth.as_bytes(wq.values), truth.as_bytes(wq.linear_scales()))
    return (truth.as_bytes(xq.values), linear.numpy()), w


def check(
    xq: mx.GroupedMXFP8, wq: mx.ExpertWeights, counts: Sequence[int], dtype: torch.dtype, backend: str
) -> torch.Tensor:
    """Multiply into poison, compare with truth, and see that rows beyond the groups keep their poison."""
    out = cases.poisoned_product(xq.groups.num_tokens, wq.n, dtype)
    y = mx.grouped_gemm(xq, wq, out_dtype=dtype, out=out, backend=backend)
    assert y.data_ptr() == out.data_ptr()
    tolerances.check_gemm(y, *plain_operands(xq, wq, counts), counts)
    assert bool(torch.isnan(y[sum(counts) :]).all())
    return y


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("name", cases.RAGGED)
def test_ragged(backend: str, name: str, dtype: torch.dtype, rng: torch.Generator) -> None:
    counts, num_tokens = cases.RAGGED[name]
    check(*operands(counts, num_tokens, 136, 160, rng), counts, dtype, backend)


@pytest.mark.parametrize(("n", "k"), [(8, 32), (64, 96), (128, 128), (136, 288), (264, 64), (40, 1056)])
def test_shapes(backend: str, n: int, k: int, rng: torch.Generator) -> None:
    counts = [3, 0, 20, 1]
    check(*operands(counts, 24, n, k, rng), counts, torch.bfloat16, backend)


@settings(max_examples=12)
@given(
    shape=cases.ragged(max_experts=6, max_tokens=160),
    n=st.sampled_from([8, 72, 136]),
    k=st.sampled_from([32, 96, 128, 224]),
    dtype=st.sampled_from(cases.DTYPES),
    seed=st.integers(0, 2**31),
)
def test_any_layout(backend: str, shape: cases.Ragged, n: int, k: int, dtype: torch.dtype, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    check(*operands(shape.counts, shape.num_tokens, n, k, rng), shape.counts, dtype, backend)


@pytest.mark.parametrize("num_experts", [1, 3, 128, 257])
def test_number_of_experts(backend: str, num_experts: int, rng: torch.Generator) -> None:
    counts = [0] * num_experts
    for e in torch.randint(0, num_experts, (40,), generator=rng).tolist():
        counts[e] += 1
    check(*operands(counts, 40, 8, 64, rng), counts, torch.float32, backend)


@pytest.mark.parametrize(("counts", "num_tokens"), [([0, 0], 0), ([0, 0], 5), ([], 0), ([], 4)])
def test_no_rows(backend: str, counts: list[int], num_tokens: int) -> None:
    groups = cases.layout(counts, num_tokens)
    xq = cases.poisoned_output(groups, 64)
    wq = mx.quantize_weights(torch.ones(len(counts), 8, 64), backend="reference")
    out = cases.poisoned_product(num_tokens, 8, torch.bfloat16)
    y = mx.grouped_gemm(xq, wq, out=out, backend=backend)
    assert y.shape == (num_tokens, 8)
    assert bool(torch.isnan(y).all())


@pytest.mark.parametrize("name", cases.HOSTILE)
def test_hostile_counts_stay_in_their_buffers(backend: str, name: str, rng: torch.Generator) -> None:
    counts, num_tokens = cases.HOSTILE[name]
    tokens = truth.layout(counts, num_tokens)[0]
    xq, wq = operands(counts, num_tokens, 40, 96, rng)
    around = torch.full((1024 + num_tokens * 40 + 1024,), 7.0)
    out = around[1024:-1024].view(num_tokens, 40)
    mx.grouped_gemm(xq, wq, out=out, out_dtype=torch.float32, backend=backend)
    assert bool((around[:1024] == 7).all())
    assert bool((around[-1024:] == 7).all())
    tolerances.check_gemm(out, *plain_operands(xq, wq, tokens), tokens)
    assert bool((out[sum(tokens) :] == 7).all())


@interpreted
def test_groups_put_together_by_hand_that_lie_stay_in_their_buffers(rng: torch.Generator) -> None:
    """Offsets beyond T and S, as a hand-made layout may have them: nothing outside is written."""
    groups = mx.GroupLayout.unchecked(
        torch.tensor([64, 64], dtype=torch.int32),
        torch.tensor([0, 64, 128], dtype=torch.int32),
        torch.tensor([0, 4096, 8192], dtype=torch.int32),
        40,
    )
    xq, wq = operands([20, 20], 40, 40, 96, rng)
    around = torch.full((1024 + 40 * 40 + 1024,), 7.0)
    lying = mx.GroupedMXFP8(xq.values, xq.scales, groups)
    out = around[1024:-1024].view(40, 40)
    mx.grouped_gemm(lying, wq, out=out, out_dtype=torch.float32, backend="triton")
    assert bool((around[:1024] == 7).all())
    assert bool((around[-1024:] == 7).all())


def from_bytes(
    codes: torch.Tensor, scales: torch.Tensor, w_codes: torch.Tensor, w_scales: torch.Tensor, counts: Sequence[int]
) -> tuple[mx.GroupedMXFP8, mx.ExpertWeights]:
    """Operands of these codes and row-major scales, which no quantizer need be able to make."""
    groups = cases.layout(counts)
    values, stored = truth.grouped_bytes(codes.numpy(), scales.numpy(), counts, groups.scale_rows, cases.POISON)
    swizzled = torch.from_numpy(stored).reshape(groups.scale_rows, -1)
    xq = mx.GroupedMXFP8(torch.from_numpy(values).view(torch.float8_e4m3fn), swizzled, groups)
    return xq, mx.ExpertWeights.from_linear_scales(w_codes, w_scales)


@pytest.mark.parametrize(
    ("x_scale", "w_scale"), [(0, 127), (1, 127), (2, 127), (0, 254), (254, 0), (254, 2), (127, 1), (240, 13), (0, 0)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_extreme_scales(backend: str, x_scale: int, w_scale: int, dtype: torch.dtype, rng: torch.Generator) -> None:
    """Scale bytes at both ends; below 2 in magnitude, because 2 times scale 254 leaves fp32."""
    counts = [5, 0, 12]
    codes = torch.randint(0, 0x40, (17, 96), generator=rng, dtype=torch.uint8)
    codes |= torch.randint(0, 2, codes.shape, generator=rng, dtype=torch.uint8) << 7
    w_codes = torch.randint(0, 0x40, (3, 40, 96), generator=rng, dtype=torch.uint8)
    w_codes |= torch.randint(0, 2, w_codes.shape, generator=rng, dtype=torch.uint8) << 7
    scales = torch.full((17, 3), x_scale, dtype=torch.uint8)
    w_scales = torch.full((3, 40, 3), w_scale, dtype=torch.uint8)
    check(*from_bytes(codes, scales, w_codes, w_scales, counts), counts, dtype, backend)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=DTYPE_IDS)
def test_every_code_times_one(backend: str, dtype: torch.dtype) -> None:
    """Each e4m3 code and each scale byte that the output holds, alone in its row: exact products."""
    codes = torch.zeros(254, 32, dtype=torch.uint8)
    finite = torch.tensor([c for c in range(256) if c & 0x7F != 0x7F], dtype=torch.uint8)
    codes[:, 7] = finite
    w_codes = torch.zeros(1, 8, 32, dtype=torch.uint8)
    w_codes[0, 3, 7] = 0x38  # 1.0
    scales = torch.full((254, 1), 127, dtype=torch.uint8)
    operands = from_bytes(codes, scales, w_codes, torch.full((1, 8, 1), 127, dtype=torch.uint8), [254])
    y = mx.grouped_gemm(*operands, out_dtype=dtype, backend=backend)
    assert torch.equal(y[:, 3].double(), finite.view(torch.float8_e4m3fn).double())
    assert bool((y[:, [0, 1, 2, 4, 5, 6, 7]] == 0).all())


def test_a_nan_row_reaches_only_itself(backend: str, rng: torch.Generator) -> None:
    counts = [3, 0, 20]
    x = cases.random_rows(23, 160, torch.bfloat16, rng)
    x[4, 33] = float("nan")
    x[22, 0] = float("inf")
    xq = mx.quantize_grouped(x, cases.layout(counts), backend="reference")
    wq = mx.quantize_weights(
        cases.random_rows(3 * 40, 160, torch.bfloat16, rng).reshape(3, 40, 160), backend="reference"
    )
    y = check(xq, wq, counts, torch.bfloat16, backend)
    assert torch.isnan(y).all(dim=1).nonzero().flatten().tolist() == [4, 22]
    assert torch.isnan(y).any(dim=1).nonzero().flatten().tolist() == [4, 22]


def test_a_nan_weight_reaches_only_its_expert_and_column(backend: str, rng: torch.Generator) -> None:
    counts = [3, 4, 20]
    w = cases.random_rows(3 * 40, 160, torch.bfloat16, rng).reshape(3, 40, 160)
    w[1, 11, 159] = float("nan")
    xq = mx.quantize_grouped(cases.random_rows(27, 160, torch.bfloat16, rng), cases.layout(counts), backend="reference")
    y = check(xq, mx.quantize_weights(w, backend="reference"), counts, torch.bfloat16, backend)
    where = torch.isnan(y).nonzero()
    assert where.tolist() == [[row, 11] for row in (3, 4, 5, 6)]


@interpreted
@pytest.mark.parametrize("formulation", ["fp32", "scaled"])
@pytest.mark.parametrize("block_t", [16, 32, 64, 128])
def test_each_formulation_and_tile(
    formulation: Formulation, block_t: int, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    if formulation == "scaled" and kernel_module._triton_version() < (3, 9):
        pytest.skip(f"tl.dot_scaled is exact in the interpreter from Triton 3.9 on, this is {triton.__version__}")
    config = TritonGemmConfig(block_t, formulation, 4, 1)
    monkeypatch.setattr(kernel_module, "select_gemm_config", lambda *args: config)
    counts = [block_t - 1, 0, block_t + 1, 1]
    num_tokens = sum(counts) + 3
    check(*operands(counts, num_tokens, 136, 160, rng), counts, torch.bfloat16, "triton")


@interpreted
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=DTYPE_IDS)
def test_backends_agree(dtype: torch.dtype, rng: torch.Generator) -> None:
    """A/B: the whole path of each backend, quantizers included. The operands are equal, so only accumulation differs."""
    counts = [3, 0, 70, 17]
    x = cases.random_rows(90, 224, torch.bfloat16, rng)
    w = cases.random_rows(4 * 72, 224, torch.bfloat16, rng).reshape(4, 72, 224) * 0.05  # fp16 ends at 65504
    results = {}
    for name in ("triton", "reference"):
        with mx.use_backend(name):
            xq, wq = mx.quantize_grouped(x, cases.layout(counts)), mx.quantize_weights(w)
            results[name] = mx.grouped_gemm(xq, wq, out_dtype=dtype)
            magnitude = torch.zeros(90, 72, dtype=torch.float64)
            start = 0
            for e, count in enumerate(counts):
                rows = slice(start, start + count)
                magnitude[rows] = xq.dequantize()[rows].double().abs() @ wq.dequantize()[e].double().abs().T
                start += count
    difference = (results["triton"].double() - results["reference"].double()).abs()
    # Both may round the output, each to its own side of the truth.
    bound = 2 * tolerances.HALF_ULP[dtype] * results["reference"].double().abs() + tolerances.ACCUMULATION * magnitude
    assert bool((difference <= bound).all())
    assert mx.calc_diff(results["triton"], results["reference"]) < 1e-5


@interpreted
def test_the_main_job_stays_near_the_unquantized_product(rng: torch.Generator) -> None:
    """SGLang's measure: correct MXFP8 of normal data has calc_diff near 7e-4 against the full-precision product."""
    counts = [40, 0, 24]
    x = torch.randn(64, 512, generator=rng).bfloat16()
    w = torch.randn(3, 64, 512, generator=rng).bfloat16()
    full = torch.cat([x[:40].double() @ w[0].double().T, x[40:].double() @ w[2].double().T])
    for name in ("triton", "reference"):
        with mx.use_backend(name):
            y = mx.grouped_gemm(mx.quantize_grouped(x, cases.layout(counts)), mx.quantize_weights(w))
        assert 2e-4 < mx.calc_diff(y, full) < 1e-3


@pytest.mark.parametrize(
    ("capability", "version", "expected"),
    [
        (None, (3, 6), "fp32"),
        (None, (3, 8), "fp32"),
        (None, (3, 9), "scaled"),
        ((8, 9), (3, 9), "bf16"),
        ((9, 0), (3, 6), "bf16"),
        ((10, 0), (3, 6), "scaled"),
        ((10, 3), (3, 9), "scaled"),
        ((12, 0), (3, 6), "scaled"),
    ],
)
def test_select_formulation(capability: tuple[int, int] | None, version: tuple[int, int], expected: str) -> None:
    assert select_formulation(capability, version) == expected


@pytest.mark.parametrize("formulation", ["scaled", "bf16", "fp32"])
@pytest.mark.parametrize("interpreted", [False, True])
@given(num_tokens=st.integers(1, 10**6), num_experts=st.integers(1, 1024))
def test_select_gemm_config(formulation: Formulation, interpreted: bool, num_tokens: int, num_experts: int) -> None:
    config = select_gemm_config(num_tokens, num_experts, formulation, interpreted)
    assert config.formulation == formulation
    assert config.block_t in (16, 32, 64, 128)


@pytest.mark.parametrize(
    ("average", "formulation", "interpreted", "block_t", "num_warps", "num_stages"),
    [
        (1, "scaled", False, 16, 4, 4),
        (16, "scaled", False, 16, 4, 4),
        (17, "scaled", False, 32, 8, 4),
        (16, "bf16", False, 16, 8, 4),
        (32, "bf16", False, 32, 8, 4),
        (64, "scaled", False, 64, 8, 4),
        (65, "bf16", False, 128, 8, 3),
        (16, "fp32", True, 16, 4, 1),
        (17, "fp32", True, 64, 4, 1),
    ],
)
def test_tile_by_the_average_number_of_tokens(
    average: int, formulation: Formulation, interpreted: bool, block_t: int, num_warps: int, num_stages: int
) -> None:
    config = select_gemm_config(8 * average, 8, formulation, interpreted)
    assert config == TritonGemmConfig(block_t, formulation, num_warps, num_stages)


@given(counts=st.lists(st.integers(0, 300), min_size=1, max_size=20), block_t=st.sampled_from([16, 32, 64, 128]))
def test_token_tiles_bound_suffices(counts: list[int], block_t: int) -> None:
    assert sum(-(-count // block_t) for count in counts) <= token_tiles_bound(sum(counts), len(counts), block_t)


@given(num_tokens=st.integers(1, 2000), num_experts=st.integers(1, 20), block_t=st.sampled_from([16, 32, 64, 128]))
def test_token_tiles_bound_is_tight(num_tokens: int, num_experts: int, block_t: int) -> None:
    """One token each and the rest to one expert needs them all."""
    counts = [1] * min(num_tokens, num_experts)
    counts[0] += num_tokens - len(counts)
    assert sum(-(-count // block_t) for count in counts) == token_tiles_bound(num_tokens, num_experts, block_t)
