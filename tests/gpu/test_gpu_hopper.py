"""The Hopper grouped GEMM in each configuration that is ever chosen, and some that are not."""

from __future__ import annotations

from dataclasses import replace

import cases
import pytest
import torch
from products import check, check_product, operands

import hybrid_mxfp8 as mx
from hybrid_mxfp8.triton_kernels import backend
from hybrid_mxfp8.triton_kernels.gemm import hopper
from hybrid_mxfp8.triton_kernels.gemm.hopper_config import HopperGemmConfig, select_hopper_config

pytestmark = pytest.mark.gpu

CONFIGS = [
    *(select_hopper_config(8 * average, 8) for average in (1, 128, 1000)),
    HopperGemmConfig(16, 16, 128, 8),
    HopperGemmConfig(128, 16, 128, 4),
]
"""Each chosen one, one whose tiles are all narrow, and one with a width between few and all."""
Operands = tuple[mx.GroupedMXFP8, mx.ExpertWeights]


@pytest.fixture(autouse=True)
def _hopper() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")


def force(config: HopperGemmConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """This configuration for any problem."""
    monkeypatch.setattr(backend, "_hopper_config", lambda problem: config)
    cases.forget_calls()


@pytest.fixture(params=CONFIGS, ids=lambda config: f"{config.small_block_t} to {config.block_t} tokens")
def forced(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> HopperGemmConfig:
    force(request.param, monkeypatch)
    config: HopperGemmConfig = request.param
    return config


@pytest.fixture(params=[0, 1, 3], ids=lambda tiles: f"all but {tiles} tiles")
def beside(request: pytest.FixtureRequest, forced: HopperGemmConfig, monkeypatch: pytest.MonkeyPatch) -> int:
    """Tokens dequantized beside the product, which at these sizes it would do before: all but the
    first tiles."""
    monkeypatch.setattr(hopper, "tiles_at_once", lambda *args: request.param)
    force(replace(forced, fused_dequantize=True), monkeypatch)
    return int(request.param)


def made(counts: list[int], t: int, n: int, k: int, rng: torch.Generator) -> Operands:
    return operands(counts, t, n, k, rng, "cuda")


@pytest.mark.parametrize("name", [name for name, (_, t) in cases.RAGGED.items() if t])
def test_ragged(name: str, forced: HopperGemmConfig, rng: torch.Generator) -> None:
    counts, num_tokens = cases.RAGGED[name]
    check(*made(counts, num_tokens, 136, 160, rng), counts, torch.bfloat16, "triton")


@pytest.mark.sanitizer
def test_a_few_tiles(forced: HopperGemmConfig, rng: torch.Generator) -> None:
    """Full and ragged ones, an empty expert, a second tile of weights, several steps along K."""
    counts = [3, 0, 65, 1]
    check(*made(counts, 72, 264, 416, rng), counts, torch.bfloat16, "triton")


@pytest.mark.sanitizer
def test_tokens_dequantized_beside_the_product(beside: int, rng: torch.Generator) -> None:
    """Full and short tiles, an empty expert, a last slice of one row, columns beyond 1024 and K."""
    counts = [3, 0, 65, 1, 256, 19]
    check(*made(counts, 350, 264, 1056, rng), counts, torch.bfloat16, "triton")


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


def stays_inside(offsets: tuple[int, ...], scale_offsets: tuple[int, ...], rng: torch.Generator) -> None:
    """Tiles that overlap or lie far out: nothing outside is written, and none is waited for."""
    x, w = made([16, 16, 16, 16], 64, 264, 256, rng)
    parts = (torch.tensor(part, dtype=torch.int32, device="cuda") for part in (offsets, scale_offsets))
    bad = mx.GroupedMXFP8(x.values, x.scales, mx.GroupLayout(x.groups.tokens_per_expert, *parts, 64))
    size = mx.grouped_gemm_workspace_size(w, 64, backend="triton")
    around = torch.full((3, 64, 264), 7.0, dtype=torch.bfloat16, device="cuda")
    memory = torch.full((4096 + -(-size // 256) * 256,), 9, dtype=torch.uint8, device="cuda")
    mx.grouped_gemm(bad, w, out=around[1], workspace=memory[2048 : 2048 + size], backend="triton")
    assert bool((around[0] == 7).all() and (around[2] == 7).all())
    assert bool((memory[:2048] == 9).all() and (memory[2048 + size :] == 9).all())


@pytest.mark.parametrize(("offsets", "scale_offsets"), LAYOUTS)
def test_a_layout_by_hand(
    offsets: tuple[int, ...], scale_offsets: tuple[int, ...], forced: HopperGemmConfig, rng: torch.Generator
) -> None:
    stays_inside(offsets, scale_offsets, rng)


@pytest.mark.parametrize(("offsets", "scale_offsets"), LAYOUTS)
def test_a_layout_by_hand_ends_when_it_dequantizes(
    offsets: tuple[int, ...], scale_offsets: tuple[int, ...], beside: int, rng: torch.Generator
) -> None:
    stays_inside(offsets, scale_offsets, rng)


def product(xq: mx.GroupedMXFP8, wq: mx.ExpertWeights) -> torch.Tensor:
    """fp32, into poison; by the launcher alone, which looks at what a test put in place at each
    call."""
    out = cases.poisoned_product(xq.groups.num_tokens, wq.n, torch.float32, "cuda")
    mx.grouped_gemm(xq, wq, out_dtype=torch.float32, out=out, backend="triton")
    return out


@pytest.mark.parametrize("counts", [[256, 200, 0, 70, 1], [1, 2, 3], [1200, 0, 0, 300]], ids=str)
def test_a_split_last_wave_gives_the_same_bytes(
    counts: list[int], forced: HopperGemmConfig, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the number of programs: in the last wave whole tiles, halves or quarters are
    dealt."""
    x, w = made(counts, 3000, 1024, 160, rng)
    ys = []
    for programs in (1, 5, 7, 24, 47, 96, 132):
        monkeypatch.setattr(hopper, "multiprocessors", lambda device, programs=programs: programs)
        cases.forget_calls()
        ys.append(product(x, w))
    for y in ys:
        assert torch.equal(y[: sum(counts)], ys[0][: sum(counts)])
    check_product(ys[-1], x, w, counts)


@pytest.mark.parametrize("average", [64, 128, 1000])
def test_dequantizing_beside_or_before_gives_the_same_bytes(
    average: int, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At sizes where the configurations do it by themselves, with tokens that change in between."""
    config = select_hopper_config(8 * average, 8)
    counts = [average // 2, 0, 2 * average, average, 1, average + 3, average, average // 3]
    for _ in range(4):
        x, w = made(counts, sum(counts) + 5, 2048, 1184, rng)
        y = {}
        for fused_dequantize in (False, True):
            force(replace(config, fused_dequantize=fused_dequantize), monkeypatch)
            y[fused_dequantize] = product(x, w)
        assert torch.equal(y[True][: sum(counts)], y[False][: sum(counts)])


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize(("n", "k"), [(8, 32), (128, 128), (264, 288), (384, 1056)])
def test_shapes_and_dtypes(n: int, k: int, dtype: torch.dtype, forced: HopperGemmConfig, rng: torch.Generator) -> None:
    counts = [3, 0, 64, 65, 128, 129, 1]
    check(*made(counts, 400, n, k, rng), counts, dtype, "triton")


def test_more_tiles_than_multiprocessors(rng: torch.Generator) -> None:
    """Every program takes several tiles, and the ring goes on from one to the next."""
    counts = [300, 0, 513, 40]
    check(*made(counts, 853, 8200, 224, rng), counts, torch.bfloat16, "triton")
