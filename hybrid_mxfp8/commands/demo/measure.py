"""The demo's figures: quality of operands and products, agreement of backends, and what an outlier does.

Pure functions of tensors. Truth is the product of the fp32 operands before quantization, accumulated in float64.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from hybrid_mxfp8.core.formats import BLOCK_SIZE, E4M3_MAX
from hybrid_mxfp8.core.layout import GroupLayout
from hybrid_mxfp8.core.metrics import calc_diff, signal_to_noise_db
from hybrid_mxfp8.core.operands import ExpertWeights, GroupedMXFP8
from hybrid_mxfp8.ops.grouped_gemm import grouped_gemm
from hybrid_mxfp8.ops.quantize import quantize_grouped, quantize_weights

OPERAND_FLOOR_DB: Final = 24.0
"""With ``rceil`` nothing saturates and e4m3 rounds by at most 2**-4 of an element: 24.08 dB, whatever the data. Elements
so small that they are subnormal in their block lose more, but carry less than 1e-7 of its power."""

PRODUCT_CALC_DIFF: Final = 1e-3
"""What DeepGEMM's and SGLang's tests allow. Both operands at their typical 31.5 dB make 7e-4 on random data."""

ACCUMULATION_STEP: Final = 2.0**-23
"""fp32 accumulation, at worst truncating at each of K steps, relative to the sum of magnitudes."""

STAGES: Final = ("tokens", "weights", "product")
"""Of :func:`run_backend`: quantize the tokens, quantize the weights, multiply."""


@dataclass(frozen=True)
class Quality:
    """How far quantization moves one expert: signal-to-noise of tokens, weights and product in dB, and calc_diff."""

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
    """Two backends side by side.

    Attributes:
        first: a backend's name.
        second: another's.
        same_operands: whether both wrote the same bytes, elements and scales.
        diff: calc_diff of the products.
        largest: largest difference of two elements.
        of_bound: the same in units of what fp32 accumulation explains; above 1 one of the two is wrong.
    """

    first: str
    second: str
    same_operands: bool
    diff: float
    largest: float
    of_bound: float

    @property
    def good(self) -> bool:
        """Same bytes, and products no further apart than the arithmetic explains."""
        return self.same_operands and self.of_bound <= 1


@dataclass(frozen=True)
class OutlierEffect:
    """Signal-to-noise in dB of all blocks but the outlier's own, when one element is ``ratio`` times their rms."""

    ratio: float
    mxfp8_db: float
    fp8_db: float


def per_tensor_fp8(x: torch.Tensor) -> torch.Tensor:
    """x through e4m3 with one fp32 scale amax/448 for the whole tensor, and back to fp32."""
    scale = x.abs().amax() / E4M3_MAX
    return (x / scale).to(torch.float8_e4m3fn).float() * scale


def run_backend(
    x: torch.Tensor,
    w: torch.Tensor,
    groups: GroupLayout,
    backend: str,
    stage: Callable[[str], None] = lambda what: None,
) -> Run:
    """Quantize both operands and multiply them, all by one backend.

    Args:
        x: (T, K) fp32.
        w: (E, N, K) fp32.
        groups: layout of x's rows.
        backend: its name.
        stage: told each of STAGES as it begins.

    Raises:
        BackendUnavailableError: the backend can't run here.
    """
    stage(STAGES[0])
    xq = quantize_grouped(x, groups, backend=backend)
    stage(STAGES[1])
    wq = quantize_weights(w, backend=backend)
    stage(STAGES[2])
    return Run(backend, xq, wq, grouped_gemm(xq, wq, out_dtype=torch.float32, backend=backend))


def quality(
    x: torch.Tensor,
    w: torch.Tensor,
    rows: Sequence[int],
    x_quantized: torch.Tensor,
    w_quantized: torch.Tensor,
    product: torch.Tensor,
) -> list[Quality]:
    """Each expert's figures.

    Args:
        x: (T, K) fp32 before quantization.
        w: (E, N, K) fp32 before quantization.
        rows: tokens of each expert.
        x_quantized: (T, K) fp32, dequantized.
        w_quantized: (E, N, K) fp32, dequantized.
        product: (T, N) of the quantized operands.
    """
    parts = zip(
        x.split(list(rows)), w, x_quantized.split(list(rows)), w_quantized, product.split(list(rows)), strict=True
    )
    return [
        Quality(
            signal_to_noise_db(xe, xq),
            signal_to_noise_db(we, wq),
            signal_to_noise_db(truth := xe.double() @ we.double().T, y),
            calc_diff(truth, y),
        )
        for xe, we, xq, wq, y in parts
    ]


def grouped_product(x: torch.Tensor, w: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """(T, N) float64 product of dequantized operands."""
    return torch.cat([xe.double() @ we.double().T for xe, we in zip(x.split(list(rows)), w, strict=True)])


def agreement(a: Run, b: Run) -> Agreement:
    """Compare two backends' runs of the same problem.

    Operands whose layout has unused rows would differ there; these have none.
    """
    same = all(
        torch.equal(p.view(torch.uint8), q.view(torch.uint8))
        for p, q in (
            (a.x.values, b.x.values),
            (_used_scales(a.x), _used_scales(b.x)),
            (a.w.values, b.w.values),
            (a.w.scales, b.w.scales),
        )
    )
    rows = a.x.groups.tokens_per_expert.tolist()
    magnitude = grouped_product(a.x.dequantize().abs(), a.w.dequantize().abs(), rows)
    difference = (a.product.double() - b.product.double()).abs()
    # Where all magnitudes are zero both products must be, and 0/tiny says so.
    bound = (a.x.k * ACCUMULATION_STEP * magnitude).clamp_min(torch.finfo(torch.float64).tiny)
    return Agreement(
        a.backend,
        b.backend,
        same,
        calc_diff(a.product, b.product),
        float(difference.max()),
        float((difference / bound).max()),
    )


def _used_scales(x: GroupedMXFP8) -> torch.Tensor:
    """The rows of the scale tensor that some expert has; the slack beyond them is never written."""
    return x.scales[: int(x.groups.scale_offsets[-1])]


def agreements(runs: Sequence[Run]) -> list[Agreement]:
    """Every pair of runs."""
    return [agreement(a, b) for a, b in itertools.combinations(runs, 2)]


def outlier_effect(x: torch.Tensor, backend: str, factors: Sequence[float]) -> list[OutlierEffect]:
    """Put one outlier into x (T, K) fp32, ``factor`` times its largest element, and look at all other blocks."""
    groups = GroupLayout.from_counts(torch.tensor([x.shape[0]], dtype=torch.int32, device=x.device), x.shape[0])
    position = int(x.abs().argmax())
    row, column = divmod(position, x.shape[1])
    others = torch.ones_like(x, dtype=torch.bool)
    others[row, column // BLOCK_SIZE * BLOCK_SIZE :][:BLOCK_SIZE] = False
    rms = float(x[others].double().square().mean().sqrt())
    effects = []
    for factor in factors:
        spoiled = x.clone()
        spoiled[row, column] *= factor
        kept = quantize_grouped(spoiled, groups, backend=backend).dequantize()
        effects.append(
            OutlierEffect(
                abs(float(spoiled[row, column])) / rms,
                signal_to_noise_db(x[others], kept[others]),
                signal_to_noise_db(x[others], per_tensor_fp8(spoiled)[others]),
            )
        )
    return effects
