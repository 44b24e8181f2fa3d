"""One row of a table of calls: what is wrong or odd about it, the call, and what must come of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from guards import Guards
from torch._subclasses.fake_tensor import FakeTensorMode

import hybrid_mxfp8 as mx
from hybrid_mxfp8.core.formats import grouped_scale_rows, scale_cols

T, E, N, K = 40, 3, 24, 96
COUNTS = [20, 0, 15]
E4M3 = torch.float8_e4m3fn
META = torch.device("meta")

Call = Callable[[], object]
Prepared = tuple[Call, Callable[[Any], None]]


@dataclass(frozen=True)
class Bad:
    """A call that must be refused.

    Attributes:
        what: a few words.
        prepare: puts its tensors into guarded memory, and returns the call.
        error: exactly this type.
        message: a regular expression that the error's message has.
    """

    what: str
    prepare: Callable[[Guards], Call]
    error: type[Exception]
    message: str


@dataclass(frozen=True)
class Odd:
    """An unusual call that must give the right result, on each backend.

    Attributes:
        what: a few words.
        prepare: puts its tensors into guarded memory, and returns the call and a check of its result.
    """

    what: str
    prepare: Callable[[Guards], Prepared]


def refused(call: Callable[..., object], good: Callable[[], dict[str, Any]]) -> Callable[..., Bad]:
    """Makes rows: ``call`` with good arguments but for a few, which are values, or functions that make them."""

    def row(what: str, error: type[Exception], message: str, /, **changes: Any) -> Bad:
        def prepare(g: Guards) -> Call:
            made = {name: value() if isinstance(value, FunctionType) else value for name, value in changes.items()}
            arguments = {name: g.place(value) for name, value in {**good(), **made}.items()}
            return lambda: call(**arguments)

        return Bad(what, prepare, error, message)

    return row


def _part(arguments: dict[str, Any], path: str) -> torch.Tensor:
    """``out``, or ``out.values``."""
    name, _, part = path.partition(".")
    found: torch.Tensor = getattr(arguments[name], part) if part else arguments[name]
    return found


def overlapping(
    call: Callable[..., object], good: Callable[[], dict[str, Any]], what: str, message: str,
    first: str, second: str, by: int,
) -> Bad:  # fmt: skip
    """Two arguments, or parts of them, in one memory: ``second`` starts ``by`` bytes behind ``first``."""

    def prepare(g: Guards) -> Call:
        arguments = {name: g.place(value) for name, value in good().items()}
        plain = {path: _part(arguments, path).contiguous() for path in (first, second)}
        starts = {first: max(-by, 0), second: max(by, 0)}
        memory = g.raw(max(starts[path] + x.numel() * x.itemsize for path, x in plain.items()))
        for path, x in plain.items():
            there = memory[starts[path] :][: x.numel() * x.itemsize].view(x.dtype).view(x.shape)
            if path == first:
                there.view(torch.uint8).copy_(x.view(torch.uint8))
            name, _, part = path.partition(".")
            arguments[name] = _with(arguments[name], part, there) if part else there
        return lambda: call(**arguments)

    return Bad(what, prepare, ValueError, message)


def _with(operand: Any, part: str, there: torch.Tensor) -> Any:
    """An operand or a layout with another part, unchecked."""
    return type(operand).unchecked(**{**vars(operand), part: there})


def shifted(
    call: Callable[..., object], good: Callable[[], dict[str, Any]], what: str, message: str, path: str, by: int
) -> Bad:
    """A buffer that starts ``by`` bytes behind a 256-byte boundary."""

    def prepare(g: Guards) -> Call:
        arguments = {name: g.place(value) for name, value in good().items()}
        there = g.out(_part(arguments, path), by)
        name, _, part = path.partition(".")
        arguments[name] = _with(arguments[name], part, there) if part else there
        return lambda: call(**arguments)

    return Bad(what, prepare, ValueError, message)


def shapes(what: str, run: Callable[[Any], object], check: Callable[[Any], None]) -> list[Odd]:
    """A call of meta tensors, and one of fake ones: ``run`` is told the device to make them on."""

    def fake() -> object:
        with FakeTensorMode():
            return run("cpu")

    def odd(kind: str, call: Call) -> Odd:
        return Odd(f"{kind} {what}", lambda g: (call, check))

    return [odd("meta", lambda: run(META)), odd("fake", fake)]


def grad(x: torch.Tensor) -> torch.Tensor:
    return x.requires_grad_()


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def ints(*values: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def layout(counts: list[int] | None = None, num_tokens: int = T) -> mx.GroupLayout:
    return mx.GroupLayout.from_counts(ints(*(COUNTS if counts is None else counts)), num_tokens)


def grouped(counts: list[int] | None = None, num_tokens: int = T, k: int = K) -> mx.GroupedMXFP8:
    """Quantized by the reference; what no expert owns is NaN."""
    groups = layout(counts, num_tokens)
    x = normal(num_tokens, k)
    out = poison(num_tokens, k, groups.num_experts, groups)
    return mx.quantize_grouped(x, groups, out=out, backend="reference")


def poison(num_tokens: int, k: int, num_experts: int, groups: mx.GroupLayout) -> mx.GroupedMXFP8:
    values = torch.full((num_tokens, k), 0xFF, dtype=torch.uint8, device=groups.device).view(E4M3)
    scale_shape = grouped_scale_rows(num_tokens, num_experts), scale_cols(k)
    return mx.GroupedMXFP8(values, torch.full(scale_shape, 0xFF, dtype=torch.uint8, device=groups.device), groups)


def weights(e: int = E, n: int = N, k: int = K) -> mx.ExpertWeights:
    return mx.quantize_weights(normal(e, n, k, seed=2), backend="reference")
