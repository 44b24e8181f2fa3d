"""Calls that were made and can be made again: where the same buffers come again, the launches can be those of the earlier call.

What a launch depends on is metadata and addresses. A call that finds all of it as it was skips its checks, decisions and
launchers, and hands the driver what it handed it before.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import NamedTuple, Protocol

from hybrid_mxfp8.dispatch.seen import Seen

Repeat = Callable[[], bool]
"""Makes the launches of an earlier call again, on the current stream and with the same addresses: True. False where the
backend must be asked again, with some of the launches made or none. Right for any tensors that lie where the earlier ones
did and look the same, if ``backends.settled`` and ``backends.in_force`` answer as they did."""


class Launched(Protocol):
    """A call that was made, and can be repeated."""

    def repeat(self) -> Repeat:
        """What repeats it, and keeps no tensor."""


class Together(NamedTuple):
    """Calls that were made one after the other, as one."""

    parts: tuple[Launched, ...]

    def repeat(self) -> Repeat:
        """What repeats all of them, in their order."""
        repeats = [part.repeat() for part in self.parts]
        return lambda: all(repeat() for repeat in repeats)


def together(*parts: Launched | None) -> Together | None:
    """Calls as one; None if one of them can't be repeated."""
    repeatable = tuple(part for part in parts if part is not None)
    return Together(repeatable) if len(repeatable) == len(parts) else None


def _not_yet() -> bool:
    """The :data:`Repeat` of a call that was seen once, or can't be repeated.

    Buffers that never come back, such as outputs of another size in every batch, are not to pay for a repetition.
    """
    return False


class Places(Seen[Repeat]):
    """Calls whose arguments passed their checks, by addresses and all else that checks and launches depend on."""

    def remember(self, place: Hashable, repeat: Repeat | None, launched: Launched | None) -> None:
        """That the call at ``place`` passed; and if it was there before, as ``repeat``, but was not repeated: how to from now on.

        ``launched`` is the call as it was made now, or None if it can't be repeated.
        """
        if repeat is None:
            self.add(place, _not_yet)
        elif launched is not None:
            self.add(place, launched.repeat())
