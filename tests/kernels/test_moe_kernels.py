"""Routing, expert bias and combine: kernels against their twins bit for bit, and the twins against loops in Python."""

from __future__ import annotations

import itertools

import cases
import pytest
import torch
from guards import Guards
from hypothesis import given
from hypothesis import strategies as st

from hybrid_mxfp8.reference import routing as moe_reference

ROUTES: dict[str, tuple[int, int, int]] = {
    "one slot": (1, 1, 1),
    "decode": (3, 8, 128),
    "no power of two": (37, 6, 72),
    "many experts": (5, 8, 1024),
    "several programs": (300, 4, 9),
    "three launches": (1030, 4, 40),
    "three launches, a power of two": (1030, 4, 64),
    "three launches, more blocks than are summed at once": (16500, 4, 6),
}
"""M, top_k, E."""


def new_route(tokens: int, top_k: int, experts: int) -> dict[str, torch.Tensor]:
    """Outputs of a routing, poisoned."""
    sizes = {
        "sorted_token_ids": (tokens * top_k,),
        "inverse_permutation": (tokens, top_k),
        "layout": (3 * experts + 2,),
    }
    return {name: torch.full(size, -77, dtype=torch.int32) for name, size in sizes.items()}


def reference_route(ids: torch.Tensor, experts: int) -> dict[str, torch.Tensor]:
    out = new_route(*ids.shape, experts)
    moe_reference.route(ids, experts, **out)
    return out


def kernel_route(ids: torch.Tensor, experts: int) -> dict[str, torch.Tensor]:
    from hybrid_mxfp8.triton_kernels.moe import route

    out = new_route(*ids.shape, experts)
    scratch = torch.full((route.scratch_elements(ids.numel(), experts),), -5, dtype=torch.int32)
    route.route(ids, experts, **out, scratch=scratch)
    return out


def random_ids(tokens: int, top_k: int, experts: int, rng: torch.Generator) -> torch.Tensor:
    """Some below 0, some beyond the experts."""
    return torch.randint(-2, experts + 2, (tokens, top_k), generator=rng)


def test_route_of_a_batch_by_hand() -> None:
    """Rows of expert 0, then 1, then 2, each in the order of the batch; -1 and 3 are nobody's."""
    got = reference_route(torch.tensor([[1, 0], [-1, 1], [2, 3]]), 3)
    assert got["sorted_token_ids"].tolist()[:4] == [0, 0, 1, 2]
    assert sorted(got["sorted_token_ids"].tolist()[4:]) == [1, 2]
    assert got["inverse_permutation"].tolist() == [[1, 0], [-1, 2], [3, -1]]
    assert got["layout"].tolist() == [1, 2, 1, 0, 1, 3, 4, 0, 128, 256, 384]


@given(
    ids=st.lists(st.integers(-2, 7), min_size=1, max_size=60),
    top_k=st.sampled_from([1, 2, 3]),
    experts=st.integers(1, 6),
)
def test_reference_route_is_a_stable_sort(ids: list[int], top_k: int, experts: int) -> None:
    ids = ids + [0] * (-len(ids) % top_k)
    got = reference_route(torch.tensor(ids).reshape(-1, top_k), experts)
    kept = [s for e in range(experts) for s, i in enumerate(ids) if i == e]
    assert got["sorted_token_ids"].tolist()[: len(kept)] == [s // top_k for s in kept]
    rows = {s: row for row, s in enumerate(kept)}
    assert got["inverse_permutation"].reshape(-1).tolist() == [rows.get(s, -1) for s in range(len(ids))]
    counts = [ids.count(e) for e in range(experts)]
    padded = [-(-c // 128) * 128 for c in counts]
    sums = [list(itertools.accumulate(c, initial=0)) for c in (counts, padded)]
    assert got["layout"].tolist() == [*counts, *sums[0], *sums[1]]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
@pytest.mark.parametrize("name", ROUTES)
def test_route_kernel_is_its_twin(interpreter: None, rng: torch.Generator, name: str, dtype: torch.dtype) -> None:
    tokens, top_k, experts = ROUTES[name]
    ids = random_ids(tokens, top_k, experts, rng).to(dtype)
    got, expected = kernel_route(ids, experts), reference_route(ids, experts)
    for key in expected:
        assert torch.equal(got[key], expected[key]), key


@pytest.mark.parametrize("slots", [5, 5000])
@pytest.mark.parametrize("value", [0, 2, -1, 3, 2**40, -(2**62)])
def test_route_kernel_of_one_value(interpreter: None, value: int, slots: int) -> None:
    """All to one expert, or nothing to any, whatever nonsense an id holds."""
    ids = torch.full((slots, 1), value)
    got, expected = kernel_route(ids, 3), reference_route(ids, 3)
    for key in expected:
        assert torch.equal(got[key], expected[key]), key
    assert got["layout"][:3].sum() == (slots if 0 <= value < 3 else 0)


def test_route_is_one_launch_while_it_may_be(interpreter: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from hybrid_mxfp8.triton_kernels.moe import route

    launches: list[object] = []
    monkeypatch.setattr(route, "launch", lambda kernel, *rest: launches.append(kernel))
    for slots, expected in ((1, 1), (4096, 1), (4097, 3)):
        launches.clear()
        kernel_route(torch.zeros(slots, 1, dtype=torch.int32), 8)
        assert len(launches) == expected


def test_scratch_grows_with_the_batch(interpreter: None) -> None:
    """So that a workspace made for the largest batch serves all smaller ones."""
    from hybrid_mxfp8.triton_kernels.moe import route

    sizes = [route.scratch_elements(slots, 300) for slots in range(1, 20000, 7)]
    assert sizes == sorted(sizes)
    assert sizes[0] == 0 < sizes[-1]


@pytest.mark.parametrize(
    ("num_slots", "interpreted", "expected"),
    [
        (1, False, (8, 128, True, 4)),
        (129, False, (8, 256, True, 4)),
        (4096, False, (8, 1024, True, 4)),
        (4097, False, (256, 8, False, 8)),
        (1, True, (256, 128, True, 4)),
        (4097, True, (1024, 1024, False, 8)),
    ],
)
def test_select_route_config(
    interpreter: None, num_slots: int, interpreted: bool, expected: tuple[int, int, bool, int]
) -> None:
    from hybrid_mxfp8.triton_kernels.moe.route import RouteConfig, select_route_config

    config = select_route_config(num_slots, interpreted)
    assert config == RouteConfig(*expected)
    assert not config.one_launch or config.chunk >= 32 * config.num_warps, "a thread has two slots of a histogram"


@pytest.mark.parametrize("experts", [31, 32, 64, 127, 128, 1024])
def test_bins_have_one_for_dropped_slots(interpreter: None, experts: int) -> None:
    from hybrid_mxfp8.triton_kernels.moe.route import _bins

    assert _bins(experts) > experts


@pytest.mark.parametrize(("tokens", "experts"), [(1030, 40), (1280, 31), (1030, 300)])
def test_routing_writes_nothing_beside_its_buffers(
    interpreter: None, rng: torch.Generator, tokens: int, experts: int
) -> None:
    """Scratch memory of exactly the size that is asked for, among guard bytes."""
    from hybrid_mxfp8.triton_kernels.moe import route

    guards = Guards()
    ids = guards(random_ids(tokens, 4, experts, rng))
    sizes = (tokens * 4,), (tokens, 4), (3 * experts + 2,), (route.scratch_elements(tokens * 4, experts),)
    outputs = [guards.out(torch.zeros(size, dtype=torch.int32)) for size in sizes]
    guards.ready()
    route.route(ids, experts, *outputs)
    guards.check()


def slots_of(tokens: int, top_k: int, experts: int, rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    ids = random_ids(tokens, top_k, experts, rng)
    return ids, reference_route(ids, experts)["inverse_permutation"]


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("tokens", "top_k", "hidden"), [(1, 1, 32), (7, 3, 96), (4, 8, 2080)])
def test_combine_kernel_is_its_twin(
    interpreter: None, rng: torch.Generator, tokens: int, top_k: int, hidden: int, bias: bool, dtype: torch.dtype
) -> None:
    from hybrid_mxfp8.triton_kernels.moe.combine import combine

    ids, inverse_permutation = slots_of(tokens, top_k, 5, rng)
    y = cases.random_rows(tokens * top_k, hidden, dtype, rng)
    owned = torch.zeros(tokens * top_k, dtype=torch.bool)
    owned[inverse_permutation[inverse_permutation >= 0].long()] = True
    y[~owned] = float("nan")  # nobody's: must not be read
    weights = torch.randn(tokens, top_k, generator=rng)
    expert_bias = torch.randn(5, hidden, generator=rng).to(dtype) if bias else None
    # A view with a longer row stride, whose rest must stay.
    got, expected = (torch.full((tokens, hidden + 32), 7.0, dtype=dtype) for _ in range(2))
    combine(y, inverse_permutation, ids, weights, expert_bias, got[:, :hidden])
    moe_reference.combine(y, inverse_permutation, ids, weights, expert_bias, expected[:, :hidden])
    assert torch.equal(got.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("bias", [False, True])
def test_combine_is_the_weighted_sum(rng: torch.Generator, bias: bool) -> None:
    tokens, top_k, experts, hidden = 11, 4, 6, 64
    ids, inverse_permutation = slots_of(tokens, top_k, experts, rng)
    y = torch.randn(tokens * top_k, hidden, generator=rng)
    weights = torch.rand(tokens, top_k, generator=rng)
    expert_bias = torch.randn(experts, hidden, generator=rng) if bias else None
    out = torch.empty(tokens, hidden)
    moe_reference.combine(y, inverse_permutation, ids, weights, expert_bias, out)
    expected = torch.zeros(tokens, hidden, dtype=torch.float64)
    for m in range(tokens):
        for k in range(top_k):
            if inverse_permutation[m, k] >= 0:
                term = y[inverse_permutation[m, k]].double()
                term = term + (expert_bias[ids[m, k]].double() if expert_bias is not None else 0)
                expected[m] += weights[m, k].double() * term
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)


def test_a_dropped_choice_contributes_nothing_not_even_nan(rng: torch.Generator) -> None:
    y = torch.full((2, 32), float("nan"))
    y[0] = 1.0
    out = torch.empty(1, 32)
    weights = torch.tensor([[2.0, float("nan")]])
    moe_reference.combine(y, torch.tensor([[0, -1]]), torch.tensor([[0, -1]]), weights, None, out)
    assert torch.equal(out, torch.full((1, 32), 2.0))


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("n", [32, 2080])
def test_expert_bias_kernel_is_its_twin(interpreter: None, rng: torch.Generator, n: int, dtype: torch.dtype) -> None:
    from hybrid_mxfp8.triton_kernels.moe.expert_bias import add_expert_bias

    ids, inverse_permutation = slots_of(5, 3, 4, rng)
    y = cases.random_rows(15, n, dtype, rng)
    bias = torch.randn(4, n, generator=rng).to(dtype)
    got, expected = y.clone(), y.clone()
    add_expert_bias(got, inverse_permutation, ids, bias)
    moe_reference.add_expert_bias(expected, inverse_permutation, ids, bias)
    assert torch.equal(got, expected)
    live = inverse_permutation.reshape(-1) >= 0
    rows, experts = inverse_permutation.reshape(-1)[live].long(), ids.reshape(-1)[live]
    assert torch.equal(got[rows], (y[rows].float() + bias[experts].float()).to(dtype))
    untouched = torch.ones(15, dtype=torch.bool)
    untouched[rows] = False
    assert torch.equal(got[untouched], y[untouched])


@pytest.mark.parametrize("bias_dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_a_bias_of_another_dtype_is_added_in_fp32(
    interpreter: None, rng: torch.Generator, dtype: torch.dtype, bias_dtype: torch.dtype
) -> None:
    from hybrid_mxfp8.triton_kernels.moe.combine import combine
    from hybrid_mxfp8.triton_kernels.moe.expert_bias import add_expert_bias

    inverse_permutation, ids = torch.arange(32, dtype=torch.int32).view(16, 2), torch.arange(32).view(16, 2) % 4
    y, bias = torch.randn(32, 64, generator=rng).to(dtype), torch.randn(4, 64, generator=rng).to(bias_dtype)
    expected = (y.float() + bias[ids.reshape(-1)].float()).to(dtype)
    for add in (add_expert_bias, moe_reference.add_expert_bias):
        got = y.clone()
        add(got, inverse_permutation, ids, bias)
        assert torch.equal(got, expected)
    weights = torch.randn(16, 2, generator=rng).to(bias_dtype)
    terms = weights.float()[:, :, None] * (y.float() + bias[ids.reshape(-1)].float()).view(16, 2, 64)
    for add_up in (combine, moe_reference.combine):
        out = torch.empty(16, 64, dtype=dtype)
        add_up(y, inverse_permutation, ids, weights, bias, out)
        assert torch.equal(out, (terms[:, 0] + terms[:, 1]).to(dtype))


@pytest.mark.parametrize("top_k", [16, 17, 20])
def test_combine_of_many_choices(interpreter: None, rng: torch.Generator, top_k: int) -> None:
    """More than are unrolled."""
    from hybrid_mxfp8.triton_kernels.moe.combine import combine

    inverse_permutation = torch.arange(3 * top_k, dtype=torch.int32).view(3, top_k)
    y, weights = torch.randn(3 * top_k, 32, generator=rng), torch.randn(3, top_k, generator=rng)
    got, expected = torch.empty(3, 32), torch.empty(3, 32)
    combine(y, inverse_permutation, inverse_permutation.clone(), weights, None, got)
    moe_reference.combine(y, inverse_permutation, inverse_permutation.clone(), weights, None, expected)
    assert torch.equal(got, expected)
