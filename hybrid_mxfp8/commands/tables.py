"""Aligned plain-text tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: Sequence[int] = (0,)) -> str:
    """Columns as wide as their widest cell, two spaces apart; numbers flush right.

    Args:
        header: one title a column.
        rows: cells, as many a row as there are titles.
        left: columns that are flush left.

    Raises:
        ValueError: a row of another length.
    """
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"rows: each must have {len(header)} cells, got {len(row)}")
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join(padded).rstrip()

    return "\n".join([line(header), line(["-" * width for width in widths]), *map(line, rows)])
