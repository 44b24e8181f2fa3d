"""What checks found out about an earlier call, by all that they looked at.

Argument checks look at metadata alone, so arguments that look like ones that passed need not be checked again: one
look-up instead of some thirty questions, in the host time of a decode step. And where the same buffers come again, the
launches can be those of the earlier call.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

T = TypeVar("T")


class Seen(Generic[T]):
    """A bounded memory: full, it forgets everything."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._found: dict[Hashable, T] = {}

    def get(self, key: Hashable) -> T | None:
        """What was found for the key; None too for one that can't be hashed, such as of symbolic shapes."""
        try:
            return self._found.get(key)
        except TypeError:
            return None

    def __reduce__(self) -> tuple[type[Seen[T]], tuple[int]]:
        """A copy, in this process or another, has seen nothing."""
        return type(self), (self._capacity,)

    def add(self, key: Hashable, value: T) -> None:
        """Remember it."""
        if len(self._found) >= self._capacity and key not in self._found:
            self._found.clear()
        self._found[key] = value

    def forget(self) -> None:
        """Everything."""
        self._found.clear()
