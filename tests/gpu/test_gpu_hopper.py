"""The Hopper grouped GEMM on a real GPU of compute capability 9.0, against float64 truth."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import cases
import pytest
import tolerances
import torch
import truth
from edges import to_device
from test_grouped_gemm import operands, plain_operands

import hybrid_mxfp8 as mx
from hybrid_mxfp8.triton_kernels.gemm import portable as launcher
from hybrid_mxfp8.triton_kernels.gemm.hopper_config import HopperGemmConfig, select_hopper_config

pytestmark = pytest.mark.gpu

CONFIGS = [
    *(select_hopper_config(8 * average, 8) for average in (1, 128, 1000)),
    HopperGemmConfig(16, 16, 128, 8),
    HopperGemmConfig(128, 16, 128, 4),
]
"""Each that is ever chosen, one whose tiles are all narrow, and one with a width between few and all."""


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A Hopper GPU, with its kernel not switched off."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")
    monkeypatch.delenv("HYBRID_MXFP8_HOPPER_GEMM", raising=False)
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(params=CONFIGS, ids=lambda config: f"{config.small_block_t} to {config.block_t} tokens")
def forced(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> HopperGemmConfig:
    """Each configuration, for any problem."""
    monkeypatch.setattr(launcher, "hopper_config_for", lambda *args: request.param)
    config: HopperGemmConfig = request.param
    return config


@pytest.fixture(params=[0, 1, 3], ids=lambda tiles: f"all but {tiles} tiles")
def expanding(
    request: pytest.FixtureRequest, forced: HopperGemmConfig, monkeypatch: pytest.MonkeyPatch
) -> Iterator[int]:
    """Each configuration expanding its tokens beside the product, which at these sizes it would do before: all but the
    first tiles."""
    hopper_module = importlib.import_module("hybrid_mxfp8.triton_kernels.gemm.hopper")
    monkeypatch.setattr(launcher, "hopper_config_for", lambda *args: replace(forced, fused_dequantize=True))
    monkeypatch.setattr(hopper_module, "tiles_at_once", lambda *args: request.param)
    hopper_module._plan.cache_clear()
    yield request.param
    hopper_module._plan.cache_clear()


def moved(xq: mx.GroupedMXFP8, wq: mx.ExpertWeights, device: torch.device) -> tuple[mx.GroupedMXFP8, mx.ExpertWeights]:
    return to_device(xq, str(device)), mx.ExpertWeights(wq.values.to(device), wq.scales.to(device))


def check(
    xq: mx.GroupedMXFP8, wq: mx.ExpertWeights, counts: Sequence[int], dtype: torch.dtype, device: torch.device
) -> None:
    """Operands on the CPU, product on the GPU into poison; rows beyond the groups keep it."""
    x, w = moved(xq, wq, device)
    assert launcher.hopper_config_for(x.groups.num_tokens, len(counts), wq.n, wq.k, device) is not None
    y = mx.grouped_gemm(
        x,
        w,
        out_dtype=dtype,
        out=cases.poisoned_product(x.groups.num_tokens, wq.n, dtype, device),
        backend="triton",
    )
    tolerances.check_gemm(y, *plain_operands(xq, wq, counts), counts, bf16_formulation=True)
    assert bool(torch.isnan(y[sum(counts) :]).all())


@pytest.mark.parametrize("name", [name for name, (_, t) in cases.RAGGED.items() if t])
def test_ragged(name: str, forced: HopperGemmConfig, hopper: torch.device, rng: torch.Generator) -> None:
    counts, num_tokens = cases.RAGGED[name]
    check(*operands(counts, num_tokens, 136, 160, rng), counts, torch.bfloat16, hopper)


@pytest.mark.sanitizer
def test_each_configuration_on_a_few_tiles(
    forced: HopperGemmConfig, hopper: torch.device, rng: torch.Generator
) -> None:
    """Full and ragged tiles, an empty expert, a second tile of weights, several steps along K, rows beyond the groups."""
    counts = [3, 0, 65, 1]
    check(*operands(counts, 72, 264, 416, rng), counts, torch.bfloat16, hopper)


@pytest.mark.sanitizer
def test_tokens_expanded_beside_the_product(expanding: int, hopper: torch.device, rng: torch.Generator) -> None:
    """Full and short tiles, an empty expert, a last slice of one row, columns beyond 1024 and beyond K."""
    counts = [3, 0, 65, 1, 256, 19]
    check(*operands(counts, 350, 264, 1056, rng), counts, torch.bfloat16, hopper)


def test_a_layout_by_hand_ends_when_it_expands(expanding: int, hopper: torch.device, rng: torch.Generator) -> None:
    """Tiles that overlap or lie far out: no slice is waited for that nobody writes."""
    x, w = moved(*operands([16, 16, 16, 16], 64, 264, 256, rng), hopper)
    for offsets in (
        (0, 1000, 2000, 30, 70000),
        (-50, 20, 10, 64, 90),
        (0, 64, 0, 64, 64),
        (2**31 - 1, -(2**31), 0, 5, 5),
    ):
        for scale_offsets in ((0, 128, 256, 384, 512), (-(2**31), 2**30, 7, 2**31 - 1, 0)):
            groups = mx.GroupLayout(
                x.groups.tokens_per_expert,
                torch.tensor(offsets, dtype=torch.int32, device=hopper),
                torch.tensor(scale_offsets, dtype=torch.int32, device=hopper),
                64,
            )
            around = torch.full((3, 64, 264), 7.0, dtype=torch.bfloat16, device=hopper)
            mx.grouped_gemm(mx.GroupedMXFP8(x.values, x.scales, groups), w, out=around[1], backend="triton")
            assert bool((around[0] == 7).all() and (around[2] == 7).all())


def product(xq: mx.GroupedMXFP8, wq: mx.ExpertWeights) -> torch.Tensor:
    """fp32, into poison; by the launcher alone, which looks at what a test put in place at each call."""
    t, n = xq.groups.num_tokens, wq.n
    out = cases.poisoned_product(t, n, torch.float32, xq.values.device)
    launcher.grouped_gemm(xq.values, xq.scales, xq.groups, wq.values, wq.scales, out)
    return out


@pytest.mark.parametrize("counts", [[256, 200, 0, 70, 1], [1, 2, 3], [1200, 0, 0, 300]], ids=str)
def test_a_last_turn_that_is_cut_gives_the_same_bytes(
    counts: list[int],
    forced: HopperGemmConfig,
    hopper: torch.device,
    rng: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever the number of programs: one has no last turn, others deal whole tiles, halves or quarters in theirs."""
    xq, wq = operands(counts, 3000, 1024, 160, rng)
    x, w = moved(xq, wq, hopper)
    ys = []
    for programs in (1, 5, 7, 24, 47, 96, 132):
        monkeypatch.setattr(launcher, "_multiprocessors", lambda device, programs=programs: programs)
        ys.append(product(x, w))
    for y in ys:
        assert torch.equal(y[: sum(counts)], ys[0][: sum(counts)])
        assert bool(torch.isnan(y[sum(counts) :]).all())
    tolerances.check_gemm(ys[-1], *plain_operands(xq, wq, counts), counts, bf16_formulation=True)


@pytest.mark.parametrize("average", [64, 128, 1000])
def test_expanding_beside_or_before_gives_the_same_bytes(
    average: int, hopper: torch.device, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At sizes where the configurations do it by themselves, several times, and with tokens that change in between."""
    config = select_hopper_config(8 * average, 8)
    counts = [average // 2, 0, 2 * average, average, 1, average + 3, average, average // 3]
    t, n, k = sum(counts) + 5, 2048, 1184
    groups = cases.layout(counts, t, device=str(hopper))
    w = mx.quantize_weights(torch.randn(8, n, k, generator=rng).bfloat16().to(hopper), backend="triton")
    for _ in range(4):
        x = torch.randn(t, k, generator=rng).bfloat16().to(hopper)
        xq = mx.quantize_grouped(x, groups, backend="triton")
        y = {}
        for fused_dequantize in (False, True):
            chosen = replace(config, fused_dequantize=fused_dequantize)
            monkeypatch.setattr(launcher, "hopper_config_for", lambda *args, chosen=chosen: chosen)
            y[fused_dequantize] = product(xq, w)
        assert torch.equal(y[True][: sum(counts)], y[False][: sum(counts)])


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize(("n", "k"), [(8, 32), (128, 128), (264, 288), (384, 1056)])
def test_shapes_and_dtypes(
    n: int, k: int, dtype: torch.dtype, forced: HopperGemmConfig, hopper: torch.device, rng: torch.Generator
) -> None:
    counts = [3, 0, 64, 65, 128, 129, 1]
    check(*operands(counts, 400, n, k, rng), counts, dtype, hopper)


@pytest.mark.sanitizer
@pytest.mark.parametrize("experts", [1, 2, 4, 8, 33, 200])
def test_any_number_of_experts(experts: int, hopper: torch.device, rng: torch.Generator) -> None:
    counts = [(7 * e) % 5 for e in range(experts)]
    check(*operands(counts, sum(counts) + 3, 64, 64, rng), counts, torch.float32, hopper)


def test_more_tiles_than_multiprocessors(hopper: torch.device, rng: torch.Generator) -> None:
    """Every program takes several tiles, and the ring goes on from one to the next."""
    counts = [300, 0, 513, 40]
    check(*operands(counts, 853, 8200, 224, rng), counts, torch.bfloat16, hopper)


@pytest.mark.parametrize(("w_scales", "x_scales"), [((0, 6), (240, 247)), ((240, 247), (0, 6)), ((250, 256), (0, 3))])
def test_extreme_scales(
    w_scales: tuple[int, int], x_scales: tuple[int, int], hopper: torch.device, rng: torch.Generator
) -> None:
    """Scales at both ends of E8M0, NaN among the largest: no more is lost than bf16's subnormals."""
    counts, n, k = [40, 24], 128, 256
    xq, wq = operands(counts, 64, n, k, rng)
    # Codes of magnitude 1 .. 1.875, so that no product with a scale up to 254 passes bf16's largest.
    for values in (xq.values, wq.values):
        values.view(torch.uint8).bitwise_and_(0x87).bitwise_or_(0x38)
    linear = torch.randint(*w_scales, (2, n, k // 32), dtype=torch.int32, generator=rng).to(torch.uint8)
    wq = mx.ExpertWeights.from_linear_scales(wq.values, linear)
    xq.scales.copy_(torch.randint(*x_scales, xq.scales.shape, dtype=torch.int32, generator=rng).to(torch.uint8))
    check(xq, wq, counts, torch.float32, hopper)


def test_nan_stays_in_its_row_and_column(hopper: torch.device, rng: torch.Generator) -> None:
    counts = [40, 24]
    xq, wq = operands(counts, 64, 128, 256, rng)
    xq.values.view(torch.uint8)[3, 77] = 0x7F
    xq.values.view(torch.uint8)[50, 7] = 0xFF
    wq.values.view(torch.uint8)[0, 5, 200] = 0x7F
    wq.values.view(torch.uint8)[1, 100, 0] = 0xFF
    check(xq, wq, counts, torch.float32, hopper)


@pytest.mark.parametrize(
    "offsets",
    [
        (0, 1000, 2000, 30, 70000),
        pytest.param((-50, 20, 10, 64, 90), marks=pytest.mark.sanitizer),
        (0, 64, 0, 64, 64),
        (2**31 - 1, -(2**31), 0, 5, 5),
    ],
    ids=str,
)
@pytest.mark.parametrize("scale_offsets", [(0, 128, 256, 384, 512), (-(2**31), 2**30, 7, 2**31 - 1, 0)])
def test_a_layout_put_together_by_hand_writes_nothing_outside(
    offsets: tuple[int, ...],
    scale_offsets: tuple[int, ...],
    forced: HopperGemmConfig,
    hopper: torch.device,
    rng: torch.Generator,
) -> None:
    x, w = moved(*operands([16, 16, 16, 16], 64, 264, 256, rng), hopper)
    groups = mx.GroupLayout(
        x.groups.tokens_per_expert,
        torch.tensor(offsets, dtype=torch.int32, device=hopper),
        torch.tensor(scale_offsets, dtype=torch.int32, device=hopper),
        64,
    )
    size = mx.grouped_gemm_workspace_size(w, 64, backend="triton")
    around = torch.full((3, 64, 264), 7.0, dtype=torch.bfloat16, device=hopper)
    memory = torch.full((4096 + -(-size // 256) * 256,), 9, dtype=torch.uint8, device=hopper)
    bad = mx.GroupedMXFP8(x.values, x.scales, groups)
    mx.grouped_gemm(bad, w, out=around[1], workspace=memory[2048 : 2048 + size], backend="triton")
    assert bool((around[0] == 7).all() and (around[2] == 7).all())
    assert bool((memory[:2048] == 9).all() and (memory[2048 + size :] == 9).all())


def test_a_graph_follows_its_counts(hopper: torch.device, rng: torch.Generator) -> None:
    """Captured once, replayed with other counts: nothing of the layout was decided on the host."""
    first, second, t = [10, 0, 50, 20], [0, 70, 1, 9], 96
    xq, wq = operands(first, t, 136, 160, rng)
    x, w = moved(xq, wq, hopper)
    workspace = torch.empty(mx.grouped_gemm_workspace_size(w, t, backend="triton"), dtype=torch.uint8, device=hopper)
    out = cases.poisoned_product(t, 136, torch.float32, hopper)

    def run() -> None:
        mx.grouped_gemm(x, w, out_dtype=torch.float32, out=out, workspace=workspace, backend="triton")

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    rows = cases.random_rows(t, 160, torch.bfloat16, rng)
    for counts in (second, first, second):
        q = mx.quantize_grouped(
            rows, (layout := cases.layout(counts, t)), out=cases.poisoned_output(layout, 160), backend="reference"
        )
        x.values.copy_(q.values)
        x.scales.copy_(q.scales)
        x.groups.expert_offsets.copy_(q.groups.expert_offsets)
        x.groups.scale_offsets.copy_(q.groups.scale_offsets)
        out.fill_(float("nan"))
        graph.replay()
        tolerances.check_gemm(out, *plain_operands(q, wq, counts), counts, bf16_formulation=True)
        assert bool(torch.isnan(out[sum(counts) :]).all())


def test_with_out_and_workspace_nothing_is_allocated(hopper: torch.device, rng: torch.Generator) -> None:
    x, w = moved(*operands([10, 0, 50, 20], 96, 136, 160, rng), hopper)
    out = torch.empty(96, 136, dtype=torch.bfloat16, device=hopper)
    size = mx.grouped_gemm_workspace_size(w, 96, backend="triton")
    assert size > 96 * 160 * 2
    workspace = torch.empty(size, dtype=torch.uint8, device=hopper)
    mx.grouped_gemm(x, w, out=out, workspace=workspace, backend="triton")
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    mx.grouped_gemm(x, w, out=out, workspace=workspace, backend="triton")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    with pytest.raises(ValueError, match=f"at least {size} bytes"):
        mx.grouped_gemm(x, w, out=out, workspace=workspace[:-1], backend="triton")


def test_weights_that_tma_cannot_read_take_the_other_kernel(
    hopper: torch.device, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = [10, 0, 50, 20]
    xq, wq = operands(counts, 80, 136, 160, rng)
    x, w = moved(xq, wq, hopper)
    shifted = torch.empty(w.values.numel() + 1, dtype=torch.uint8, device=hopper)[1:]
    shifted.copy_(w.values.view(torch.uint8).view(-1))
    unaligned = mx.ExpertWeights(shifted.view(w.values.shape).view(torch.float8_e4m3fn), w.scales)
    y = mx.grouped_gemm(x, unaligned, out_dtype=torch.float32, backend="triton")
    tolerances.check_gemm(y, *plain_operands(xq, wq, counts), counts, bf16_formulation=True)


def _last_block(big: Callable[[], tuple[mx.GroupedMXFP8, mx.ExpertWeights]], rows: int) -> None:
    """Compare the last rows, 1024 columns at the end of N, in float64 on the GPU."""
    x, w = big()
    y = mx.grouped_gemm(x, w, out_dtype=torch.float32, backend="triton")[-rows:, -1024:]
    xd = x.values[-rows:].double() * 2.0 ** (x.scales.view(-1)[0].item() - 127)
    wd = w.values[-1, -1024:].double() * 2.0 ** (w.scales.view(-1)[0].item() - 127)
    bound = tolerances.gemm_bound(truth.doubles(xd @ wd.T), truth.doubles(xd.abs() @ wd.abs().T), torch.float32)
    assert bool((abs(truth.doubles(y) - truth.doubles(xd @ wd.T)) <= bound).all())


def _constant_scales(
    t: int, e: int, n: int, k: int, last: int, device: torch.device
) -> tuple[mx.GroupedMXFP8, mx.ExpertWeights]:
    """Random codes, one scale for all, all tokens with the last expert but ``t - last``.

    Of both signs: sums that only grow lose up to K / 16 truncations of one sign, 9e-5 of the result at K = 28672.
    """

    def codes(*shape: int) -> torch.Tensor:
        magnitudes = torch.randint(0, 127, shape, dtype=torch.uint8, device=device)
        return (magnitudes | torch.randint_like(magnitudes, 2) << 7).view(torch.float8_e4m3fn)

    counts = [0] * e
    counts[0] += t - last
    counts[-1] += last
    groups = cases.layout(counts, t, device=str(device))
    x, w = codes(t, k), codes(e, n, k)
    x_scales = torch.full((groups.scale_rows, -(-k // 128) * 4), 120, dtype=torch.uint8, device=device)
    w_scales = torch.full((e, -(-n // 128) * 128, -(-k // 128) * 4), 122, dtype=torch.uint8, device=device)
    return mx.GroupedMXFP8(x, x_scales, groups), mx.ExpertWeights(w, w_scales)


def test_weights_beyond_2_31_bytes(hopper: torch.device) -> None:
    _last_block(lambda: _constant_scales(24, 3, 28672, 28672, 16, hopper), 16)


def test_outputs_beyond_2_31_elements(hopper: torch.device) -> None:
    _last_block(lambda: _constant_scales(70_000, 2, 32768, 32, 300, hopper), 300)
