"""Draw docs/scale_layout.png from the layout's own formula: ``python docs/scale_layout.py
[FILE]``."""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from hybrid_mxfp8.core.formats import SCALE_TILE_BYTES, padded_scale_rows, scale_cols, scale_offset

COUNTS, K = (5, 0, 130), 320
"""Two experts with tokens and one without; 10 scale columns, stored as 12."""
BYTES_A_LINE = 16
BANDS = ("#9ecae1", "#a1d99b", "#fdd0a2", "#dadaeb")
"""Of rows 0 to 31, 32 to 63, 64 to 95 and 96 to 127 of a tile."""


def draw_tile(axes: Axes) -> None:
    """One 128x4 tile as it lies in memory, 16 bytes a line: where each row's 4 scales are."""
    for row in range(128):
        for col in range(4):
            y, x = divmod(scale_offset(row, col, 4), BYTES_A_LINE)
            axes.add_patch(Rectangle((x, y), 1, 1, facecolor=BANDS[row // 32], linewidth=0))
            if col == 0:
                axes.text(x + 2, y + 0.5, f"row {row}", ha="center", va="center", fontsize=7)
    lines = SCALE_TILE_BYTES // BYTES_A_LINE
    axes.hlines(range(lines), 0, BYTES_A_LINE, color="white", linewidth=0.8)
    axes.set_xlim(0, BYTES_A_LINE)
    axes.set_ylim(lines, 0)
    axes.set_xticks([x + 0.5 for x in range(BYTES_A_LINE)], [str(x % 4) for x in range(BYTES_A_LINE)], fontsize=7)
    axes.set_yticks([y + 0.5 for y in range(lines)], [str(y * BYTES_A_LINE) for y in range(lines)], fontsize=7)
    axes.tick_params(length=0)
    axes.set_xlabel("scale column c % 4")
    axes.set_ylabel("byte of the line's first scale")
    axes.set_title(f"One tile in memory: {SCALE_TILE_BYTES} bytes, 128 rows of 4", fontsize=10)


def draw_buffer(axes: Axes) -> None:
    """The tiles of a grouped operand, numbered in the order in which they lie in memory."""
    stored, used = scale_cols(K), K // 32
    first_row = 0
    for expert, tokens in enumerate(COUNTS):
        rows = padded_scale_rows(tokens)
        for row in range(0, rows, 128):
            real = min(tokens - row, 128)
            for col in range(0, stored, 4):
                y, number = first_row + row, scale_offset(first_row + row, col, stored) // SCALE_TILE_BYTES
                axes.add_patch(Rectangle((col, y), 4, 128, facecolor="#eeeeee"))
                width = min(max(used - col, 0), 4)
                axes.add_patch(Rectangle((col, y), width, real, facecolor=plt.cm.tab10(expert), alpha=0.55))
                axes.add_patch(Rectangle((col, y), 4, 128, fill=False, edgecolor="black"))
                axes.text(col + 1, y + 64, f"tile {number}", ha="center", va="center", fontsize=9)
        text = f"expert {expert}:\n{tokens} tokens" if rows else f"expert {expert}:\nno tokens,\nno tile"
        axes.text(stored + 0.2, first_row + rows / 2, text, ha="left", va="center", fontsize=9)
        first_row += rows
    axes.set_xlim(0, stored)
    axes.set_ylim(first_row, 0)
    axes.set_xticks([col + 0.5 for col in range(stored)], [str(col) for col in range(stored)])
    axes.set_yticks(range(0, first_row + 1, 128))
    axes.set_ylabel("scale row")
    axes.set_xlabel(f"scale column c; K = {K} fills {used} of {stored}")
    axes.set_title("A grouped operand: tiles along K first; coloured: scales; grey: zeros", fontsize=10)


def main() -> None:
    """Write the picture."""
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("scale_layout.png")
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 7), width_ratios=(1, 1.3), layout="constrained")
    draw_tile(left)
    draw_buffer(right)
    figure.savefig(target, dpi=110)


if __name__ == "__main__":
    main()
