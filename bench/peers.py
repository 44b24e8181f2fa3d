"""Baselines and other libraries behind one interface: a list of contenders, and the absent ones
with the reason.

A peer is named absent when it is not installed or says that it can't run on this card; one that
is tried and fails is reported by timing with its error. No other library is imported before it is
asked for.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import hybrid_mxfp8 as mx

from . import work
from .limits import Precision
from .work import Work

SGLANG = "sglang.jit_kernel.mxfp8"

CHECKED_ROWS = 8
MAX_DIFF = 2e-3
"""calc_diff of an MXFP8 product of normal data against the unquantized one is near 7e-4."""


@dataclass(frozen=True)
class Contender:
    """One way to do a case's job.

    Attributes:
        name: as reported.
        call: does it once, on input set i.
        work: bytes and flops that it needs.
        ours: whether it is this library.
        precision: of the operands that the matrix unit multiplies.
        warm: whether its operands stay in the L2 cache; then memory is not its limit, nor the
            baseline its measure.
        note: what a reader must know to compare it.
        check: says how its result of set 0 compares with the truth; raises AssertionError when it
            is wrong.
    """

    name: str
    call: Callable[[int], object]
    work: Work
    ours: bool = False
    precision: Precision = "bf16"
    warm: bool = False
    note: str = ""
    check: Callable[[], str] | None = None


@dataclass(frozen=True)
class Absent:
    """A peer that can't take part, and why."""

    name: str
    reason: str


Field = list["Contender | Absent"]


@dataclass(frozen=True)
class QuantizeInputs:
    """Rotating sets of a quantize case: x (T, K) bf16, its groups, our outputs, (E,) counts on the
    GPU, and those of set 0 on the host."""

    x: Sequence[torch.Tensor]
    groups: Sequence[mx.GroupLayout]
    out: Sequence[mx.GroupedMXFP8]
    counts: Sequence[torch.Tensor]
    host_counts: Sequence[int]


@dataclass(frozen=True)
class GemmInputs:
    """Rotating sets of one GEMM case.

    x (T, K) bf16 and quantized, w (E, N, K) bf16 and quantized, ends (E,) int32 as
    ``_grouped_mm`` takes them, y (T, N) bf16, and the (E,) counts.
    """

    x: Sequence[torch.Tensor]
    xq: Sequence[mx.GroupedMXFP8]
    w: Sequence[torch.Tensor]
    wq: Sequence[mx.ExpertWeights]
    ends: Sequence[torch.Tensor]
    y: Sequence[torch.Tensor]
    counts: Sequence[int]


def expert_of_rows(counts: Sequence[int], rows: Sequence[int]) -> list[int]:
    """The expert that owns each row."""
    return [int(e) for e in np.searchsorted(np.cumsum(counts), rows, side="right")]


def check_product(
    x: torch.Tensor, w: torch.Tensor, counts: Sequence[int], y: Callable[[], torch.Tensor]
) -> Callable[[], str]:
    """A check of sampled rows of ``y`` against the fp32 product of the unquantized operands."""

    def check() -> str:
        rows = sorted({int(r) for r in np.linspace(0, x.shape[0] - 1, CHECKED_ROWS)})
        truth = torch.stack(
            [w[e].float() @ x[r].float() for r, e in zip(rows, expert_of_rows(counts, rows), strict=True)]
        )
        diff = mx.calc_diff(y()[rows], truth)
        if not diff < MAX_DIFF:
            raise AssertionError(f"calc_diff of {len(rows)} rows against fp32 is {diff:.1e}, expected below {MAX_DIFF}")
        return f"calc_diff {diff:.1e} on {len(rows)} rows against fp32"

    return check


def _needs_sm100(capability: tuple[int, int]) -> str | None:
    if capability[0] == 10:
        return None
    return f"needs compute capability 10.0 or 10.3, this card has {capability[0]}.{capability[1]}"


def _not_installed(module: str) -> str | None:
    return None if importlib.util.find_spec(module) else "not installed"


def find_function(module: str, name: str, reason: str | None = None) -> Any:
    """A function of an installed package; else a string that says why not, ``reason`` if given."""
    package = module.partition(".")[0]
    if reason := _not_installed(package) or reason:
        return reason
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        return f"this {package} has no {name} ({error})"
    except (OSError, RuntimeError, AssertionError) as error:  # made for another torch or CUDA
        return f"this {package} does not load ({error.__cause__ or error})"


def rows_in_rooms(counts: torch.Tensor, rooms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The expert of each of T rows in order, and its place where expert e has room for rooms[e]."""
    owners = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
    shift = (rooms.cumsum(0) - rooms) - (counts.cumsum(0) - counts)
    return owners, torch.arange(len(owners), device=counts.device) + shift[owners]


def bf16_copy(num_bytes: int, sets: int, device: torch.device) -> Contender:
    """A copy that moves ``num_bytes`` in all, half read and half written, in bf16."""
    # Whole 256-byte stretches, so that every set is as aligned as the first.
    elements = max(num_bytes // (2 * work.BF16) // 128, 1) * 128
    source = torch.empty(sets, elements, dtype=torch.bfloat16, device=device).normal_()
    target = torch.empty_like(source)
    return Contender("bf16 copy of the same bytes", lambda i: target[i].copy_(source[i]), work.copy(elements))


def quantize_peers(inputs: QuantizeInputs, capability: tuple[int, int]) -> Field:
    """Other quantizers of the plain job."""
    return [_sglang_quantize(inputs, capability), _flashinfer_quantize(inputs, capability), _torchao_quantize(inputs)]


def _sglang_quantize(inputs: QuantizeInputs, capability: tuple[int, int]) -> Contender | Absent:
    name = "SGLang jit_kernel.mxfp8"
    quantize = find_function(SGLANG, "es_sm100_mxfp8_blockscaled_grouped_quant", _needs_sm100(capability))
    if isinstance(quantize, str):
        return Absent(name, quantize)

    values = [torch.empty_like(o.values) for o in inputs.out]
    scales = [torch.empty_like(o.scales) for o in inputs.out]

    def call(i: int) -> None:
        groups = inputs.groups[i]
        quantize(
            inputs.x[i],
            groups.tokens_per_expert,
            groups.expert_offsets[:-1],
            groups.scale_offsets[:-1],
            values[i],
            scales[i],
        )

    k = inputs.x[0].shape[1]
    return Contender(name, call, work.quantize(inputs.host_counts, k), note="padding scales left unwritten")


def _flashinfer_quantize(inputs: QuantizeInputs, capability: tuple[int, int]) -> Contender | Absent:
    name = "FlashInfer mxfp8_quantize"
    ragged = "quantizes one matrix, not ragged groups: takes part at E = 1" if len(inputs.host_counts) > 1 else None
    mxfp8_quantize = find_function("flashinfer", "mxfp8_quantize", _needs_sm100(capability) or ragged)
    if isinstance(mxfp8_quantize, str):
        return Absent(name, mxfp8_quantize)
    k = inputs.x[0].shape[1]
    return Contender(
        name,
        lambda i: mxfp8_quantize(inputs.x[i], True),
        work.quantize(inputs.host_counts, k),
        note="allocates its outputs",
    )


def _torchao_quantize(inputs: QuantizeInputs) -> Contender | Absent:
    name = "torchao triton_to_mxfp8_dim0"
    triton_to_mxfp8_dim0 = find_function("torchao.prototype.mx_formats.kernels", "triton_to_mxfp8_dim0")
    if isinstance(triton_to_mxfp8_dim0, str):
        return Absent(name, triton_to_mxfp8_dim0)
    k = inputs.x[0].shape[1]
    tokens = inputs.x[0].shape[0]
    unswizzled = Work(tokens * k * (work.BF16 + 1) + tokens * k // 32)
    return Contender(
        name,
        lambda i: triton_to_mxfp8_dim0(inputs.x[i], 32),
        unswizzled,
        note="no groups; row-major scales, whose swizzling takes another kernel; allocates its outputs",
    )


def bf16_grouped_mm(inputs: GemmInputs) -> Contender:
    """The baseline of every GEMM: torch's own, in bf16."""
    n, k = inputs.w[0].shape[1:]
    transposed = [w.transpose(-2, -1) for w in inputs.w]
    return Contender(
        "torch bf16 _grouped_mm",
        lambda i: torch._grouped_mm(inputs.x[i], transposed[i % len(transposed)], offs=inputs.ends[i]),
        work.gemm_bf16(inputs.counts, n, k),
        note="allocates its output",
    )


def gemm_peers(inputs: GemmInputs, capability: tuple[int, int]) -> Field:
    """Other grouped GEMMs on FP8 operands."""
    return [
        _torch_fp8_rowwise(inputs, capability),
        _torch_mxfp8(inputs, capability),
        _sglang_gemm(inputs, capability),
        Absent(
            "FlashInfer grouped GEMM",
            _not_installed("flashinfer") or "its grouped GEMM for MXFP8 tokens takes MXFP4 weights: another job",
        ),
        Absent(
            "torchao grouped GEMM",
            _not_installed("torchao") or "calls torch's _scaled_grouped_mm, which is a contender itself",
        ),
    ]


def _torch_fp8_rowwise(inputs: GemmInputs, capability: tuple[int, int]) -> Contender | Absent:
    name = "torch fp8 row-wise _scaled_grouped_mm"

    if capability != (9, 0):
        return Absent(name, f"needs compute capability 9.0, this card has {capability[0]}.{capability[1]}")
    num_experts, n, k = inputs.wq[0].values.shape
    tokens = inputs.x[0].shape[0]
    if n % 16 or k % 16:
        return Absent(name, f"needs N and K that are multiples of 16, got {n} and {k}")
    row_scales = torch.ones(tokens, dtype=torch.float32, device=inputs.x[0].device)
    weight_scales = torch.ones(num_experts, n, dtype=torch.float32, device=inputs.x[0].device)
    transposed = [w.values.transpose(-2, -1) for w in inputs.wq]

    def call(i: int) -> torch.Tensor:
        return torch._scaled_grouped_mm(
            inputs.xq[i].values,
            transposed[i % len(transposed)],
            row_scales,
            weight_scales,
            offs=inputs.ends[i],
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )

    return Contender(
        name,
        call,
        work.gemm_fp8_rowwise(inputs.counts, n, k),
        precision="fp8",
        note="not MXFP8: one scale a row, accumulated in the matrix unit; allocates its output",
    )


def _torch_mxfp8(inputs: GemmInputs, capability: tuple[int, int]) -> Contender | Absent:
    name = "torch MXFP8 _scaled_grouped_mm"
    reason = _needs_sm100(capability)
    if reason:
        return Absent(name, reason)

    num_experts, n, k = inputs.wq[0].values.shape
    transposed = [w.values.transpose(-2, -1) for w in inputs.wq]
    weight_scales = [w.scales.reshape(num_experts, -1).view(torch.float8_e8m0fnu) for w in inputs.wq]

    def call(i: int) -> torch.Tensor:
        return torch._scaled_grouped_mm(
            inputs.xq[i].values,
            transposed[i % len(transposed)],
            inputs.xq[i].scales.view(torch.float8_e8m0fnu),
            weight_scales[i % len(transposed)],
            offs=inputs.ends[i],
            out_dtype=torch.bfloat16,
        )

    return Contender(name, call, work.gemm(inputs.counts, n, k), precision="mxfp8", note="allocates its output")


def _sglang_gemm(inputs: GemmInputs, capability: tuple[int, int]) -> Contender | Absent:
    name = "SGLang jit_kernel.mxfp8"
    _, n, k = inputs.wq[0].values.shape
    odd = f"needs N and K that are multiples of 128, got {n} and {k}" if n % 128 or k % 128 else None
    gemm = find_function(SGLANG, "es_sm100_mxfp8_blockscaled_moe_grouped_gemm", _needs_sm100(capability) or odd)
    if isinstance(gemm, str):
        return Absent(name, gemm)

    workspace = torch.empty(2**30, dtype=torch.uint8, device=inputs.x[0].device)

    def call(i: int) -> object:
        x = inputs.xq[i]
        w = inputs.wq[i % len(inputs.wq)]
        return gemm(
            w.values,
            x.values,
            w.scales,
            x.scales,
            x.groups.expert_offsets[:-1],
            x.groups.scale_offsets[:-1],
            x.groups.tokens_per_expert,
            workspace,
            torch.bfloat16,
        )

    return Contender(
        name, call, work.gemm(inputs.counts, n, k), precision="mxfp8", note="allocates its output; 1 GiB of workspace"
    )
