"""How a plan follows from its sizes: T, or whatever else changes from batch to batch.

A plan is made once with a :class:`Size` in place of each. That is a number which writes down what
becomes of it: arithmetic as a line of Python, a comparison as a condition on sizes. The lines are
compiled to a function that computes a plan's words from other sizes, in microseconds. Sizes that
meet a condition with another answer, such as those of another tile, are not for that function.

What a Size can't follow raises TypeError, so nothing that depends on one is ever taken for
constant: it can't be hashed, printed, used as an index or stored in an array.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

MIN_SIZE = 2  # the least size traced: with one row or none any strides count as contiguous


class Trace:
    """What was done with ``sizes``, a :class:`Size` for each value, as lines of Python."""

    def __init__(self, values: Sequence[int]) -> None:
        self.sizes: tuple[Any, ...] = tuple(Size(self, f"size{i}", value) for i, value in enumerate(values))
        self._known: dict[str, Size] = {}
        self._lines: dict[str, None] = {}  # a set in order
        for size in self.sizes:
            self.decide(f"{size._name} >= {MIN_SIZE}", True)

    def compute(self, text: str, value: Any) -> Size:
        """The result of an operation on sizes."""
        if text not in self._known:
            self._known[text] = Size(self, f"v{len(self._known)}", value)
            self._lines[f"{self._known[text]._name} = {text}"] = None
        return self._known[text]

    def decide(self, text: str, answer: bool) -> None:
        """An answer that holds for some sizes only."""
        self._lines[f"if {'not ' if answer else ''}{text}: return None"] = None

    def compiled(self, words: Sequence[Any], result: Sequence[Any]) -> Callable[..., tuple[int, ...] | None]:
        """A function (words, *sizes) that writes the ``words`` that depend on sizes and returns
        ``result``; None for sizes that this trace is not for. TypeError for what is no number."""
        writes = [f"words[{i}] = {_text(word)}" for i, word in enumerate(words) if isinstance(word, Size)]
        returned = f"return ({''.join(f'{_text(value)}, ' for value in result)})"
        head = f"def fill(words, {', '.join(size._name for size in self.sizes)}):"
        defined: dict[str, Any] = {}
        exec("\n ".join([head, *self._lines, *writes, returned]), {}, defined)
        fill: Callable[..., tuple[int, ...] | None] = defined["fill"]
        return fill


def value_of(number: Any) -> Any:
    """The number itself, of a size or of what was computed from one."""
    return number._value if isinstance(number, Size) else number


def _text(number: Any) -> str:
    if isinstance(number, Size):
        return number._name
    if type(number) not in (bool, int, float):
        raise TypeError(f"must be a number, got {type(number).__name__}")
    return repr(number)


def _arithmetic(symbol: str, apply: Callable[[Any, Any], Any]) -> tuple[Any, Any]:
    def forward(self: Size, other: Any) -> Size:
        return self._trace.compute(f"{self._name} {symbol} {_text(other)}", apply(self._value, value_of(other)))

    def reflected(self: Size, other: Any) -> Size:
        return self._trace.compute(f"{_text(other)} {symbol} {self._name}", apply(other, self._value))

    return forward, reflected


def _comparison(symbol: str, apply: Callable[[Any, Any], bool]) -> Any:
    def compare(self: Size, other: Any) -> bool:
        answer = apply(self._value, value_of(other))
        self._trace.decide(f"{self._name} {symbol} {_text(other)}", answer)
        return answer

    return compare


class Size:
    """A traced number: arithmetic and comparisons with it are written down."""

    __slots__ = ("_name", "_trace", "_value")

    def __init__(self, trace: Trace, name: str, value: Any) -> None:
        self._trace, self._name, self._value = trace, name, value

    __add__, __radd__ = _arithmetic("+", operator.add)
    __sub__, __rsub__ = _arithmetic("-", operator.sub)
    __mul__, __rmul__ = _arithmetic("*", operator.mul)
    __floordiv__, __rfloordiv__ = _arithmetic("//", operator.floordiv)
    __truediv__, __rtruediv__ = _arithmetic("/", operator.truediv)
    __mod__, __rmod__ = _arithmetic("%", operator.mod)
    __lt__, __le__ = _comparison("<", operator.lt), _comparison("<=", operator.le)
    __gt__, __ge__ = _comparison(">", operator.gt), _comparison(">=", operator.ge)
    __eq__, __ne__ = _comparison("==", operator.eq), _comparison("!=", operator.ne)
    __hash__ = None  # type: ignore[assignment]

    def __bool__(self) -> bool:
        return bool(self != 0)

    def bit_length(self) -> int:
        """An int: sizes of another length are not for this trace."""
        length: int = self._value.bit_length()
        self._trace.decide(f"{self._name}.bit_length() == {length}", True)
        return length

    def __repr__(self) -> str:
        raise TypeError("a size has no text: a name made of it would stand for one size alone")
