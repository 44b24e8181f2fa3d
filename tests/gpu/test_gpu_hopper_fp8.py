"""The Hopper FP8 grouped GEMM in each configuration that is ever chosen."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import cases
import pytest
import torch

import hybrid_mxfp8 as mx
from hybrid_mxfp8.triton_kernels import backend
from hybrid_mxfp8.triton_kernels.gemm import hopper_fp8
from hybrid_mxfp8.triton_kernels.gemm.hopper_fp8_config import HopperFp8Config, select_hopper_fp8_config

pytestmark = pytest.mark.gpu

CONFIGS = [
    select_hopper_fp8_config(average, 1, squares) for average, squares in ((1, False), (1000, False), (1000, True))
]
UNITS = 33 * 2.0**-13
"""What FP8 units may lose, of the sum of magnitudes: they align 32 products and the sum so far to
the largest, and cut what lies below 13 bits. Cut, not rounded: of one sign it adds up."""

Operands = tuple[mx.GroupedMXFP8, mx.ExpertWeights]


@pytest.fixture(autouse=True)
def _hopper() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")


@pytest.fixture(params=CONFIGS, ids=lambda config: f"{config.block_t}{' squares' * config.squares}")
def config(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> HopperFp8Config:
    """Forced for any problem of groups of 128."""
    monkeypatch.setattr(backend, "_hopper_fp8_config", lambda problem: request.param)
    cases.forget_calls()
    found: HopperFp8Config = request.param
    return found


def rows(kind: str, count: int, k: int, rng: torch.Generator) -> torch.Tensor:
    """(count, K) bf16 of one kind of data."""
    x = torch.randn(count, k, generator=rng)
    if kind == "heavy-tailed":
        x = x / torch.randn(count, k, generator=rng).abs().clamp(min=1e-3) ** 0.5
    elif kind == "outlier channels":
        x[:, torch.randperm(k, generator=rng)[: k // 64]] *= 100
    elif kind == "SwiGLU":
        x = torch.nn.functional.silu(2 * x) * torch.randn(count, k, generator=rng)
    return x.bfloat16().cuda()


def made(
    counts: Sequence[int], t: int, n: int, k: int, rng: torch.Generator, kind: str = "normal", squares: bool = False
) -> Operands:
    w = rows("normal", len(counts) * n, k, rng).view(len(counts), n, k) * k**-0.5
    groups = cases.layout(counts, t, "cuda")
    xq = mx.quantize_grouped(rows(kind, t, k, rng), groups, scale_group=128)
    return xq, mx.quantize_weights(w, scale_group=128).regrouped(128, squares=squares)[0]


def product(x: mx.GroupedMXFP8, w: mx.ExpertWeights, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    out = cases.poisoned_product(x.groups.num_tokens, w.n, dtype, "cuda")
    return mx.grouped_gemm(x, w, out_dtype=dtype, out=out, backend="triton")


def exact(x: mx.GroupedMXFP8, w: mx.ExpertWeights, counts: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """(product, product of magnitudes) of the rows that experts own, fp64."""
    xd, wd = x.dequantize().double(), w.dequantize().double()
    parts = [
        (xd[start:end] @ wd[e].T, xd[start:end].abs() @ wd[e].abs().T)
        for e, (start, end) in enumerate(itertools.pairwise(itertools.accumulate(counts, initial=0)))
    ]
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def check(x: mx.GroupedMXFP8, w: mx.ExpertWeights, counts: Sequence[int], dtype: torch.dtype = torch.float32) -> None:
    """Within the units' bound; rows that no expert owns are left as they are."""
    y, (ref, magnitude) = product(x, w, dtype), exact(x, w, counts)
    used = sum(counts)
    assert bool(y[used:].isnan().all())
    y = y[:used].double()
    nan = ref.isnan()
    assert torch.equal(y.isnan(), nan)
    bound = UNITS * magnitude + torch.finfo(dtype).eps * ref.abs() + torch.finfo(dtype).tiny
    assert bool((nan | ((y - ref).abs() <= bound) | (y == ref.to(dtype).double())).all())


@pytest.mark.parametrize("kind", ["normal", "heavy-tailed", "outlier channels", "SwiGLU"])
def test_accuracy(kind: str, config: HopperFp8Config, rng: torch.Generator) -> None:
    """At least 60 dB from the exact product of the same operands."""
    counts = [100, 1, 0, 300]
    x, w = made(counts, 401, 512, 7168, rng, kind, config.squares)
    y, ref = product(x, w), exact(x, w, counts)[0]
    assert mx.signal_to_noise_db(y, ref) >= 60


@pytest.mark.sanitizer
def test_a_few_tiles(config: HopperFp8Config, rng: torch.Generator) -> None:
    """Full and ragged ones, an empty expert, a second tile of weights, several steps along K."""
    counts = [3, 0, 65, 1]
    check(*made(counts, 72, 264, 416, rng, squares=config.squares), counts, torch.bfloat16)


@pytest.mark.parametrize("name", [name for name, (_, t) in cases.RAGGED.items() if t])
def test_ragged(name: str, config: HopperFp8Config, rng: torch.Generator) -> None:
    counts, num_tokens = cases.RAGGED[name]
    check(*made(counts, num_tokens, 136, 160, rng, squares=config.squares), counts)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize(("n", "k"), [(8, 32), (128, 128), (264, 288), (384, 1056)])
def test_shapes_and_dtypes(n: int, k: int, dtype: torch.dtype, config: HopperFp8Config, rng: torch.Generator) -> None:
    counts = [3, 0, 64, 65, 128, 129, 1, 270]
    check(*made(counts, 680, n, k, rng, squares=config.squares), counts, dtype)


@pytest.mark.parametrize("experts", [1, 33, 512])
def test_any_number_of_experts(experts: int, rng: torch.Generator) -> None:
    counts = [(7 * e) % 5 for e in range(experts)]
    check(*made(counts, sum(counts) + 3, 64, 64, rng), counts)


def test_special_values(config: HopperFp8Config, rng: torch.Generator) -> None:
    """Scale bytes 0, 1, 254 and 255 on either side, a NaN code, a product beyond fp32."""
    counts, n, k = [40, 30], 136, 384
    codes_x, codes_w = (
        torch.randint(1, 0x39, shape, generator=rng, dtype=torch.uint8) for shape in ((70, k), (2, n, k))
    )  # positive, at most 1, so that nothing but scales makes Inf
    scales_x = torch.full((70, k // 32), 127, dtype=torch.uint8)
    scales_w = torch.full((2, n, k // 32), 127, dtype=torch.uint8)
    codes_x[10, 200] = codes_w[1, 10, 7] = 0x7F
    codes_w[:, 3, 128:256] = codes_x[3, 128:256] = 1  # 2**-9: times 2**127 it is finite
    scales_x[20, :4] = 254
    for i, b in enumerate((0, 1, 254, 255)):
        scales_x[i + 1, 4:8] = b
        if not config.squares:
            scales_w[:, i + 1, 4:8] = b
    if config.squares:  # none above 1
        for e, rows_of, columns, b in ((0, 0, 4, 0), (0, 1, 4, 1), (1, 0, 8, 120), (1, 1, 8, 255)):
            scales_w[e, 128 * rows_of : 128 * (rows_of + 1), columns : columns + 4] = b
    else:
        scales_w[:, 20, :4] = 230
    w = mx.ExpertWeights.from_linear_scales(codes_w.view(torch.float8_e4m3fn).cuda(), scales_w.cuda())
    groups = cases.layout(counts, 70, "cuda")
    values = codes_x.view(torch.float8_e4m3fn).cuda()
    x = mx.GroupedMXFP8.from_linear_scales(values, scales_x.cuda(), groups, scale_group=128)
    assert (x.scale_group, w.scale_group, w.squares) == (128, 128, config.squares)
    assert bool(product(x, w)[20, 20].isinf())
    check(x, w, counts)


@pytest.mark.parametrize("counts", [[256, 200, 0, 70, 1], [1200, 0, 0, 300]], ids=str)
def test_the_same_bytes_again_and_on_any_grid(
    counts: list[int], config: HopperFp8Config, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the number of programs, by which the last tiles are cut; and from one run to the
    next."""
    x, w = made(counts, 1500, 1024, 1184, rng, squares=config.squares)
    ys = []
    for programs in (1, 5, 24, 47, 132, 132, 132):
        monkeypatch.setattr(hopper_fp8, "multiprocessors", lambda device, programs=programs: programs)
        cases.forget_calls()
        ys.append(product(x, w)[: sum(counts)])
    assert all(torch.equal(y, ys[0]) for y in ys)


def test_an_experts_rows_do_not_depend_on_others(config: HopperFp8Config, rng: torch.Generator) -> None:
    """By bytes, in one configuration: other experts have other rows, and another number of them."""
    k = 416
    own = rows("normal", 45, k, rng)
    w = mx.quantize_weights(rows("normal", 3 * 264, k, rng).view(3, 264, k), scale_group=128)
    w, _ = w.regrouped(128, squares=config.squares)
    ys = []
    for before, after in ((0, 0), (7, 300), (130, 1)):
        x = torch.cat([rows("normal", before, k, rng), own, rows("heavy-tailed", after, k, rng)])
        xq = mx.quantize_grouped(x, cases.layout([before, 45, after], device="cuda"), scale_group=128)
        ys.append(product(xq, w)[before : before + 45])
    assert torch.equal(ys[0], ys[1])
    assert torch.equal(ys[0], ys[2])


def test_in_a_graph(config: HopperFp8Config, rng: torch.Generator) -> None:
    """Captured once, replayed with other tokens and counts in the same memory."""
    x, w = made([30, 50], 90, 264, 416, rng, squares=config.squares)
    out = torch.empty(90, 264, device="cuda")
    product(x, w)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mx.grouped_gemm(x, w, out_dtype=torch.float32, out=out, backend="triton")
    other, _ = made([70, 3], 90, 264, 416, rng)
    for name in ("values", "scales"):
        cases.bits(getattr(x, name)).copy_(cases.bits(getattr(other, name)))
    for name in ("tokens_per_expert", "expert_offsets", "scale_offsets"):
        getattr(x.groups, name).copy_(getattr(other.groups, name))
    graph.replay()
    assert torch.equal(out[:73], product(other, w)[:73])


@pytest.mark.parametrize("counts", [[40, 24], [300, 129]], ids=str)
def test_squares_change_no_bit(counts: list[int], rng: torch.Generator) -> None:
    """Nor do tokens as rows: whichever tile takes them, sums are the same."""
    x, w = made(counts, sum(counts), 264, 416, rng, squares=True)
    assert w.squares
    assert torch.equal(product(x, w), product(x, w.regrouped(128)[0]))


def test_which_kernel_takes_it(rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of 128 the FP8 kernel, whose result says so; by option, or for groups of 32, the
    other."""
    counts = [40, 24]
    x, w = made(counts, 64, 264, 512, rng)
    ref = exact(x, w, counts)[0]
    fp8 = mx.signal_to_noise_db(product(x, w), ref)
    monkeypatch.setenv("HYBRID_MXFP8_HOPPER_GEMM", "bf16")
    bf16 = mx.signal_to_noise_db(product(x, w), ref)
    assert fp8 < 100 < bf16
