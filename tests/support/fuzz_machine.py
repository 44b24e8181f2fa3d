"""The library under a random sequence of calls: a state machine that holds what earlier calls made
and feeds it to later ones.

State: layouts, quantized tokens and weights, MoE layers with their workspaces, outputs to be
written again. Each rule makes one public call on every backend that can run here, and compares:

- bytes of a quantizer: equal to those of ``truth``, padding zero, what no expert owns as it was
  before;
- a product: within the bounds of ``tolerances`` of float64, what no expert owns as it was before;
- a whole MoE layer: the bits of the same steps as separate calls.

Every buffer that a call may write stands between guard bytes, which are looked at after each rule.
It runs on a GPU if there is one, else on the CPU, kernels interpreted. Shapes come from modest
pools, so that a GPU compiles a bounded set of kernels. What a single call shows is in other tests:
NaN, counts that are none, operands of any bytes and any address, how a backend is asked for.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cases
import moe_truth
import numpy as np
import products
import swiglu_truth
import tolerances
import torch
import truth
from cases import bits
from guards import GUARD, Guards
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from products import Plain

import hybrid_mxfp8 as mx
from hybrid_mxfp8 import env
from hybrid_mxfp8.core.formats import next_power_of_2, scale_cols

GPU = torch.cuda.is_available() and not env.triton_interpret()
DEVICE = torch.device("cuda", 0) if GPU else torch.device("cpu")
BACKENDS = [name for name, (available, _) in mx.backends(DEVICE).items() if available]
HALF = GPU and torch.cuda.get_device_capability() < (10, 0)
"""Whether the Triton backend's operands pass through bf16."""


@dataclass(frozen=True)
class Pool:
    """What shapes and options are drawn from; few, so that a GPU's kernels are soon compiled."""

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
COUNTS: Counter[str] = Counter()
"""Rules run to their end, by name, and examples."""


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


@dataclass(eq=False)
class Tokens:
    """A quantized operand."""

    operand: mx.GroupedMXFP8
    layout: Layout
    plain: Plain


def plain(x: torch.Tensor, rounding: str) -> Plain:
    """Codes and row-major scales of x (..., K)."""
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


index = st.integers(0, 2**16)
seeds = st.integers(0, 2**31 - 1)
formats = st.sampled_from(POOL.formats)
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
        self.buffers: deque[Guards] = deque(maxlen=32)
        self.layouts: list[Layout] = []
        self.tokens: list[Tokens] = []
        self.weights: list[tuple[mx.ExpertWeights, Plain]] = []
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
        self.make_layout(counts, seed % 3, False, False, seed)
        self.quantize(0, 0, "packed", kind, seed, "layout", False, None, "poisoned")
        self.make_weights(seed, 0, kind, seed, "packed")
        self.make_layer(seed, seed // 7, seed)

    # ------------------------------------------------------------ helpers

    def empty(self, shape: Sequence[int], dtype: torch.dtype, offset: int = 0) -> torch.Tensor:
        """A poisoned tensor between guards; 0xFF is a NaN in every float dtype here."""
        size = int(np.prod(shape)) * dtype.itemsize
        guards = Guards(str(DEVICE), next_power_of_2(size + 2 * GUARD + 512))
        memory = guards.raw(size, offset).fill_(cases.POISON)
        guards.ready()
        self.buffers.append(guards)
        return memory.view(dtype).view(tuple(shape))

    def placed(self, x: torch.Tensor) -> torch.Tensor:
        """A copy between guards."""
        there = self.empty(x.shape, x.dtype)
        if there.numel():
            there.view(torch.uint8).copy_(x.view(torch.uint8))
        return there

    def rows(self, rows: int, width: int, dtype: torch.dtype, style: str, seed: int) -> torch.Tensor:
        """(rows, width) values, strided as ``style`` says among NaNs."""
        x = cases.random_rows(rows, width, dtype, torch.Generator().manual_seed(seed), DEVICE)
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
        sizes=st.lists(sizes, max_size=48), spare=st.sampled_from([0, 0, 1, 50]),
        ends=st.booleans(), wide=st.booleans(), spread=seeds,
    )  # fmt: skip
    def make_layout(self, sizes: list[int], spare: int, ends: bool, wide: bool, spread: int) -> None:
        counts = [0] * self.experts
        where = np.random.default_rng(spread).permutation(self.experts)
        for place, size in zip(where.tolist(), sizes, strict=False):
            counts[place] = min(size, POOL.max_tokens - sum(counts))
        num_tokens = sum(counts) + spare
        given = np.cumsum(counts).tolist() if ends else counts
        tensor = self.placed(torch.tensor(given, dtype=torch.int64 if wide else torch.int32, device=DEVICE))
        groups = (mx.GroupLayout.from_ends if ends else mx.GroupLayout.from_counts)(tensor, num_tokens)
        assert [t.tolist() for t in tensors(groups)] == list(truth.layout(counts, num_tokens))
        self.layouts.append(Layout(groups, None if ends else tensor, counts))
        self.done("make_layout")

    # ------------------------------------------------------------ tokens

    @precondition(lambda self: self.layouts)
    @rule(
        layout=index, k=index, style=styles, kind=formats, seed=seeds,
        form=st.sampled_from(["layout", "counts"]), gather=st.booleans(), swiglu=activations,
        out=st.sampled_from(["new", "poisoned", "unaligned", "reused"]),
    )  # fmt: skip
    def quantize(
        self, layout: int, k: int, style: str, kind: tuple[torch.dtype, str], seed: int, form: str, gather: bool,
        swiglu: mx.SwiGLU | None, out: str,
    ) -> None:  # fmt: skip
        where, k = self.layouts[layout % len(self.layouts)], self.inner[k % len(self.inner)]
        self._quantize(where, k, style, kind, seed, form, gather, swiglu, out)
        self.done("quantize")

    def _quantize(
        self, layout: Layout, k: int, style: str, kind: tuple[torch.dtype, str], seed: int, form: str, gather: bool,
        swiglu: mx.SwiGLU | None, out: str, held: Tokens | None = None,
    ) -> None:  # fmt: skip
        t, (dtype, rounding) = layout.groups.num_tokens, kind
        width = k if swiglu is None else 2 * k
        rng = torch.Generator().manual_seed(seed + 1)
        sources = [0, 1, t // 2 + 1, t + 3][seed % 4] if gather else t
        x = self.rows(sources, width, dtype, style, seed)
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
            got = mx.quantize_grouped(x, groups, scale_rounding=rounding, **options, backend=name)
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
    @rule(token=index, seed=seeds, kind=formats, swiglu=activations)
    def reroute(self, token: int, seed: int, kind: tuple[torch.dtype, str], swiglu: mx.SwiGLU | None) -> None:
        """Other counts in the tensors of a layout that was used, as a replayed graph has them."""
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
        self._quantize(where, held.operand.k, "packed", kind, seed, "layout", False, swiglu, "poisoned", held)
        self.done("reroute")

    # ------------------------------------------------------------ weights

    @rule(
        n=index, k=index, kind=formats, seed=seeds,
        style=st.sampled_from(["packed", "columns", "every other", "transposed", "repeated"]),
    )  # fmt: skip
    def make_weights(self, n: int, k: int, kind: tuple[torch.dtype, str], seed: int, style: str) -> None:
        k, (dtype, rounding), e = self.inner[k % len(self.inner)], kind, self.experts
        fitting = [m for m in POOL.ns if e * m * k <= POOL.weight_elements] or [8]
        n = fitting[n % len(fitting)]
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
            wq = mx.quantize_weights(w, scale_rounding=rounding, backend=name)
            assert np.array_equal(truth.as_bytes(wq.values), codes), name
            assert np.array_equal(truth.as_bytes(wq.scales).reshape(e, -1), stored), name
        self.weights.append((wq, (codes, scales)))
        del self.weights[:-6]
        self.done("make_weights")

    # ------------------------------------------------------------ products

    def pairs(self) -> list[tuple[Tokens, mx.ExpertWeights, Plain]]:
        """Operands that fit together."""
        return [(x, w, plain) for x in self.tokens for w, plain in self.weights if x.operand.k == w.k]

    @precondition(lambda self: self.pairs())
    @rule(
        pair=index, dtype=st.sampled_from(cases.DTYPES), workspace=st.booleans(),
        out=st.sampled_from(["new", "poisoned", "reused"]),
    )  # fmt: skip
    def multiply(self, pair: int, dtype: torch.dtype, workspace: bool, out: str) -> None:
        pairs = self.pairs()
        x, w, plain_w = pairs[pair % len(pairs)]
        t, n, used = x.operand.groups.num_tokens, w.n, x.layout.used
        for name in BACKENDS:
            into = None if out == "new" else self.empty((t, n), dtype)
            if out == "reused":
                into = self.outs.setdefault((t, n, dtype), into)
            before = None if into is None else into.clone()
            options: dict[str, Any] = {"out_dtype": dtype, "backend": name}
            try:
                size = mx.grouped_gemm_workspace_size(w, t, **options)
            except mx.BackendUnavailableError:
                assert name == "cutlass"
                continue
            memory = self.empty((size,), torch.uint8) if workspace else None
            y = mx.grouped_gemm(x.operand, w, out=into, workspace=memory, **options)
            assert (y.shape, y.dtype) == ((t, n), dtype)
            half = HALF and name != "reference"
            tolerances.check_gemm(y, x.plain, plain_w, x.layout.tokens, bf16_formulation=half)
            if into is not None and before is not None:
                assert y.data_ptr() == into.data_ptr()
                assert torch.equal(bits(y[used:]), bits(before[used:]))
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
        which=index, batch=st.sampled_from(POOL.batches), top_k=st.integers(1, 3), seed=seeds,
        dtype=st.sampled_from(cases.DTYPES), weights_dtype=st.sampled_from([torch.float32, torch.bfloat16]),
        sentinels=st.booleans(), wide=st.booleans(), style=styles, biases=st.booleans(), workspace=st.booleans(),
        gate=gates, out=st.sampled_from(["new", "poisoned", "strided", "reused", "in place"]),
    )  # fmt: skip
    def forward(
        self, which: int, batch: int, top_k: int, seed: int, dtype: torch.dtype, weights_dtype: torch.dtype,
        sentinels: bool, wide: bool, style: str, biases: bool, workspace: bool, gate: mx.SwiGLU, out: str,
    ) -> None:  # fmt: skip
        (w13, w2), e = self.layers[which % len(self.layers)], self.experts
        hidden, intermediate = w2.n, w2.k
        rng = torch.Generator().manual_seed(seed)
        x = self.rows(batch, hidden, dtype, style, seed)
        chosen = torch.randint(0, e, (top_k, batch), generator=rng)
        if sentinels:
            odd = torch.tensor([-1, e, e + 3, -(2**40) if wide else -(2**31), 2**40 if wide else 2**31 - 1])
            odd = odd[torch.randint(0, 5, chosen.shape, generator=rng)]
            chosen = torch.where(torch.rand(chosen.shape, generator=rng) < 0.4, odd, chosen)
        topk_ids = chosen.to(DEVICE, torch.int64 if wide else torch.int32).T  # not contiguous
        weights = torch.randn(batch, top_k, generator=rng).to(DEVICE, weights_dtype)
        bias = {
            name: self.placed(torch.randn(e, n, generator=rng).to(DEVICE, dtype))
            for name, n in (("w13_bias", 2 * intermediate), ("w2_bias", hidden))
            if biases
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
            y = mx.moe_forward(given, w13, w2, topk_ids, weights, **options, backend=name)
            layer = moe_truth.Layer(x, x, x, topk_ids, weights, **bias)
            expected = moe_truth.forward_in_steps(layer, w13, w2, name, gate)
            assert torch.equal(y, expected), name
            if into is not None:
                assert y.data_ptr() == into.data_ptr()
        self.done("forward")

    # ------------------------------------------------------------ always

    @invariant()
    def guards_are_intact(self) -> None:
        for guards in self.buffers:
            guards.check()
