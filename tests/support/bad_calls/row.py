"""One row of a table of calls: what is wrong or odd about it, the call, and what must come of
it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any, NamedTuple

import torch
from guards import Guards

import hybrid_mxfp8 as mx
from hybrid_mxfp8.core.formats import grouped_scale_rows, scale_cols

T, E, N, K = 40, 3, 24, 96
COUNTS = [20, 0, 15]
E4M3 = torch.float8_e4m3fn
META = torch.device("meta")

Call = Callable[[], object]
Prepared = tuple[Call, Callable[[Any], None]]


class Bad(NamedTuple):
    """A call that must be refused."""

    what: str
    prepare: Callable[[Guards], Call]
    """Puts its tensors into guarded memory, and returns the call."""
    error: type[Exception]  # exactly this type
    message: str  # a regular expression that the error's message has
    good: Callable[[Guards], Call] = lambda g: lambda: None
    """Prepares one like it that passes."""


class Odd(NamedTuple):
    """An unusual call that must give the right result, on each backend."""

    what: str
    prepare: Callable[[Guards], Prepared]
    """Puts its tensors into guarded memory, and returns the call and a check of its result."""


def placed(call: Callable[..., object], make: Callable[[], dict[str, Any]]) -> Callable[[Guards], Call]:
    """Prepares ``call`` with these arguments."""

    def prepare(g: Guards) -> Call:
        arguments = {name: g.place(value) for name, value in make().items()}
        return lambda: call(**arguments)

    return prepare


def refused(
    call: Callable[..., object], good: Callable[[], dict[str, Any]], *, passes: bool = True
) -> Callable[..., Bad]:
    """Makes rows: ``call`` with good arguments, which pass, but for a few, which are values, or
    functions that make them."""

    def row(what: str, error: type[Exception], message: str, /, **changes: Any) -> Bad:
        def bad() -> dict[str, Any]:
            made = {name: value() if isinstance(value, FunctionType) else value for name, value in changes.items()}
            return {**good(), **made}

        return Bad(what, placed(call, bad), error, message, *([placed(call, good)] if passes else []))

    return row


FLOATS = "bfloat16 or float16 or float32"
NOT_FLOATS = (torch.float64, torch.int32, torch.uint8, torch.bool, E4M3)


def of_tensor(
    row: Callable[..., Bad], what: str, name: str, make: Callable[[], torch.Tensor], dims: str, dtypes: str,
    wrong: Sequence[torch.dtype], strides: str = "must be contiguous", place: str | None = "", more: str = "sparse",
) -> list[Bad]:  # fmt: skip
    """What every tensor is checked for: its type, dtypes, rank, strides, device; sparse, and with
    grad.

    Args:
        row: of the function's table.
        what: the function, in the rows' names.
        name: of the argument.
        make: a good one.
        dims: as its shape is described.
        dtypes: as those are listed that it may have.
        wrong: some that it may not have.
        strides: what the error says of gaps; none where gaps are taken.
        place: the error for a meta tensor, if not that this must be on the CPU; None where it is
        taken. more: ``sparse``, ``grad``, both or none.
    """
    odd: dict[str, tuple[type[Exception], str, Callable[[], Any]]] = {
        "a list": (TypeError, r"must be a torch\.Tensor", lambda: [1.0]),
        "of higher rank": (ValueError, f"must have shape {re.escape(dims)}", lambda: make()[None]),
        "a scalar": (ValueError, f"must have shape {re.escape(dims)}", lambda: make().flatten()[0]),
    }
    if place is not None:
        odd["on meta"] = (ValueError, "must be on cpu", lambda: make().to(META))
    for dtype in wrong:
        message = f"dtype must be {dtypes}, got {str(dtype)[6:]}$"
        odd[f"of {dtype}"] = (TypeError, message, lambda dtype=dtype: make().to(dtype))
    if strides:
        odd["with gaps"] = (ValueError, strides, lambda: spread(make()))
        odd["one element for all"] = (ValueError, strides, lambda: make().flatten()[:1].expand(make().shape))
    if "sparse" in more:
        odd["sparse"] = (TypeError, "must be a dense tensor, got layout sparse_coo$", lambda: make().to_sparse())
    if "grad" in more:
        odd["with grad"] = (ValueError, "must not require grad", lambda: make().requires_grad_())
    return [
        row(
            f"{what}: {name} {how}",
            error,
            place if place and how == "on meta" else f"^{name}: {message}",
            **{name: bad},
        )
        for how, (error, message, bad) in odd.items()
    ]


def spread(x: torch.Tensor) -> torch.Tensor:
    """The same elements, each followed by another."""
    return x.new_zeros(*x.shape, 2)[..., 0].copy_(x)


def _part(owner: Any, path: str) -> Any:
    """Of arguments: ``out``, ``out.values`` or ``x.groups.expert_offsets``."""
    name, _, rest = path.partition(".")
    part = owner[name] if isinstance(owner, dict) else getattr(owner, name)
    return _part(part, rest) if rest else part


def _with(owner: Any, path: str, there: torch.Tensor) -> Any:
    """Arguments, an operand or a layout with another part, unchecked."""
    name, _, rest = path.partition(".")
    part = _with(_part(owner, name), rest, there) if rest else there
    return {**owner, name: part} if isinstance(owner, dict) else type(owner).unchecked(**{**vars(owner), name: part})


def overlapping(
    call: Callable[..., object], good: Callable[[], dict[str, Any]], what: str, message: str,
    first: str, second: str, by: int,
) -> Bad:  # fmt: skip
    """Two arguments, or parts of them, in one memory: ``second`` starts ``by`` bytes behind
    ``first``."""

    def prepare(g: Guards) -> Call:
        arguments = {name: g.place(value) for name, value in good().items()}
        plain = {path: _part(arguments, path).contiguous() for path in (first, second)}
        starts = {first: max(-by, 0), second: max(by, 0)}
        memory = g.raw(max(starts[path] + x.numel() * x.itemsize for path, x in plain.items()))
        for path, x in plain.items():
            there = memory[starts[path] :][: x.numel() * x.itemsize].view(x.dtype).view(x.shape)
            if path == first:
                there.view(torch.uint8).copy_(x.view(torch.uint8))
            arguments = _with(arguments, path, there)
        return lambda: call(**arguments)

    return Bad(what, prepare, ValueError, message, placed(call, good))


def shifted(
    call: Callable[..., object], good: Callable[[], dict[str, Any]], what: str, message: str, path: str, by: int
) -> Bad:
    """A buffer that starts ``by`` bytes behind a 256-byte boundary."""

    def prepare(g: Guards) -> Call:
        arguments = {name: g.place(value) for name, value in good().items()}
        arguments = _with(arguments, path, g.out(_part(arguments, path), by))
        return lambda: call(**arguments)

    return Bad(what, prepare, ValueError, message, placed(call, good))


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
