"""quantize_grouped and quantize_weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cases
import torch
import truth
from guards import Guards

import hybrid_mxfp8 as mx

from .row import (
    COUNTS,
    E4M3,
    META,
    Bad,
    E,
    K,
    N,
    Odd,
    T,
    grad,
    ints,
    layout,
    normal,
    overlapping,
    poison,
    refused,
    shapes,
    shifted,
)


def _tokens() -> dict[str, Any]:
    return {"x": normal(T, K), "groups": layout()}


def _with_out(**changes: Any) -> dict[str, Any]:
    groups = layout()
    return {"x": normal(T, K), "groups": groups, "out": poison(T, K, E, groups), **changes}


tokens = refused(mx.quantize_grouped, _tokens)
into = refused(mx.quantize_grouped, _with_out)
experts = refused(mx.quantize_weights, lambda: {"w": normal(E, N, K)})
WRONG = (torch.float64, torch.int8, torch.uint8, torch.int64, torch.bool, E4M3, torch.complex64)


def index(*values: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(values or [0] * T, dtype=dtype)


BAD: list[Bad] = [
    *(tokens(f"x of {dtype}", TypeError, "^x: dtype must be bfloat16 or float16 or float32, got", x=torch.ones(T, K).to(dtype)) for dtype in WRONG),
    *(experts(f"w of {dtype}", TypeError, "^w: dtype must be bfloat16 or float16 or float32, got", w=torch.ones(E, N, K).to(dtype)) for dtype in WRONG),
    *(tokens(f"x with K = {k}", ValueError, f"^x: K must be a positive multiple of 32, got {k}$", x=normal(T, k)) for k in (0, 1, 16, 31, 33, 48, 100)),
    *(experts(f"w with K = {k}", ValueError, f"^w: K must be a positive multiple of 32, got {k}$", w=normal(E, N, k)) for k in (0, 1, 16, 33, 100)),
    *(tokens(f"x of shape {shape}", ValueError, r"^x: must have shape \(R, K\)", x=torch.zeros(shape)) for shape in ((), (K,), (1, T, K), (0,))),
    *(experts(f"w of shape {shape}", ValueError, r"^w: must have shape \(E, N, K\)", w=torch.zeros(shape)) for shape in ((), (K,), (N, K), (1, E, N, K))),
    tokens("x None", TypeError, r"^x: must be a torch\.Tensor", x=None),
    tokens("x an operand", TypeError, r"^x: must be a torch\.Tensor .* got GroupedMXFP8$", x=lambda: poison(T, K, E, layout())),
    tokens("x sparse", TypeError, "^x: must be a dense tensor, got layout sparse_coo$", x=lambda: torch.eye(T, K).to_sparse()),
    tokens("x on meta", ValueError, "^x: must be on cpu", x=normal(T, K).to(META)),
    tokens("groups on meta", ValueError, "^x: must be on meta", groups=lambda: ints(*COUNTS).to(META)),
    tokens("x transposed", ValueError, "^x: must have unit stride along its columns", x=normal(K, T).T),
    tokens("x of every second column", ValueError, "^x: must have unit stride along its columns", x=normal(T, 2 * K)[:, ::2]),
    tokens("x one column for all", ValueError, "^x: must have unit stride", x=normal(T, 1).expand(T, K)),
    tokens("x a row too many", ValueError, "^x: must have T = groups.num_tokens = 40 rows, got 41$", x=normal(T + 1, K)),
    tokens("x without rows", ValueError, "^x: must have T = groups.num_tokens = 40 rows, got 0$", x=normal(0, K)),
    tokens("x with grad", ValueError, "^x: must not require grad", x=lambda: grad(normal(T, K))),
    tokens("groups None", TypeError, "^groups: must be a GroupLayout or a tensor of counts", groups=None),
    tokens("groups a list", TypeError, "^groups: must be a GroupLayout or a tensor of counts", groups=[1, 2]),
    tokens("groups a string", TypeError, "^groups: must be a GroupLayout or a tensor of counts", groups="3"),
    tokens("counts of float", TypeError, "^groups: dtype must be int32 or int64, got float32$", groups=torch.ones(E)),
    tokens("counts of int16", TypeError, "^groups: dtype must be int32 or int64, got int16$", groups=ints(1, 2, dtype=torch.int16)),
    tokens("counts a matrix", ValueError, r"^groups: must have shape \(E,\)", groups=torch.ones(E, 1, dtype=torch.int32)),
    tokens("counts with gaps", ValueError, "^groups: must be contiguous", groups=torch.ones(2 * E, dtype=torch.int32)[::2]),
    tokens("counts one for all", ValueError, "^groups: must be contiguous", groups=ints(4).expand(E)),
    *(tokens(f"rounding {r!r}", ValueError, "^scale_rounding: must be one of rceil, floor, even, got", scale_rounding=r) for r in ("", "RCEIL", "nearest", 1, None, b"rceil")),
    *(tokens(f"activation {a!r}", ValueError, "^activation: must be None, 'swiglu' .*, got", activation=a) for a in ("", "silu", "SwiGLU", True, 0)),
    *(tokens(f"backend {b!r}", ValueError, "^backend: must be one of auto, cutlass, triton, reference, got", backend=b) for b in ("", "cuda", "Reference", 7)),
    tokens("swiglu of odd width", ValueError, "^x: must have an even number of columns", x=normal(T, 65), activation="swiglu"),
    tokens("swiglu of K = 48", ValueError, "^x: K must be", x=normal(T, K), activation="swiglu"),
    tokens("index a list", TypeError, r"^row_index: must be a torch\.Tensor", row_index=[0] * T),
    tokens("index of int64", TypeError, "^row_index: dtype must be int32, got int64$", row_index=index(dtype=torch.int64)),
    tokens("index of bool", TypeError, "^row_index: dtype must be int32, got bool$", row_index=torch.ones(T, dtype=torch.bool)),
    tokens("index of float", TypeError, "^row_index: dtype must be int32, got float32$", row_index=torch.zeros(T)),
    tokens("index a matrix", ValueError, r"^row_index: must have shape \(T,\)", row_index=index().reshape(T, 1)),
    tokens("index of one", ValueError, "^row_index: must have T = groups.num_tokens = 40 rows, got 1$", row_index=index(3)),
    tokens("index with gaps", ValueError, "^row_index: must be contiguous", row_index=torch.zeros(2 * T, dtype=torch.int32)[::2]),
    tokens("index on meta", ValueError, "^row_index: must be on cpu", row_index=index().to(META)),
    into("out a tensor", TypeError, "^out: must be a GroupedMXFP8, got Tensor$", out=normal(T, K)),
    into("out a tuple", TypeError, "^out: must be a GroupedMXFP8, got tuple$", out=(1, 2)),
    into("out of fewer rows", ValueError, r"^out: must have shape \(T, K\)", out=lambda: poison(T - 1, K, E, layout(num_tokens=T - 1))),
    into("out of wider rows", ValueError, r"^out: must have shape \(T, K\)", out=lambda: poison(T, 2 * K, E, layout())),
    into("out of fewer experts", ValueError, r"^out: must have shape \(S, C\)", out=lambda: poison(T, K, 1, layout([T]))),
    into("out on meta", ValueError, "^out: must be on cpu", out=lambda: mx.GroupedMXFP8(
        torch.empty(T, K, dtype=E4M3, device=META), torch.empty(384, 4, dtype=torch.uint8, device=META),
        mx.GroupLayout.from_counts(torch.ones(E, dtype=torch.int32, device=META), T))),
    experts("w None", TypeError, r"^w: must be a torch\.Tensor", w=None),
    experts("w an operand", TypeError, r"^w: must be a torch\.Tensor .* got ExpertWeights$", w=lambda: mx.quantize_weights(normal(E, N, K))),
    experts("w sparse", TypeError, "^w: must be a dense tensor", w=lambda: torch.ones(E, N, K).to_sparse()),
    experts("w transposed", ValueError, "^w: must have unit stride along K", w=normal(E, K, N).mT),
    experts("w experts last", ValueError, "^w: must have unit stride along K", w=normal(N, K, E).permute(2, 0, 1)),
    experts("w with grad", ValueError, "^w: must not require grad", w=lambda: grad(normal(E, N, K))),
    experts("w: rounding down", ValueError, "^scale_rounding: must be one of", scale_rounding="down"),
    experts("w: backend None at all", ValueError, "^backend: must be one of", backend="none"),
]  # fmt: skip


def _of_counts() -> dict[str, Any]:
    return {**_with_out(), "groups": ints(*COUNTS), "row_index": index()}


VALUES, SCALES = T * K, layout().scale_rows * 4

BAD += [
    overlapping(mx.quantize_grouped, _of_counts, f"{written} in {read}", f"^out: must not overlap {read.replace('out.', 'its own ')}, got addresses", first, second, by)
    for written, read, first, second, by in (
        ("out's values", "x", "x", "out.values", VALUES), ("out's scales", "x", "x", "out.scales", 0),
        ("out's scales", "out.scales", "out.values", "out.scales", VALUES - 16),
        ("out's values", "row_index", "out.values", "row_index", 64), ("out's scales", "groups", "out.scales", "groups", SCALES - 4 * E),
    )
]  # fmt: skip
BAD += [
    overlapping(mx.quantize_grouped, _with_out, f"out in {part}", f"^out: must not overlap {part}, got", "out.scales", f"groups.{part}", 0)
    for part in ("expert_offsets", "scale_offsets")
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
    unaligned_values: bool = False,
    dtype: torch.dtype = torch.int32,
) -> Odd:
    """Quantized into poison, every byte as truth has it: values and scales of owned rows, zeros as padding, poison elsewhere."""

    def prepare(g: Guards) -> tuple[Callable[[], object], Callable[[Any], None]]:
        source, rows = g(x, shift), None if index is None else g(torch.tensor(index, dtype=torch.int32))
        num_tokens = x.shape[0] if index is None else len(index)
        given = g(torch.tensor(counts, dtype=dtype))
        groups = given if as_counts else g.layout(mx.GroupLayout.from_counts(given, num_tokens))
        buffers = poison(num_tokens, x.shape[1], len(counts), mx.GroupLayout.from_counts(given, num_tokens))
        values = g.out(buffers.values, 1 if unaligned_values else 0)
        out = mx.GroupedMXFP8(values, g.out(buffers.scales), buffers.groups)

        def check(result: mx.GroupedMXFP8) -> None:
            assert result.values is out.values
            plain = truth.doubles(x)
            if index is not None:
                inside = [r if 0 <= r < x.shape[0] else -1 for r in index]
                plain = torch.cat([x.double(), torch.zeros(1, x.shape[1])])[inside].numpy()
            tokens, _, _ = truth.layout(counts, num_tokens)
            expected = truth.grouped_bytes(*truth.quantize(plain), tokens, out.scales.shape[0], 0xFF)
            assert (truth.as_bytes(result.values) == expected[0]).all()
            assert (truth.as_bytes(result.scales).reshape(-1) == expected[1]).all()

        return lambda: mx.quantize_grouped(source, groups, row_index=rows, out=out), check

    return Odd(what, prepare)


def _weights(what: str, w: torch.Tensor, shift: int = 0) -> Odd:
    def prepare(g: Guards) -> tuple[Callable[[], object], Callable[[Any], None]]:
        given = g(w, shift)

        def check(wq: mx.ExpertWeights) -> None:
            for e in range(w.shape[0]):
                codes, scales = truth.quantize(truth.doubles(w[e]))
                assert (truth.as_bytes(wq.values[e]) == codes).all()
                assert truth.as_bytes(wq.scales[e]).tobytes() == truth.swizzle(scales).tobytes()

        return lambda: mx.quantize_weights(given), check

    return Odd(what, prepare)


def _quantized(as_counts: bool) -> Callable[[Any], Any]:
    def run(device: Any) -> Any:
        counts = torch.ones(E, dtype=torch.int32, device=device)
        groups = counts if as_counts else mx.GroupLayout.from_counts(counts, T)
        x = torch.ones(T, 2 * K, dtype=torch.float16, device=device)
        w = mx.quantize_weights(torch.ones(E, N, K, device=device))
        return mx.quantize_grouped(x, groups, activation="swiglu"), w

    return run


def _are_operands(result: Any) -> None:
    shapes = [(q.values.shape, q.scales.shape) for q in result]
    assert shapes == [((T, K), (384, 4)), ((E, N, K), (E, 128, 4))]


HOSTILE = {name: counts for name, counts in cases.HOSTILE.items() if counts[1]}

ODD: list[Odd] = [
    *(_right(f"counts: {name}", normal(t, 32), counts, as_counts=True) for name, (counts, t) in HOSTILE.items()),
    *(_right(f"int64 counts: {name}", normal(t, 32), counts, as_counts=True, dtype=torch.int64) for name, (counts, t) in cases.HUGE.items()),
    *(_right(f"layout of {name}", normal(t, 32), counts) for name, (counts, t) in HOSTILE.items()),
    *(_right(f"x starts {shift} bytes off", normal(T, K), COUNTS, shift=shift) for shift in (2, 4, 8, 14)),
    _right("out's values start a byte off", normal(T, K), COUNTS, unaligned_values=True),
    _right("columns of wider rows", normal(T, 3 * K)[:, K + 1 : 2 * K + 1], COUNTS),
    _right("every second row", normal(2 * T, K)[::2], COUNTS),
    _right("one row for all", normal(1, K).expand(T, K), COUNTS),
    _right("rows that overlap", normal(T + K).as_strided((T, K), (1, 1)), COUNTS),
    _right("E = 1", normal(T, K), [T]),
    _right("E = 4096", normal(T, 32), [0] * 2000 + [7] + [0] * 2000 + [9] + [0] * 94),
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
    _weights("300 experts of one row", normal(300, 1, 32)),
    *shapes("tensors, layout", _quantized(False), _are_operands),
    *shapes("tensors, counts", _quantized(True), _are_operands),
]  # fmt: skip
