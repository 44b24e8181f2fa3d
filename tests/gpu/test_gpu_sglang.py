"""SGLang's two functions on a GPU: its own grid and criterion, seeded, with empty experts; graph replay with other counts."""

from __future__ import annotations

import random

import pytest
import sglang_case
import torch

import hybrid_mxfp8 as mx

pytestmark = pytest.mark.gpu


@pytest.fixture
def gpu() -> str:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs compute capability 8.9 or newer")
    return "cuda"


@pytest.fixture
def workspace(gpu: str) -> torch.Tensor:
    return torch.empty(64, 1024, 1024, dtype=torch.uint8, device=gpu)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("num_experts", [8, 16, 32, 64])
def test_each_expert_is_close_to_the_unquantized_product(
    gpu: str, workspace: torch.Tensor, num_experts: int, dtype: torch.dtype
) -> None:
    """SGLang's grid; weights are kept below 2**29 elements so that the float64 truth fits and takes seconds."""
    choose = random.Random(f"{num_experts} {dtype}")
    n, k = 128 * choose.randint(1, 64), 128 * choose.randint(1, 64)
    while num_experts * n * k > 2**29:
        n, k = 128 * choose.randint(1, 64), 128 * choose.randint(1, 64)
    counts = [choose.randint(1, 512) if choose.random() < 0.8 else 0 for _ in range(num_experts)]
    case = sglang_case.random_case(counts, n, k, dtype, num_experts, device=gpu)
    case.quantize()
    d = case.multiply(workspace, dtype)
    for rows, truth in case.experts():
        assert mx.calc_diff(d[rows], truth) < 0.001


@pytest.mark.parametrize("gap", [0, 128])
def test_bytes_are_those_of_the_reference(gpu: str, workspace: torch.Tensor, gap: int) -> None:
    counts = [5, 0, 130, 1, 0, 128]
    case = sglang_case.random_case(counts, 256, 384, torch.bfloat16, 0, device=gpu, gap=gap)
    case.quantize()
    twin = sglang_case.Case(counts, case.x.cpu(), case.w.cpu(), gap)
    with mx.use_backend("reference"):
        twin.quantize()
    assert torch.equal(case.x_values.cpu().view(torch.uint8), twin.x_values.view(torch.uint8))
    for start, count in zip(case.scale_starts.tolist(), counts, strict=True):
        rows = slice(start, start + -(-count // 128) * 128)
        assert torch.equal(case.x_scales[rows].cpu(), twin.x_scales[rows])
    assert torch.equal(case.w_scales.cpu(), twin.w_scales)
    d = case.multiply(workspace, torch.bfloat16)
    for rows, truth in case.experts():
        assert mx.calc_diff(d[rows], truth) < 0.001


def test_a_captured_graph_follows_new_metadata(gpu: str, workspace: torch.Tensor) -> None:
    case = sglang_case.random_case([40, 60, 28], 256, 256, torch.bfloat16, 1, device=gpu, spare=256)

    def step() -> torch.Tensor:
        case.quantize_tokens()
        return case.multiply(workspace, torch.bfloat16)

    case.quantize()
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        d = step()
    for counts in ([1, 0, 127], [128, 0, 0], [40, 60, 28]):
        case.set_counts(counts)
        graph.replay()
        assert torch.equal(d, step())
        for rows, truth in case.experts():
            assert mx.calc_diff(d[rows], truth) < 0.001


def test_nothing_syncs(gpu: str, workspace: torch.Tensor) -> None:
    case = sglang_case.random_case([40, 60, 28], 256, 256, torch.bfloat16, 2, device=gpu)
    case.quantize()
    case.multiply(workspace, torch.bfloat16)
    torch.cuda.set_sync_debug_mode("error")
    try:
        case.quantize_tokens()
        case.multiply(workspace, torch.bfloat16)
    finally:
        torch.cuda.set_sync_debug_mode("default")
