"""A grouped product as SGLang's callers set it up: caller-computed metadata, caller-allocated
buffers, both operands quantized."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hybrid_mxfp8.compat.sglang import es_sm100_mxfp8_blockscaled_grouped_quant as grouped_quant
from hybrid_mxfp8.compat.sglang import es_sm100_mxfp8_blockscaled_moe_grouped_gemm as moe_grouped_gemm
from hybrid_mxfp8.core.formats import padded_scale_rows


def exclusive(counts: Sequence[int]) -> list[int]:
    """Exclusive prefix sums."""
    return [sum(counts[:e]) for e in range(len(counts))]


@dataclass
class Case:
    """Operands in full precision and the buffers to quantize them to."""

    counts: list[int]  # tokens of each expert
    x: torch.Tensor  # (T, K), sorted by expert
    w: torch.Tensor  # (E, N, K), N % 128 == 0
    gap: int = 0  # scale rows, a multiple of 128, that the caller leaves free before each expert's
    spare: int = 0  # rows of the scale buffer beyond the last expert's

    def __post_init__(self) -> None:
        device = self.x.device
        self.tokens = self._int32(self.counts)
        self.starts = self._int32(exclusive(self.counts))
        padded = [self.gap + padded_scale_rows(count) for count in self.counts]
        self.scale_starts = self._int32([start + self.gap for start in exclusive(padded)])
        k = self.x.shape[1]
        self.x_values = torch.zeros(self.x.shape, dtype=torch.float8_e4m3fn, device=device)
        self.x_scales = torch.full((sum(padded) + self.spare, k // 32), 0xFF, dtype=torch.uint8, device=device)

    def _int32(self, values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.x.device)

    def quantize(self) -> None:
        """Tokens, and the weights by the same function, as N tokens of each expert."""
        num_experts, n, k = self.w.shape
        self.quantize_tokens()
        rows = self._int32([n] * num_experts)
        starts = self._int32(exclusive([n] * num_experts))
        values = torch.zeros(num_experts * n, k, dtype=torch.float8_e4m3fn, device=self.x.device)
        scales = torch.zeros(num_experts * n, k // 32, dtype=torch.uint8, device=self.x.device)
        grouped_quant(self.w.reshape(-1, k), rows, starts, starts, values, scales)
        self.w_values, self.w_scales = values.view(num_experts, n, k), scales.view(num_experts, n, k // 32)

    def quantize_tokens(self) -> None:
        grouped_quant(self.x, self.tokens, self.starts, self.scale_starts, self.x_values, self.x_scales)

    def set_counts(self, counts: list[int]) -> None:
        """Other counts of the same sum, written into the same metadata tensors."""
        assert sum(counts) == sum(self.counts)
        self.counts = counts
        self.tokens.copy_(self._int32(counts))
        self.starts.copy_(self._int32(exclusive(counts)))
        self.scale_starts.copy_(self._int32(exclusive([padded_scale_rows(count) for count in counts])))

    def multiply(self, workspace: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        operands = (self.w_values, self.x_values, self.w_scales, self.x_scales)
        return moe_grouped_gemm(*operands, self.starts, self.scale_starts, self.tokens, workspace, dtype)

    def experts(self) -> list[tuple[slice, torch.Tensor]]:
        """Rows of each expert that has any, and their product in float64 before quantization."""
        return [
            (slice(start, start + count), self.x[start : start + count].double() @ self.w[e].double().T)
            for e, (start, count) in enumerate(zip(exclusive(self.counts), self.counts, strict=True))
            if count
        ]


def random_case(
    counts: list[int], n: int, k: int, dtype: torch.dtype, seed: int, *, device: str = "cpu", **room: int
) -> Case:
    """Normal operands, as in SGLang's test; ``room`` is the gap and the spare rows."""
    rng = torch.Generator(device=device).manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float32, device=device).to(dtype)

    return Case(counts, normal(sum(counts), k), normal(len(counts), n, k), **room)
