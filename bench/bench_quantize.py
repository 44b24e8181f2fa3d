"""The contenders of a quantize case. ``baseline`` is what the ratio column refers to.

| variant | ours | baseline | also |
| --- | --- | --- | --- |
| plain | quantize_grouped | a bf16 copy of the same bytes | other quantizers; operands in L2 |
| counts | quantize_grouped of counts | quantize_grouped alone | from_counts, then the same |
| gather | quantize_grouped(row_index=) | index_select, then the same | rows in place |
| swiglu | quantize_grouped(activation="swiglu") | silu_mul, then quantize_grouped | |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

import hybrid_mxfp8 as mx
from hybrid_mxfp8 import reference
from hybrid_mxfp8.core.formats import grouped_scale_rows, scale_cols
from hybrid_mxfp8.core.scales import dequantize

from . import work
from .peers import Contender, Field, QuantizeInputs, bf16_copy, quantize_peers
from .shapes import Case, tokens_per_expert
from .timing import num_sets
from .work import Work

CHECKED_ROWS = 256
SEED = 20240613
WARM_SHARE = 0.75
"""Of the L2 cache: a job whose bytes fit in it is also measured with its operands there."""

OURS = "quantize_grouped"
FROM_COUNTS = "quantize_grouped of counts"
LAYOUT_FIRST = "GroupLayout.from_counts, then quantize_grouped"
WARM = "quantize_grouped, operands in L2"
ALONE = "quantize_grouped alone"
GATHER = "quantize_grouped with row_index"
SWIGLU = "quantize_grouped with swiglu"


@dataclass(frozen=True)
class Prepared:
    """A case ready to be timed, with its contenders, the baseline's name, sets and our job."""

    case: Case
    field: Field
    baseline: str
    sets: int
    job: Work


def counts_of_set(case: Case, index: int) -> list[int]:
    """(E,) counts of input set ``index``: the same sizes for every set, at other experts."""
    return tokens_per_expert(case.distribution, case.num_tokens, case.num_experts, SEED + index)


def set_bytes(case: Case) -> int:
    """Bytes of one input set and its output, allocated."""
    width = 2 if case.variant == "swiglu" else 1
    scales = grouped_scale_rows(case.num_tokens, case.num_experts) * scale_cols(case.k)
    return case.num_tokens * case.k * (work.BF16 * width + 1) + scales


def output(groups: mx.GroupLayout, k: int) -> mx.GroupedMXFP8:
    """Buffers for ``out=``."""
    return mx.GroupedMXFP8(
        torch.empty(groups.num_tokens, k, dtype=torch.float8_e4m3fn, device=groups.device),
        torch.empty(groups.scale_rows, scale_cols(k), dtype=torch.uint8, device=groups.device),
        groups,
    )


def layouts(case: Case, sets: int, device: str) -> tuple[list[torch.Tensor], list[mx.GroupLayout]]:
    """Counts (E,) int32 and layout of every set."""
    counts = [torch.tensor(counts_of_set(case, i), dtype=torch.int32, device=device) for i in range(sets)]
    return counts, [mx.GroupLayout.from_counts(c, case.num_tokens) for c in counts]


def sampled_rows(out: mx.GroupedMXFP8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Some row numbers (R,), and what ``out`` holds there: codes (R, K), row-major scales."""
    tokens = out.values.shape[0]
    rows = torch.linspace(0, tokens - 1, min(tokens, CHECKED_ROWS), device=out.values.device).long()
    return rows, out.values[rows], out.linear_scales()[rows]


def check_rows(expected: Callable[[torch.Tensor], torch.Tensor], out: mx.GroupedMXFP8) -> Callable[[], str]:
    """A check that sampled rows of ``out`` hold the bytes that the PyTorch reference gives.

    Args:
        expected: row numbers (R,) to the rows (R, K) that were to be quantized.
        out: what the kernel wrote.
    """

    def check() -> str:
        rows, values, scales = sampled_rows(out)
        codes, linear = reference.quantize(expected(rows), "rceil")
        wrong = int((codes.view(torch.uint8) != values.view(torch.uint8)).sum()) + int((linear != scales).sum())
        if wrong:
            raise AssertionError(f"{wrong} bytes of {len(rows)} sampled rows differ from the reference")
        return f"{len(rows)} sampled rows equal the reference bitwise"

    return check


def check_swiglu(x: torch.Tensor, out: mx.GroupedMXFP8) -> Callable[[], str]:
    """A check by signal-to-noise: exp, and so bytes, may differ from PyTorch's."""

    def check() -> str:
        rows, values, scales = sampled_rows(out)
        decibels = mx.signal_to_noise_db(reference.swiglu(x[rows]), dequantize(values, scales))
        if decibels < 25.0:
            raise AssertionError(f"signal-to-noise is {decibels:.1f} dB, expected the format's 30 or so")
        return f"{decibels:.1f} dB against fp32"

    return check


def prepare(case: Case, capability: tuple[int, int], l2_bytes: int, device: str = "cuda") -> Prepared:
    """Inputs on the GPU, random normal, and the contenders."""
    sets = num_sets(set_bytes(case), l2_bytes)
    counts, groups = layouts(case, sets, device)
    width = case.k * (2 if case.variant == "swiglu" else 1)
    x = torch.empty(sets, case.num_tokens, width, dtype=torch.bfloat16, device=device).normal_()
    inputs = QuantizeInputs(list(x), groups, [output(g, case.k) for g in groups], counts, counts_of_set(case, 0))
    job = work.quantize(inputs.host_counts, case.k)
    if case.variant == "plain":
        field, baseline = _plain(inputs, job, capability, l2_bytes)
    else:
        field, baseline = {"counts": _counts, "gather": _gather, "swiglu": _swiglu}[case.variant](inputs, job)
    return Prepared(case, field, baseline, sets, job)


def _alone(inputs: QuantizeInputs, job: Work, name: str, note: str = "") -> Contender:
    """The plain job."""
    x, groups, out = inputs.x, inputs.groups, inputs.out
    check = check_rows(lambda rows: x[0][rows], out[0])
    call = lambda i: mx.quantize_grouped(x[i], groups[i], out=out[i])  # noqa: E731
    return Contender(name, call, job, ours=True, note=note, check=check)


def _plain(inputs: QuantizeInputs, job: Work, capability: tuple[int, int], l2_bytes: int) -> tuple[Field, str]:
    copy = bf16_copy(job.bytes, len(inputs.x), inputs.x[0].device)
    ours = _alone(inputs, job, OURS)
    field: Field = [ours]
    if job.bytes <= WARM_SHARE * l2_bytes:
        note = "one input set over and over: what a layer finds that the kernel before it left in L2"
        field.append(Contender(WARM, lambda i: ours.call(0), job, ours=True, warm=True, note=note))
    return [*field, copy, *quantize_peers(inputs, capability)], copy.name


def _counts(inputs: QuantizeInputs, job: Work) -> tuple[Field, str]:
    x, counts, out = inputs.x, inputs.counts, inputs.out

    def layout_first(i: int) -> object:
        return mx.quantize_grouped(x[i], mx.GroupLayout.from_counts(counts[i], x[i].shape[0]), out=out[i])

    alone = _alone(inputs, job, ALONE)
    calls = {FROM_COUNTS: lambda i: mx.quantize_grouped(x[i], counts[i], out=out[i]), LAYOUT_FIRST: layout_first}
    ours = [Contender(name, call, job, ours=True, check=alone.check) for name, call in calls.items()]
    return [*ours, alone], alone.name


def _gather(inputs: QuantizeInputs, job: Work) -> tuple[Field, str]:
    """The gather reads a random permutation: every row is read once, as in the plain job."""
    x, groups, out = inputs.x, inputs.groups, inputs.out
    (tokens, k), device = x[0].shape, x[0].device
    generator = torch.Generator(device=device).manual_seed(SEED)
    order = [torch.randperm(tokens, device=device, generator=generator).to(torch.int32) for _ in x]
    gathered = torch.empty_like(x[0])
    with_index = work.quantize(inputs.host_counts, k, gather=True)

    def unfused(i: int) -> object:
        torch.index_select(x[i], 0, order[i], out=gathered)
        return mx.quantize_grouped(gathered, groups[i], out=out[i])

    check = check_rows(lambda rows: x[0][order[0][rows].long()], out[0])
    fused = Contender(
        GATHER,
        lambda i: mx.quantize_grouped(x[i], groups[i], row_index=order[i], out=out[i]),
        with_index,
        ours=True,
        check=check,
    )
    both = work.copy(tokens * k) + with_index
    baseline = Contender("index_select, then quantize_grouped", unfused, both, note="bf16 intermediate", check=check)
    return [fused, baseline, _alone(inputs, job, ALONE, note="no gather")], baseline.name


def _swiglu(inputs: QuantizeInputs, job: Work) -> tuple[Field, str]:
    from .peer_kernels import silu_mul

    x, groups, out = inputs.x, inputs.groups, inputs.out
    tokens, k = x[0].shape[0], x[0].shape[1] // 2
    product = torch.empty(tokens, k, dtype=torch.bfloat16, device=x[0].device)

    def unfused(i: int) -> object:
        silu_mul(x[i], product)
        return mx.quantize_grouped(product, groups[i], out=out[i])

    check = check_swiglu(x[0], out[0])
    fused_job = work.quantize(inputs.host_counts, k, swiglu=True)
    fused = Contender(
        SWIGLU,
        lambda i: mx.quantize_grouped(x[i], groups[i], activation="swiglu", out=out[i]),
        fused_job,
        ours=True,
        check=check,
    )
    baseline = Contender(
        "silu_mul, then quantize_grouped",
        unfused,
        work.silu_mul(tokens, k) + job,
        note="one silu_mul kernel, bf16 intermediate",
        check=check,
    )
    return [fused, baseline], baseline.name
