"""The compiled grouped GEMM at sizes of models, and as part of a GPU program: streams and
graphs."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import cases
import pytest
import torch
from on_gpu import captured
from products import check, operands
from recorder import Recorder

import hybrid_mxfp8 as mx

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("tokens_per_expert", [1, 16, 17, 32, 64, 65, 128, 300])
@pytest.mark.parametrize(("n", "k"), [(8, 32), (64, 96), (264, 1056), (2880, 2880), (4096, 7168)])
def test_every_configuration(kernel: str, n: int, k: int, tokens_per_expert: int, rng: torch.Generator) -> None:
    counts = [tokens_per_expert, 0, 2 * tokens_per_expert, tokens_per_expert]
    check(*operands(counts, sum(counts) + 2, n, k, rng, "cuda"), counts, torch.bfloat16, "triton")


@pytest.mark.parametrize(
    "counts", [[8192] + [0] * 31, [256] * 32, [0, 1, 4000, 7, 88] * 6], ids=["one hot", "even", "skewed"]
)
def test_large(kernel: str, counts: list[int], rng: torch.Generator) -> None:
    check(*operands(counts, sum(counts), 2048, 4096, rng, "cuda"), counts, torch.bfloat16, "triton")


@pytest.mark.parametrize("form", ["layout", "counts"])
def test_graph_replay_follows_the_counts(kernel: str, form: str, rng: torch.Generator) -> None:
    """Captured once, replayed with padded batches and hostile counts: equal to eager, bit for
    bit."""
    num_tokens, n, k = 200, 136, 288
    counts = torch.zeros(5, dtype=torch.int32, device="cuda")
    x = cases.random_rows(num_tokens, k, torch.bfloat16, rng, "cuda")
    xq, wq = operands([0] * 5, num_tokens, n, k, rng, "cuda")
    out = cases.poisoned_product(num_tokens, n, torch.bfloat16, "cuda")

    def step() -> None:
        groups = counts if form == "counts" else mx.GroupLayout.from_counts(counts, num_tokens)
        mx.grouped_gemm(mx.quantize_grouped(x, groups, out=xq, backend="triton"), wq, out=out, backend="triton")

    def written(run: Callable[[], None]) -> list[torch.Tensor]:
        """Into poison."""
        buffers = [tensor.view(torch.uint8) for tensor in (xq.values, xq.scales, out)]
        for buffer in buffers:
            buffer.fill_(cases.POISON)
        run()
        return [buffer.clone() for buffer in buffers]

    step()  # compiles outside the capture
    graph, _ = captured(step)
    for now in ([40] * 5, [0, 200, 0, 0, 0], [0] * 5, [1, 2, 3, 4, 5], [199, 0, 0, 0, 1], [90, -4, 90, 90, 90]):
        counts.copy_(torch.tensor(now))
        assert all(map(torch.equal, written(graph.replay), written(step))), now


def test_cutlass_runs_or_says_why_not(rng: torch.Generator) -> None:
    """Named, on other hardware than its own, it raises and names the hardware; auto takes
    triton."""
    available, reason = mx.backends()["cutlass"]
    xq, wq = operands([3], 3, 8, 32, rng, "cuda")
    if available:
        check(xq, wq, [3], torch.bfloat16, "cutlass")
        return
    with pytest.raises(mx.BackendUnavailableError) as caught:
        mx.grouped_gemm(xq, wq, backend="cutlass")
    assert reason in str(caught.value)
    assert mx.explain(xq, wq).startswith("triton, chosen automatically")


@pytest.mark.parametrize("build", [mx.GroupLayout.from_counts, mx.GroupLayout.from_ends])
def test_a_layout_is_one_allocation_and_no_sync(build: Any, no_sync: None) -> None:
    """The other PyTorch operators make views."""
    given = torch.empty(32, dtype=torch.int32, device="cuda")
    with Recorder() as recorder:
        build(given, 40)
    assert len(recorder.allocations) == 1
    assert all(re.search("empty|split|slice|view|narrow", name) for name in recorder.names)
