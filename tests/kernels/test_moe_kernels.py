"""Routing, expert bias, combine: kernels bit for bit their references, those against loops."""

from __future__ import annotations

import itertools

import cases
import kernels
import pytest
import torch
from guards import Guards
from hypothesis import given
from hypothesis import strategies as st

from hybrid_mxfp8 import reference as routing

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
if cases.device() == "cuda":
    ROUTES |= {"a million slots": (131072, 8, 8), "a million slots, many experts": (131072, 8, 1024)}
"""M, top_k, E."""


def route(ids: torch.Tensor, experts: int, by_kernel: bool) -> dict[str, torch.Tensor]:
    """Into poison."""
    sizes = {"inverse_permutation": ids.shape, "layout": (3 * experts + 2,)}
    out = {name: torch.full(size, -77, dtype=torch.int32, device=ids.device) for name, size in sizes.items()}
    if by_kernel:
        elements = kernels.scratch_elements(ids.numel(), experts)
        kernels.route(ids, experts, **out, scratch=torch.full((elements,), -5, dtype=torch.int32, device=ids.device))
    else:
        routing.route(ids, experts, **out)
    return out


def check_route(ids: torch.Tensor, experts: int) -> dict[str, torch.Tensor]:
    got, expected = route(ids, experts, True), route(ids, experts, False)
    for name in expected:
        assert torch.equal(got[name], expected[name]), name
    return got


def random_ids(tokens: int, top_k: int, experts: int, rng: torch.Generator, device: str = "cpu") -> torch.Tensor:
    """Some below 0, some beyond the experts."""
    return torch.randint(-2, experts + 2, (tokens, top_k), generator=rng).to(device)


@given(
    ids=st.lists(st.integers(-2, 7), min_size=1, max_size=60),
    top_k=st.sampled_from([1, 2, 3]),
    experts=st.integers(1, 6),
)
def test_reference_route_is_a_stable_sort(ids: list[int], top_k: int, experts: int) -> None:
    ids = ids + [0] * (-len(ids) % top_k)
    got = route(torch.tensor(ids).reshape(-1, top_k), experts, False)
    kept = [s for e in range(experts) for s, i in enumerate(ids) if i == e]
    sources = routing.source_rows(got["inverse_permutation"], len(ids))
    assert sources.tolist()[: len(kept)] == [s // top_k for s in kept]
    rows = {s: row for row, s in enumerate(kept)}
    assert got["inverse_permutation"].reshape(-1).tolist() == [rows.get(s, -1) for s in range(len(ids))]
    counts = [ids.count(e) for e in range(experts)]
    sums = [list(itertools.accumulate(c, initial=0)) for c in (counts, [-(-c // 128) * 128 for c in counts])]
    assert got["layout"].tolist() == [*counts, *sums[0], *sums[1]]


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
@pytest.mark.parametrize("name", ROUTES)
def test_route(kernels_run: None, device: str, rng: torch.Generator, name: str, dtype: torch.dtype) -> None:
    tokens, top_k, experts = ROUTES[name]
    check_route(random_ids(tokens, top_k, experts, rng, device).to(dtype), experts)


@pytest.mark.parametrize("slots", [5, 5000])
@pytest.mark.parametrize("value", [0, 2, -1, 3, 2**40, -(2**62)])
def test_route_of_one_value(kernels_run: None, device: str, value: int, slots: int) -> None:
    """All to one expert, or nothing to any, whatever nonsense an id holds."""
    got = check_route(torch.full((slots, 1), value, device=device), 3)
    assert got["layout"][:3].sum() == (slots if 0 <= value < 3 else 0)


def test_scratch_grows_with_the_batch(kernels_run: None) -> None:
    """So that a workspace made for the largest batch serves all smaller ones."""
    sizes = [kernels.scratch_elements(slots, 300) for slots in range(1, 20000, 7)]
    assert sizes == sorted(sizes)
    assert sizes[0] == kernels.scratch_elements(2048, 300) == 0 < kernels.scratch_elements(2049, 300)


@pytest.mark.parametrize(
    ("num_slots", "interpreted", "expected"),
    [
        (1, False, (8, 128, True, 4)),
        (129, False, (8, 256, True, 4)),
        (2048, False, (8, 1024, True, 4)),
        (2049, False, (64, 16, False, 2)),
        (1, True, (256, 128, True, 4)),
        (2049, True, (1024, 1024, False, 8)),
    ],
)
def test_select_route_config(num_slots: int, interpreted: bool, expected: tuple[int, int, bool, int]) -> None:
    from hybrid_mxfp8.triton_kernels.moe.route import RouteConfig, select_route_config

    config = select_route_config(num_slots, interpreted)
    assert config == RouteConfig(*expected)
    counted = config.chunk if config.one_launch else config.block
    assert counted >= 32 * config.num_warps, "a histogram has a slot twice"


@pytest.mark.parametrize(("tokens", "experts"), [(1030, 40), (1280, 31), (1030, 300)])
def test_routing_writes_nothing_beside_its_buffers(
    kernels_run: None, device: str, rng: torch.Generator, tokens: int, experts: int
) -> None:
    """Scratch memory of exactly the size that is asked for, among guard bytes."""
    guards = Guards(device)
    ids = guards(random_ids(tokens, 4, experts, rng))
    sizes = (tokens, 4), (3 * experts + 2,), (kernels.scratch_elements(tokens * 4, experts),)
    outputs = [guards.out(torch.zeros(size, dtype=torch.int32)) for size in sizes]
    guards.ready()
    kernels.route(ids, experts, *outputs)
    guards.check()


COMBINED = [(1, 1, 32), (7, 3, 96), (4, 8, 2080), *((3, top_k, 32) for top_k in (16, 17, 20))]
"""Tokens, top_k, hidden; from 17 choices on not all are unrolled."""
if cases.device() == "cuda":
    COMBINED.append((19, 8, 7168))


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize(("tokens", "top_k", "hidden"), COMBINED)
def test_combine_and_bias(
    kernels_run: None, device: str, rng: torch.Generator, tokens: int, top_k: int, hidden: int, bias: bool,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    """The kernels multiply and add without fusing, as PyTorch does. Other rows stay."""
    ids = random_ids(tokens, top_k, 5, rng, device)
    inverse_permutation = route(ids, 5, False)["inverse_permutation"]
    live = inverse_permutation.reshape(-1) >= 0
    rows, experts = inverse_permutation.reshape(-1)[live].long(), ids.reshape(-1)[live]
    y = torch.full((tokens * top_k, hidden), float("nan"), dtype=dtype, device=device)  # nobody's: not read
    y[rows] = cases.random_rows(int(live.sum()), hidden, dtype, rng, device)
    weights = torch.randn(tokens, top_k, generator=rng).to(device)
    expert_bias = torch.randn(5, hidden, generator=rng).to(device, dtype) if bias else None
    # A view with a longer row stride, whose rest must stay.
    got, expected = (torch.full((tokens, hidden + 32), 7.0, dtype=dtype, device=device) for _ in range(2))
    kernels.combine(y, inverse_permutation, ids, weights, expert_bias, got[:, :hidden])
    routing.combine(y, inverse_permutation, ids, weights, expert_bias, expected[:, :hidden])
    assert torch.equal(cases.bits(got), cases.bits(expected))
    if expert_bias is not None:
        added, twin = y.clone(), y.clone()
        kernels.add_expert_bias(added, inverse_permutation, ids, expert_bias)
        routing.add_expert_bias(twin, inverse_permutation, ids, expert_bias)
        assert torch.equal(cases.bits(added), cases.bits(twin))
        assert torch.equal(added[rows], (y[rows].float() + expert_bias[experts].float()).to(dtype))


def test_a_dropped_choice_contributes_nothing_not_even_nan(backend: str, device: str) -> None:
    y = torch.full((2, 32), float("nan"), device=device)
    y[0] = 1.0
    out, weights = torch.empty(1, 32, device=device), torch.tensor([[2.0, float("nan")]], device=device)
    given_rows = torch.tensor([[0, -1]], dtype=torch.int32, device=device)
    combine = kernels.combine if backend == "triton" else routing.combine
    combine(y, given_rows, given_rows.clone(), weights, None, out)
    assert torch.equal(out, torch.full((1, 32), 2.0, device=device))


@pytest.mark.parametrize("bias_dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_a_bias_of_another_dtype_is_added_in_fp32(
    backend: str, device: str, rng: torch.Generator, dtype: torch.dtype, bias_dtype: torch.dtype
) -> None:
    rows = torch.arange(32, dtype=torch.int32, device=device).view(16, 2)
    ids = torch.arange(32, device=device).view(16, 2) % 4
    y = torch.randn(32, 64, generator=rng).to(device, dtype)
    bias, weights = (torch.randn(*size, generator=rng).to(device, bias_dtype) for size in ((4, 64), (16, 2)))
    biased = y.float() + bias[ids.reshape(-1)].float()
    terms = weights.float()[:, :, None] * biased.view(16, 2, 64)
    out = torch.empty(16, 64, dtype=dtype, device=device)
    steps = kernels if backend == "triton" else routing
    steps.combine(y, rows, ids, weights, bias, out)
    assert torch.equal(out, (terms[:, 0] + terms[:, 1]).to(dtype))
    steps.add_expert_bias(y, rows, ids, bias)
    assert torch.equal(y, biased.to(dtype))
