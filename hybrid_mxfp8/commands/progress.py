"""Progress bars: drawn on a terminal alone, gone when done, and with log lines above them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm


@contextmanager
def progress(total: float, **options: Any) -> Iterator[tqdm[Any]]:
    """A tqdm bar on stderr, drawn only where that is a terminal; ``options`` as tqdm's."""
    with logging_redirect_tqdm(), tqdm(total=total, leave=False, disable=None, dynamic_ncols=True, **options) as bar:
        yield bar
