"""Experts spread over two processes, through gloo; and who goes where, for any number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from stand_ins import EveryCallTakes10Us

import hybrid_mxfp8 as mx
from hybrid_mxfp8.bench import expert_parallel, expert_parallel_model
from hybrid_mxfp8.bench.shapes import MODELS, ModelShape
from hybrid_mxfp8.distributed import ExpertParallelExperts, _destinations, experts_of_rank


def test_a_layer_on_two_ranks(tmp_path: Path) -> None:
    """Bit for bit the ranks' parts and their sum: every dispatch, uneven tokens, none, compiled."""
    assert ranks.on_ranks(ranks.check_layer, tmp_path, "cpu", "reference", str(tmp_path)) == [True, True]


@pytest.mark.parametrize("option", [{"max_tokens": 4}, {}, {"dispatch": "all_to_all"}], ids=str)
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


def test_ranks_agree_when_they_are_made(tmp_path: Path) -> None:
    """On the smallest scale group, in which tokens then travel, and on max_tokens."""

    def agree(rank: int, size: int, device: str) -> tuple[int, str]:
        w13, w2 = torch.ones(2, 64, 128), torch.ones(2, 128, 32)
        own = mx.MXFP8Experts.from_weights(w13[:1], w2[:1], scale_group=(32, 128)[rank], backend="reference")
        if rank == 0:
            own.w13_scales[0, 0] += torch.arange(4, dtype=torch.uint8)
        layer = ExpertParallelExperts(own, num_experts=2)
        with pytest.raises(ValueError, match=r"^max_tokens: must be the same on all ranks, got 7 \.\. 8$") as error:
            ExpertParallelExperts(own, num_experts=2, max_tokens=7 + rank)
        return layer._scale_group, str(error.value)

    first, second = ranks.on_ranks(agree, tmp_path, "cpu")
    assert first == second
    assert first[0] == 32


def test_the_benchmark_runs(tmp_path: Path) -> None:
    """Both layers agree, and bytes are those of the records."""
    models = [ModelShape("tiny", 5, 64, 32, 2), ModelShape("other", 4, 32, 32, 1)]

    def run(rank: int, size: int, device: str) -> list[dict[str, Any]]:
        with mx.use_backend("reference"):
            return list(expert_parallel.measure_models(models, (3, 6), EveryCallTakes10Us(), device))

    rows, other = ranks.on_ranks(run, tmp_path, "cpu")
    assert [row["wall_us"] for row in rows] == [row["wall_us"] for row in other], "the slowest rank's, on both"
    assert [(row["model"], row["tokens"]) for row in rows] == [("tiny", 3), ("tiny", 6), ("other", 3), ("other", 6)]
    assert rows[0]["sent_bytes"] == {"gather bf16": 3 * (128 + 24), "gather mxfp8": 3 * 96, "reduce-scatter": 3 * 128}
    assert rows[0]["us"]["layer bf16"] == 10 / 20
    assert expert_parallel.line(rows[0]).startswith("tiny 3 tokens x 2: 1.00x, communication 200%, 0.63 of the bytes")


@pytest.mark.parametrize("model", [m for m in MODELS if m.top_k > 1], ids=lambda m: m.name)
def test_the_model_counts_as_the_dispatch_does(model: ModelShape, rng: torch.Generator) -> None:
    """How many other ranks a token goes to; on two ranks both dispatches send nearly all."""
    for size in (2, 8, 64):
        ids = torch.argsort(torch.rand(2000, model.experts, generator=rng), dim=1)[:, : model.top_k]
        goes, _ = _destinations(ids, model.experts, size)
        assert goes[1:].sum() / 2000 == pytest.approx(expert_parallel_model.other_ranks(model, size), rel=0.05)
    table = expert_parallel_model.table(model, 128).splitlines()
    assert len(table) == 4 + sum(size <= model.experts for size in expert_parallel_model.RANKS)


@pytest.mark.parametrize(("experts", "size"), [(1, 1), (7, 2), (8, 3), (128, 8), (256, 256), (257, 16)])
def test_every_expert_is_on_one_rank(experts: int, size: int) -> None:
    owned = [experts_of_rank(experts, rank, size) for rank in range(size)]
    assert [e for own in owned for e in own] == list(range(experts))
    assert max(map(len, owned)) - min(map(len, owned)) <= 1


@pytest.mark.parametrize(("experts", "size", "top_k"), [(1, 1, 1), (7, 2, 3), (8, 3, 8), (64, 8, 6), (257, 16, 4)])
def test_tokens_go_once_to_each_rank_of_their_experts(
    experts: int, size: int, top_k: int, rng: torch.Generator
) -> None:
    ids = torch.randint(-2, experts + 2, (top_k, 37), generator=rng).t()
    goes, places = _destinations(ids, experts, size)
    assert places.is_contiguous()
    owner = {e: rank for rank in range(size) for e in experts_of_rank(experts, rank, size)}
    rows = [(rank, m) for rank in range(size) for m in range(37) if any(owner.get(e) == rank for e in ids[m].tolist())]
    assert goes.nonzero().tolist() == [list(row) for row in rows]
    for m, choices in enumerate(ids.tolist()):
        first = {owner[e]: k for k, e in reversed(list(enumerate(choices))) if e in owner}
        expected = [rows.index((owner[e], m)) if first.get(owner.get(e)) == k else -1 for k, e in enumerate(choices)]
        assert places[m].tolist() == expected
