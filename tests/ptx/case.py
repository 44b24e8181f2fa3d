"""A problem: operands from a seed, in the product's layouts, and how far a product may be from the
truth.

The bytes and their layouts are made here from their definitions, not by the product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ptx.formats import E4M3, E8M0
from ptx.memory import GlobalMemory, aligned

BLOCK = 32
TILE_ROWS = 128
TILE_COLUMNS = 4

HALF_ULP = {"bf16": 2.0**-8, "fp16": 2.0**-11, "fp32": 2.0**-24}
SMALLEST = {"bf16": 2.0**-134, "fp16": 2.0**-25, "fp32": 2.0**-150}
OVERFLOW = {"bf16": 2.0**128 - 2.0**119, "fp16": 65520.0, "fp32": 2.0**128 - 2.0**103}
BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}

STEP_ROUNDING = 2.0**-24
"""Relative: half a unit in the last place of fp32."""


def round_up(value: int, multiple: int) -> int:
    """The next multiple."""
    return -(-value // multiple) * multiple


def swizzled(scales: np.ndarray, rows: int, padding_rows: int = 0, padding_columns: int = 0) -> np.ndarray:
    """Row-major scales (R, K/32) as 128x4 tiles: offset = ((r//128) * (C//4) + c//4) * 512 + r%32 *
    16 + r%128 // 32 * 4 + c%4.

    Args:
        scales: (R, K/32) bytes.
        rows: of the result, a multiple of 128.
        padding_rows: the byte of rows from R on.
        padding_columns: the byte of columns from K/32 on.
    """
    used_rows, used_columns = scales.shape
    columns = round_up(used_columns, TILE_COLUMNS)
    full = np.full((rows, columns), padding_columns, np.uint8)
    full[used_rows:, :used_columns] = padding_rows
    full[:used_rows, :used_columns] = scales
    tiles = full.reshape(
        rows // 128, 4, 32, columns // 4, 4
    )  # tile row, quarter, row of a quarter, tile column, column
    return np.ascontiguousarray(tiles.transpose(0, 3, 2, 1, 4)).reshape(-1)


@dataclass(frozen=True)
class Shape:
    """What a call multiplies: experts of ``counts`` tokens, weights (N, K)."""

    counts: tuple[int, ...]
    n: int
    k: int
    out: str = "bf16"
    extra_rows: int = 0
    """Token rows that no expert owns, as of a padded batch."""

    @property
    def experts(self) -> int:
        return len(self.counts)

    @property
    def tokens(self) -> int:
        return sum(self.counts) + self.extra_rows

    @property
    def scale_rows(self) -> int:
        """The tightest bound that needs no counts: the product allocates so many."""
        return (self.tokens + 127 * min(self.experts, self.tokens)) // 128 * 128

    @property
    def scale_columns(self) -> int:
        return round_up(self.k // BLOCK, TILE_COLUMNS)

    def __str__(self) -> str:
        return f"counts {','.join(map(str, self.counts))} N {self.n} K {self.k} {self.out}"


@dataclass
class Case:
    """Operands in memory, and their truth.

    Args:
        shape: of the call.
        seed: of the operands.
        scale_shift: added to the exponents of the tokens' scales; large ones make fp16 overflow.
        padding_rows: scale byte of the tokens' and weights' rows of padding.
        padding_columns: scale byte of the columns of padding.
        beyond: scale byte of the tokens' rows behind the last expert's; None: nobody wrote them,
            and none may be read.
    """

    shape: Shape
    seed: int = 0
    scale_shift: int = 0
    padding_rows: int = 0
    padding_columns: int = 0
    beyond: int | None = None
    memory: GlobalMemory = field(default_factory=GlobalMemory)
    buffers: dict[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape = self.shape
        self.put("x", shape.tokens * shape.k, writable=False)
        self.put("x_scales", shape.scale_rows * shape.scale_columns, writable=False)
        self.put("w", shape.experts * shape.n * shape.k, writable=False)
        weight_rows = round_up(shape.n, TILE_ROWS)
        self.put("w_scales", shape.experts * weight_rows * shape.scale_columns, writable=False)
        for name, count in (("tokens", 0), ("expert_offsets", 1), ("scale_offsets", 1)):
            self.put(name, 4 * (shape.experts + count), writable=False)
        self.put("out", shape.tokens * shape.n * BYTES[shape.out], writable=True)
        rng = np.random.default_rng((self.seed, 1))
        self.w, self.w_scales = (
            _codes(rng, (shape.experts, shape.n, shape.k)),
            self._scales(rng, shape.experts, shape.n),
        )
        self.buffers["w"][:] = self.w.reshape(-1)
        self.buffers["w_scales"][:] = np.concatenate(
            [swizzled(scales, weight_rows, self.padding_rows, self.padding_columns) for scales in self.w_scales]
        )
        self.fill(shape.counts)

    def put(self, name: str, size: int, *, writable: bool) -> np.ndarray:
        """Add a buffer; one that is read only has contents, others do not."""
        self.buffers[name] = aligned(max(size, 16))
        self.memory.add(name, self.buffers[name], written=not writable, writable=writable)
        return self.buffers[name]

    def fill(self, counts: Sequence[int], call: int = 0) -> None:
        """New tokens and counts in the same buffers, as a captured graph would see them; the
        product is not written yet."""
        shape = self.shape
        if len(counts) != shape.experts or sum(counts) > shape.tokens:
            raise ValueError(
                f"counts: expected {shape.experts} of at most {shape.tokens} tokens together, got {counts}"
            )
        rng = np.random.default_rng((self.seed, 2, call))
        self.counts = tuple(counts)
        self.x, (self.x_scales,) = _codes(rng, (shape.tokens, shape.k)), self._scales(rng, 1, shape.tokens)
        self.x_scales = np.clip(self.x_scales.astype(int) + self.scale_shift, 0, 254).astype(np.uint8)
        self.buffers["x"][:] = self.x.reshape(-1)
        ends = np.concatenate([[0], np.cumsum(counts)])
        scale_ends = np.concatenate([[0], np.cumsum([round_up(count, TILE_ROWS) for count in counts])])
        for name, values in (("tokens", counts), ("expert_offsets", ends), ("scale_offsets", scale_ends)):
            self.buffers[name].view(np.int32)[: len(values)] = values
        used = self.memory.find(self.buffers["x_scales"].ctypes.data, 1, "x_scales")[0].written
        used[:] = self.beyond is not None
        self.buffers["x_scales"][:] = self.beyond or 0
        for e, count in enumerate(counts):
            at = slice(int(scale_ends[e]) * shape.scale_columns, int(scale_ends[e + 1]) * shape.scale_columns)
            rows = self.x_scales[ends[e] : ends[e] + count]
            self.buffers["x_scales"][at] = swizzled(
                rows, int(scale_ends[e + 1] - scale_ends[e]), self.padding_rows, self.padding_columns
            )
            used[at] = True
        self.memory.find(self.buffers["out"].ctypes.data, 1, "out")[0].written[:] = False

    def _scales(self, rng: np.random.Generator, count: int, rows: int) -> np.ndarray:
        return rng.integers(118, 125, (count, rows, self.shape.k // BLOCK), dtype=np.uint8)

    # ---------------------------------------------------------------- the truth

    def product(self) -> np.ndarray:
        """(T, N) of the output buffer, in double."""
        raw = self.buffers["out"][: self.shape.tokens * self.shape.n * BYTES[self.shape.out]]
        if self.shape.out == "bf16":
            values = (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        else:
            values = raw.view(np.float16 if self.shape.out == "fp16" else np.float32)
        return values.reshape(self.shape.tokens, self.shape.n).astype(np.float64)

    def check(self) -> tuple[float, list[str]]:
        """The largest error in units of the bound, and what is wrong apart from it.

        The bound is that of fp32 rounding after every step of K = 32, and the rounding of the
        output:

            half_ulp(out) * |sum| + 2**-24 * (|sum after step 1| + |sum after step 2| + ...)
        """
        shape, problems, worst = self.shape, [], 0.0
        got = self.product()
        written = self.memory.find(self.buffers["out"].ctypes.data, 1, "out")[0].written
        written = written[: shape.tokens * shape.n * BYTES[shape.out]].reshape(shape.tokens, -1)
        used = sum(self.counts)
        if not written[:used].all():
            missing = sorted(set(np.flatnonzero(~written[:used].all(1)).tolist()))
            problems.append(f"{len(missing)} rows of the product were not written, the first is {missing[0]}")
        if written[used:].any():
            problems.append("rows that no expert owns were written")
        start = 0
        for e, count in enumerate(self.counts):
            rows = slice(start, start + count)
            start += count
            if count == 0:
                continue
            reference, slack = self._sums(rows, e)
            nan = np.isnan(reference)
            if (np.isnan(got[rows]) != nan).any():
                problems.append(f"expert {e}: NaN where the truth has none, or the reverse")
            bound = HALF_ULP[shape.out] * np.abs(reference) + slack + SMALLEST[shape.out]
            with np.errstate(invalid="ignore"):
                error = np.abs(got[rows] - reference) / bound
                infinite = np.isinf(got[rows]) & (np.signbit(got[rows]) == np.signbit(reference))
                may, must = (np.abs(reference) + sign * bound >= OVERFLOW[shape.out] for sign in (1, -1))
            error = np.where(infinite, np.where(may, 0, np.inf), np.where(must, np.inf, error))
            worst = max(worst, float(np.where(nan | np.isnan(got[rows]), 0, error).max()))
        return worst, problems

    def _sums(self, rows: slice, expert: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, N) sums, and the rounding that fp32 may have cost them."""
        x, w = E4M3[self.x[rows]], E4M3[self.w[expert]]
        x_factor, w_factor = E8M0[self.x_scales[rows]], E8M0[self.w_scales[expert]]
        total = np.zeros((x.shape[0], w.shape[0]))
        slack = np.zeros_like(total)
        for step in range(self.shape.k // BLOCK):
            part = slice(step * BLOCK, (step + 1) * BLOCK)
            total += (x[:, part] @ w[:, part].T) * x_factor[:, step, None] * w_factor[:, step]
            slack += STEP_ROUNDING * np.abs(total)
        if self.padding_columns == 255 and self.shape.k // BLOCK % TILE_COLUMNS:
            total[:] = np.nan  # 0 * NaN, from the columns beyond K
        return total, slack


def _codes(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Every e4m3 code but NaN, alike often."""
    codes = rng.integers(0, 254, shape, dtype=np.uint8)
    return np.where(codes >= 127, codes + 1, codes).astype(np.uint8)
