"""Experts spread over two processes, through gloo; and who goes where, for any number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ranks
import torch

from hybrid_mxfp8.distributed import _destinations, experts_of_rank


def test_a_layer_on_two_ranks(tmp_path: Path) -> None:
    """Bit for bit the ranks' parts and their sum: every dispatch, uneven tokens, none, compiled."""
    assert ranks.on_ranks(ranks.check_layer, tmp_path, "cpu", "reference", str(tmp_path)) == [True, True]


@pytest.mark.parametrize("option", ({"max_tokens": 4}, {}, {"dispatch": "all_to_all"}), ids=str)
@pytest.mark.parametrize("how", ["dies", "raises"])
def test_a_rank_that_fails_ends_the_others(how: str, option: dict[str, Any], tmp_path: Path) -> None:
    """Within the group's timeout: at once where a connection breaks, else when it has passed."""
    timeout = 3
    given = (tmp_path, "cpu", how, option, timeout)
    first, second = ranks.on_ranks(ranks.fail_on_rank_1, *given, timeout=timeout)
    error, seconds = first
    assert error in ("RuntimeError", "DistBackendError", "DistNetworkError")
    assert seconds < timeout + 10
    assert second is None if how == "dies" else second[0] == "ValueError"


@pytest.mark.parametrize(("experts", "size"), [(1, 1), (7, 2), (8, 3), (128, 8), (256, 256), (257, 16)])
def test_every_expert_is_on_one_rank(experts: int, size: int) -> None:
    owned = [experts_of_rank(experts, rank, size) for rank in range(size)]
    assert [e for own in owned for e in own] == list(range(experts))
    assert max(map(len, owned)) - min(map(len, owned)) <= 1


@pytest.mark.parametrize(("experts", "size", "top_k"), [(1, 1, 1), (7, 2, 3), (8, 3, 8), (64, 8, 6), (257, 16, 4)])
def test_tokens_go_once_to_each_rank_of_their_experts(
    experts: int, size: int, top_k: int, rng: torch.Generator
) -> None:
    ids = torch.randint(-2, experts + 2, (37, top_k), generator=rng)
    goes, places = _destinations(ids, experts, size)
    owner = {e: rank for rank in range(size) for e in experts_of_rank(experts, rank, size)}
    rows = [(rank, m) for rank in range(size) for m in range(37) if any(owner.get(e) == rank for e in ids[m].tolist())]
    assert goes.nonzero().tolist() == [list(row) for row in rows]
    for m, choices in enumerate(ids.tolist()):
        first = {owner[e]: k for k, e in reversed(list(enumerate(choices))) if e in owner}
        expected = [rows.index((owner[e], m)) if first.get(owner.get(e)) == k else -1 for k, e in enumerate(choices)]
        assert places[m].tolist() == expected
