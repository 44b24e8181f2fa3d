"""grouped_gemm, explain and grouped_gemm_workspace_size."""

from __future__ import annotations

from typing import Any

import cases
import tolerances
import torch
from guards import Guards
from products import plain_operands

import hybrid_mxfp8 as mx

from .row import (
    COUNTS,
    E4M3,
    Bad,
    E,
    K,
    N,
    Odd,
    Prepared,
    T,
    grouped,
    ints,
    layout,
    meta,
    normal,
    of_tensor,
    overlapping,
    refused,
    shifted,
    weights,
)


def _good() -> dict[str, Any]:
    return {"x": grouped(), "w": weights(), "out": cases.poisoned_product(T, N, torch.bfloat16)}


def bf16(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.bfloat16)


def u8(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.uint8)


product = refused(mx.grouped_gemm, _good)
explained = refused(mx.explain, lambda: {"x": grouped(), "w": weights()})
size = refused(mx.grouped_gemm_workspace_size, lambda: {"w": weights(), "num_tokens": T})
DTYPES = (torch.float64, torch.int32, torch.uint8, E4M3, None, "bfloat16", 3, torch.ones(1))

BAD: list[Bad] = [
    *(
        row(f"{word}: {what}", error, message, **changes)
        for word, row in (("gemm", product), ("explain", explained))
        for what, error, message, changes in (
            ("x a tensor", TypeError, "^x: must be a GroupedMXFP8 .* got Tensor$", {"x": normal(T, K)}),
            ("x and w swapped", TypeError, "^x: must be a GroupedMXFP8 .* got ExpertWeights$", {"x": weights, "w": grouped}),
            ("w a tensor", TypeError, "^w: must be an ExpertWeights .* got Tensor$", {"w": normal(E, N, K)}),
            ("w an operand of tokens", TypeError, "^w: must be an ExpertWeights .* got GroupedMXFP8$", {"w": grouped}),
            ("an expert too few", ValueError, r"^w: must have x's E = 3 experts, got 2 \(from_indptr takes offsets with a leading 0\)$", {"w": lambda: weights(2)}),
            ("no experts", ValueError, "^w: must have x's E = 3 experts, got 0$", {"w": lambda: weights(0)}),
            ("another K", ValueError, "^x: must have w's K = 128, got 96$", {"w": lambda: weights(k=128)}),
            ("(E, K, N)", ValueError, r"^w: must be \(E, N, K\) with x's K = 96 \(transposed\?\), got \(3, 96, 64\)$", {"w": lambda: weights(n=96, k=64)}),
            ("w on meta", ValueError, "^w: must be on cpu, as x, got meta$", {"w": lambda: meta(weights())}),
            *((f"N = {n}", ValueError, f"^w: N must be a positive multiple of 8, got {n}$", {"w": lambda n=n: weights(n=n)}) for n in (0, 1, 4, 7, 9, 20)),
            *((f"out_dtype {d}", TypeError, "^out_dtype: must be bfloat16 or float16 or float32, got", {"out_dtype": d}) for d in DTYPES),
            *((f"backend {b!r}", ValueError, "^backend: must be one of auto, cutlass, triton, reference, got", {"backend": b}) for b in ("blas", "", 0)),
        )
    ),
    *of_tensor(product, "gemm", "out", lambda: bf16(T, N), "(T, N)", "bfloat16", (torch.float32, torch.uint8), more="sparse grad"),
    *of_tensor(product, "gemm", "workspace", lambda: u8(999), "(bytes,)", "uint8", (torch.int8, torch.float32), more=""),
    product("out of bf16 for fp32", TypeError, "^out: dtype must be float32, got bfloat16$", out_dtype=torch.float32),
    *(product(f"out of shape {out.shape}", ValueError, r"^out: must have shape \(T, N\)", out=out) for out in (bf16(T - 1, N), bf16(T + 1, N), bf16(N, T), bf16(0, N))),
    *(size(f"size: w {w!r}", TypeError, "^w: must be an ExpertWeights, got", w=w) for w in (None, 3, "w")),
    *(size(f"size: T {t!r}", TypeError, "^num_tokens: must be an int, got", num_tokens=t) for t in (None, 3.0, "3", True)),
    *(size(f"size: T = {t}", ValueError, f"^num_tokens: must be at least 0, .*int32, got {t}$", num_tokens=t) for t in (-1, 2**31, 2**31 - 1, 2**63, 2**70)),
    *(size(f"size: N = {n}", ValueError, f"^w: N must be a positive multiple of 8, got {n}$", w=lambda n=n: weights(n=n)) for n in (0, 12)),
    size("size: out_dtype", TypeError, "^out_dtype: must be", out_dtype=torch.int8),
    size("size: backend", ValueError, "^backend: must be one of", backend="cublas"),
]  # fmt: skip


BAD += [
    *(shifted(mx.grouped_gemm, _good, f"out starts {by} bytes off", "^out: must start at a 16-byte boundary, got address 0x", "out", by) for by in (2, 4, 8, 14)),
    *(shifted(mx.grouped_gemm, lambda: {**_good(), "workspace": u8(999)}, f"workspace starts {by} bytes off", "^workspace: must start at a 256-byte boundary", "workspace", by) for by in (1, 16, 128)),
    *(
        overlapping(mx.grouped_gemm, lambda: {**_good(), "workspace": u8(512)}, f"{written} in {read}", rf"^{written}: must not overlap {read.replace('x.groups.', '')}, got addresses 0x", read, written, by)
        for written, read, by in (
            ("out", "x.values", T * K - 16), ("out", "x.scales", 16 - T * N * 2), ("out", "w.values", 1024),
            ("out", "x.groups.expert_offsets", 4 * (E + 1) - T * N * 2), ("workspace", "out", 256), ("workspace", "w.scales", 256),
        )
    ),
]  # fmt: skip


# ---------------------------------------------------------------- odd ones, by truth


def _right(
    what: str,
    counts: list[int],
    num_tokens: int = T,
    *,
    n: int = N,
    k: int = K,
    dtype: torch.dtype = torch.float32,
    shift: int = 0,
    workspace: int | None = None,
) -> Odd:
    """Rows of experts within their bounds of truth, all others still poison."""

    def prepare(g: Guards) -> Prepared:
        plain, w = grouped(counts, num_tokens, k), weights(len(counts), n, k)
        x = mx.GroupedMXFP8(g(plain.values, shift), g(plain.scales, shift), g.place(plain.groups))
        wq = mx.ExpertWeights(g(w.values, shift), g(w.scales, shift))
        out = g.out(cases.poisoned_product(num_tokens, n, dtype))
        needed = mx.grouped_gemm_workspace_size(wq, num_tokens, out_dtype=dtype)
        space = None if workspace is None else g.out(u8(max(workspace, needed)))

        def check(result: torch.Tensor) -> None:
            assert result.data_ptr() == out.data_ptr()
            tokens = plain.groups.tokens_per_expert.tolist()
            tolerances.check_gemm(result, *plain_operands(plain, w, tokens), tokens)
            assert bool(torch.isnan(result[sum(tokens) :]).all())

        return lambda: mx.grouped_gemm(x, wq, out_dtype=dtype, out=out, workspace=space), check

    return Odd(what, prepare)


GARBAGE = {
    "offsets fall": ([20, 0, 15], [0, 30, 10, 35], [0, 128, 128, 256]),
    "offsets negative": ([20, 0, 15], [-5, -1, 3, 35], [-128, 0, 0, 256]),
    "offsets huge": ([20, 0, 15], [0, 2**31 - 1, -(2**31), 2**31 - 1], [0, 2**31 - 1, 2**31 - 128, 2**31 - 1]),
    "every expert owns all rows": ([40, 40, 40], [0, 40, 0, 40], [0, 0, 0, 256]),
    "scales far outside": ([20, 0, 15], [0, 20, 20, 35], [2**31 - 128, 2**31 - 128, -128, 2**31 - 1]),
    "scales off a tile": ([20, 0, 15], [0, 20, 20, 35], [37, 64, 200, 255]),
    "more rows than there are": ([99, 99, 99], [0, 99, 198, 297], [0, 128, 256, 384]),
    "sums that wrap": ([1, 1, 1], [-(2**31), 2**31 - 1, -(2**31), 2**31 - 1], [2**31 - 1, 2**31 - 1, 2**31 - 1, 2**31 - 1]),
}  # fmt: skip
"""Counts, expert offsets, scale offsets. Any numbers may come out, within the buffers."""


def _garbage(what: str, product: bool) -> Odd:
    """Past the checks of the constructor, which can look at a CPU's tensors, but not at a GPU's."""

    def prepare(g: Guards) -> Prepared:
        groups = mx.GroupLayout.unchecked(*(g(ints(*numbers)) for numbers in GARBAGE[what]), T)
        plain = grouped()
        if not product:
            into = mx.GroupedMXFP8(g.out(plain.values), g.out(plain.scales), g.place(plain.groups))
            rows = g(normal(T, K))
            return lambda: mx.quantize_grouped(rows, groups, out=into), lambda result: None
        x, w = mx.GroupedMXFP8.unchecked(g(plain.values), g(plain.scales), groups), g.place(weights())
        out = g.out(cases.poisoned_product(T, N, torch.bfloat16))
        return lambda: mx.grouped_gemm(x, w, out=out), lambda result: None

    return Odd(f"{'product' if product else 'quantized'}: {what}", prepare)


by_hand = refused(mx.GroupLayout, lambda: dict(vars(layout())))
PARTS = ("tokens_per_expert", "expert_offsets", "scale_offsets")
BAD += [
    by_hand(f"layout by hand: {what}", ValueError, f"^({'|'.join(PARTS)}): must (be|have) .*, got", **{name: ints(*part) for name, part in zip(PARTS, numbers, strict=True)})
    for what, numbers in GARBAGE.items()
]  # fmt: skip
GARBAGE_ROWS: list[Odd] = [_garbage(what, product) for product in (True, False) for what in GARBAGE]


ODD: list[Odd] = [
    *(_right(f"counts: {name}", counts, t, n=8, k=32) for name, (counts, t) in cases.HOSTILE.items()),
    *(_right(f"operands start {by} bytes off", COUNTS, shift=by) for by in (1, 4, 8)),
    _right("E = 1", [T]),
    _right("E = 4096", [0] * 4000 + [3] + [0] * 90 + [2, 0, 0, 1, 0], 8, n=8, k=32),
    _right("E = 0", [], 3),
    _right("T = 0 in fp16", [0, 0], 0, dtype=torch.float16),
    _right("all experts empty", [0, 0, 0]),
    _right("rows that no expert owns", [1, 0, 1]),
    _right("the narrowest", [1], 1, n=8, k=32),
    _right("a larger workspace than needed", COUNTS, workspace=4096),
    _right("a workspace of just what is needed", COUNTS, workspace=0),
]  # fmt: skip
