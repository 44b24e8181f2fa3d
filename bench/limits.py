"""What the card can do: ceilings measured in the same run by plain PyTorch calls, and datasheet
numbers as labels.

The limit of a job is the larger of its bytes at the fastest streaming rate seen here and its
flops at the rate of a large dense bf16 matmul, times what the operands' precision gains in the
matrix unit; percent of limit is that time over the measured one. MXFP8 gains nothing on Hopper,
which has no block-scaled matrix unit, and a factor of two from compute capability 10 on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from .timing import Device, measure, plan
from .work import Work, copy

DATASHEETS: tuple[tuple[str, float, float], ...] = (
    ("B300", 8.0, 2250.0),
    ("B200", 8.0, 2250.0),
    ("H200", 4.8, 989.4),
    ("H100 NVL", 3.9, 835.5),
    ("H100 PCIe", 2.0, 756.0),
    ("H100", 3.35, 989.4),
)
"""(part of the name, TB/s of memory, dense bf16 TFLOP/s), the more specific name first."""

Precision = Literal["bf16", "fp8", "mxfp8"]


def rate_over_bf16(precision: Precision, capability: tuple[int, int]) -> float:
    """What the matrix unit does with these operands, relative to bf16."""
    if precision == "fp8":
        return 2.0 if capability >= (8, 9) else 1.0
    return 2.0 if precision == "mxfp8" and capability[0] >= 10 else 1.0


@dataclass(frozen=True)
class Limits:
    """Ceilings of one card.

    Attributes:
        read_tb_s: a sum over a large tensor.
        copy_tb_s: a copy of a large tensor, reads and writes.
        bf16_tflop_s: a large square bf16 matmul.
        capability: compute capability.
        datasheet_tb_s: None for a card that the table lacks.
        datasheet_bf16_tflop_s: dense.
    """

    read_tb_s: float
    copy_tb_s: float
    bf16_tflop_s: float
    capability: tuple[int, int]
    datasheet_tb_s: float | None = None
    datasheet_bf16_tflop_s: float | None = None

    def time_us(self, work: Work, precision: Precision) -> float:
        """The least time that ``work`` takes at these ceilings."""
        bytes_us = work.bytes / (max(self.read_tb_s, self.copy_tb_s) * 1e6)
        flops_us = work.flops / (self.bf16_tflop_s * rate_over_bf16(precision, self.capability) * 1e6)
        return max(bytes_us, flops_us)


def datasheet(name: str) -> tuple[float | None, float | None]:
    """TB/s and dense bf16 TFLOP/s of the card of this name."""
    for part, tb_s, tflop_s in DATASHEETS:
        if part.lower() in name.lower():
            return tb_s, tflop_s
    return None, None


def measure_limits(
    device: Device,
    name: str,
    capability: tuple[int, int],
    quick: bool,
    place: str = "cuda",
    elements: int = 2**30,
    side: int = 8192,
) -> Limits:
    """Measure the three ceilings.

    Args:
        device: the timer.
        name: of the card, for its datasheet.
        capability: compute capability.
        quick: fewer rounds.
        place: where the tensors are.
        elements: of the bf16 tensor that is read and copied; even.
        side: of the square matrices that are multiplied.
    """
    source = torch.empty(elements, dtype=torch.bfloat16, device=place).normal_()
    target = torch.empty_like(source)
    floats = source.view(torch.float32)
    a = torch.randn(side, side, dtype=torch.bfloat16, device=place)
    b = torch.randn(side, side, dtype=torch.bfloat16, device=place)
    c = torch.empty_like(a)
    calls: dict[str, Callable[[int], object]] = {
        "read": lambda i: floats.sum(),
        "copy": lambda i: target.copy_(source),
        "matmul": lambda i: torch.mm(a, b, out=c),
    }
    jobs = {"read": Work(2 * elements), "copy": copy(elements), "matmul": Work(6 * side**2, 2 * side**3)}
    rates = {}
    for key, job in jobs.items():
        timing = measure({key: calls[key]}, plan(1, job, quick), device)[key]
        if timing.timing is None:
            raise RuntimeError(f"the {key} ceiling could not be measured: {timing.failure}")
        rates[key] = (job.flops or job.bytes) / timing.timing.median_us / 1e6
    tb_s, tflop_s = datasheet(name)
    return Limits(
        read_tb_s=rates["read"],
        copy_tb_s=rates["copy"],
        bf16_tflop_s=rates["matmul"],
        capability=capability,
        datasheet_tb_s=tb_s,
        datasheet_bf16_tflop_s=tflop_s,
    )
