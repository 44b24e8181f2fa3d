"""The compiled grouped GEMM at sizes of models, and as part of a GPU program: streams and
graphs."""

from __future__ import annotations

import re
from typing import Any

import cases
import pytest
import torch
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


class Step:
    """The main job on static buffers: counts in, product out."""

    def __init__(self, rng: torch.Generator, form: str) -> None:
        self.num_tokens, self.e, self.n, self.k = 200, 5, 136, 288
        self.form = form
        self.x = cases.random_rows(self.num_tokens, self.k, torch.bfloat16, rng, "cuda")
        w = cases.random_rows(self.e * self.n, self.k, torch.bfloat16, rng, "cuda").reshape(self.e, self.n, self.k)
        self.wq = mx.quantize_weights(w, backend="triton")
        self.counts = torch.zeros(self.e, dtype=torch.int32, device="cuda")
        self.operand = cases.poisoned_output(cases.layout([0] * self.e, self.num_tokens, "cuda"), self.k)
        self.out = cases.poisoned_product(self.num_tokens, self.n, torch.bfloat16, "cuda")

    def run(self) -> None:
        groups = self.counts if self.form == "counts" else mx.GroupLayout.from_counts(self.counts, self.num_tokens)
        xq = mx.quantize_grouped(self.x, groups, out=self.operand, backend="triton")
        mx.grouped_gemm(xq, self.wq, out=self.out, backend="triton")

    def poison(self) -> None:
        self.operand.values.view(torch.uint8).fill_(cases.POISON)
        self.operand.scales.fill_(cases.POISON)
        self.out.fill_(float("nan"))

    def state(self) -> list[torch.Tensor]:
        return [cases.bits(t).clone() for t in (self.operand.values, self.operand.scales, self.out)]

    def check(self, expected: list[torch.Tensor]) -> None:
        for ours, eager in zip(self.state(), expected, strict=True):
            assert torch.equal(ours, eager)


@pytest.mark.parametrize("form", ["layout", "counts"])
def test_graph_replay_follows_the_counts(kernel: str, form: str, rng: torch.Generator) -> None:
    """Captured once, replayed with padded batches and hostile counts: equal to eager, bit for
    bit."""
    step = Step(rng, form)
    step.run()  # compiles outside the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step.run()
    for counts in ([40] * 5, [0, 200, 0, 0, 0], [0] * 5, [1, 2, 3, 4, 5], [199, 0, 0, 0, 1], [90, -4, 90, 90, 90]):
        step.counts.copy_(torch.tensor(counts))
        step.poison()
        step.run()
        expected = step.state()
        step.poison()
        graph.replay()
        step.check(expected)


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
