"""The library under a random sequence of calls: a state machine that holds what earlier calls made
and feeds it to later ones.

State: layouts, quantized tokens and weights, MoE layers with their workspaces, outputs and
workspaces to be written again. Each rule makes one public call on every backend that can run here,
asked for by argument, context or environment, and compares:

- bytes of a quantizer: equal to those of ``truth``, padding zero, what no expert owns as it was
  before;
- a product: within the bounds of ``tolerances`` of float64, what no expert owns as it was before;
- a whole MoE layer: the bits of the same steps as separate calls.

Every buffer that a call may write stands between guard bytes, which are looked at after each rule.
It runs on a GPU if there is one, else on the CPU, kernels interpreted. Shapes come from modest
pools, so that a GPU compiles a bounded set of kernels.
"""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import cases
import kernels
import moe_truth
import numpy as np
import products
import swiglu_truth
import tolerances
import torch
import truth
from cases import bits
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import hybrid_mxfp8 as mx
from hybrid_mxfp8 import env, reference
from hybrid_mxfp8.core.formats import grouped_scale_rows, scale_cols

GPU = torch.cuda.is_available() and not env.triton_interpret()
DEVICE = torch.device("cuda", 0) if GPU else torch.device("cpu")
BACKENDS = [name for name, (available, _) in mx.backends(DEVICE).items() if available]
AUTOMATIC = BACKENDS[0]
"""They are in the order in which one is chosen."""
VARIABLE = "HYBRID_MXFP8_BACKEND"
HALF = GPU and torch.cuda.get_device_capability() < (10, 0)
"""Whether the Triton backend's operands pass through bf16."""


@dataclass(frozen=True)
class Pool:
    """What shapes and options are drawn from; few enough that a GPU's kernels are soon all
    compiled."""

    experts: tuple[int, ...]
    ks: tuple[int, ...]
    ns: tuple[int, ...]
    max_tokens: int
    weight_elements: int
    batches: tuple[int, ...]
    formats: tuple[tuple[torch.dtype, str], ...]


ALL_FORMATS = tuple((dtype, rounding) for dtype in cases.DTYPES for rounding in truth.ROUNDINGS)
POOL = (
    Pool((1, 3, 4, 17, 48), (32, 96, 160, 416), (8, 72, 136, 264), 600, 2**19, (0, 1, 3, 17, 1500), ALL_FORMATS[::2])
    if GPU
    else Pool((1, 2, 3, 5, 8, 13, 33, 48), (32, 64, 96, 128, 160, 288), (8, 16, 40, 72, 128, 136, 264), 150, 2**16, (0, 1, 2, 3, 8, 17, 24), ALL_FORMATS)
)  # fmt: skip
TRUTH_ELEMENTS = 2**17
"""Beyond, the reference backend is the judge: truth takes a microsecond an element."""

COUNTS: Counter[str] = Counter()
"""Rules run to their end, by name, and examples."""


# ---------------------------------------------------------------- buffers

GUARD, GUARD_BYTE = 4096, 0xA5


class Buffer:
    """Poisoned bytes between guards, from a 256-byte boundary or ``offset`` bytes after it."""

    def __init__(self, size: int, offset: int = 0) -> None:
        self.whole = torch.full((2 * GUARD + 512 + size,), GUARD_BYTE, dtype=torch.uint8, device=DEVICE)
        self.start = GUARD + -(self.whole.data_ptr() + GUARD) % 256 + offset
        self.end = self.start + size
        self.bytes.fill_(cases.POISON)

    @property
    def bytes(self) -> torch.Tensor:
        return self.whole[self.start : self.end]

    def intact(self) -> bool:
        around = torch.cat([self.whole[: self.start], self.whole[self.end :]])
        return bool((around == GUARD_BYTE).all())


@contextmanager
def asking(way: str, name: str) -> Iterator[dict[str, str]]:
    """Ask for a backend in one way, while those of lower rank ask for another; yields keyword
    arguments of the call.

    ``auto`` asks for none where that comes to the same, else by argument.
    """
    with mock.patch.dict(os.environ), ExitStack() as outer:
        os.environ.pop(VARIABLE, None)
        if way == "environment":
            os.environ[VARIABLE] = f" {name.capitalize()}"
            yield {}
        elif way == "auto" and name == AUTOMATIC:
            yield {}
        else:
            os.environ[VARIABLE] = "reference"
            outer.enter_context(mx.use_backend(name if way == "context" else "reference"))
            yield {} if way == "context" else {"backend": name}


# ---------------------------------------------------------------- state


def tensors(groups: mx.GroupLayout) -> tuple[torch.Tensor, ...]:
    """In the order in which ``truth`` has their numbers."""
    return groups.tokens_per_expert, groups.expert_offsets, groups.scale_offsets


@dataclass(eq=False)
class Layout:
    """A layout, the counts it was made from if it was, and what it is in plain numbers."""

    groups: mx.GroupLayout
    counts: torch.Tensor | None
    tokens: list[int]

    @property
    def used(self) -> int:
        return sum(self.tokens)


Plain = tuple[truth.Bytes, truth.Bytes]
"""Codes and row-major scales."""


@dataclass(eq=False)
class Tokens:
    """A quantized operand."""

    operand: mx.GroupedMXFP8
    layout: Layout
    plain: Plain


@dataclass(eq=False)
class Weights:
    operand: mx.ExpertWeights
    plain: Plain


def plain(x: torch.Tensor, rounding: str) -> Plain:
    """Codes and row-major scales of x (..., K)."""
    if x.numel() > TRUTH_ELEMENTS:
        codes, scales = reference.quantize(x, rounding)
        return truth.as_bytes(codes), truth.as_bytes(scales)
    k = x.shape[-1]
    codes, scales = truth.quantize(truth.doubles(x).reshape(-1, k), rounding)
    return codes.reshape(x.shape), scales.reshape(*x.shape[:-1], k // 32)


def check_stored(operand: mx.GroupedMXFP8, tokens: Sequence[int], content: Plain, before: Plain) -> None:
    """Each byte of a grouped operand's buffers that held ``before``."""
    rows, cols = operand.scales.shape
    values, stored = truth.grouped_bytes(*content, tokens, rows, 0)
    stored = stored.reshape(rows, cols)
    used, used_scales = sum(tokens), sum(truth.padded(count, 128) for count in tokens)
    values[used:], stored[used_scales:] = before[0][used:], before[1][used_scales:]
    assert np.array_equal(truth.as_bytes(operand.values), values), "values"
    assert np.array_equal(truth.as_bytes(operand.scales), stored), "scales"


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal, a NaN being a NaN."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(bits(a.nan_to_num(7.0)), bits(b.nan_to_num(7.0)))


index = st.integers(0, 2**16)
seeds = st.integers(0, 2**31 - 1)
ways = st.sampled_from(["argument", "argument", "context", "environment", "auto"])
formats = st.sampled_from(POOL.formats)
SPECIAL = ("nan", "inf", "-inf", -0.0, 1e-38, 3e-38, 1e-41, 1e27)
"""What becomes of an element of some blocks, or what others are multiplied by."""
gates = st.sampled_from([mx.SwiGLU(), mx.SwiGLU(), mx.SwiGLU(1.702, 1.0, 7.0), mx.SwiGLU(limit=2.5)])
activations = st.none() | gates
styles = st.sampled_from(["packed", "wide", "shifted", "repeated"])
sizes = st.one_of(
    st.sampled_from([0, 0, 0, 1, 1, 15, 16, 17, 31, 32, 33, 127, 128, 129]), st.integers(0, POOL.max_tokens)
)


class Machine(RuleBasedStateMachine):
    """One life of a process that uses the library."""

    def __init__(self) -> None:
        super().__init__()
        self.experts, self.inner, self.taken = 1, (32,), 0
        self.buffers: deque[Buffer] = deque(maxlen=32)
        self.layouts: list[Layout] = []
        self.tokens: list[Tokens] = []
        self.weights: list[Weights] = []
        self.layers: list[tuple[mx.ExpertWeights, mx.ExpertWeights]] = []  # w13, w2
        self.outs: dict[tuple[Any, ...], torch.Tensor] = {}
        self.workspaces: dict[tuple[Any, ...], mx.MoEWorkspace] = {}  # shared by layers of one shape

    def teardown(self) -> None:
        COUNTS["examples"] += 1

    @initialize(
        experts=st.sampled_from(POOL.experts), inner=st.lists(st.sampled_from(POOL.ks), min_size=1, max_size=2),
        counts=st.lists(sizes, max_size=8), seed=seeds, kind=formats,
    )  # fmt: skip
    def start(
        self, experts: int, inner: list[int], counts: list[int], seed: int, kind: tuple[torch.dtype, str]
    ) -> None:
        """One of each thing that calls need, so that few steps go by before they fit together."""
        self.experts, self.inner = experts, tuple(inner)
        self.make_layout(counts, seed % 3, "", False, False, seed)
        self.quantize(0, 0, "packed", kind, seed, "argument", bool(seed % 2), "layout", False, None, "poisoned")
        self.make_weights(seed, 0, kind, seed, "argument", "packed")
        self.make_layer(seed, seed // 7, seed)

    # ------------------------------------------------------------ helpers

    def empty(self, shape: Sequence[int], dtype: torch.dtype, offset: int = 0) -> torch.Tensor:
        """A poisoned tensor between guards; 0xFF is a NaN in every float dtype here."""
        buffer = Buffer(int(np.prod(shape)) * dtype.itemsize, offset)
        self.buffers.append(buffer)
        return buffer.bytes.view(dtype).view(tuple(shape))

    def placed(self, x: torch.Tensor, offset: int = 0) -> torch.Tensor:
        """A copy between guards."""
        there = self.empty(x.shape, x.dtype, offset)
        if there.numel():
            there.view(torch.uint8).copy_(x.view(torch.uint8))
        return there

    def shifted(self, operand: mx.GroupedMXFP8 | mx.ExpertWeights, what: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of its values and scales, of which one starts a byte off."""
        return self.placed(operand.values, int("values" in what)), self.placed(operand.scales, int("scales" in what))

    def fitting_n(self, n: int, k: int) -> int:
        """One of the pool's with which weights are not too large."""
        fitting = [m for m in POOL.ns if self.experts * m * k <= POOL.weight_elements] or [8]
        return fitting[n % len(fitting)]

    def rows(
        self, rows: int, width: int, dtype: torch.dtype, style: str, seed: int, special: bool = False
    ) -> torch.Tensor:
        """(rows, width) values, strided as ``style`` says among NaNs."""
        rng = torch.Generator().manual_seed(seed)
        x = cases.random_rows(rows, width, dtype, rng, DEVICE)
        for _ in range(1 + rows // 8 if special and x.numel() else 0):
            sizes = rows, width // 32, 32, len(SPECIAL)
            row, block, place, kind = (int(torch.randint(0, size, (), generator=rng)) for size in sizes)
            elements = x[row, 32 * block : 32 * block + 32]
            if isinstance(SPECIAL[kind], str):
                elements[place] = float(SPECIAL[kind])
            else:
                elements *= min(SPECIAL[kind], 100.0 if dtype == torch.float16 else 1e27)
        if style == "repeated" and rows:
            return self.placed(x[:1].contiguous()).expand(rows, width)
        if style in ("wide", "shifted"):
            extra, first = {"wide": (32, 0), "shifted": (33, 7)}[style]
            return self.empty((rows, width + extra), dtype)[:, first : first + width].copy_(x)
        return self.placed(x)

    def done(self, name: str) -> None:
        self.taken += 1
        COUNTS.update([name, "steps"])

    # ------------------------------------------------------------ layouts

    @rule(
        sizes=st.lists(sizes, max_size=48),
        spare=st.sampled_from([0, 0, 1, 50]),
        hostile=st.sampled_from(["", "", "", "negative", "beyond", "wraps"]),
        ends=st.booleans(),
        wide=st.booleans(),
        spread=seeds,
    )
    def make_layout(self, sizes: list[int], spare: int, hostile: str, ends: bool, wide: bool, spread: int) -> None:
        counts = [0] * self.experts
        where = np.random.default_rng(spread).permutation(self.experts)
        for place, size in zip(where.tolist(), sizes, strict=False):
            counts[place] = min(size, POOL.max_tokens - sum(counts))
        num_tokens = sum(counts) + spare
        if hostile == "negative":
            counts[where[0]] = -(2**63) if wide else -(2**31)
        elif hostile == "beyond":
            num_tokens = num_tokens // 2
        elif hostile == "wraps":
            counts[where[0]] = counts[where[-1]] = 2**63 - 1 if wide else 2**31 - 1
        dtype = torch.int64 if wide else torch.int32
        given = np.cumsum(counts, dtype=np.int64).tolist() if ends and hostile != "wraps" else counts
        if ends and not wide:
            given = [max(min(g, 2**31 - 1), -(2**31)) for g in given]
        tensor = self.placed(torch.tensor(given, dtype=dtype, device=DEVICE))
        build = mx.GroupLayout.from_ends if ends else mx.GroupLayout.from_counts
        expected = (truth.layout_from_ends if ends else truth.layout)(given, num_tokens)
        with cases.unlooked():
            made = [build(tensor, num_tokens)]
        if "triton" in BACKENDS and not GPU:  # an interpreter's kernel is not what a CPU's layouts are made by
            made.append(mx.GroupLayout(*kernels.group_offsets(tensor, num_tokens, ends), num_tokens))
        for groups in made:
            assert [t.tolist() for t in tensors(groups)] == list(expected)
            assert groups.scale_rows == grouped_scale_rows(num_tokens, self.experts)
            assert groups.scale_rows >= expected[2][-1]
        self.layouts.append(Layout(made[-1], None if ends else tensor, expected[0]))
        self.done("make_layout")

    # ------------------------------------------------------------ tokens

    @precondition(lambda self: self.layouts)
    @rule(
        layout=index, k=index, style=styles, kind=formats, seed=seeds, way=ways,
        special=st.booleans(),
        form=st.sampled_from(["layout", "counts"]), gather=st.booleans(), swiglu=activations,
        out=st.sampled_from(["new", "poisoned", "unaligned", "reused"]),
    )  # fmt: skip
    def quantize(
        self, layout: int, k: int, style: str, kind: tuple[torch.dtype, str], seed: int, way: str, special: bool,
        form: str, gather: bool, swiglu: mx.SwiGLU | None, out: str,
    ) -> None:  # fmt: skip
        where, k = self.layouts[layout % len(self.layouts)], self.inner[k % len(self.inner)]
        self._quantize(where, k, style, kind, seed, way, special and swiglu is None, form, gather, swiglu, out)
        self.done("quantize")

    def _quantize(
        self, layout: Layout, k: int, style: str, kind: tuple[torch.dtype, str], seed: int, way: str, special: bool,
        form: str, gather: bool, swiglu: mx.SwiGLU | None, out: str, held: Tokens | None = None,
    ) -> None:  # fmt: skip
        t, (dtype, rounding) = layout.groups.num_tokens, kind
        width = k if swiglu is None else 2 * k
        rng = torch.Generator().manual_seed(seed + 1)
        sources = [0, 1, t // 2 + 1, t + 3][seed % 4] if gather else t
        x = self.rows(sources, width, dtype, style, seed, special)
        row_index, sorted_x = None, x
        if gather:
            chosen = torch.randint(-1, sources + 1, (t,), generator=rng, dtype=torch.int32)
            if t > 2:
                chosen[:2] = torch.tensor([2**31 - 1, -(2**31)])
            row_index = self.placed(chosen.to(DEVICE))
            inside = (chosen >= 0) & (chosen < sources)
            rows = x.cpu()[torch.where(inside, chosen, 0)] if sources else torch.zeros(t, width, dtype=dtype)
            sorted_x = torch.where(inside[:, None], rows, 0)
        groups = layout.counts if form == "counts" and layout.counts is not None else layout.groups
        content = plain(sorted_x, rounding) if swiglu is None else None
        x_before = bits(x).clone()

        def run(name: str, into: mx.GroupedMXFP8 | None) -> tuple[mx.GroupedMXFP8, Plain]:
            before = (truth.as_bytes(into.values).copy(), truth.as_bytes(into.scales).copy()) if into else None
            options: dict[str, Any] = {"row_index": row_index, "activation": swiglu, "out": into}
            with asking(way, name) as asked, cases.unlooked():
                got = mx.quantize_grouped(x, groups, scale_rounding=rounding, **options, **asked)
            assert [part.tolist() for part in tensors(got.groups)] == list(truth.layout(layout.tokens, t))
            found = content
            if found is None:
                found = truth.as_bytes(got.values), products.linear_scales(got, layout.tokens)
                if layout.used:
                    trimmed = mx.GroupedMXFP8.unchecked(got.values[: layout.used], got.scales, got.groups)
                    assert swiglu is not None
                    swiglu_truth.check(trimmed, sorted_x[: layout.used], layout.tokens, rounding, 1.0, swiglu)
            if before is None:  # new buffers: what no expert owns may be anything
                before = truth.as_bytes(got.values), truth.as_bytes(got.scales)
            check_stored(got, layout.tokens, found, before)
            for part in ("values", "scales") if into else ():
                assert getattr(got, part).data_ptr() == getattr(into, part).data_ptr()
            assert torch.equal(bits(x), x_before)
            return got, found

        def fresh() -> mx.GroupedMXFP8 | None:
            if out == "new":
                return None
            values = self.empty((t, k), torch.float8_e4m3fn, 1 if out == "unaligned" else 0)
            scales = self.empty((layout.groups.scale_rows, scale_cols(k)), torch.uint8)
            return mx.GroupedMXFP8(values, scales, layout.groups)

        for name in BACKENDS:
            kept = run(name, fresh())
        if out == "reused" or held is not None:
            earlier = [h for h in self.tokens if (h.operand.groups.num_tokens, h.operand.k) == (t, k)]
            held = held or (earlier[seed % len(earlier)] if earlier else None)
            if held is not None:
                self.tokens = [h for h in self.tokens if h.operand.values is not held.operand.values]
                kept = run(BACKENDS[seed % len(BACKENDS)], held.operand)
        operand, found = kept
        where = layout if operand.groups is layout.groups else Layout(operand.groups, None, layout.tokens)
        self.tokens.append(Tokens(operand, where, found))
        del self.tokens[:-6]

    @precondition(lambda self: self.tokens)
    @rule(token=index, seed=seeds, kind=formats, way=ways, swiglu=activations)
    def reroute(self, token: int, seed: int, kind: tuple[torch.dtype, str], way: str, swiglu: mx.SwiGLU | None) -> None:
        """Other counts in the tensors of a layout that earlier calls have used, as a replayed graph
        has them."""
        held = self.tokens[token % len(self.tokens)]
        groups, t = held.operand.groups, held.operand.groups.num_tokens
        rng = np.random.default_rng(seed)
        owners = rng.choice(rng.permutation(self.experts)[: 1 + seed % self.experts], rng.integers(0, t + 1))
        numbers = truth.layout(np.bincount(owners, minlength=self.experts).tolist(), t)
        for tensor, now in zip(tensors(groups), numbers, strict=True):
            tensor.copy_(torch.tensor(now))
        where = next((one for one in self.layouts if one.groups is groups), held.layout)
        where.tokens, where.counts = numbers[0], None
        self.tokens = [h for h in self.tokens if h is held or h.operand.groups is not groups]
        self._quantize(
            where, held.operand.k, "packed", kind, seed, way, swiglu is None, "layout", False, swiglu, "poisoned", held
        )
        self.done("reroute")

    @precondition(lambda self: self.tokens and self.taken % 3 == 0)
    @rule(token=index)
    def dequantize(self, token: int) -> None:
        held = self.tokens[token % len(self.tokens)]
        expected = truth.dequantize(*held.plain)
        expected[held.layout.used :] = 0
        assert np.array_equal(truth.doubles(held.operand.dequantize()), expected, equal_nan=True)
        self.done("dequantize")

    # ------------------------------------------------------------ weights

    @rule(
        n=index, k=index, kind=formats, seed=seeds, way=ways,
        style=st.sampled_from(["packed", "columns", "every other", "transposed", "repeated"]),
    )  # fmt: skip
    def make_weights(self, n: int, k: int, kind: tuple[torch.dtype, str], seed: int, way: str, style: str) -> None:
        k, (dtype, rounding), e = self.inner[k % len(self.inner)], kind, self.experts
        n = self.fitting_n(n, k)
        rng = torch.Generator().manual_seed(seed)
        w = (cases.random_rows(e * n, k, torch.float32, rng, DEVICE).reshape(e, n, k) * 0.05).to(dtype)
        if style == "columns":
            w = self.empty((e, n + 1, k + 33), dtype)[:, :n, 5 : 5 + k].copy_(w)
        elif style == "every other":
            w = self.empty((2 * e, n, k), dtype)[::2].copy_(w)
        elif style == "transposed":
            w = self.placed(w.transpose(0, 1).contiguous()).transpose(0, 1)
        elif style == "repeated":
            w = self.placed(w[:1].contiguous()).expand(e, n, k)
        codes, scales = plain(w, rounding)
        stored = np.stack([truth.swizzle(one) for one in scales]).reshape(e, -1)
        for name in BACKENDS:
            with asking(way, name) as asked:
                wq = mx.quantize_weights(w, scale_rounding=rounding, **asked)
            assert np.array_equal(truth.as_bytes(wq.values), codes), name
            assert np.array_equal(truth.as_bytes(wq.scales).reshape(e, -1), stored), name
        self.weights.append(Weights(wq, (codes, scales)))
        del self.weights[:-6]
        self.done("make_weights")

    @rule(n=index, k=index, seed=seeds, layout=index)
    def operands_of_any_bytes(self, n: int, k: int, seed: int, layout: int) -> None:
        """Codes and scales that no quantizer need be able to make, scales at the ends of E8M0 among
        them."""
        k, e = self.inner[k % len(self.inner)], self.experts
        n = self.fitting_n(n, k)
        where = self.layouts[layout % len(self.layouts)]
        rng = np.random.default_rng(seed)
        # No product may leave fp32, which would make the order of additions matter; a quantized
        # operand has up to 3e29.
        scale_bytes = np.array([0, 1, 2, *range(100, 136)], np.uint8)

        def draw(*shape: int) -> Plain:
            codes = rng.integers(0, 256, (*shape, k), dtype=np.uint8)
            codes[(codes & 0x7F) == 0x7F] = 0x80
            scales = rng.choice(scale_bytes, (*shape, k // 32))
            if codes.size and seed % 2:
                codes.reshape(-1)[rng.integers(0, codes.size)] = 0xFF
                scales.reshape(-1)[rng.integers(0, scales.size)] = 255
            return codes, scales

        x, w = draw(where.groups.num_tokens), draw(e, n)
        values, stored = truth.grouped_bytes(*x, where.tokens, where.groups.scale_rows, cases.POISON)
        xq = mx.GroupedMXFP8(
            self.placed(torch.from_numpy(values).to(DEVICE)).view(torch.float8_e4m3fn),
            self.placed(torch.from_numpy(stored).to(DEVICE)).view(where.groups.scale_rows, scale_cols(k)),
            where.groups,
        )
        wq = mx.ExpertWeights.from_linear_scales(torch.from_numpy(w[0]).to(DEVICE), torch.from_numpy(w[1]).to(DEVICE))
        self.tokens = [*self.tokens[-5:], Tokens(xq, where, x)]
        self.weights = [*self.weights[-5:], Weights(wq, w)]
        self.done("operands_of_any_bytes")

    # ------------------------------------------------------------ products

    def pairs(self) -> list[tuple[Tokens, Weights]]:
        """Operands that fit together."""
        return [(x, w) for x in self.tokens for w in self.weights if x.operand.k == w.operand.k]

    @precondition(lambda self: self.pairs())
    @rule(
        pair=index, dtype=st.sampled_from(cases.DTYPES), way=ways, again=st.booleans(),
        out=st.sampled_from(["new", "poisoned", "reused"]), workspace=st.sampled_from(["none", "exact", "larger"]),
        shift=st.sampled_from(["", "", "", "x values", "x scales", "w values", "w scales"]),
    )  # fmt: skip
    def multiply(
        self, pair: int, dtype: torch.dtype, way: str, again: bool, out: str, workspace: str, shift: str
    ) -> None:
        pairs = self.pairs()
        x, w = pairs[pair % len(pairs)]
        t, n = x.operand.groups.num_tokens, w.operand.n
        xq, wq = x.operand, w.operand
        if shift.startswith("x"):
            xq = mx.GroupedMXFP8(*self.shifted(xq, shift), xq.groups)
        elif shift:
            wq = mx.ExpertWeights(*self.shifted(wq, shift))
        for name in BACKENDS:
            into = None if out == "new" else self.empty((t, n), dtype)
            if out == "reused":
                into = self.outs.setdefault((t, n, dtype), into)
            before = None if into is None else into.clone()
            with asking(way, name) as asked:
                try:
                    why = mx.explain(xq, wq, out_dtype=dtype, **asked)
                except mx.BackendUnavailableError:
                    assert name == "cutlass"
                    continue
                assert why.startswith(f"{name}, asked for") or (way, name) == ("auto", AUTOMATIC), why
                size = mx.grouped_gemm_workspace_size(wq, t, out_dtype=dtype, **asked)
                memory = None
                if workspace != "none":
                    memory = self.empty((size + (256 if workspace == "larger" else 0),), torch.uint8)
                y = mx.grouped_gemm(xq, wq, out_dtype=dtype, out=into, workspace=memory, **asked)
                twice = mx.grouped_gemm(xq, wq, out_dtype=dtype, **asked) if again else None
            assert (y.shape, y.dtype) == ((t, n), dtype)
            used = x.layout.used
            half = HALF and name != "reference"
            tolerances.check_gemm(y, x.plain, w.plain, x.layout.tokens, bf16_formulation=half)
            if before is not None:
                assert into is not None
                assert y.data_ptr() == into.data_ptr()
                assert torch.equal(bits(y[used:]), bits(before[used:]))
            if twice is not None:
                assert torch.equal(bits(twice[:used]), bits(y[:used]))
        self.done("multiply")

    # ------------------------------------------------------------ the MoE layer

    @precondition(lambda self: self.taken % 5 == 3)
    @rule(hidden=index, intermediate=index, seed=seeds)
    def make_layer(self, hidden: int, intermediate: int, seed: int) -> None:
        e = self.experts
        fitting = [(h, i) for h in POOL.ks for i in POOL.ks if 2 * e * h * i <= 2 * POOL.weight_elements] or [(32, 32)]
        h, i = fitting[(hidden * 31 + intermediate) % len(fitting)]
        rng = torch.Generator().manual_seed(seed)
        plain = (torch.randn(e, n, k, generator=rng).to(DEVICE) * k**-0.5 for n, k in ((2 * i, h), (h, i)))
        w13, w2 = (mx.quantize_weights(w, backend="reference") for w in plain)
        self.layers.append((w13, w2))
        del self.layers[:-2]
        self.done("make_layer")

    @precondition(lambda self: self.layers)
    @rule(
        which=index, batch=st.sampled_from(POOL.batches), top_k=st.integers(1, 3), seed=seeds, way=ways,
        dtype=st.sampled_from(cases.DTYPES), weights_dtype=st.sampled_from([torch.float32, torch.bfloat16]),
        ids=st.sampled_from(["any", "sentinels", "dropped", "one"]), wide=st.booleans(), style=styles,
        biases=st.sampled_from(["", "", "w13", "w2", "both"]), workspace=st.booleans(), nan=st.booleans(), gate=gates,
        out=st.sampled_from(["new", "poisoned", "strided", "reused", "in place"]),
    )  # fmt: skip
    def forward(
        self, which: int, batch: int, top_k: int, seed: int, way: str, dtype: torch.dtype, weights_dtype: torch.dtype,
        ids: str, wide: bool, style: str, biases: str, workspace: bool, nan: bool, gate: mx.SwiGLU, out: str,
    ) -> None:  # fmt: skip
        (w13, w2), e = self.layers[which % len(self.layers)], self.experts
        hidden, intermediate = w2.n, w2.k
        rng = torch.Generator().manual_seed(seed)
        x = self.rows(batch, hidden, dtype, style, seed, nan)
        chosen = torch.randint(0, e, (top_k, batch), generator=rng)
        if ids == "sentinels":
            odd = torch.tensor([-1, e, e + 3, -(2**40) if wide else -(2**31), 2**40 if wide else 2**31 - 1])
            odd = odd[torch.randint(0, 5, chosen.shape, generator=rng)]
            chosen = torch.where(torch.rand(chosen.shape, generator=rng) < 0.4, odd, chosen)
        elif ids != "any":
            chosen.fill_(-1 if ids == "dropped" else e - 1)
        topk_ids = chosen.to(DEVICE, torch.int64 if wide else torch.int32).T  # not contiguous
        weights = torch.randn(batch, top_k, generator=rng).to(DEVICE, weights_dtype)
        sides = {"w13_bias": (2 * intermediate, ("w13", "both")), "w2_bias": (hidden, ("w2", "both"))}
        bias = {
            name: self.placed(torch.randn(e, n, generator=rng).to(DEVICE, dtype))
            for name, (n, when) in sides.items()
            if biases in when
        }
        for name in BACKENDS:
            memory = None
            if workspace:
                key = (hidden, intermediate, top_k, dtype)
                if key not in self.workspaces:
                    sizes = {"max_tokens": max(POOL.batches), "top_k": top_k}
                    self.workspaces[key] = mx.MoEWorkspace(w13, w2, **sizes, dtype=dtype, backend=name)
                memory = self.workspaces[key]
            given = x
            into = None if out == "new" else self.empty((batch, hidden + 32 * (out == "strided")), dtype)[:, :hidden]
            if out == "reused":
                into = self.outs.setdefault((batch, hidden, dtype, "moe"), into)
            elif out == "in place":
                given = into = self.placed(x.contiguous())
            options: dict[str, Any] = {"activation": gate, "workspace": memory, "out": into, **bias}
            with asking(way, name) as asked:
                y = mx.moe_forward(given, w13, w2, topk_ids, weights, **options, **asked)
            layer = moe_truth.Layer(x, x, x, topk_ids, weights, **bias)
            expected = moe_truth.forward_in_steps(layer, w13, w2, name, gate)
            assert same_bits(y, expected), name
            if into is not None:
                assert y.data_ptr() == into.data_ptr()
            if ids == "dropped":
                assert not bool(y.any())
        self.done("forward")

    # ------------------------------------------------------------ always

    @invariant()
    def guards_are_intact(self) -> None:
        for buffer in self.buffers:
            assert buffer.intact()
