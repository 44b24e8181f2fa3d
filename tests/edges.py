"""What must hold for the rows of a product whatever stands beside them; shared by the tests for CPUs and for GPUs.

Each function checks one promise on one device and returns how many things it checked, to be counted.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import cases
import moe_truth
import tolerances
import torch
import truth

import hybrid_mxfp8 as mx
from hybrid_mxfp8.core.formats import scale_offset


def to_device(xq: mx.GroupedMXFP8, device: str) -> mx.GroupedMXFP8:
    """The same operand elsewhere."""
    groups = xq.groups
    there = mx.GroupLayout(
        groups.tokens_per_expert.to(device),
        groups.expert_offsets.to(device),
        groups.scale_offsets.to(device),
        groups.num_tokens,
    )
    return mx.GroupedMXFP8(xq.values.to(device), xq.scales.to(device), there)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Its bytes: two NaN are equal if they are the same NaN."""
    return tensor.contiguous().view(torch.uint8)


# ---------------------------------------------------------------- poison

POISONS = ("NaN", "Inf", "-Inf", "code 0x7F", "code 0xFF", "scale 255")


def poisoned(xq: mx.GroupedMXFP8, x: torch.Tensor, rows: Sequence[int], poison: str) -> mx.GroupedMXFP8:
    """xq, on the CPU, with one bad element or scale in each of these rows, never in the same column twice running."""
    values, scales = bits(xq.values).clone(), xq.scales.clone()
    offsets, scale_offsets = xq.groups.expert_offsets.tolist(), xq.groups.scale_offsets.tolist()
    if poison in ("NaN", "Inf", "-Inf"):
        x = x.clone()
    for i, row in enumerate(rows):
        column = (7 + 37 * i) % xq.k
        if poison.startswith("code"):
            values[row, column] = int(poison.split()[1], 16)
        elif poison.startswith("scale"):
            expert = next(e for e in range(len(offsets) - 1) if offsets[e] <= row < offsets[e + 1])
            scale_row = scale_offsets[expert] + row - offsets[expert]
            scales.view(-1)[scale_offset(scale_row, column // 32, scales.shape[1])] = 255
        else:
            x[row, column] = float(poison)
    if poison in ("NaN", "Inf", "-Inf"):
        return mx.quantize_grouped(x, xq.groups, backend="reference")
    return mx.GroupedMXFP8(values.view(torch.float8_e4m3fn), scales, xq.groups)


def check_poisoned_rows(
    counts: Sequence[int], n: int, k: int, dtype: torch.dtype, rng: torch.Generator, device: str, backend: str
) -> int:
    """NaN or Inf in some rows: those are NaN all along, and all others have the bytes they have without."""
    total = sum(counts)
    x = cases.random_rows(total, k, torch.bfloat16, rng)
    clean = mx.quantize_grouped(x, cases.layout(counts), backend="reference")
    wq = mx.quantize_weights((torch.randn(len(counts), n, k, generator=rng) * 0.05).to(device), backend=backend)
    expected = mx.grouped_gemm(to_device(clean, device), wq, out_dtype=dtype, backend=backend)
    assert not bool(torch.isnan(expected).any())
    ends = list(itertools.accumulate(counts, initial=0))
    edges = sorted({row for end in ends for row in (end - 1, end) if 0 <= row < total})
    checked = 0
    for poison, rows in itertools.product(POISONS, (edges, list(range(1, total, 3)))):
        y = mx.grouped_gemm(to_device(poisoned(clean, x, rows, poison), device), wq, out_dtype=dtype, backend=backend)
        spoilt = torch.zeros(total, dtype=torch.bool, device=device)
        spoilt[rows] = True
        assert bool(torch.isnan(y[spoilt]).all()), poison
        assert torch.equal(bits(y[~spoilt]), bits(expected[~spoilt])), poison
        checked += len(rows)
    return checked


def check_poisoned_experts(
    counts: Sequence[int], n: int, k: int, dtype: torch.dtype, rng: torch.Generator, device: str, backend: str
) -> int:
    """An expert whose weights, or scales, are all NaN: its rows are NaN, and the others' bytes stay."""
    x = cases.random_rows(sum(counts), k, torch.bfloat16, rng).to(device)
    xq = mx.quantize_grouped(x, cases.layout(counts, device=device), backend=backend)
    wq = mx.quantize_weights((torch.randn(len(counts), n, k, generator=rng) * 0.05).to(device), backend=backend)
    expected = mx.grouped_gemm(xq, wq, out_dtype=dtype, backend=backend)
    ends = list(itertools.accumulate(counts, initial=0))
    checked = 0
    for expert, what in itertools.product(range(len(counts)), ("codes", "scales")):
        values, scales = bits(wq.values).clone(), wq.scales.clone()
        (values if what == "codes" else scales)[expert] = 0x7F if what == "codes" else 255
        bad = mx.ExpertWeights(values.view(torch.float8_e4m3fn), scales)
        y = mx.grouped_gemm(xq, bad, out_dtype=dtype, backend=backend)
        spoilt = torch.zeros(sum(counts), dtype=torch.bool, device=device)
        spoilt[ends[expert] : ends[expert + 1]] = True
        assert bool(torch.isnan(y[spoilt]).all()), (expert, what)
        assert torch.equal(bits(y[~spoilt]), bits(expected[~spoilt])), (expert, what)
        checked += counts[expert]
    return checked


def check_poisoned_tokens_of_a_layer(rng: torch.Generator, tokens: int, device: str, backend: str) -> int:
    """A whole MoE layer: a bad token reaches its own output, a bad expert the tokens that chose it, and nothing else."""
    layer = moe_truth.to(moe_truth.make_layer(rng, tokens=tokens, bias=True, dropped=True), device)
    w13q, w2q = (mx.quantize_weights(w, backend=backend) for w in (layer.w13, layer.w2))

    def forward(x: torch.Tensor, w13q: mx.ExpertWeights, w2q: mx.ExpertWeights) -> torch.Tensor:
        bias = {"w13_bias": layer.w13_bias, "w2_bias": layer.w2_bias}
        return mx.moe_forward(x, w13q, w2q, layer.ids, layer.weights, backend=backend, **bias)

    def check(y: torch.Tensor, spoilt: torch.Tensor) -> int:
        assert bool(torch.isnan(y[spoilt]).all())
        assert torch.equal(bits(y[~spoilt]), bits(expected[~spoilt]))
        return int(spoilt.sum())

    expected = forward(layer.x, w13q, w2q)
    experts = layer.w2.shape[0]
    live = (layer.ids >= 0) & (layer.ids < experts)
    checked = 0
    for bad in (float("nan"), float("inf")):
        x = layer.x.clone()
        x[::2, 5] = bad
        rows = torch.arange(tokens, device=device) % 2 == 0
        checked += check(forward(x, w13q, w2q), rows & live.any(1))
    for expert in range(experts):
        chose = (layer.ids == expert).any(1)
        for name in ("w13", "w2"):
            whole = w13q if name == "w13" else w2q
            scales = whole.scales.clone()
            scales[expert] = 255
            spoilt = mx.ExpertWeights(whole.values, scales)
            y = forward(layer.x, spoilt, w2q) if name == "w13" else forward(layer.x, w13q, spoilt)
            checked += check(y, chose)
    return checked


# ---------------------------------------------------------------- scale bytes


def scale_byte_operands(
    x_byte: int, w_byte: int, rng: torch.Generator
) -> tuple[tuple[truth.Bytes, truth.Bytes], tuple[truth.Bytes, truth.Bytes], list[int]]:
    """Codes below 2 in magnitude, positive where the product of the scales leaves fp32, so that no Inf meets its negative."""
    counts, n, k = [5, 0, 12], 40, 96
    codes = torch.randint(0, 0x40, (17, k), generator=rng, dtype=torch.uint8)
    w_codes = torch.randint(0, 0x40, (3, n, k), generator=rng, dtype=torch.uint8)
    if x_byte + w_byte < 370:
        codes |= torch.randint(0, 2, codes.shape, generator=rng, dtype=torch.uint8) << 7
        w_codes |= torch.randint(0, 2, w_codes.shape, generator=rng, dtype=torch.uint8) << 7
    else:
        codes, w_codes = codes.clamp_min(0x30), w_codes.clamp_min(0x30)
    scales = torch.full((17, k // 32), x_byte, dtype=torch.uint8)
    w_scales = torch.full((3, n, k // 32), w_byte, dtype=torch.uint8)
    return (codes.numpy(), scales.numpy()), (w_codes.numpy(), w_scales.numpy()), counts


def from_bytes(
    x: tuple[truth.Bytes, truth.Bytes], w: tuple[truth.Bytes, truth.Bytes], counts: Sequence[int], device: str
) -> tuple[mx.GroupedMXFP8, mx.ExpertWeights]:
    """Operands of these codes and row-major scales."""
    groups = cases.layout(counts)
    values, stored = truth.grouped_bytes(*x, counts, groups.scale_rows, cases.POISON)
    swizzled = torch.from_numpy(stored).reshape(groups.scale_rows, -1)
    xq = mx.GroupedMXFP8(torch.from_numpy(values).view(torch.float8_e4m3fn), swizzled, groups)
    wq = mx.ExpertWeights.from_linear_scales(*(torch.from_numpy(part).to(device) for part in w))
    return to_device(xq, device), wq


NEUTRAL = 120
"""A scale byte by which sums of products with scale 254 stay below 2**128 on their way, too."""

SCALE_BYTES = (0, 1, NEUTRAL, 254, 255)


def check_scale_bytes(
    dtype: torch.dtype, rng: torch.Generator, device: str, backend: str, *, through_bf16: bool
) -> int:
    """Each of these by each: subnormal, overflowing and NaN products, as float64 has them. Returns rows that are NaN."""
    checked = 0
    for x_byte, w_byte in itertools.product(SCALE_BYTES, repeat=2):
        x, w, counts = scale_byte_operands(x_byte, w_byte, rng)
        xq, wq = from_bytes(x, w, counts, device)
        y = mx.grouped_gemm(xq, wq, out_dtype=dtype, backend=backend)
        tolerances.check_gemm(y, x, w, counts, bf16_formulation=through_bf16)
        if 255 in (x_byte, w_byte):
            assert bool(torch.isnan(y).all())
            checked += y.shape[0]
    return checked


def check_every_code_by_every_scale(side: str, device: str, backend: str, *, through_bf16: bool) -> int:
    """Each finite code by each scale byte up to 246 (beyond, fp32 overflows), picked out of a product by a 1: exact.

    ``side`` says which operand holds them: ``x`` or ``w``. The other is the identity.
    """
    bytes_in_order = torch.arange(247, dtype=torch.int32).to(torch.uint8)
    codes = (
        torch.arange(256, dtype=torch.int32).to(torch.uint8).view(8, 1, 32).expand(8, 247, 32).reshape(-1, 32).clone()
    )
    codes[(codes & 0x7F) == 0x7F] = 0
    scales = bytes_in_order.repeat(8)[:, None]
    identity = torch.eye(32, dtype=torch.uint8) * 0x38
    ones = torch.full((32, 1), 127, dtype=torch.uint8)
    exact = torch.from_numpy(truth.dequantize(codes.numpy(), scales.numpy()))
    if side == "x":
        x, w = (codes.numpy(), scales.numpy()), (identity[None].numpy(), ones[None].numpy())
    else:
        x, w = (identity.numpy(), ones.numpy()), (codes[None].numpy(), scales[None].numpy())
        exact = exact.T
    y = mx.grouped_gemm(*from_bytes(x, w, [x[0].shape[0]], device), out_dtype=torch.float32, backend=backend)
    error = (y.cpu().double() - exact).abs()
    allowed = tolerances.BF16_DROPPED if through_bf16 else 0.0
    small = (scales[:, 0] < 3) if side == "w" else (scales < 3)
    assert float(torch.where(small, 0.0, error).max()) == 0.0
    assert float(error.max()) <= allowed
    return codes.numel()


def check_padding_rows(counts: Sequence[int], n: int, k: int, rng: torch.Generator, device: str, backend: str) -> None:
    """Scales of rows that don't exist, those that fill up 128x4 tiles: whatever they hold, the product is the same."""
    x = cases.random_rows(sum(counts), k, torch.bfloat16, rng)
    xq = mx.quantize_grouped(x, cases.layout(counts), backend="reference")
    wq = mx.quantize_weights(torch.randn(len(counts), n, k, generator=rng), backend="reference")
    cols = k // 32
    x_linear = mx.unswizzle_scales(xq.scales, xq.scales.shape[0], cols)
    w_linear = mx.unswizzle_scales(wq.scales, wq.scales.shape[1], cols)
    rows = torch.zeros(x_linear.shape[0], dtype=torch.bool)
    for start, count in zip(xq.groups.scale_offsets.tolist(), counts, strict=False):
        rows[start : start + count] = True
    x_linear[~rows] = 255
    w_linear[:, n:] = 255
    there = to_device(xq, device)
    expected = mx.grouped_gemm(
        there, mx.ExpertWeights(wq.values.to(device), wq.scales.to(device)), out_dtype=torch.float32, backend=backend
    )
    bad_x = mx.GroupedMXFP8(there.values, mx.swizzle_scales(x_linear).to(device), there.groups)
    bad_w = mx.ExpertWeights(wq.values.to(device), mx.swizzle_scales(w_linear).to(device))
    y = mx.grouped_gemm(bad_x, bad_w, out_dtype=torch.float32, backend=backend)
    assert torch.equal(y, expected)


# ---------------------------------------------------------------- company


@dataclass(frozen=True)
class Company:
    """Rows of each expert, and its weights; a call may take any of them, in any order."""

    rows: list[torch.Tensor]  # each (tokens, K)
    weights: torch.Tensor  # (E, N, K)
    backend: str
    dtype: torch.dtype

    def product(self, rows: Sequence[torch.Tensor], experts: Sequence[int], padding: int = 0) -> list[torch.Tensor]:
        """One call for these rows with the weights of these experts; the product of each, padding rows left out."""
        device = self.weights.device
        counts = [part.shape[0] for part in rows]
        k = self.weights.shape[2]
        x = torch.cat([*rows, torch.full((padding, k), float("nan"), dtype=rows[0].dtype, device=device)])
        groups = cases.layout(counts, x.shape[0], str(device))
        xq = mx.quantize_grouped(x, groups, out=cases.poisoned_output(groups, k), backend=self.backend)
        wq = mx.quantize_weights(self.weights[list(experts)], backend=self.backend)
        out = cases.poisoned_product(x.shape[0], self.weights.shape[1], self.dtype, device)
        y = mx.grouped_gemm(xq, wq, out_dtype=self.dtype, out=out, backend=self.backend)
        assert bool(torch.isnan(y[sum(counts) :]).all())
        return list(y[: sum(counts)].split(counts))


def make_company(
    counts: Sequence[int], n: int, k: int, dtype: torch.dtype, rng: torch.Generator, device: str, backend: str,
    exact: bool = False,
) -> Company:  # fmt: skip
    """Normal data; or small integers, which e4m3 holds and whose products fp32 adds up without rounding, in any order."""
    if exact:
        integers = [torch.randint(-8, 9, (count, k), generator=rng).bfloat16() for count in (*counts, len(counts) * n)]
        rows = [part.to(device) for part in integers[:-1]]
        return Company(rows, integers[-1].view(len(counts), n, k).to(device), backend, dtype)
    rows = [cases.random_rows(count, k, torch.bfloat16, rng).to(device) for count in counts]
    weights = (torch.randn(len(counts), n, k, generator=rng) * 0.05).to(device)
    return Company(rows, weights, backend, dtype)


def check_any_company(c: Company, rng: torch.Generator) -> int:
    """An expert's rows have the same bytes alone, in any order, padded, split, and beside other rows and other weights."""
    experts = list(range(len(c.rows)))
    expected = c.product(c.rows, experts)
    checked = 0

    def check(got: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor], how: str) -> int:
        for e, (a, b) in enumerate(zip(got, wanted, strict=True)):
            assert torch.equal(bits(a), bits(b)), f"{how}: place {e}"
        return 1

    for _ in range(4):
        order = torch.randperm(len(experts), generator=rng).tolist()
        got = c.product([c.rows[e] for e in order], order)
        checked += check(got, [expected[e] for e in order], f"order {order}")
    for e in experts:
        checked += check(c.product([c.rows[e]], [e]), [expected[e]], f"expert {e} alone")
    for padding in (1, 130):
        checked += check(c.product(c.rows, experts, padding), expected, f"{padding} rows of padding")
    halves = [(part[: part.shape[0] // 3], part[part.shape[0] // 3 :]) for part in c.rows]
    first, second = (c.product([half[i] for half in halves], experts) for i in (0, 1))
    checked += check([torch.cat(pair) for pair in zip(first, second, strict=True)], expected, "two batches")
    both = c.product([half for pair in halves for half in pair], [e for e in experts for _ in (0, 1)])
    checked += check(
        [torch.cat(both[2 * e : 2 * e + 2]) for e in experts],
        expected,
        "one batch, each expert twice, half its rows each",
    )
    for e in experts:
        others = Company(
            [part if i == e else torch.full_like(part, float("nan")) for i, part in enumerate(c.rows)],
            torch.where(
                (torch.arange(len(experts), device=c.weights.device) == e)[:, None, None], c.weights, torch.inf
            ),
            c.backend,
            c.dtype,
        )
        got = others.product(others.rows, experts)
        checked += check([got[e]], [expected[e]], f"expert {e} beside NaN and Inf")
    return checked
