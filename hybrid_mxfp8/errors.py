"""The one exception type of this package that is not a TypeError or a ValueError."""

from __future__ import annotations


class BackendUnavailableError(RuntimeError):
    """A backend that was asked for by name can't run here; the message says why and what to do."""
