"""The SM100 kernel on the hardware it is made for, against float64 and the Triton backend.

Not yet run: no GPU of compute capability 10.0 or 10.3 was at hand. ``python -m hybrid_mxfp8 warmup
--out-dtypes bf16,fp16,fp32`` compiles its kernels ahead of time.
"""

from __future__ import annotations

import cases
import products
import pytest
import torch
from on_gpu import captured
from products import check, check_product

import hybrid_mxfp8 as mx
from hybrid_mxfp8.cutlass_kernels.config import CONFIGS, MODULES
from hybrid_mxfp8.dispatch.device import SM100_CAPABILITIES
from hybrid_mxfp8.dispatch.problem import Problem
from hybrid_mxfp8.dispatch.registry import backend_of

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

SHAPES = [(136, 96), (256, 128), (1024, 2880)]
DTYPE_IDS = ["bf16", "fp16", "fp32"]

GPU = "cuda"


@pytest.fixture(autouse=True)
def sm100() -> None:
    capability = torch.cuda.get_device_capability()
    if capability not in SM100_CAPABILITIES:
        pytest.skip(f"needs compute capability 10.0 or 10.3, got {capability[0]}.{capability[1]}")


def operands(
    counts: list[int], num_tokens: int, n: int, k: int, rng: torch.Generator
) -> tuple[mx.GroupedMXFP8, mx.ExpertWeights]:
    return products.operands(counts, num_tokens, n, k, rng, GPU, "triton")


def product(
    xq: mx.GroupedMXFP8, wq: mx.ExpertWeights, dtype: torch.dtype, workspace: torch.Tensor | None = None
) -> torch.Tensor:
    """By the CUTLASS backend, into an output of NaN."""
    out = cases.poisoned_product(xq.groups.num_tokens, wq.n, dtype, GPU)
    return mx.grouped_gemm(xq, wq, out_dtype=dtype, out=out, workspace=workspace, backend="cutlass")


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("module", MODULES)
def test_every_kernel(module: str, dtype: torch.dtype, monkeypatch, rng: torch.Generator) -> None:
    """Each tile with each output type: ragged, empty, N and K that fill no tile, and rows that no
    expert owns."""
    monkeypatch.setenv("HYBRID_MXFP8_CONFIG", module)
    for counts, num_tokens in cases.RAGGED.values():
        for n, k in SHAPES:
            check(*operands(counts, num_tokens, n, k, rng), counts, dtype, "cutlass")


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_cluster(config, monkeypatch, rng: torch.Generator) -> None:
    """Clusters larger than an expert has tiles, and uneven ends of the grid."""
    monkeypatch.setenv("HYBRID_MXFP8_CONFIG", config.name)
    for counts in ([1, 0, 300, 64], [513], [1] * 70):
        check(*operands(counts, sum(counts) + 9, 1160, 512, rng), counts, torch.bfloat16, "cutlass")


@pytest.mark.parametrize(
    ("num_experts", "n", "k", "num_tokens"), [(32, 4096, 7168, 1024), (256, 4096, 7168, 64), (8, 7168, 2048, 8192)]
)
def test_model_shapes_agree_with_triton(num_experts: int, n: int, k: int, num_tokens: int, rng) -> None:
    """Two kernels with nothing in common but the operands."""
    counts = torch.bincount(torch.randint(num_experts, (num_tokens,), generator=rng), minlength=num_experts).tolist()
    xq, wq = operands(counts, num_tokens, n, k, rng)
    y = product(xq, wq, torch.float32)
    expected = mx.grouped_gemm(xq, wq, out_dtype=torch.float32, backend="triton")
    assert mx.calc_diff(y, expected) < 1e-8
    assert float((y - expected).abs().max()) < 1e-4 * float(expected.abs().max())


def test_thousands_of_experts(rng: torch.Generator) -> None:
    counts = torch.randint(0, 3, (4096,), generator=rng).tolist()
    check(*operands(counts, sum(counts), 136, 96, rng), counts, torch.float32, "cutlass")


def test_dependent_launch_changes_nothing(monkeypatch, rng: torch.Generator) -> None:
    """Back to back on one workspace, with and without the overlap of the two kernels: the same
    bytes."""
    xq, wq = operands([7, 0, 130, 3], 150, 1024, 512, rng)
    size = mx.grouped_gemm_workspace_size(wq, 150, backend="cutlass")
    workspace = torch.empty(size, dtype=torch.uint8, device=GPU)
    outputs = []
    for pdl in ("1", "0"):
        monkeypatch.setenv("HYBRID_MXFP8_PDL", pdl)
        outputs += [product(xq, wq, torch.bfloat16, workspace)[:140] for _ in range(20)]
    assert all(torch.equal(outputs[0].view(torch.int16), y.view(torch.int16)) for y in outputs)


def test_workspace_of_the_exact_size_is_enough(rng: torch.Generator) -> None:
    """Whatever it holds; a byte less is refused, and what lies behind it is not touched."""
    counts = [7, 0, 130, 3]
    xq, wq = operands(counts, 140, 136, 96, rng)
    size = backend_of("cutlass").workspace_size(Problem(4, 136, 96, 140, torch.bfloat16, wq.device))
    buffer = torch.full((size + 1024,), 0xFF, dtype=torch.uint8, device=GPU)
    check_product(product(xq, wq, torch.bfloat16, buffer[:size]), xq, wq, counts)
    assert bool((buffer[size:] == 0xFF).all())
    with pytest.raises(ValueError, match="workspace"):
        product(xq, wq, torch.bfloat16, buffer[: size - 1])


def test_one_graph_serves_changing_counts(no_sync, rng: torch.Generator) -> None:
    num_tokens, n, k = 160, 136, 96
    counts = torch.tensor([7, 0, 130, 3], dtype=torch.int32, device=GPU)
    x = cases.random_rows(num_tokens, k, torch.bfloat16, rng, GPU)
    wq = operands([0, 0, 0, 0], 1, n, k, rng)[1]
    out = torch.empty(num_tokens, n, dtype=torch.bfloat16, device=GPU)

    def step() -> mx.GroupedMXFP8:
        xq = mx.quantize_grouped(x, mx.GroupLayout.from_counts(counts, num_tokens))
        mx.grouped_gemm(xq, wq, out=out, backend="cutlass")
        return xq

    step()
    graph, xq = captured(step)
    torch.cuda.set_sync_debug_mode("default")
    for now in ([7, 0, 130, 3], [0, 0, 0, 160], [40, 40, 40, 40], [0, 0, 0, 0], [1, 128, 0, 31]):
        counts.copy_(torch.tensor(now))
        out.fill_(torch.nan)
        graph.replay()
        check_product(out, xq, wq, now)


def test_current_stream_is_used(rng: torch.Generator) -> None:
    """On a side stream behind a slow kernel, the product is that of what the slow kernel leaves."""
    counts = [64, 64]
    xq, wq = operands(counts, 128, 256, 128, rng)
    right = xq.values.clone()
    xq.values.view(torch.uint8).zero_()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        xq.values.view(torch.uint8).copy_(right.view(torch.uint8))
        y = product(xq, wq, torch.float32)
    side.synchronize()
    check_product(y, xq, wq, counts)
