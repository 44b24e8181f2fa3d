"""docs/troubleshooting.md quotes the library word for word: each message is raised here."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import cases
import pytest
import torch

import hybrid_mxfp8 as mx
from hybrid_mxfp8.errors import BackendUnavailableError

PAGE = (Path(__file__).parents[2] / "docs" / "troubleshooting.md").read_text()
QUOTED = [line.split("`")[1] for line in PAGE.splitlines() if line.startswith("| `")]


def x(columns: int = 64) -> torch.Tensor:
    return torch.ones(3, columns, dtype=torch.bfloat16)


def operands(n: int = 16) -> tuple[mx.GroupedMXFP8, mx.ExpertWeights]:
    with mx.use_backend("reference"):
        return mx.quantize_grouped(x(), cases.layout([1, 2])), mx.quantize_weights(torch.ones(2, n, 64))


X, W = operands()
INDPTR = mx.GroupLayout.from_ends(torch.tensor([0, 1, 3]), 3)
CASES: dict[str, tuple[type[Exception], Callable[[], object]]] = {
    "K": (ValueError, lambda: mx.quantize_weights(torch.ones(2, 16, 40))),
    "N": (ValueError, lambda: mx.grouped_gemm(*operands(n=20))),
    "name": (ValueError, lambda: mx.grouped_gemm(X, W, backend="cuda")),
    "cutlass": (BackendUnavailableError, lambda: mx.grouped_gemm(X, W, backend="cutlass")),
    "grad": (ValueError, lambda: mx.quantize_grouped(x().requires_grad_(), X.groups)),
    "swizzled as linear": (ValueError, lambda: mx.ExpertWeights.from_linear_scales(W.values, W.scales)),
    "linear as swizzled": (ValueError, lambda: mx.ExpertWeights(W.values, W.linear_scales())),
    "counts": (TypeError, lambda: mx.GroupLayout.from_counts(torch.ones(2), 3)),
    "ends as counts": (ValueError, lambda: mx.GroupLayout.from_counts(torch.tensor([3, 3, 8, 9]), 9)),
    "indptr as ends": (ValueError, lambda: mx.grouped_gemm(mx.quantize_grouped(x(), INDPTR), W)),
    "transposed": (ValueError, lambda: mx.grouped_gemm(X, mx.quantize_weights(torch.ones(2, 64, 32)))),
    "out": (ValueError, lambda: mx.grouped_gemm(X, W, out=x(32)[:, :16], backend="reference")),
}


@pytest.mark.parametrize("case", CASES)
def test_the_page_quotes_the_message(case: str) -> None:
    error, call = CASES[case]
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) in QUOTED


def test_nothing_else_is_quoted_but_the_interpreters_message() -> None:
    """That one is raised where Triton compiles, not interprets: the backends' tests have it."""
    assert len(QUOTED) == len(CASES) + 1
    assert any(re.search("TRITON_INTERPRET=1", message) for message in QUOTED)
