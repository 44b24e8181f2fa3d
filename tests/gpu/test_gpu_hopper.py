"""Hopper's grouped GEMMs, in bf16 and in FP8, in each configuration that is ever chosen, and some
that are not."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import cases
import pytest
import torch
from products import check_product, operands

import hybrid_mxfp8 as mx
from hybrid_mxfp8.triton_kernels import backend
from hybrid_mxfp8.triton_kernels.gemm import hopper, hopper_fp8
from hybrid_mxfp8.triton_kernels.gemm.hopper_config import HopperGemmConfig, select_hopper_config
from hybrid_mxfp8.triton_kernels.gemm.hopper_fp8_config import HopperFp8Config, select_hopper_fp8_config

pytestmark = pytest.mark.gpu

Config = HopperGemmConfig | HopperFp8Config
Operands = tuple[mx.GroupedMXFP8, mx.ExpertWeights]

BF16: list[Config] = [
    *(select_hopper_config(8 * average, 8) for average in (1, 128, 1000)),
    HopperGemmConfig(16, 16, 128, 8),
    HopperGemmConfig(128, 16, 128, 4),
]
"""Each chosen one, one whose tiles are all narrow, and one with a width between few and all."""

FP8: list[Config] = [
    select_hopper_fp8_config(average, 1, squares)
    for average, squares in ((1, False), (32, True), (1000, False), (1000, True))
]
UNITS = 33 * 2.0**-13
"""What FP8 units may lose, of the sum of magnitudes: they align 32 products and the sum so far to
the largest, and cut what lies below 13 bits. Cut, not rounded: of one sign it adds up."""


@pytest.fixture(autouse=True)
def _hopper() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")


def force(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """This configuration for any problem, of groups of 128 if it is one of FP8."""
    name = "_hopper_fp8_config" if isinstance(config, HopperFp8Config) else "_hopper_config"
    monkeypatch.setattr(backend, name, lambda problem: config)
    cases.forget_calls()


def name_of(config: Config) -> str:
    if isinstance(config, HopperFp8Config):
        return f"FP8 {config.block_t}{' squares' * config.squares}"
    return f"bf16 {config.small_block_t} to {config.block_t}"


@pytest.fixture(params=[*BF16, *FP8], ids=name_of)
def config(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Config:
    """Each, forced."""
    force(request.param, monkeypatch)
    found: Config = request.param
    return found


in_bf16 = pytest.mark.parametrize("config", BF16, indirect=True, ids=name_of)
in_fp8 = pytest.mark.parametrize("config", FP8, indirect=True, ids=name_of)


@pytest.fixture(params=[None, 0, 1, 3], ids=lambda tiles: "before" if tiles is None else f"all but {tiles} tiles")
def dequantized(request: pytest.FixtureRequest, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """When tokens are: at these sizes before the product; or beside it, all but the first tiles."""
    if request.param is not None:
        monkeypatch.setattr(hopper, "tiles_at_once", lambda *args: request.param)
        force(replace(config, fused_dequantize=True), monkeypatch)


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


def in_groups_of_128(
    counts: Sequence[int], t: int, n: int, k: int, rng: torch.Generator, kind: str = "normal", squares: bool = False
) -> Operands:
    """What the FP8 kernel takes; bytes that the quantizer leaves are poison."""
    w = rows("normal", len(counts) * n, k, rng).view(len(counts), n, k) * k**-0.5
    groups = cases.layout(counts, t, "cuda")
    xq = mx.quantize_grouped(rows(kind, t, k, rng), groups, scale_group=128, out=cases.poisoned_output(groups, k))
    return xq, mx.quantize_weights(w, scale_group=128).regrouped(128, squares=squares)[0]


def made(config: Config, counts: Sequence[int], t: int, n: int, k: int, rng: torch.Generator) -> Operands:
    """What the kernel of this configuration takes."""
    if isinstance(config, HopperFp8Config):
        return in_groups_of_128(counts, t, n, k, rng, squares=config.squares)
    return operands(counts, t, n, k, rng, "cuda")


def product(x: mx.GroupedMXFP8, w: mx.ExpertWeights, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Into poison; by the launcher alone, which looks at what a test put in place at each call."""
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
    """Within the bound, of FP8 that of its units; rows that no expert owns are left as they are."""
    y = product(x, w, dtype)
    if w.scale_group == 32:
        check_product(y, x, w, counts)
        return
    (ref, magnitude), used = exact(x, w, counts), sum(counts)
    assert bool(y[used:].isnan().all())
    y = y[:used].double()
    nan = ref.isnan()
    assert torch.equal(y.isnan(), nan)
    bound = UNITS * magnitude + torch.finfo(dtype).eps * ref.abs() + torch.finfo(dtype).tiny
    assert bool((nan | ((y - ref).abs() <= bound) | (y == ref.to(dtype).double())).all())


@pytest.mark.parametrize("name", [name for name, (_, t) in cases.RAGGED.items() if t])
def test_ragged(name: str, config: Config, rng: torch.Generator) -> None:
    counts, num_tokens = cases.RAGGED[name]
    check(*made(config, counts, num_tokens, 136, 160, rng), counts)


@pytest.mark.sanitizer
def test_a_few_tiles(config: Config, rng: torch.Generator) -> None:
    """Full and ragged ones, an empty expert, a second tile of weights, several steps along K."""
    counts = [3, 0, 65, 1]
    check(*made(config, counts, 72, 264, 416, rng), counts, torch.bfloat16)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize(("n", "k"), [(8, 32), (128, 128), (264, 288), (384, 1056)])
def test_shapes_and_dtypes(n: int, k: int, dtype: torch.dtype, config: Config, rng: torch.Generator) -> None:
    counts = [3, 0, 64, 65, 128, 129, 1, 270]
    check(*made(config, counts, 680, n, k, rng), counts, dtype)


@pytest.mark.parametrize("counts", [[256, 200, 0, 70, 1], [1, 2, 3], [1200, 0, 0, 300]], ids=str)
def test_the_same_bytes_again_and_on_any_grid(
    counts: list[int], config: Config, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the number of programs, by which the last tiles are cut, whole, in halves or in
    quarters; and from one run to the next."""
    x, w = made(config, counts, 3000, 1024, 1184, rng)
    ys = []
    for programs in (1, 5, 7, 24, 47, 96, 132, 132, 132):
        for module in (hopper, hopper_fp8):
            monkeypatch.setattr(module, "multiprocessors", lambda device, programs=programs: programs)
        cases.forget_calls()
        ys.append(product(x, w)[: sum(counts)])
    assert all(torch.equal(y, ys[0]) for y in ys)
    check(x, w, counts)


# ---------------------------------------------------------------- bf16


@pytest.mark.sanitizer
@in_bf16
def test_tokens_dequantized_beside_the_product(config: Config, dequantized: None, rng: torch.Generator) -> None:
    """Full and short tiles, an empty expert, a last slice of one row, columns beyond 1024 and K."""
    counts = [3, 0, 65, 1, 256, 19]
    check(*made(config, counts, 350, 264, 1056, rng), counts, torch.bfloat16)


LAYOUTS = [
    pytest.param(offsets, scale_offsets, id=str(offsets), marks=pytest.mark.sanitizer if offsets[0] == -50 else ())
    for offsets in (
        (0, 1000, 2000, 30, 70000),
        (-50, 20, 10, 64, 90),
        (0, 64, 0, 64, 64),
        (2**31 - 1, -(2**31), 0, 5, 5),
    )
    for scale_offsets in ((0, 128, 256, 384, 512), (-(2**31), 2**30, 7, 2**31 - 1, 0))
]


@in_bf16
@pytest.mark.parametrize(("offsets", "scale_offsets"), LAYOUTS)
def test_a_layout_by_hand(
    offsets: tuple[int, ...], scale_offsets: tuple[int, ...], config: Config, dequantized: None, rng: torch.Generator
) -> None:
    """Tiles that overlap or lie far out: nothing outside is written, and none is waited for."""
    x, w = made(config, [16, 16, 16, 16], 64, 264, 256, rng)
    parts = (torch.tensor(part, dtype=torch.int32, device="cuda") for part in (offsets, scale_offsets))
    bad = mx.GroupedMXFP8(x.values, x.scales, mx.GroupLayout(x.groups.tokens_per_expert, *parts, 64))
    size = mx.grouped_gemm_workspace_size(w, 64, backend="triton")
    around = torch.full((3, 64, 264), 7.0, dtype=torch.bfloat16, device="cuda")
    memory = torch.full((4096 + -(-size // 256) * 256,), 9, dtype=torch.uint8, device="cuda")
    mx.grouped_gemm(bad, w, out=around[1], workspace=memory[2048 : 2048 + size], backend="triton")
    assert bool((around[0] == 7).all() and (around[2] == 7).all())
    assert bool((memory[:2048] == 9).all() and (memory[2048 + size :] == 9).all())


@pytest.mark.parametrize("average", [64, 128, 1000])
def test_dequantizing_beside_or_before_gives_the_same_bytes(
    average: int, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At sizes where the configurations do it by themselves, with tokens that change in between."""
    config = select_hopper_config(8 * average, 8)
    counts = [average // 2, 0, 2 * average, average, 1, average + 3, average, average // 3]
    for _ in range(4):
        x, w = made(config, counts, sum(counts) + 5, 2048, 1184, rng)
        y = {}
        for fused_dequantize in (False, True):
            force(replace(config, fused_dequantize=fused_dequantize), monkeypatch)
            y[fused_dequantize] = product(x, w)[: sum(counts)]
        assert torch.equal(y[True], y[False])


# ---------------------------------------------------------------- FP8


@in_fp8
@pytest.mark.parametrize("kind", ["normal", "heavy-tailed", "outlier channels", "SwiGLU"])
def test_accuracy(kind: str, config: HopperFp8Config, rng: torch.Generator) -> None:
    """At least 60 dB from the exact product of the same operands."""
    counts = [100, 1, 0, 300]
    x, w = in_groups_of_128(counts, 401, 512, 7168, rng, kind, config.squares)
    y, ref = product(x, w), exact(x, w, counts)[0]
    assert mx.signal_to_noise_db(y, ref) >= 60


@pytest.mark.parametrize("experts", [1, 33, 512])
def test_any_number_of_experts(experts: int, rng: torch.Generator) -> None:
    counts = [(7 * e) % 5 for e in range(experts)]
    check(*in_groups_of_128(counts, sum(counts) + 3, 64, 64, rng), counts)


@in_fp8
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


@in_fp8
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


@pytest.mark.parametrize("counts", [[40, 24], [300, 129]], ids=str)
def test_squares_change_no_bit(counts: list[int], rng: torch.Generator) -> None:
    """Nor do tokens as rows: whichever tile takes them, sums are the same."""
    x, w = in_groups_of_128(counts, sum(counts), 264, 416, rng, squares=True)
    assert w.squares
    assert torch.equal(product(x, w), product(x, w.regrouped(128)[0]))


def test_which_kernel_takes_it(rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of 128 the FP8 kernel, whose result says so; by option, or for groups of 32, the
    other."""
    counts = [40, 24]
    x, w = in_groups_of_128(counts, 64, 264, 512, rng)
    ref = exact(x, w, counts)[0]
    fp8 = mx.signal_to_noise_db(product(x, w), ref)
    monkeypatch.setenv("HYBRID_MXFP8_HOPPER_GEMM", "bf16")
    bf16 = mx.signal_to_noise_db(product(x, w), ref)
    assert fp8 < 100 < bf16
