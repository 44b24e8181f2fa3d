"""The gated activation between the two products of an expert."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from hybrid_mxfp8.core.checks import fail


@dataclass(frozen=True)
class SwiGLU:
    """``g * sigmoid(alpha * g) * (u + beta)`` of gate g and up u; with a limit, of min(g, limit)
    and u cut to -limit .. limit.

    Without arguments it is SwiGLU itself, silu(g) * u (Shazeer, arXiv:2002.05202), which vLLM and
    SGLang call ``silu``. The experts of gpt-oss and MiniMax-M3 have alpha 1.702, beta 1 and limit
    7, those of DeepSeek-V4 a limit alone; a model's configuration has them as ``swiglu_alpha`` and
    ``swiglu_limit``.

    Attributes:
        alpha: factor of the gate in the sigmoid, above 0.
        beta: added to up.
        limit: above 0, or None. A gate of +Inf and an infinite up become the limit; NaN stays NaN.
        spec: the same as a string, as operators take it; every function that takes a SwiGLU takes
            that, too.

    Raises:
        TypeError, ValueError: a number that is no float, not finite, or not above 0.
    """

    alpha: float = 1.0
    beta: float = 0.0
    limit: float | None = None
    spec: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, positive in (("alpha", True), ("beta", False), ("limit", True)):
            value = getattr(self, name)
            if value is None and name == "limit":
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name}: must be a float, got {type(value).__name__}")
            if not math.isfinite(value) or (positive and value <= 0):
                fail(name, "must be finite and above 0" if positive else "must be finite", value)
            object.__setattr__(self, name, float(value))
        limit = "" if self.limit is None else repr(self.limit)
        # A string made here, since torch.compile can't make one of floats.
        object.__setattr__(self, "spec", f"swiglu:{self.alpha!r}:{self.beta!r}:{limit}")


PLAIN_SWIGLU = SwiGLU()
NAMED = {"swiglu": PLAIN_SWIGLU, "swigluoai": SwiGLU(1.702, 1.0, 7.0)}
"""The activations that have names; ``swigluoai`` is what vLLM and SGLang call that of gpt-oss."""


def swiglu_of(activation: Any, also: str = "") -> SwiGLU:
    """The SwiGLU that ``activation`` stands for. ValueError says what it may be: ``also`` first."""
    if isinstance(activation, SwiGLU):
        return activation
    if isinstance(activation, str):
        known = NAMED.get(activation) or _parsed(activation)
        if known is not None:
            return known
    expected = f"must be {also}'swiglu' (silu(gate) * up, elsewhere called 'silu'), 'swigluoai' or a SwiGLU"
    fail("activation", expected, repr(activation))


def _parsed(spec: str) -> SwiGLU | None:
    try:
        name, alpha, beta, limit = spec.split(":")
        return SwiGLU(float(alpha), float(beta), float(limit) if limit else None) if name == "swiglu" else None
    except ValueError:  # another number of parts, or one that is no number
        return None
