"""At the edges: NaN stays where it is, scales at both ends, equal bytes each time and anywhere."""

from __future__ import annotations

import bisect
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import cases
import moe_truth
import numpy as np
import pytest
import tolerances
import torch
import truth
from cases import bits, to_device
from products import from_bytes, operands, through_bf16

import hybrid_mxfp8 as mx
from hybrid_mxfp8.core.formats import scale_offset
from hybrid_mxfp8.core.scales import dequantize_grouped
from hybrid_mxfp8.triton_kernels import backend
from hybrid_mxfp8.triton_kernels.gemm import portable
from hybrid_mxfp8.triton_kernels.gemm.hopper_config import select_hopper_config

ON_GPU = cases.device() == "cuda"
COUNTS = {"few": [3, 0, 17, 1]} | ({"some": [3, 0, 200, 1, 70], "many": [300, 0, 700, 5]} if ON_GPU else {})
"""By tokens an expert, which choose the tile; interpreted always few."""


# ---------------------------------------------------------------- poison

POISONS = ("NaN", "Inf", "-Inf", "code 0x7F", "code 0xFF", "scale 255")


def poisoned(xq: mx.GroupedMXFP8, x: torch.Tensor, rows: Sequence[int], poison: str) -> mx.GroupedMXFP8:
    """xq, on the CPU, with one bad element or scale in each of these rows, in changing columns."""
    x, values, scales = x.clone(), bits(xq.values).clone(), xq.scales.clone()
    offsets, scale_offsets = xq.groups.expert_offsets.tolist(), xq.groups.scale_offsets.tolist()
    for i, row in enumerate(rows):
        column = (7 + 37 * i) % xq.k
        if poison.startswith("code"):
            values[row, column] = int(poison.split()[1], 16)
        elif poison.startswith("scale"):
            expert = bisect.bisect_right(offsets, row) - 1
            scale_row = scale_offsets[expert] + row - offsets[expert]
            scales.view(-1)[scale_offset(scale_row, column // 32, scales.shape[1])] = 255
        else:
            x[row, column] = float(poison)
    if poison in ("NaN", "Inf", "-Inf"):
        return mx.quantize_grouped(x, xq.groups, backend="reference")
    return mx.GroupedMXFP8(values.view(torch.float8_e4m3fn), scales, xq.groups)


def check_spoilt(y: torch.Tensor, expected: torch.Tensor, spoilt: torch.Tensor, what: object = "") -> None:
    """These rows are NaN all along, all others have the bytes they have without."""
    assert bool(torch.isnan(y[spoilt]).all()), what
    assert torch.equal(bits(y[~spoilt]), bits(expected[~spoilt])), what


@pytest.mark.parametrize(
    ("size", "dtype"),
    [*(("few", d) for d in cases.DTYPES), *((size, torch.bfloat16) for size in list(COUNTS)[1:])],
    ids=str,
)
def test_a_bad_row_spoils_only_itself(
    multiplier: str, device: str, size: str, dtype: torch.dtype, rng: torch.Generator
) -> None:
    """NaN or Inf in some rows."""
    counts, n, k = COUNTS[size], 40 if device == "cpu" else 136, 160
    total = sum(counts)
    x = cases.random_rows(total, k, torch.bfloat16, rng)
    clean = mx.quantize_grouped(x, cases.layout(counts), backend="reference")
    wq = mx.quantize_weights((torch.randn(len(counts), n, k, generator=rng) * 0.05).to(device), backend="reference")
    product = functools.partial(mx.grouped_gemm, out_dtype=dtype, backend=multiplier)
    expected = product(to_device(clean, device), wq)
    assert not bool(torch.isnan(expected).any())
    ends = list(itertools.accumulate(counts, initial=0))
    edges = sorted({row for end in ends for row in (end - 1, end) if 0 <= row < total})
    for poison, rows in itertools.product(POISONS, (edges, list(range(1, total, 3)))):
        y = product(to_device(poisoned(clean, x, rows, poison), device), wq)
        spoilt = torch.zeros(total, dtype=torch.bool, device=device)
        spoilt[rows] = True
        check_spoilt(y, expected, spoilt, poison)


@pytest.mark.parametrize("n", [40, 136])
@pytest.mark.parametrize("size", COUNTS)
def test_a_bad_expert_spoils_only_its_rows(
    multiplier: str, device: str, size: str, n: int, rng: torch.Generator
) -> None:
    """Weights, or scales, all NaN. A tile of 128 weight rows reaches into the next expert."""
    counts = COUNTS[size]
    xq, wq = operands(counts, sum(counts), n, 96, rng, device)
    expected = mx.grouped_gemm(xq, wq, backend=multiplier)
    ends = list(itertools.accumulate(counts, initial=0))
    for expert, what in itertools.product(range(len(counts)), ("codes", "scales")):
        values, scales = bits(wq.values).clone(), wq.scales.clone()
        (values if what == "codes" else scales)[expert] = 0x7F if what == "codes" else 255
        bad = mx.ExpertWeights(values.view(torch.float8_e4m3fn), scales)
        y = mx.grouped_gemm(xq, bad, backend=multiplier)
        spoilt = torch.zeros(sum(counts), dtype=torch.bool, device=device)
        spoilt[ends[expert] : ends[expert + 1]] = True
        check_spoilt(y, expected, spoilt, (expert, what))


def layer_of(
    device: str, backend: str, rng: torch.Generator, **shape: Any
) -> tuple[moe_truth.Layer, mx.ExpertWeights, mx.ExpertWeights, Callable[..., torch.Tensor]]:
    """A layer with biases and dropped choices; its weights; and forward(tokens, w13q, w2q, x)."""
    layer = moe_truth.to(moe_truth.make_layer(rng, bias=True, dropped=True, **shape), device)
    w13q, w2q = (mx.quantize_weights(w, backend="reference") for w in (layer.w13, layer.w2))
    bias = {"w13_bias": layer.w13_bias, "w2_bias": layer.w2_bias}

    def forward(
        tokens: Any = slice(None), w13: mx.ExpertWeights = w13q, w2: mx.ExpertWeights = w2q,
        x: torch.Tensor = layer.x,
    ) -> torch.Tensor:  # fmt: skip
        return mx.moe_forward(x[tokens], w13, w2, layer.ids[tokens], layer.weights[tokens], backend=backend, **bias)

    return layer, w13q, w2q, forward


@pytest.mark.parametrize("tokens", [5, 500] if ON_GPU else [5])
def test_bad_tokens_and_experts_of_a_layer(multiplier: str, device: str, tokens: int, rng: torch.Generator) -> None:
    """A bad token reaches its own output alone, a bad expert the tokens that chose it."""
    layer, w13q, w2q, forward = layer_of(device, multiplier, rng, tokens=tokens, experts=3)
    expected = forward()
    live = (layer.ids >= 0) & (layer.ids < 3)
    for bad in (float("nan"), float("inf")):
        x = layer.x.clone()
        x[::2, 5] = bad
        check_spoilt(forward(x=x), expected, (torch.arange(tokens, device=device) % 2 == 0) & live.any(1))
    for expert, (name, whole) in itertools.product(range(3), (("w13", w13q), ("w2", w2q))):
        scales = whole.scales.clone()
        scales[expert] = 255
        check_spoilt(forward(**{name: mx.ExpertWeights(whole.values, scales)}), expected, (layer.ids == expert).any(1))


# ---------------------------------------------------------------- scale bytes


NEUTRAL = 120
"""A scale byte by which sums of products with scale 254 stay below 2**128 on their way, too."""

SCALE_BYTES = (0, 1, 2, NEUTRAL, 254, 255)


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_scale_bytes_at_both_ends(multiplier: str, device: str, dtype: torch.dtype, rng: torch.Generator) -> None:
    """Each by each: subnormal, overflowing and NaN products, as float64 has them."""
    counts, n, k = [5, 0, 12], 40, 96
    for x_byte, w_byte in itertools.product(SCALE_BYTES, repeat=2):
        # Below 2 in magnitude, positive where scales leave fp32, so that no Inf meets its negative.
        codes = [torch.randint(0, 0x40, size, generator=rng, dtype=torch.uint8) for size in ((17, k), (3, n, k))]
        if x_byte + w_byte < 370:
            codes = [c | torch.randint(0, 2, c.shape, generator=rng, dtype=torch.uint8) << 7 for c in codes]
        else:
            codes = [c.clamp_min(0x30) for c in codes]
        x = codes[0].numpy(), np.full((17, k // 32), x_byte, np.uint8)
        w = codes[1].numpy(), np.full((3, n, k // 32), w_byte, np.uint8)
        y = mx.grouped_gemm(*from_bytes(x, w, counts, device), out_dtype=dtype, backend=multiplier)
        tolerances.check_gemm(y, x, w, counts, bf16_formulation=through_bf16(multiplier))
        if 255 in (x_byte, w_byte):
            assert bool(torch.isnan(y).all())


@pytest.mark.parametrize("side", ["x", "w"])
def test_every_code_by_every_scale(multiplier: str, device: str, side: str) -> None:
    """Each finite code by each scale up to 246 (beyond, fp32 overflows), picked out of a product by
    a 1: exact, but for what bf16 drops below 2**-133. The other operand is the identity."""
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(8, 1, 32).expand(8, 247, 32).reshape(-1, 32)
    codes = torch.where((codes & 0x7F) == 0x7F, 0, codes)
    scales = torch.arange(247, dtype=torch.int32).to(torch.uint8).repeat(8)[:, None]
    identity, ones = torch.eye(32, dtype=torch.uint8) * 0x38, torch.full((32, 1), 127, dtype=torch.uint8)
    exact = torch.from_numpy(truth.dequantize(codes.numpy(), scales.numpy()))
    if side == "x":
        x, w = (codes.numpy(), scales.numpy()), (identity[None].numpy(), ones[None].numpy())
    else:
        x, w = (identity.numpy(), ones.numpy()), (codes[None].numpy(), scales[None].numpy())
        exact = exact.T
    xq, wq = from_bytes(x, w, [x[0].shape[0]], device)
    error = (mx.grouped_gemm(xq, wq, out_dtype=torch.float32, backend=multiplier).cpu().double() - exact).abs()
    small = (scales[:, 0] < 3) if side == "w" else (scales < 3)
    assert float(torch.where(small, 0.0, error).max()) == 0.0
    assert float(error.max()) <= (tolerances.BF16_DROPPED if through_bf16(multiplier) else 0.0)


@pytest.mark.parametrize("size", COUNTS)
def test_scales_of_rows_that_do_not_exist(multiplier: str, device: str, size: str, rng: torch.Generator) -> None:
    """Those that fill up 128x4 tiles: whatever they hold, the product is the same."""
    counts, n, cols = COUNTS[size], 40, 5
    xq, wq = operands(counts, sum(counts), n, 32 * cols, rng, device)
    expected = mx.grouped_gemm(xq, wq, out_dtype=torch.float32, backend=multiplier)
    x_linear = mx.unswizzle_scales(xq.scales, xq.scales.shape[0], cols)
    w_linear = mx.unswizzle_scales(wq.scales, wq.scales.shape[1], cols)
    rows = torch.zeros(x_linear.shape[0], dtype=torch.bool)
    for start, count in zip(xq.groups.scale_offsets.tolist(), counts, strict=False):
        rows[start : start + count] = True
    x_linear[~rows] = 255
    w_linear[:, n:] = 255
    bad_x = mx.GroupedMXFP8(xq.values, mx.swizzle_scales(x_linear), xq.groups)
    bad_w = mx.ExpertWeights(wq.values, mx.swizzle_scales(w_linear))
    assert torch.equal(mx.grouped_gemm(bad_x, bad_w, out_dtype=torch.float32, backend=multiplier), expected)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_subnormal_inputs(backend: str, device: str, dtype: torch.dtype, rng: torch.Generator) -> None:
    """None is flushed that e4m3 with scale 2**-127 or more can hold."""
    smallest = torch.finfo(dtype).smallest_normal
    x = (torch.rand(20, 64, generator=rng, dtype=torch.float64) * smallest).to(dtype)
    got = mx.quantize_grouped(x.to(device), cases.layout([20], device=device), backend=backend).dequantize()
    assert torch.equal(got.cpu().double(), torch.from_numpy(truth.dequantize(*truth.quantize(truth.doubles(x)))))
    assert bool((got > 0).float().mean() > 0.9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_top_of_the_range_becomes_two_to_the_128(multiplier: str, device: str, dtype: torch.dtype) -> None:
    """Above 248 * 2**120, e4m3's nearest is 256 * 2**120: a value of MXFP8, and beyond fp32."""
    x = torch.zeros(3, 32, dtype=dtype)
    x[0, 0], x[2, 0] = torch.finfo(dtype).max, -torch.finfo(dtype).max
    x[1, 0] = 248 * 2.0**120 * (1 - 2.0**-7)
    xq = mx.quantize_grouped(x.to(device), cases.layout([3], device=device), backend=multiplier)
    assert xq.dequantize()[:, 0].tolist() == [float("inf"), 240 * 2.0**120, float("-inf")]
    groups = xq.groups
    exact = dequantize_grouped(xq.values, xq.scales, groups.expert_offsets, groups.scale_offsets, torch.float64)
    assert exact[:, 0].tolist() == [2.0**128, 240 * 2.0**120, -(2.0**128)]
    w = torch.zeros(1, 8, 32, device=device)
    w[0, 0, 0] = 2.0**-40
    wq = mx.quantize_weights(w, backend=multiplier)
    y = mx.grouped_gemm(xq, wq, out_dtype=torch.float32, backend=multiplier)
    assert float(y[1, 0]) == 240 * 2.0**80
    assert float(y[0, 0]) in (2.0**88, float("inf"))  # the reference's, in float64; a kernel's, in fp32 or bf16


# ---------------------------------------------------------------- the same bytes each time


def repeats(device: str, backend: str) -> int:
    """An interpreted kernel has no two things at once that could change places."""
    return 5 if (device, backend) == ("cpu", "triton") else 100


@pytest.mark.parametrize("tokens", [2, 40, 300] if ON_GPU else [10])
def test_products_repeat_their_bytes(multiplier: str, device: str, tokens: int, rng: torch.Generator) -> None:
    """Quantization included."""
    counts, n, k = ([3, 0, 10], 40, 160) if device == "cpu" else ([tokens, 0, 2 * tokens, 1] * 4, 1032, 1056)
    x = cases.random_rows(sum(counts) + 7, k, torch.bfloat16, rng, device)
    x[2, 3] = float("nan")
    groups = cases.layout(counts, x.shape[0], device)
    wq = mx.quantize_weights(torch.randn(len(counts), n, k, generator=rng).to(device), backend=multiplier)

    def run() -> tuple[mx.GroupedMXFP8, torch.Tensor]:
        xq = mx.quantize_grouped(x, groups, out=cases.poisoned_output(groups, k), backend=multiplier)
        return xq, mx.grouped_gemm(xq, wq, out_dtype=torch.float32, backend=multiplier)[: sum(counts)]

    xq, y = run()
    for _ in range(repeats(device, multiplier)):
        again, product = run()
        cases.same_bytes(again, xq)
        assert torch.equal(bits(product), bits(y))


@pytest.mark.parametrize("tokens", [3, 1500] if ON_GPU else [3])
def test_layers_repeat_their_bytes(multiplier: str, device: str, tokens: int, rng: torch.Generator) -> None:
    """One launch of routing, and three."""
    shape = {"experts": 3} if device == "cpu" else {"experts": 16, "hidden": 256, "intermediate": 128, "top_k": 4}
    *_, forward = layer_of(device, multiplier, rng, tokens=tokens, **shape)
    first = forward()
    for _ in range(repeats(device, multiplier)):
        assert torch.equal(forward(), first)


def test_deterministic_algorithms_are_what_runs(
    backend: str, device: str, rng: torch.Generator, request: pytest.FixtureRequest
) -> None:
    """PyTorch's switch: other operators raise, and new memory is NaN. Any device is the default."""
    request.addfinalizer(lambda: torch.use_deterministic_algorithms(False))
    torch.use_deterministic_algorithms(True)
    layer, *_, forward = layer_of(device, backend, rng)
    with torch.device("meta"):
        y = forward()
    assert mx.signal_to_noise_db(moe_truth.forward(layer), y.cpu()) > 20.0


# ---------------------------------------------------------------- in any company


def check_any_company(
    counts: Sequence[int], n: int, k: int, dtype: torch.dtype, rng: torch.Generator, device: str, backend: str
) -> None:
    """An expert's rows have the same bytes alone, in any order, padded, split, and beside other
    rows and other weights.

    Normal data; interpreted, small integers, which e4m3 holds and whose products fp32 adds up
    without rounding: NumPy multiplies there, whose order of additions depends on where a row lies
    in its tile.
    """
    if (device, backend) == ("cpu", "triton"):
        integers = [torch.randint(-8, 9, (count, k), generator=rng).bfloat16() for count in (*counts, len(counts) * n)]
        rows, w = integers[:-1], integers[-1].view(len(counts), n, k)
    else:
        rows = [cases.random_rows(count, k, torch.bfloat16, rng).to(device) for count in counts]
        w = (torch.randn(len(counts), n, k, generator=rng) * 0.05).to(device)

    def product(
        rows: Sequence[torch.Tensor], experts: Sequence[int], padding: int = 0, w: torch.Tensor = w
    ) -> list[torch.Tensor]:
        """The product of each expert's rows, from one call with these experts' weights."""
        counts = [part.shape[0] for part in rows]
        x = torch.cat([*rows, torch.full((padding, k), float("nan"), dtype=rows[0].dtype, device=device)])
        groups = cases.layout(counts, x.shape[0], device)
        xq = mx.quantize_grouped(x, groups, out=cases.poisoned_output(groups, k), backend=backend)
        wq = mx.quantize_weights(w[list(experts)], backend=backend)
        out = cases.poisoned_product(x.shape[0], n, dtype, device)
        y = mx.grouped_gemm(xq, wq, out_dtype=dtype, out=out, backend=backend)
        assert bool(torch.isnan(y[sum(counts) :]).all())
        return list(y[: sum(counts)].split(counts))

    def check(got: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor], how: str) -> None:
        for e, (a, b) in enumerate(zip(got, wanted, strict=True)):
            assert torch.equal(bits(a), bits(b)), f"{how}: place {e}"

    experts = list(range(len(rows)))
    expected = product(rows, experts)
    for _ in range(3):
        order = torch.randperm(len(experts), generator=rng).tolist()
        check(product([rows[e] for e in order], order), [expected[e] for e in order], f"order {order}")
    for padding in (1, 130):
        check(product(rows, experts, padding), expected, f"{padding} rows of padding")
    halves = [(part[: part.shape[0] // 3], part[part.shape[0] // 3 :]) for part in rows]
    first, second = (product([half[i] for half in halves], experts) for i in (0, 1))
    check([torch.cat(pair) for pair in zip(first, second, strict=True)], expected, "two batches")
    both = product([half for pair in halves for half in pair], [e for e in experts for _ in (0, 1)])
    joined = [torch.cat(both[2 * e : 2 * e + 2]) for e in experts]
    check(joined, expected, "one batch, each expert twice, half its rows each")
    for e in experts:
        check(product([rows[e]], [e]), [expected[e]], f"expert {e} alone")
        others = [part if i == e else torch.full_like(part, float("nan")) for i, part in enumerate(rows)]
        infinite = torch.full_like(w, torch.inf)
        infinite[e] = w[e]
        check([product(others, experts, w=infinite)[e]], [expected[e]], f"expert {e} beside NaN and Inf")


def configurations(kernel: str, device: str) -> list[Any]:
    """All that a kernel is ever run with."""
    if kernel == "hopper":
        return [select_hopper_config(8 * average, 8) for average in (1, 32, 64, 128, 1000)]
    capability = torch.cuda.get_device_capability() if device == "cuda" else None
    formulation = portable.select_formulation(capability, portable.triton_version())
    if device == "cpu":
        return [portable.TritonGemmConfig(block_t, formulation, 4, 1) for block_t in (16, 64)]
    return [portable.select_gemm_config(8 * average, 8, formulation) for average in (1, 32, 64, 1000)]


def pin(kernel: str, configuration: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run every problem with this configuration."""
    module, name = (backend, "_hopper_config") if kernel == "hopper" else (portable, "select_gemm_config")
    monkeypatch.setattr(module, name, lambda *args: configuration)
    cases.forget_calls()


def test_any_company_with_a_kernel(
    kernel: str, device: str, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within a configuration, which is what is promised."""
    counts, n, k = ([5, 18, 0, 2], 16, 64) if device == "cpu" else ([5, 33, 0, 2, 300], 136, 288)
    for configuration in configurations(kernel, device):
        pin(kernel, configuration, monkeypatch)
        check_any_company(counts, n, k, torch.float32, rng, device, "triton")


def test_any_company_with_the_reference(device: str, rng: torch.Generator) -> None:
    """Its sums are float64, and rounded once."""
    check_any_company([5, 33, 0, 2, 70], 72, 160, torch.bfloat16, rng, device, "reference")


@pytest.mark.parametrize("tokens", [5, 400] if ON_GPU else [5])
def test_a_tokens_choices_in_any_company(multiplier: str, device: str, tokens: int, rng: torch.Generator) -> None:
    """moe_forward of a batch, and of its tokens in another order: the same bytes."""
    *_, forward = layer_of(device, multiplier, rng, tokens=tokens, experts=4)
    expected = forward()
    for order in (torch.arange(tokens).flip(0), *(torch.randperm(tokens, generator=rng) for _ in range(2))):
        assert torch.equal(forward(order.to(device)), expected[order.to(device)])
    if tokens < 100:  # a configuration given
        assert torch.equal(torch.cat([forward([i]) for i in range(tokens)]), expected)
