"""What an activation can be given as."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import pytest
import torch

import hybrid_mxfp8 as mx
from hybrid_mxfp8.core.activation import NAMED, swiglu_of


def test_names_and_specs() -> None:
    assert swiglu_of("swiglu") == mx.SwiGLU()
    assert swiglu_of("swigluoai") == mx.SwiGLU(1.702, 1.0, 7.0)
    for activation in (*NAMED.values(), mx.SwiGLU(0.1, -1 / 3, 1e-30), mx.SwiGLU(2)):
        assert swiglu_of(activation.spec) == activation
        assert swiglu_of(activation) is activation


@pytest.mark.parametrize(
    "given",
    ["silu", "SwiGLU", "", "swiglu:", "swiglu:1:2", "swiglu:a:0:", "swiglu:1:0:-1", "swiglu:nan:0:", None, 1, True],
)
def test_what_it_cannot_be(given: Any) -> None:
    said = rf"^activation: must be 'swiglu' .* or a SwiGLU, got {re.escape(repr(given))}$"
    with pytest.raises(ValueError, match=said):
        swiglu_of(given)


@pytest.mark.parametrize(
    ("numbers", "kind", "message"),
    [
        ({"alpha": 0.0}, ValueError, "alpha: must be finite and above 0, got 0.0"),
        ({"alpha": math.inf}, ValueError, "alpha: must be finite and above 0, got inf"),
        ({"beta": math.nan}, ValueError, "beta: must be finite, got nan"),
        ({"limit": -7.0}, ValueError, "limit: must be finite and above 0, got -7.0"),
        ({"alpha": None}, TypeError, "alpha: must be a float, got NoneType"),
        ({"limit": "7"}, TypeError, "limit: must be a float, got str"),
        ({"beta": True}, TypeError, "beta: must be a float, got bool"),
    ],
)
def test_wrong_numbers(numbers: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^{re.escape(message)}$"):
        mx.SwiGLU(**numbers)


def test_integers_are_the_same_as_floats() -> None:
    """One kernel for both, and one entry in every table of calls that were seen."""
    assert mx.SwiGLU(1, 0, 7).spec == mx.SwiGLU(1.0, 0.0, 7.0).spec
    with pytest.raises(dataclasses.FrozenInstanceError):
        mx.SwiGLU().alpha = 2.0  # type: ignore[misc]


def test_traced() -> None:
    """torch.compile takes one from outside the traced function, and none for another."""
    x = torch.randn(6, 128)
    groups = mx.GroupLayout.from_counts(torch.tensor([2, 4], dtype=torch.int32), 6)

    def quantized(activation: mx.SwiGLU) -> torch.Tensor:
        return mx.quantize_grouped(x, groups, activation=activation, backend="reference").values.view(torch.uint8)

    compiled = torch.compile(quantized, fullgraph=True, backend="eager")
    for activation in (mx.SwiGLU(), mx.SwiGLU(limit=0.5), mx.SwiGLU(alpha=1.702, beta=1.0, limit=7.0)):
        assert torch.equal(compiled(activation), quantized(activation))
