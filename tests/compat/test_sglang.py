"""SGLang's two functions: its own criterion, its buffers, operators and graphs.

What they refuse is in ops/test_bad_calls.py.
"""

from __future__ import annotations

import contextlib
import random
from typing import Any

import cases
import kernels
import pytest
import sglang_case
import torch
from bad_calls import sglang as tables
from bad_calls.row import ints
from hypothesis import example, given
from hypothesis import strategies as st
from stand_ins import replace_backend

import hybrid_mxfp8 as mx
from hybrid_mxfp8.compat import sglang
from hybrid_mxfp8.core.formats import padded_scale_rows
from hybrid_mxfp8.core.layout import caller_offsets

COUNTS = [5, 0, 130, 1, 0]


@pytest.fixture
def _asked_for(multiplier: str) -> Any:
    with mx.use_backend(multiplier):
        yield


each_multiplier = pytest.mark.usefixtures("_asked_for")


@pytest.fixture
def workspace(device: str) -> torch.Tensor:
    """On a GPU as SGLang's callers pass it: a gigabyte in three dimensions."""
    return torch.empty((1024, 1024, 1024) if device == "cuda" else 1024, dtype=torch.uint8, device=device)


def ours(case: sglang_case.Case, dtype: torch.dtype) -> tuple[mx.GroupedMXFP8, mx.ExpertWeights, torch.Tensor]:
    """The same product through the package's own functions."""
    xq = mx.quantize_grouped(case.x, mx.GroupLayout.from_counts(case.tokens, case.x.shape[0]))
    wq = mx.quantize_weights(case.w)
    return xq, wq, mx.grouped_gemm(xq, wq, out_dtype=dtype)


@each_multiplier
@pytest.mark.parametrize("dtype", cases.HALF_DTYPES)
@pytest.mark.parametrize("num_experts", [8, 16, 32, 64] if cases.device() == "cuda" else [8])
def test_each_expert_is_close_to_the_unquantized_product(
    num_experts: int, dtype: torch.dtype, device: str, workspace: torch.Tensor
) -> None:
    """SGLang's own bound, 0.001; on a GPU its own grid, of weights whose float64 truth fits."""
    choose = random.Random(f"{num_experts} {dtype}")
    most, tokens = (64, 512) if device == "cuda" else (2, 24)
    n = k = 2**29
    while num_experts * n * k > 2**29:
        n, k = 128 * choose.randint(1, most), 128 * choose.randint(1, most)
    counts = [choose.randint(1, tokens) if choose.random() < 0.7 else 0 for _ in range(num_experts)]
    case = sglang_case.random_case(counts, n, k, dtype, num_experts, device=device)
    case.quantize()
    d = case.multiply(workspace, dtype)
    assert (d.shape, d.dtype) == ((sum(counts), n), dtype)
    for rows, truth in case.experts():
        assert mx.calc_diff(d[rows], truth) < 0.001


@each_multiplier
@pytest.mark.parametrize(("gap", "spare"), [(0, 0), (0, 384), (0, 77), (128, 0), (256, 128)])
def test_bytes_are_those_of_the_packages_own_functions(
    gap: int, spare: int, device: str, workspace: torch.Tensor
) -> None:
    """Wherever scales lie in a larger buffer."""
    case = sglang_case.random_case(COUNTS, 128, 128, torch.bfloat16, 1, device=device, gap=gap, spare=spare)
    case.quantize()
    xq, wq, y = ours(case, torch.float16)
    assert torch.equal(cases.bits(case.x_values), cases.bits(xq.values))
    cases.same_bytes(mx.ExpertWeights(case.w_values, case.w_scales), wq)
    for start, count, at in zip(case.scale_starts.tolist(), COUNTS, xq.groups.scale_offsets.tolist(), strict=False):
        rows = padded_scale_rows(count)
        assert torch.equal(case.x_scales[start : start + rows], xq.scales[at : at + rows])
    used = int(case.scale_starts[2]) + 256 + gap + 128  # expert 3's; expert 4 has none
    assert (case.x_scales[used:] == 0xFF).all(), "rows beyond the last expert were written"
    assert torch.equal(case.multiply(workspace, torch.float16), y)


@each_multiplier
def test_scales_in_any_order_and_rows_of_a_padded_batch(device: str, workspace: torch.Tensor) -> None:
    case = sglang_case.random_case([3, 5], 128, 128, torch.bfloat16, 2, device=device)
    case.scale_starts = case.scale_starts.flip(0).contiguous()
    case.x = torch.cat([case.x, torch.full((5, 128), float("nan"), dtype=torch.bfloat16, device=device)])
    case.x_values = torch.full((13, 128), 0x3A, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn)
    case.quantize()
    assert (cases.bits(case.x_values)[8:] == 0x3A).all()
    d = case.multiply(workspace, torch.float32)
    assert d.shape == (13, 128)
    assert torch.equal(d[:8], ours(case, torch.float32)[2][:8])


@each_multiplier
@pytest.mark.parametrize("counts", [[0, 0, 0], []])
def test_nothing_to_do(counts: list[int], device: str, workspace: torch.Tensor) -> None:
    case = sglang_case.random_case(counts, 128, 128, torch.bfloat16, 4, device=device)
    case.quantize()
    assert case.multiply(workspace, torch.bfloat16).shape == (0, 128)


@each_multiplier
def test_k_that_is_a_multiple_of_32_alone(device: str, workspace: torch.Tensor, rng: torch.Generator) -> None:
    """SGLang asks for K % 128 == 0; here K = 160 works, with whole tiles' 8 scale columns for 5."""
    x, w = torch.randn(6, 160, generator=rng).to(device), torch.randn(2, 8, 160, generator=rng).to(device)
    tokens, starts, scale_starts = (ints(*values).to(device) for values in ((2, 4), (0, 2), (0, 128)))
    values = torch.empty(6, 160, dtype=torch.float8_e4m3fn, device=device)
    scales = torch.empty(256, 8, dtype=torch.uint8, device=device)
    sglang_case.grouped_quant(x, tokens, starts, scale_starts, values, scales)
    wq = mx.quantize_weights(w)
    d = sglang_case.moe_grouped_gemm(
        wq.values, values, wq.scales, scales, starts, scale_starts, tokens, workspace, torch.float32
    )
    assert torch.equal(d, mx.grouped_gemm(mx.quantize_grouped(x, tokens), wq, out_dtype=torch.float32))


def test_opcheck() -> None:
    case = sglang_case.random_case(COUNTS, 128, 128, torch.bfloat16, 7)
    with mx.use_backend("reference"):
        case.quantize()
        x, w = case.x_values.view(torch.uint8), case.w_values.view(torch.uint8)
        metadata, ops = (case.starts, case.scale_starts), torch.ops.hybrid_mxfp8
        torch.library.opcheck(ops.sglang_grouped_quant, (case.x, case.tokens, *metadata, x, case.x_scales))
        product = (w, x, case.w_scales, case.x_scales, *metadata, case.tokens, torch.float16)
        torch.library.opcheck(ops.sglang_moe_grouped_gemm, product)


def test_compiled_as_one_graph_for_any_number_of_tokens(device: str, workspace: torch.Tensor) -> None:
    """Into the caller's buffers as without the compiler, bit for bit."""
    compilations = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        compilations.append(graph)
        return torch._inductor.compile(graph, inputs) if device == "cuda" else graph

    def step(x: Any, tokens: Any, starts: Any, places: Any, values: Any, scales: Any, w: Any, w_scales: Any) -> Any:
        sglang.es_sm100_mxfp8_blockscaled_grouped_quant(x, tokens, starts, places, values, scales)
        return sglang.es_sm100_mxfp8_blockscaled_moe_grouped_gemm(
            w, values, w_scales, scales, starts, places, tokens, workspace, torch.bfloat16
        )

    compiled = torch.compile(step, fullgraph=True, backend=backend, dynamic=True)
    with mx.use_backend("reference" if device == "cpu" else None):
        for seed, counts in enumerate(([5, 0, 130, 1, 0], [3, 9, 1, 0, 200], [50, 60, 70, 80, 90])):
            case = sglang_case.random_case(counts, 128, 128, torch.bfloat16, seed, device=device)
            case.quantize()
            expected = case.multiply(workspace, torch.bfloat16), case.x_values.clone(), case.x_scales.clone()
            case.x_values.view(torch.uint8).fill_(0)
            case.x_scales.fill_(0xFF)
            metadata = (case.tokens, case.starts, case.scale_starts)
            got = compiled(case.x, *metadata, case.x_values, case.x_scales, case.w_values, case.w_scales)
            for ours_now, before in zip((got, case.x_values, case.x_scales), expected, strict=True):
                assert torch.equal(cases.bits(ours_now), cases.bits(before))
    assert len(compilations) == 1


@pytest.mark.sanitizer
@given(st.lists(st.tuples(st.integers(-9, 400), st.integers(-300, 4000)), min_size=1, max_size=20), st.integers(0, 900))
@example([(3, 2**31 - 1), (1, 0)], 4)
def test_kernel_and_reference_make_the_same_layout(
    kernels_run: None, device: str, experts: list[tuple[int, int]], num_tokens: int
) -> None:
    """Whatever the data; the largest int32 too."""
    tokens = ints(*(t for t, _ in experts))
    starts = ints(*(s if s < 3900 else 2**31 - 1 for _, s in experts))
    for many in (1, 60):
        given_tokens, given_starts = tokens.repeat(many), starts.repeat(many)
        for rows in (2048, 2**31 - 128):
            got = kernels.caller_layout(given_tokens.to(device), given_starts.to(device), num_tokens, rows)
            expected = caller_offsets(given_tokens, given_starts, num_tokens, rows)
            assert all(torch.equal(mine.cpu(), theirs) for mine, theirs in zip(got, expected, strict=True))


def test_layouts_by_hand() -> None:
    """In the second, an expert's rows end beyond int32."""
    parts = caller_offsets(ints(3, 200, 0), ints(256, 512, 900), 203, 1024)
    assert [part.tolist() for part in parts] == [[3, 200, 0], [0, 3, 203, 203], [256, 512, 900, 768]]
    parts = caller_offsets(ints(3, 1), ints(2**31 - 1, 0), 4, 2**31 - 128)
    assert parts[2].tolist() == [2**31 - 128, 0, 2**31 - 128]


def test_a_workspace_is_used_from_its_first_aligned_byte() -> None:
    whole = cases.aligned_bytes(4096)
    shifted = whole[1:]  # one byte beyond a boundary
    part = sglang._aligned_part(shifted, 1000)
    assert (part.numel(), part.data_ptr()) == (1000, shifted.data_ptr() + 255)
    assert sglang._aligned_part(whole.view(16, 16, 16), 512).data_ptr() % 256 == 0
    assert sglang._aligned_part(shifted[:1000], 745).numel() == 745
    assert sglang._aligned_part(shifted[:1000], 746) is None  # then memory is allocated
    for size in (0, 1):  # where nothing is needed any will do
        assert sglang._aligned_part(shifted[:size], 0).numel() == 0


@pytest.mark.parametrize("missing", [0, 1])
def test_what_is_missing_of_a_workspace_is_allocated(missing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang's 16 MiB may be too few for another backend; its functions have no way to ask."""
    case = sglang_case.random_case(COUNTS, 128, 128, torch.bfloat16, 1)
    workspace = cases.aligned_bytes(2**24)
    needy = {"workspace_size": lambda problem: workspace.numel() + missing}
    with mx.use_backend("reference"):
        case.quantize()
        expected = case.multiply(workspace, torch.bfloat16)
        replace_backend(monkeypatch, "reference", **needy)
        assert torch.equal(case.multiply(workspace, torch.bfloat16), expected)


@pytest.mark.parametrize(("rows", "fits"), [(2**31 - 1, True), (2**31, False)])
def test_scales_of_2_to_the_31_rows_are_refused(rows: int, fits: bool) -> None:
    on_meta = {name: tensor.to("meta") for name, tensor in tables._tokens().items()}
    on_meta["scale_factor"] = torch.empty(rows, 4, dtype=torch.uint8, device="meta")
    message = r"^scale_factor: must have fewer than 2\*\*31 rows, got 2147483648$"
    with contextlib.nullcontext() if fits else pytest.raises(ValueError, match=message):
        sglang_case.grouped_quant(**on_meta)
