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


def draw_tile(axes: Axes) -> None:
    """One 128x4 tile: where the byte of each row and column lies."""
    offsets = [[scale_offset(row, col, 4) for col in range(4)] for row in range(128)]
    axes.imshow(offsets, aspect="auto", cmap="viridis", interpolation="nearest")
    for row in range(0, 128, 4):
        for col in range(4):
            shade = "white" if offsets[row][col] < 300 else "black"
            # In the middle of rows row .. row + 3, of which it is the first's.
            axes.text(col, row + 1.5, str(offsets[row][col]), ha="center", va="center", fontsize=6, color=shade)
    axes.set_xticks(range(4), [f"c % 4 = {col}" for col in range(4)])
    axes.set_yticks([0, 32, 64, 96, 124])
    axes.set_ylabel("row in the tile")
    axes.set_title(f"one tile: byte (of {SCALE_TILE_BYTES}) of scales in rows 0, 4, 8 ...")


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
                axes.add_patch(Rectangle((col, y), 4, 128, facecolor="#eeeeee", edgecolor="black"))
                width = min(max(used - col, 0), 4)
                axes.add_patch(Rectangle((col, y), width, real, facecolor=plt.cm.tab10(expert), alpha=0.55))
                axes.text(col + 2, y + 64, f"tile {number}", ha="center", va="center", fontsize=9)
        if rows:
            axes.text(
                -0.25, first_row + rows / 2, f"expert {expert}\n{tokens} tokens", ha="right", va="center", fontsize=9
            )
        first_row += rows
    axes.set_xlim(0, stored)
    axes.set_ylim(first_row, 0)
    axes.set_xticks(range(0, stored + 1, 4))
    axes.set_yticks([])
    axes.set_xlabel(f"scale column c; K = {K} fills {used}, {stored} are stored")
    axes.set_title("a grouped operand: tiles along K first, each expert from a new tile; grey: zeros")


def main() -> None:
    """Write the picture."""
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("scale_layout.png")
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 6.5), width_ratios=(1, 1.6), layout="constrained")
    draw_tile(left)
    draw_buffer(right)
    figure.savefig(target, dpi=110)


if __name__ == "__main__":
    main()
