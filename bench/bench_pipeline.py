"""The contenders of a pipeline case: tokens in bf16 to products in bf16, quantization included.

The baseline multiplies the bf16 tokens as they are.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

import hybrid_mxfp8 as mx

from . import work
from .bench_grouped_gemm import Kept, Weights, check_product, make_inputs, our_gemm, usable_backends
from .bench_quantize import Prepared
from .peers import Contender, Field, GemmInputs, bf16_grouped_mm
from .shapes import Case


def _from_groups(inputs: GemmInputs, gemm: Callable[[int], object]) -> Callable[[int], object]:
    def call(i: int) -> object:
        mx.quantize_grouped(inputs.x[i], inputs.xq[i].groups, out=inputs.xq[i])
        return gemm(i)

    return call


def _from_counts(inputs: GemmInputs, counts: list[torch.Tensor], backend: str) -> Callable[[int], object]:
    """The layout is the call's own, so the GEMM takes the operand that the quantizer returns."""
    tokens = inputs.x[0].shape[0]
    size = mx.grouped_gemm_workspace_size(inputs.wq[0], tokens, backend=backend)
    workspace = torch.empty(size, dtype=torch.uint8, device=inputs.x[0].device) if size else None

    def call(i: int) -> object:
        xq = mx.quantize_grouped(inputs.x[i], counts[i], out=inputs.xq[i])
        return mx.grouped_gemm(xq, inputs.wq[i % len(inputs.wq)], out=inputs.y[i], workspace=workspace, backend=backend)

    return call


def prepare(
    case: Case,
    capability: tuple[int, int],
    l2_bytes: int,
    store: Kept[Weights],
    device: str = "cuda",
    note: str = "",
) -> Prepared:
    """Inputs and contenders of a case that fits."""
    inputs, counts = make_inputs(case, store, l2_bytes, device)
    job = work.quantize(inputs.counts, case.k) + work.gemm(inputs.counts, case.n, case.k)
    check = check_product(inputs.x[0], inputs.w[0], inputs.counts, lambda: inputs.y[0])
    usable, absent = usable_backends(inputs.x[0].device)
    field: Field = []
    for backend in usable:
        calls = {
            f"quantize + grouped_gemm ({backend})": _from_groups(inputs, our_gemm(inputs, backend)),
            f"quantize of counts + grouped_gemm ({backend})": _from_counts(inputs, counts, backend),
        }
        field += [Contender(name, call, job, ours=True, precision="mxfp8", check=check) for name, call in calls.items()]
    baseline = bf16_grouped_mm(inputs)
    return Prepared(case, [*field, baseline, *absent], baseline.name, len(inputs.x), job, note)
