"""What commands share: a number of at least 1, wrapped text, tables, sizes, and progress bars."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm

WIDTH = 100


def positive(text: str) -> int:
    """An option's number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a number of at least 1, got {text!r}")
    return int(text)


def wrap(text: str, indent: str = "") -> str:
    """Lines of at most WIDTH columns; those after the first are indented."""
    return textwrap.fill(text, WIDTH, subsequent_indent=indent)


def format_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, left: Sequence[int] = (0,), title: str = ""
) -> str:
    """Columns two spaces apart, flush right but those of ``left``; above them a title."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = [c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return "  ".join(padded).rstrip()

    above = [wrap(title), ""] if title else []
    return "\n".join([*above, line(header), line(["-" * width for width in widths]), *map(line, rows)])


def size(num_bytes: int) -> str:
    """Bytes for people."""
    power = min((max(num_bytes, 1).bit_length() - 1) // 10, 4)
    return f"{num_bytes / 1024**power:.2f} {'KMGT'[power - 1]}iB" if power else f"{num_bytes} B"


@contextmanager
def progress(total: float, **options: Any) -> Iterator[tqdm[Any]]:
    """A tqdm bar on stderr, drawn only where that is a terminal, gone when done, and with log lines
    above it; ``options`` as tqdm's."""
    from tqdm import tqdm  # so that doctor runs where it is missing
    from tqdm.contrib.logging import logging_redirect_tqdm

    with logging_redirect_tqdm(), tqdm(total=total, leave=False, disable=None, dynamic_ncols=True, **options) as bar:
        yield bar
