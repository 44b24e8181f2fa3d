"""The demo's figures: quality of operands and products, agreement of backends, an outlier's effect.

Truth is the product of the fp32 operands before quantization, accumulated in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch

from hybrid_mxfp8.commands.demo.workload import Operands
from hybrid_mxfp8.core.formats import BLOCK_SIZE, E4M3_MAX
from hybrid_mxfp8.core.metrics import calc_diff, signal_to_noise_db
from hybrid_mxfp8.core.operands import ExpertWeights, GroupedMXFP8
from hybrid_mxfp8.ops.grouped_gemm import grouped_gemm
from hybrid_mxfp8.ops.quantize import quantize_grouped, quantize_weights

OPERAND_FLOOR_DB: Final = 24.0
"""``rceil`` saturates nothing, and e4m3 rounds by at most 2**-4 of an element: 24.08 dB. Elements
that are subnormal in their block lose more, but carry less than 1e-7 of its power."""

PRODUCT_CALC_DIFF: Final = 1e-3  # what DeepGEMM's and SGLang's tests allow; usual ones are 7e-4
ACCUMULATION_STEP: Final = 2.0**-23  # fp32 accumulation, at worst truncating at each of K steps


@dataclass(frozen=True)
class Quality:
    """An expert's signal-to-noise of tokens, weights and product in dB, and its calc_diff."""

    x_db: float
    w_db: float
    product_db: float
    product_diff: float

    @property
    def good(self) -> bool:
        """Whether MXFP8 keeps its promises here."""
        return min(self.x_db, self.w_db) >= OPERAND_FLOOR_DB and self.product_diff <= PRODUCT_CALC_DIFF


@dataclass(frozen=True)
class Run:
    """What one backend makes of a grouped GEMM: both operands, and the (T, N) fp32 product."""

    backend: str
    x: GroupedMXFP8
    w: ExpertWeights
    product: torch.Tensor


@dataclass(frozen=True)
class Agreement:
    """Two backends side by side."""

    first: str
    second: str
    same_operands: bool  # both wrote the same bytes, elements and scales
    diff: float  # calc_diff of the products
    largest: float  # difference of two elements of the products
    of_bound: float  # the same over what fp32 accumulation explains: above 1 one of them is wrong

    @property
    def good(self) -> bool:
        """Same bytes, and products no further apart than the arithmetic explains."""
        return self.same_operands and self.of_bound <= 1


@dataclass(frozen=True)
class Effect:
    """Signal-to-noise in dB of all other blocks, by format, when one element, or the rms of one
    channel, is ``ratio`` times their rms."""

    ratio: float
    db: dict[str, float]


def through_e4m3(x: torch.Tensor, amax: torch.Tensor) -> torch.Tensor:
    """x through e4m3 with fp32 scales amax/448, and back to fp32."""
    # Zeros need some scale; which one makes no difference to them.
    scale = torch.where(amax > 0, amax / E4M3_MAX, 1.0)
    return (x / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float() * scale


def per_tensor_fp8(x: torch.Tensor) -> torch.Tensor:
    """x through e4m3 with one scale for the whole tensor, and back to fp32."""
    return through_e4m3(x, x.abs().amax()) if x.numel() else x


def run_backend(gemm: Operands, backend: str) -> Run:
    """Quantize both operands and multiply them."""
    counts = torch.tensor(gemm.rows, dtype=torch.int32, device=gemm.x.device)
    xq = quantize_grouped(gemm.x, counts, backend=backend)
    wq = quantize_weights(gemm.w, backend=backend)
    return Run(backend, xq, wq, grouped_gemm(xq, wq, out_dtype=torch.float32, backend=backend))


def quality(gemm: Operands, xq: torch.Tensor, wq: torch.Tensor, product: torch.Tensor) -> list[Quality]:
    """Each expert's figures, of what is left of both operands, and of their (T, N) product."""
    found = []
    x, xqs, ys = (t.split(list(gemm.rows)) for t in (gemm.x, xq, product))
    for xe, we, xqe, wqe, y in zip(x, gemm.w, xqs, wq, ys, strict=True):
        truth = xe.double() @ we.double().T
        x_db, w_db, product_db = (signal_to_noise_db(*pair) for pair in ((xe, xqe), (we, wqe), (truth, y)))
        found.append(Quality(x_db, w_db, product_db, calc_diff(truth, y)))
    return found


def grouped_product(x: torch.Tensor, w: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """(T, N) float64 product of dequantized operands."""
    return torch.cat([xe.double() @ we.double().T for xe, we in zip(x.split(list(rows)), w, strict=True)])


def agreement(a: Run, b: Run) -> Agreement:
    """Compare two backends' runs of one problem, whose x has no unused rows."""

    def operands(run: Run) -> list[torch.Tensor]:
        used = int(run.x.groups.scale_offsets[-1])  # scale rows beyond them are never written
        written = run.x.values, run.x.scales[:used], run.w.values, run.w.scales
        return [operand.view(torch.uint8) for operand in written]

    same = all(map(torch.equal, operands(a), operands(b)))
    rows = a.x.groups.tokens_per_expert.tolist()
    magnitude = grouped_product(a.x.dequantize().abs(), a.w.dequantize().abs(), rows)
    difference = (a.product.double() - b.product.double()).abs()
    # Where all magnitudes are zero both products must be, and 0/tiny says so.
    bound = (a.x.k * ACCUMULATION_STEP * magnitude).clamp_min(torch.finfo(torch.float64).tiny)
    of_bound = float((difference / bound).max())
    diff = calc_diff(a.product, b.product)
    return Agreement(a.backend, b.backend, same, diff, float(difference.max()), of_bound)


def outlier_effect(x: torch.Tensor, backend: str, factors: Sequence[float]) -> list[Effect]:
    """Make the largest element of x (T, K) fp32 ``factor`` times larger; look at other blocks."""
    counts = torch.tensor([x.shape[0]], dtype=torch.int32, device=x.device)
    row, column = divmod(int(x.abs().argmax()), x.shape[1])
    others = torch.ones_like(x, dtype=torch.bool)
    others[row, column // BLOCK_SIZE * BLOCK_SIZE :][:BLOCK_SIZE] = False
    rms = float(x[others].double().square().mean().sqrt())
    effects = []
    for factor in factors:
        spoiled = x.clone()
        spoiled[row, column] *= factor
        mxfp8 = quantize_grouped(spoiled, counts, backend=backend).dequantize()
        kept = {"MXFP8": mxfp8, "per-tensor FP8": per_tensor_fp8(spoiled)}
        db = {name: signal_to_noise_db(x[others], left[others]) for name, left in kept.items()}
        effects.append(Effect(abs(float(spoiled[row, column])) / rms, db))
    return effects
