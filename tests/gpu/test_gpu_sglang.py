"""SGLang's two functions on a GPU: its own grid and criterion, seeded, with empty experts; graph replay with other counts."""

from __future__ import annotations

import random

import pytest
import sglang_case
import torch

import hybrid_mxfp8 as mx
from hybrid_mxfp8.compat import sglang
from hybrid_mxfp8.triton_kernels.caller_layout import caller_layout

pytestmark = pytest.mark.gpu


@pytest.fixture
def workspace() -> torch.Tensor:
    """As SGLang's callers pass it: a gigabyte in three dimensions."""
    return torch.empty(1024, 1024, 1024, dtype=torch.uint8, device="cuda")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("num_experts", [8, 16, 32, 64])
def test_each_expert_is_close_to_the_unquantized_product(
    workspace: torch.Tensor, num_experts: int, dtype: torch.dtype
) -> None:
    """SGLang's grid; weights are kept below 2**29 elements so that the float64 truth fits and takes seconds."""
    choose = random.Random(f"{num_experts} {dtype}")
    n, k = 128 * choose.randint(1, 64), 128 * choose.randint(1, 64)
    while num_experts * n * k > 2**29:
        n, k = 128 * choose.randint(1, 64), 128 * choose.randint(1, 64)
    counts = [choose.randint(1, 512) if choose.random() < 0.8 else 0 for _ in range(num_experts)]
    case = sglang_case.random_case(counts, n, k, dtype, num_experts, device="cuda")
    case.quantize()
    d = case.multiply(workspace, dtype)
    for rows, truth in case.experts():
        assert mx.calc_diff(d[rows], truth) < 0.001


@pytest.mark.parametrize("gap", [0, 128])
def test_bytes_are_those_of_the_reference(workspace: torch.Tensor, gap: int) -> None:
    counts = [5, 0, 130, 1, 0, 128]
    case = sglang_case.random_case(counts, 256, 384, torch.bfloat16, 0, device="cuda", gap=gap)
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


def test_a_captured_graph_follows_new_metadata(workspace: torch.Tensor) -> None:
    case = sglang_case.random_case([40, 60, 28], 256, 256, torch.bfloat16, 1, device="cuda", spare=256)

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


def test_nothing_syncs(workspace: torch.Tensor, request: pytest.FixtureRequest) -> None:
    case = sglang_case.random_case([40, 60, 28], 256, 256, torch.bfloat16, 2, device="cuda")
    case.quantize()
    case.multiply(workspace, torch.bfloat16)
    request.getfixturevalue("no_sync")
    case.quantize_tokens()
    case.multiply(workspace, torch.bfloat16)


@pytest.mark.sanitizer
@pytest.mark.parametrize("num_experts", [1, 33, 1024])
def test_layout_is_that_of_the_reference_whatever_the_data(num_experts: int) -> None:
    rng = torch.Generator().manual_seed(num_experts)
    tokens = torch.randint(-50, 400, (num_experts,), generator=rng, dtype=torch.int32)
    starts = torch.randint(-(2**31), 2**31 - 1, (num_experts,), generator=rng).to(torch.int32)
    starts[::2] %= 4096
    for num_tokens, rows in ((0, 0), (1000, 4096), (2**30, 2**31 - 128)):
        got = caller_layout(tokens.cuda(), starts.cuda(), num_tokens, rows)
        for mine, theirs in zip(got, sglang.reference_layout(tokens, starts, num_tokens, rows), strict=True):
            assert torch.equal(mine.cpu(), theirs)


@pytest.mark.sanitizer
def test_metadata_that_make_no_sense_lead_nowhere(workspace: torch.Tensor) -> None:
    """What surrounds the caller's buffers stays as it was."""
    case = sglang_case.random_case([40, 60, 28], 256, 256, torch.bfloat16, 3, device="cuda")
    case.quantize()
    values = torch.full((3, 128, 256), 0x3A, dtype=torch.uint8, device="cuda")
    scales = torch.full((3, 384, 8), 0x3A, dtype=torch.uint8, device="cuda")
    case.x_values, case.x_scales = values[1].view(torch.float8_e4m3fn), scales[1]
    for tokens, starts in (([2**31 - 1] * 3, [-(2**31), 2**31 - 128, 128]), ([-5, 200, 9], [256, 384, -128])):
        case.tokens.copy_(torch.tensor(tokens, dtype=torch.int32))
        case.scale_starts.copy_(torch.tensor(starts, dtype=torch.int64).to(torch.int32))
        case.quantize_tokens()
        assert case.multiply(workspace, torch.bfloat16).shape == (128, 256)
        torch.cuda.synchronize()
    for buffer in (values, scales):
        assert (buffer[::2] == 0x3A).all()


def test_compiled_into_the_callers_buffers(workspace: torch.Tensor) -> None:
    def step(x, tokens, starts, scale_starts, values, scales, w, w_scales):  # type: ignore[no-untyped-def]
        sglang.es_sm100_mxfp8_blockscaled_grouped_quant(x, tokens, starts, scale_starts, values, scales)
        return sglang.es_sm100_mxfp8_blockscaled_moe_grouped_gemm(
            w, values, w_scales, scales, starts, scale_starts, tokens, workspace, torch.bfloat16
        )

    case = sglang_case.random_case([40, 60, 28], 256, 256, torch.bfloat16, 5, device="cuda")
    case.quantize()
    expected = case.multiply(workspace, torch.bfloat16), case.x_values.clone()
    case.x_values.view(torch.uint8).zero_()
    metadata = (case.tokens, case.starts, case.scale_starts)
    compiled = torch.compile(step, fullgraph=True)
    got = compiled(case.x, *metadata, case.x_values, case.x_scales, case.w_values, case.w_scales)
    assert torch.equal(got, expected[0])
    assert torch.equal(case.x_values.view(torch.uint8), expected[1].view(torch.uint8))
