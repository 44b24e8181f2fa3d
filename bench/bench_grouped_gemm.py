"""The contenders of a GEMM case: this library's backends, torch's bf16 ``_grouped_mm`` as the
baseline, and peers.

Operands have groups of 32, on Hopper those of 128, layers' default there, too. Inputs are random
normal, the weights made on the GPU and kept while cases of the same shape follow.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

import hybrid_mxfp8 as mx
from hybrid_mxfp8.core.formats import BLOCK_SIZE, grouped_scale_rows, padded_scale_rows, scale_cols
from hybrid_mxfp8.dispatch.device import preferred_scale_group
from hybrid_mxfp8.ops.experts import group_into_squares_

from . import work
from .bench_quantize import Prepared, counts_of_set, layouts
from .deep_gemm import deep_gemm
from .peers import Absent, Contender, Field, GemmInputs, bf16_grouped_mm, check_product, gemm_peers
from .shapes import Case
from .timing import num_sets

BACKENDS = ("cutlass", "triton")

T = TypeVar("T")


@dataclass(frozen=True)
class Weights:
    """Sets of expert weights: w (E, N, K) bf16, and the same quantized."""

    w: Sequence[torch.Tensor]
    wq: Sequence[mx.ExpertWeights]


class Kept(Generic[T]):
    """Holds the last value that was made: consecutive cases often share it."""

    def __init__(self) -> None:
        self._key: tuple[int, ...] | None = None
        self._value: T | None = None

    def get(self, key: tuple[int, ...], make: Callable[[], T]) -> T:
        """The value of this key; another one is freed before it is made."""
        if self._key != key or self._value is None:
            self.clear()
            if torch.cuda.is_available():
                # Cached blocks of other sizes would leave no room for these.
                torch.cuda.empty_cache()
            self._value, self._key = make(), key
        return self._value

    def clear(self) -> None:
        """Free it."""
        self._key = self._value = None


def make_weights(num_experts: int, n: int, k: int, sets: int, device: str) -> Weights:
    """Random normal ones."""
    w = [torch.empty(num_experts, n, k, dtype=torch.bfloat16, device=device).normal_() for _ in range(sets)]
    return Weights(w, [mx.quantize_weights(each) for each in w])


def weight_bytes(num_experts: int, n: int, k: int) -> int:
    """One set of weights, quantized."""
    return num_experts * (n * k + padded_scale_rows(n) * scale_cols(k))


def token_bytes(case: Case) -> int:
    """One set of tokens in bf16, quantized in groups of 32 and 128 and again for DeepGEMM, and its
    outputs."""
    scales = grouped_scale_rows(case.num_tokens, case.num_experts) * scale_cols(case.k)
    return case.num_tokens * (case.k * (work.BF16 + 3) + 2 * case.n * work.BF16) + 2 * scales


def plan_sets(case: Case, l2_bytes: int) -> tuple[int, int]:
    """(sets of tokens, sets of weights).

    Sets differ in which experts have tokens, so even where few experts are active, few sets leave
    the L2 cache behind; weights that fit in it entirely are rotated too.
    """
    job = work.gemm(counts_of_set(case, 0), case.n, case.k)
    sets = max(num_sets(job.bytes, l2_bytes), 2)
    sets = min(sets, max(2, int(8e9 // max(token_bytes(case), 1))))
    return sets, min(sets, num_sets(weight_bytes(case.num_experts, case.n, case.k), l2_bytes))


def our_gemm(inputs: GemmInputs, backend: str, counts: Sequence[torch.Tensor] | None = None) -> Callable[[int], object]:
    """A call of ``grouped_gemm`` with everything given that it could allocate, after one of
    ``quantize_grouped`` if there are ``counts`` (E,) for its layout."""
    size = mx.grouped_gemm_workspace_size(inputs.wq[0], inputs.x[0].shape[0], backend=backend)
    workspace = torch.empty(size, dtype=torch.uint8, device=inputs.x[0].device) if size else None

    def call(i: int) -> object:
        xq = inputs.xq[i]
        if counts is not None:
            xq = mx.quantize_grouped(inputs.x[i], counts[i], scale_group=xq.scale_group, out=xq)
        return mx.grouped_gemm(xq, inputs.wq[i % len(inputs.wq)], out=inputs.y[i], workspace=workspace, backend=backend)

    return call


def our_contenders(inputs: GemmInputs, counts: Sequence[torch.Tensor], backend: str) -> list[Contender]:
    """The product alone, and with the layout and the quantization of its tokens before it."""
    x, w = inputs.xq[0], inputs.wq[0]
    _, n, k = w.values.shape
    plain = x.scale_group == BLOCK_SIZE
    alone = Contender(
        f"grouped_gemm ({backend})" + ("" if plain else f", groups of {x.scale_group}"),
        our_gemm(inputs, backend),
        work.gemm(inputs.counts, n, k),
        ours=True,
        precision="mxfp8" if plain else "fp8",
        note=mx.explain(x, w, backend=backend).partition(": ")[2],
        check=check_product(inputs.x[0], inputs.w[0], inputs.counts, lambda: inputs.y[0]),
    )
    both = work.quantize(inputs.counts, k) + alone.work
    name = f"quantize of counts + {alone.name}"
    return [alone, dataclasses.replace(alone, name=name, call=our_gemm(inputs, backend, counts), work=both)]


def usable_backends(device: torch.device) -> tuple[list[str], list[Absent]]:
    """This library's GPU backends that can run here, and those that can't."""
    answers = mx.backends(device)
    usable = [name for name in BACKENDS if answers[name][0]]
    return usable, [Absent(f"grouped_gemm ({name})", answers[name][1]) for name in BACKENDS if name not in usable]


def make_inputs(case: Case, store: Kept[Weights], l2_bytes: int, device: str) -> tuple[GemmInputs, list[torch.Tensor]]:
    """All sets of a case, and the (E,) counts tensors that their layouts came from."""
    sets, weight_sets = plan_sets(case, l2_bytes)
    counts, groups = layouts(case, sets, device)
    shape = (case.num_experts, case.n, case.k, weight_sets)
    weights = store.get(shape, lambda: make_weights(*shape, device))
    x = list(torch.empty(sets, case.num_tokens, case.k, dtype=torch.bfloat16, device=device).normal_())
    inputs = GemmInputs(
        x=x,
        xq=[mx.quantize_grouped(x[i], groups[i]) for i in range(sets)],
        w=weights.w,
        wq=weights.wq,
        ends=[g.expert_offsets[1:].clone() for g in groups],
        y=[torch.empty(case.num_tokens, case.n, dtype=torch.bfloat16, device=device) for _ in range(sets)],
        counts=counts_of_set(case, 0),
    )
    return inputs, counts


def in_groups(inputs: GemmInputs, group: int) -> GemmInputs:
    """The same case, its operands with ``group`` elements to a scale; of 128 weights in squares."""
    wq = [group_into_squares_(mx.quantize_weights(w, scale_group=group)) for w in inputs.w]
    xq = [mx.quantize_grouped(x, q.groups, scale_group=group) for x, q in zip(inputs.x, inputs.xq, strict=True)]
    return dataclasses.replace(inputs, xq=xq, wq=wq)


def prepare(
    case: Case, capability: tuple[int, int], l2_bytes: int, store: Kept[Weights], device: str = "cuda"
) -> Prepared:
    """Inputs and contenders; the weights stay in ``store``."""
    inputs, counts = make_inputs(case, store, l2_bytes, device)
    usable, absent = usable_backends(inputs.x[0].device)
    group = preferred_scale_group(inputs.x[0].device)
    field: Field = []
    for operands in (inputs, in_groups(inputs, group)) if group != BLOCK_SIZE else (inputs,):
        for backend in usable:
            field += our_contenders(operands, counts, backend)
    baseline = bf16_grouped_mm(inputs)
    field += [baseline, *gemm_peers(inputs, capability), deep_gemm(inputs, capability), *absent]
    return Prepared(case, field, baseline.name, len(inputs.x), work.gemm(inputs.counts, case.n, case.k))
