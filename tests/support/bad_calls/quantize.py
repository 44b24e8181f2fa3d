"""quantize_grouped and quantize_weights."""

from __future__ import annotations

from typing import Any

import cases
import torch
import truth
from guards import Guards

import hybrid_mxfp8 as mx

from .row import (
    COUNTS,
    FLOATS,
    NOT_FLOATS,
    Bad,
    E,
    K,
    N,
    Odd,
    Prepared,
    T,
    ints,
    layout,
    normal,
    of_tensor,
    overlapping,
    refused,
    shifted,
)


def _tokens() -> dict[str, Any]:
    return {"x": normal(T, K), "groups": layout()}


def _with_out() -> dict[str, Any]:
    groups = layout()
    return {"x": normal(T, K), "groups": groups, "out": cases.poisoned_output(groups, K)}


tokens = refused(mx.quantize_grouped, _tokens)
into = refused(mx.quantize_grouped, _with_out)
counted = refused(mx.quantize_grouped, lambda: {"x": normal(T, K), "groups": ints(*COUNTS)})
experts = refused(mx.quantize_weights, lambda: {"w": normal(E, N, K)})


BAD: list[Bad] = [
    *of_tensor(tokens, "tokens", "x", lambda: normal(T, K), "(R, K)", FLOATS, NOT_FLOATS, "must have unit stride along its columns", "^groups: must be on meta, as x, got cpu$", more="sparse grad"),
    *of_tensor(experts, "weights", "w", lambda: normal(E, N, K), "(E, N, K)", FLOATS, NOT_FLOATS, "must have unit stride along K", None, more="sparse grad"),
    *of_tensor(tokens, "tokens", "row_index", lambda: ints(*[0] * T), "(T,)", "int32", (torch.int64, torch.bool, torch.float32)),
    *(tokens(f"x with K = {k}", ValueError, f"^x: K must be a positive multiple of 32, got {k}$", x=normal(T, k)) for k in (0, 16, 33, 48)),
    *(experts(f"w with K = {k}", ValueError, f"^w: K must be a positive multiple of 32, got {k}$", w=normal(E, N, k)) for k in (0, 16, 33)),
    counted("ends as counts", ValueError, r"^groups: must have a sum of at most num_tokens = 40 \(counts, not offsets\? GroupLayout.from_ends takes these\), got \[20, 20, 35\]$", groups=ints(20, 20, 35)),
    tokens("x a row too many", ValueError, "^x: must have T = groups.num_tokens = 40 rows, got 41$", x=normal(T + 1, K)),
    *(tokens(f"groups {type(g).__name__}", TypeError, "^groups: must be a GroupLayout or a tensor of counts", groups=g) for g in (None, [1, 2], "3")),
    *of_tensor(tokens, "tokens", "groups", lambda: ints(*COUNTS), "(E,)", "int32 or int64", (torch.float32, torch.int16), place="^groups: must be on cpu, as x, got meta$")[1:],
    *(tokens(f"rounding {r!r}", ValueError, "^scale_rounding: must be one of rceil, floor, even, got", scale_rounding=r) for r in ("", "RCEIL", 1, None)),
    *(row(f"{word}: scale_group {g!r}", ValueError, "^scale_group: must be 32 or 128, got", scale_group=g)
      for word, row in (("tokens", tokens), ("weights", experts)) for g in (64, 0, "128", 32.0, None)),
    *(tokens(f"activation {a!r}", ValueError, "^activation: must be None, 'swiglu' .*, got", activation=a) for a in ("", "silu", True, 0)),
    *(tokens(f"backend {b!r}", ValueError, "^backend: must be one of auto, cutlass, triton, reference, got", backend=b) for b in ("", "refer", 7)),
    tokens("swiglu of odd width", ValueError, "^x: must have an even number of columns", x=normal(T, 65), activation="swiglu"),
    tokens("swiglu of K = 48", ValueError, "^x: K must be", x=normal(T, K), activation="swiglu"),
    tokens("index of one", ValueError, "^row_index: must have T = groups.num_tokens = 40 rows, got 1$", row_index=ints(3)),
    *(into(f"out a {type(out).__name__}", TypeError, f"^out: must be a GroupedMXFP8, got {type(out).__name__}$", out=out) for out in (normal(T, K), (1, 2))),
    into("out of fewer rows", ValueError, r"^out: must have shape \(T, K\)", out=lambda: cases.poisoned_output(layout(num_tokens=T - 1), K)),
    into("out of fewer experts", ValueError, r"^out: must have shape \(S, C\)", out=lambda: cases.poisoned_output(layout([T]), K)),
    into("out on meta", ValueError, "^out: must be on cpu", out=lambda: cases.poisoned_output(cases.layout(COUNTS, T, "meta"), K)),
    experts("rounding down", ValueError, "^scale_rounding: must be one of", scale_rounding="down"),
    experts("backend none", ValueError, "^backend: must be one of", backend="none"),
]  # fmt: skip


def _of_counts() -> dict[str, Any]:
    return {**_with_out(), "groups": ints(*COUNTS), "row_index": ints(*[0] * T)}


VALUES, SCALES = T * K, layout().scale_rows * 4

BAD += [
    overlapping(mx.quantize_grouped, _of_counts, f"{written} in {read}", f"^out: must not overlap {read.replace('out.', 'its own ')}, got addresses", first, second, by)
    for written, read, first, second, by in (
        ("out's values", "x", "x", "out.values", VALUES), ("out's scales", "x", "x", "out.scales", 0),
        ("out's scales", "out.scales", "out.values", "out.scales", VALUES - 16),
        ("out's values", "row_index", "out.values", "row_index", 64), ("out's scales", "groups", "groups", "out.scales", 4 * E - SCALES),
    )
]  # fmt: skip
BAD += [
    overlapping(mx.quantize_grouped, _with_out, f"out in {part}", f"^out: must not overlap {part}, got", "out.scales", f"groups.{part}", 0)
    for part in ("tokens_per_expert", "expert_offsets", "scale_offsets")
]  # fmt: skip
BAD.append(shifted(mx.quantize_grouped, _with_out, "out's scales off a 16-byte boundary", "^out: must start at a 16-byte boundary, got address 0x", "out.scales", 4))  # fmt: skip


# ---------------------------------------------------------------- odd ones, by truth


def _right(
    what: str,
    x: torch.Tensor,
    counts: list[int],
    *,
    shift: int = 0,
    index: list[int] | None = None,
    as_counts: bool = False,
    out_shift: int = 0,
    dtype: torch.dtype = torch.int32,
) -> Odd:
    """Every byte as truth has it: owned rows, zeros as padding, poison elsewhere."""

    def prepare(g: Guards) -> Prepared:
        source, rows = g(x, shift), None if index is None else g(ints(*index))
        sources = list(range(x.shape[0])) if index is None else index
        given = g(ints(*counts, dtype=dtype))
        groups = mx.GroupLayout.from_counts(given, len(sources))
        buffers = cases.poisoned_output(groups, x.shape[1])
        out = mx.GroupedMXFP8(g.out(buffers.values, out_shift), g.out(buffers.scales), groups)
        form = given if as_counts else g.place(groups)

        def check(result: mx.GroupedMXFP8) -> None:
            assert result.values is out.values
            inside = [r if 0 <= r < x.shape[0] else -1 for r in sources]
            plain = torch.cat([x.double(), torch.zeros(1, x.shape[1])])[inside].numpy()
            tokens, _, _ = truth.layout(counts, len(sources))
            expected = truth.grouped_bytes(*truth.quantize(plain), tokens, out.scales.shape[0], 0xFF)
            assert (truth.as_bytes(result.values) == expected[0]).all()
            assert (truth.as_bytes(result.scales).reshape(-1) == expected[1]).all()

        return lambda: mx.quantize_grouped(source, form, row_index=rows, out=out), check

    return Odd(what, prepare)


def _weights(what: str, w: torch.Tensor, shift: int = 0) -> Odd:
    def prepare(g: Guards) -> Prepared:
        given = g(w, shift)

        def check(wq: mx.ExpertWeights) -> None:
            for e in range(w.shape[0]):
                codes, scales = truth.quantize(truth.doubles(w[e]))
                assert (truth.as_bytes(wq.values[e]) == codes).all()
                assert truth.as_bytes(wq.scales[e]).tobytes() == truth.swizzle(scales).tobytes()

        return lambda: mx.quantize_weights(given), check

    return Odd(what, prepare)


HOSTILE = {name: counts for name, counts in cases.HOSTILE.items() if counts[1]}

ODD: list[Odd] = [
    *(_right(f"counts: {name}", normal(t, 32), counts, as_counts=True) for name, (counts, t) in HOSTILE.items()),
    *(_right(f"int64 counts: {name}", normal(t, 32), counts, as_counts=True, dtype=torch.int64) for name, (counts, t) in cases.HUGE.items()),
    *(_right(f"layout of {name}", normal(t, 32), counts) for name, (counts, t) in HOSTILE.items()),
    *(_right(f"x starts {shift} bytes off", normal(T, K), COUNTS, shift=shift) for shift in (2, 4, 8, 14)),
    _right("out's values start a byte off", normal(T, K), COUNTS, out_shift=1),
    _right("columns of wider rows", normal(T, 3 * K)[:, K + 1 : 2 * K + 1], COUNTS),
    _right("every second row", normal(2 * T, K)[::2], COUNTS),
    _right("one row for all", normal(1, K).expand(T, K), COUNTS),
    _right("rows that overlap", normal(T + K).as_strided((T, K), (1, 1)), COUNTS),
    _right("E = 1", normal(T, K), [T]),
    _right("E = 1200", normal(T, 32), [0] * 1030 + [7] + [0] * 100 + [9] + [0] * 68),
    _right("E = 0", normal(T, K), []),
    _right("E = 0, from counts", normal(T, K), [], as_counts=True),
    _right("T = 0", normal(0, K), [0, 0]),
    _right("T = 0, from counts that promise more", normal(0, K), [3, 4], as_counts=True),
    _right("all experts empty", normal(T, K), [0, 0, 0]),
    _right("index far outside", normal(5, K), [3, 5], index=[0, 4, -1, 5, 2**31 - 1, -(2**31), 1, 1]),
    _right("index into nothing", normal(0, K), [3, 1], index=[0, 1, -1, 7]),
    _right("the same row again and again", normal(2, K), COUNTS, index=[1] * T),
    _weights("w starts 2 bytes off", normal(2, 9, K), 2),
    _weights("every second expert", normal(4, 9, K)[::2]),
    _weights("rows of a wider matrix", normal(2, 9, 2 * K)[:, :, :K]),
    _weights("experts and rows swapped", normal(9, 2, K).transpose(0, 1)),
    _weights("one matrix for all experts", normal(1, 9, K).expand(3, 9, K)),
    _weights("N = 1", normal(2, 1, K)),
    _weights("N = 0", normal(2, 0, K)),
    _weights("no experts", normal(0, 9, K)),
    _weights("70 experts of one row", normal(70, 1, 32)),
]  # fmt: skip
