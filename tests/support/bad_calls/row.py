"""One row of a table of calls: what is wrong or odd, the call, and what must come of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any, NamedTuple

import cases
import torch
from guards import Guards

import hybrid_mxfp8 as mx

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
    """Makes rows: ``call`` with good arguments but for a few, values or what makes them."""

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
    """What every tensor is checked for.

    Args:
        row, what, name: the function's table, the function in the rows' names, the argument.
        make: a good one.
        dims, dtypes: as the error describes its shape, and lists the dtypes it may have.
        wrong: some that it may not have.
        strides: what the error says of gaps; none where gaps are taken.
        place: the error for a meta tensor, if not that this must be on the CPU; None where it is
            taken.
        more: ``sparse``, ``grad``, both or none.
    """
    odd: dict[str, tuple[type[Exception], str, Callable[[], Any]]] = {
        "a list": (TypeError, rf"^{name}: must be a torch\.Tensor", lambda: [1.0]),
        "of higher rank": (ValueError, f"^{name}: must have shape {re.escape(dims)}", lambda: make()[None]),
        "a scalar": (ValueError, f"^{name}: must have shape {re.escape(dims)}", lambda: make().flatten()[0]),
    }
    if place is not None:
        odd["on meta"] = (ValueError, place or f"^{name}: must be on cpu", lambda: make().to(META))
    for dtype in wrong:
        message = f"^{name}: dtype must be {dtypes}, got {str(dtype)[6:]}$"
        odd[f"of {dtype}"] = (TypeError, message, lambda dtype=dtype: make().to(dtype))
    if strides:
        message = f"^{name}: {strides}"
        odd["with gaps"] = (ValueError, message, lambda: torch.stack([make()] * 2, -1)[..., 0])
        odd["one element for all"] = (ValueError, message, lambda: make().flatten()[:1].expand(make().shape))
    if "sparse" in more:
        message = f"^{name}: must be a dense tensor, got layout sparse_coo$"
        odd["sparse"] = (TypeError, message, lambda: make().to_sparse())
    if "grad" in more:
        odd["with grad"] = (ValueError, f"^{name}: must not require grad", lambda: make().requires_grad_())
    return [row(f"{what}: {name} {how}", error, message, **{name: bad}) for how, (error, message, bad) in odd.items()]


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
    """Arguments or parts in one memory: ``second`` starts ``by`` bytes behind ``first``."""

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
    return cases.layout(COUNTS if counts is None else counts, num_tokens)


def grouped(counts: list[int] | None = None, num_tokens: int = T, k: int = K) -> mx.GroupedMXFP8:
    """Quantized by the reference; what no expert owns is NaN."""
    groups = layout(counts, num_tokens)
    out = cases.poisoned_output(groups, k)
    return mx.quantize_grouped(normal(num_tokens, k), groups, out=out, backend="reference")


def weights(e: int = E, n: int = N, k: int = K) -> mx.ExpertWeights:
    return mx.quantize_weights(normal(e, n, k, seed=2), backend="reference")


def meta(w: mx.ExpertWeights) -> mx.ExpertWeights:
    return mx.ExpertWeights(w.values.to(META), w.scales.to(META))
