"""SGLang's two functions on the CPU: its own criterion on a reduced grid, its buffers, and what they refuse."""

from __future__ import annotations

import contextlib
import dataclasses
import random
from typing import Any

import cases
import pytest
import sglang_case
import torch
from fake_hopper import aligned_bytes, moved
from hypothesis import given
from hypothesis import strategies as st

import hybrid_mxfp8 as mx
from hybrid_mxfp8.compat import sglang
from hybrid_mxfp8.core.formats import padded_scale_rows
from hybrid_mxfp8.dispatch.registry import BACKENDS

WORKSPACE = torch.empty(1024, dtype=torch.uint8)
COUNTS = [5, 0, 130, 1, 0]


@pytest.fixture
def _each_backend(backend: str) -> Any:
    with mx.use_backend(backend):
        yield


on_each_backend = pytest.mark.usefixtures("_each_backend")


def ours(case: sglang_case.Case, dtype: torch.dtype) -> tuple[mx.GroupedMXFP8, mx.ExpertWeights, torch.Tensor]:
    """The same product through the package's own functions."""
    xq = mx.quantize_grouped(case.x, mx.GroupLayout.from_counts(case.tokens, case.x.shape[0]))
    wq = mx.quantize_weights(case.w)
    return xq, wq, mx.grouped_gemm(xq, wq, out_dtype=dtype)


@on_each_backend
@pytest.mark.parametrize("dtype", cases.HALF_DTYPES)
@pytest.mark.parametrize("num_experts", [8, 16])
def test_each_expert_is_close_to_the_unquantized_product(num_experts: int, dtype: torch.dtype) -> None:
    """SGLang's own bound, 0.001 an expert, with a fixed seed and with empty experts."""
    choose = random.Random(num_experts)
    n, k = 128 * choose.randint(1, 2), 128 * choose.randint(1, 2)
    counts = [choose.choice((0, 1, choose.randint(1, 24))) for _ in range(num_experts)]
    assert 0 in counts
    case = sglang_case.random_case(counts, n, k, dtype, seed=num_experts)
    case.quantize()
    d = case.multiply(WORKSPACE, dtype)
    assert d.shape == (sum(counts), n)
    assert d.dtype == dtype
    for rows, truth in case.experts():
        assert mx.calc_diff(d[rows], truth) < 0.001


@on_each_backend
def test_bytes_are_those_of_the_packages_own_functions() -> None:
    case = sglang_case.random_case(COUNTS, 128, 256, torch.bfloat16, seed=0)
    case.quantize()
    xq, wq, y = ours(case, torch.bfloat16)
    assert torch.equal(case.x_values.view(torch.uint8), xq.values.view(torch.uint8))
    assert torch.equal(case.x_scales, xq.scales[: case.x_scales.shape[0]])
    assert torch.equal(case.w_values.view(torch.uint8), wq.values.view(torch.uint8))
    assert torch.equal(case.w_scales, wq.scales)
    assert torch.equal(case.multiply(WORKSPACE, torch.bfloat16), y)


@on_each_backend
@pytest.mark.parametrize(("gap", "spare"), [(0, 384), (0, 77), (128, 0), (256, 128)])
def test_scales_may_lie_anywhere_in_a_larger_buffer(gap: int, spare: int) -> None:
    case = sglang_case.random_case(COUNTS, 128, 128, torch.bfloat16, seed=1, gap=gap, spare=spare)
    case.quantize()
    xq, _, y = ours(case, torch.float16)
    for start, count, e in zip(case.scale_starts.tolist(), COUNTS, range(len(COUNTS)), strict=True):
        at, rows = int(xq.groups.scale_offsets[e]), padded_scale_rows(count)
        assert torch.equal(case.x_scales[start : start + rows], xq.scales[at : at + rows])
    used = int(case.scale_starts[2]) + 256 + gap + 128  # expert 3's; expert 4 has none
    assert (case.x_scales[used:] == 0xFF).all(), "rows beyond the last expert were written"
    assert torch.equal(case.multiply(WORKSPACE, torch.float16), y)


@on_each_backend
def test_experts_scales_may_lie_in_any_order() -> None:
    case = sglang_case.random_case([3, 5], 128, 128, torch.bfloat16, seed=2)
    case.scale_starts = case.scale_starts.flip(0).contiguous()
    case.quantize()
    assert torch.equal(case.multiply(WORKSPACE, torch.float32), ours(case, torch.float32)[2])


@on_each_backend
def test_rows_of_a_padded_batch_stay() -> None:
    case = sglang_case.random_case([4, 3], 128, 128, torch.bfloat16, seed=3)
    case.x = torch.cat([case.x, torch.full((5, 128), float("nan"), dtype=torch.bfloat16)])
    case.x_values = torch.full((12, 128), 0x3A, dtype=torch.uint8).view(torch.float8_e4m3fn)
    case.quantize()
    assert (case.x_values.view(torch.uint8)[7:] == 0x3A).all()
    d = case.multiply(WORKSPACE, torch.bfloat16)
    assert d.shape == (12, 128)
    for rows, truth in case.experts():
        assert mx.calc_diff(d[rows], truth) < 0.001


@on_each_backend
@pytest.mark.parametrize("counts", [[0, 0, 0], []], ids=["no tokens", "no experts"])
def test_nothing_to_do(counts: list[int]) -> None:
    case = sglang_case.random_case(counts, 128, 128, torch.bfloat16, seed=4)
    case.quantize()
    assert case.multiply(WORKSPACE, torch.bfloat16).shape == (0, 128)


@on_each_backend
def test_k_that_is_a_multiple_of_32_alone() -> None:
    """SGLang asks for K % 128 == 0; here K = 160 works with the scale columns of whole tiles, 8 for 5."""
    x = torch.randn(6, 160, generator=torch.Generator().manual_seed(5))
    w = torch.randn(2, 8, 160, generator=torch.Generator().manual_seed(6))
    tokens, starts = torch.tensor([2, 4], dtype=torch.int32), torch.tensor([0, 2], dtype=torch.int32)
    scale_starts = torch.tensor([0, 128], dtype=torch.int32)
    values = torch.empty(6, 160, dtype=torch.float8_e4m3fn)
    scales = torch.empty(256, 8, dtype=torch.uint8)
    sglang.es_sm100_mxfp8_blockscaled_grouped_quant(x, tokens, starts, scale_starts, values, scales)
    wq = mx.quantize_weights(w)
    d = sglang.es_sm100_mxfp8_blockscaled_moe_grouped_gemm(
        wq.values, values, wq.scales, scales, starts, scale_starts, tokens, WORKSPACE, torch.float32
    )
    assert torch.equal(d, mx.grouped_gemm(mx.quantize_grouped(x, tokens), wq, out_dtype=torch.float32))


# ---------------------------------------------------------------- operators


@pytest.mark.parametrize("which", ["quantizer", "product"])
def test_opcheck(which: str) -> None:
    case = sglang_case.random_case(COUNTS, 128, 128, torch.bfloat16, seed=7)
    case.quantize()
    metadata = (case.starts, case.scale_starts)
    with mx.use_backend("reference"):
        if which == "quantizer":
            arguments: tuple[Any, ...] = (
                case.x,
                case.tokens,
                *metadata,
                case.x_values.view(torch.uint8),
                case.x_scales,
            )
            torch.library.opcheck(torch.ops.hybrid_mxfp8.sglang_grouped_quant, arguments)
        else:
            values = case.w_values.view(torch.uint8), case.x_values.view(torch.uint8)
            arguments = (*values, case.w_scales, case.x_scales, *metadata, case.tokens, torch.float16)
            torch.library.opcheck(torch.ops.hybrid_mxfp8.sglang_moe_grouped_gemm, arguments)


def test_compiled_as_one_graph_for_any_number_of_tokens() -> None:
    """Into the caller's buffers as without the compiler, bit for bit, and with one compilation for dynamic T."""
    compilations = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        compilations.append(graph)
        return graph

    def both(case: sglang_case.Case) -> torch.Tensor:
        case.quantize_tokens()
        return case.multiply(WORKSPACE, torch.bfloat16)

    def step(
        x: Any, tokens: Any, starts: Any, scale_starts: Any, values: Any, scales: Any, w: Any, w_scales: Any
    ) -> Any:
        sglang.es_sm100_mxfp8_blockscaled_grouped_quant(x, tokens, starts, scale_starts, values, scales)
        return sglang.es_sm100_mxfp8_blockscaled_moe_grouped_gemm(
            w, values, w_scales, scales, starts, scale_starts, tokens, WORKSPACE, torch.bfloat16
        )

    compiled = torch.compile(step, fullgraph=True, backend=backend, dynamic=True)
    with mx.use_backend("reference"):
        for seed, counts in enumerate(([5, 0, 130, 1, 0], [3, 9, 1, 0, 200], [50, 60, 70, 80, 90])):
            case = sglang_case.random_case(counts, 128, 128, torch.bfloat16, seed)
            case.quantize()
            expected = both(case), case.x_values.clone(), case.x_scales.clone()
            case.x_values.view(torch.uint8).fill_(0)
            case.x_scales.fill_(0xFF)
            metadata = (case.tokens, case.starts, case.scale_starts)
            got = compiled(case.x, *metadata, case.x_values, case.x_scales, case.w_values, case.w_scales)
            assert torch.equal(got, expected[0])
            assert torch.equal(case.x_values.view(torch.uint8), expected[1].view(torch.uint8))
            assert torch.equal(case.x_scales, expected[2])
    assert len(compilations) == 1


# ---------------------------------------------------------------- layout


@given(st.lists(st.tuples(st.integers(-9, 400), st.integers(-300, 4000)), min_size=1, max_size=20), st.integers(0, 900))
def test_kernel_and_reference_make_the_same_layout(
    interpreter: None, experts: list[tuple[int, int]], num_tokens: int
) -> None:
    """Whatever the data; the largest int32 too."""
    from hybrid_mxfp8.triton_kernels.caller_layout import caller_layout

    tokens = torch.tensor([t for t, _ in experts], dtype=torch.int32)
    starts = torch.tensor([s if s < 3900 else 2**31 - 1 for _, s in experts], dtype=torch.int32)
    for rows in (2048, 2**31 - 128):
        got = caller_layout(tokens, starts, num_tokens, rows)
        for mine, theirs in zip(got, sglang.reference_layout(tokens, starts, num_tokens, rows), strict=True):
            assert torch.equal(mine, theirs)


def test_scales_near_the_end_of_int32(interpreter: None) -> None:
    """Their expert's rows end beyond it."""
    from hybrid_mxfp8.triton_kernels.caller_layout import caller_layout

    tokens, starts = torch.tensor([3, 1], dtype=torch.int32), torch.tensor([2**31 - 1, 0], dtype=torch.int32)
    for function in (caller_layout, sglang.reference_layout):
        assert function(tokens, starts, 4, 2**31 - 128)[2].tolist() == [2**31 - 128, 0, 2**31 - 128]


def test_layout_by_hand() -> None:
    tokens, starts = torch.tensor([3, 200, 0], dtype=torch.int32), torch.tensor([256, 512, 900], dtype=torch.int32)
    parts = sglang.reference_layout(tokens, starts, 203, 1024)
    assert [part.tolist() for part in parts] == [[3, 200, 0], [0, 3, 203, 203], [256, 512, 900, 768]]


# ---------------------------------------------------------------- workspace


def test_workspace_is_used_from_its_first_aligned_byte() -> None:
    whole = torch.empty(4096, dtype=torch.uint8)
    shifted = whole[-whole.data_ptr() % 256 + 1 :]  # one byte beyond a boundary
    part = sglang._aligned_part(shifted, 1000)
    assert part.numel() == 1000
    assert part.data_ptr() == shifted.data_ptr() + 255
    assert sglang._aligned_part(whole.view(16, 16, 16), 512).data_ptr() % 256 == 0


def test_workspace_that_is_too_small_says_what_is_needed() -> None:
    whole = torch.empty(4096, dtype=torch.uint8)
    shifted = whole[-whole.data_ptr() % 256 + 1 :][:1000]
    with pytest.raises(ValueError, match=r"workspace: must have at least 746 bytes .*, got 745"):
        sglang._aligned_part(shifted, 746)
    assert sglang._aligned_part(shifted, 745).numel() == 745


def test_where_nothing_is_needed_any_workspace_will_do() -> None:
    shifted = aligned_bytes(512)[1:]
    for size in (0, 1):
        assert sglang._aligned_part(shifted[:size], 0).numel() == 0


ARGUMENTS = {
    **{"w_values": "a", "w_scales": "sfa", "x_values": "b", "x_scales": "sfb"},
    **{"tokens": "tokens_per_expert", "scale_starts": "blockscale_offsets"},
}


@pytest.mark.parametrize("field", ARGUMENTS)
def test_a_workspace_inside_an_operand_is_refused(field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As much of it as the backend takes."""
    needy = dataclasses.replace(BACKENDS["reference"], workspace_size=lambda problem: 8)
    monkeypatch.setitem(BACKENDS, "reference", needy)
    case = sglang_case.random_case([3, 1], 128, 128, torch.bfloat16, seed=8)
    with mx.use_backend("reference"):
        case.quantize()
        case.multiply(WORKSPACE, torch.bfloat16)
        operand = moved(getattr(case, field))
        setattr(case, field, operand)
        with pytest.raises(ValueError, match=f"^workspace: must not overlap {ARGUMENTS[field]}, got"):
            case.multiply(operand.view(torch.uint8).view(-1), torch.bfloat16)


# ---------------------------------------------------------------- errors


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


QUANT = {
    "input": torch.ones(4, 128, dtype=torch.bfloat16),
    "tokens_per_expert": int32(3, 1),
    "expert_offsets": int32(0, 3),
    "blockscale_offsets": int32(0, 128),
    "quant_output": torch.empty(4, 128, dtype=torch.float8_e4m3fn),
    "scale_factor": torch.empty(256, 4, dtype=torch.uint8),
}
GEMM = {
    "a": torch.zeros(2, 128, 128, dtype=torch.float8_e4m3fn),
    "b": torch.zeros(4, 128, dtype=torch.float8_e4m3fn),
    "sfa": torch.zeros(2, 128, 4, dtype=torch.uint8),
    "sfb": torch.zeros(256, 4, dtype=torch.uint8),
    "expert_offsets": int32(0, 3),
    "blockscale_offsets": int32(0, 128),
    "tokens_per_expert": int32(3, 1),
    "workspace": WORKSPACE,
    "dtype": torch.bfloat16,
}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("input", torch.ones(4, 128, dtype=torch.float64), "input: dtype must be bfloat16 or"),
        ("input", torch.ones(4, 100), "input: K must be a positive multiple of 32, got 100"),
        ("input", torch.ones(128, 4).T, "input: must have unit stride along K"),
        ("tokens_per_expert", torch.tensor([3, 1]), "tokens_per_expert: dtype must be int32, got int64"),
        ("expert_offsets", int32(0, 3, 4), r"expert_offsets: must have shape \(E,\) = \(2,\), got \(3,\)"),
        ("expert_offsets", int32(0, 4), r"expert_offsets: must be the exclusive prefix sum .* \[0, 3\], got \[0, 4\]"),
        ("blockscale_offsets", int32(0, 100), "blockscale_offsets: must be multiples of 128"),
        ("blockscale_offsets", int32(0, 256), "blockscale_offsets: .*its rows among 256"),
        ("quant_output", torch.empty(4, 64, dtype=torch.float8_e4m3fn), "quant_output: must have shape"),
        ("quant_output", torch.empty(4, 256, dtype=torch.float8_e4m3fn)[:, ::2], "quant_output: must be contiguous"),
        ("scale_factor", torch.empty(4, 4, dtype=torch.uint8), r"at least roundup\(T, 128\) = 128 rows, .*got 4"),
        ("scale_factor", torch.empty(256, 8, dtype=torch.uint8), "scale_factor: must have 4 columns"),
    ],
)
def test_quantizer_refuses(name: str, value: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        sglang.es_sm100_mxfp8_blockscaled_grouped_quant(**{**QUANT, name: value})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("a", torch.zeros(2, 100, 128, dtype=torch.float8_e4m3fn), "a: N must be a positive multiple of 8, got 100"),
        ("a", torch.zeros(3, 128, 128, dtype=torch.float8_e4m3fn), r"sfa: must have shape .* = \(3, 128, 4\)"),
        ("sfa", torch.zeros(2, 120, 4, dtype=torch.uint8), r"sfa: must have shape \(E, roundup\(N, 128\), K/32\)"),
        ("b", torch.zeros(4, 256, dtype=torch.float8_e4m3fn), r"b: must have shape \(T, K\) = \(4, 128\)"),
        ("sfb", torch.zeros(100, 4, dtype=torch.uint8), "sfb: must have at least"),
        ("tokens_per_expert", [3, 1], "tokens_per_expert: must be a torch.Tensor"),
        ("workspace", torch.empty(64), "workspace: dtype must be uint8, got float32"),
        ("workspace", None, "workspace: must be a torch.Tensor"),
        ("dtype", torch.int8, "dtype: must be bfloat16 or float16 or float32, got int8"),
    ],
)
def test_product_refuses(name: str, value: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        sglang.es_sm100_mxfp8_blockscaled_moe_grouped_gemm(**{**GEMM, name: value})


def test_product_refuses_another_number_of_experts() -> None:
    one = {"tokens_per_expert": int32(4), "expert_offsets": int32(0), "blockscale_offsets": int32(0)}
    with pytest.raises(ValueError, match=r"tokens_per_expert: must have shape \(E,\) = \(2,\), got \(1,\)"):
        sglang.es_sm100_mxfp8_blockscaled_moe_grouped_gemm(**{**GEMM, **one})


@pytest.mark.parametrize(("rows", "fits"), [(2**31 - 1, True), (2**31, False)])
def test_scales_of_2_to_the_31_rows_are_refused(rows: int, fits: bool) -> None:
    on_meta = {name: tensor.to("meta") for name, tensor in QUANT.items()}
    on_meta["scale_factor"] = torch.empty(rows, 4, dtype=torch.uint8, device="meta")
    message = r"^scale_factor: must have fewer than 2\*\*31 rows, got 2147483648$"
    with contextlib.nullcontext() if fits else pytest.raises(ValueError, match=message):
        sglang.es_sm100_mxfp8_blockscaled_grouped_quant(**on_meta)


def test_unaligned_scales_of_a_product_are_refused() -> None:
    unaligned = aligned_bytes(256 * 4 + 8)[8:].view(256, 4)
    with pytest.raises(ValueError, match=r"^sfb: must start at a 16-byte boundary, got address 0x"):
        sglang.es_sm100_mxfp8_blockscaled_moe_grouped_gemm(**{**GEMM, "sfb": unaligned})
