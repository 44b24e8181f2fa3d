"""Inputs that tests share: value patterns, ragged layouts, hostile counts, poisoned outputs."""

from __future__ import annotations

import unittest.mock
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from hypothesis import strategies as st

import hybrid_mxfp8 as mx
from hybrid_mxfp8 import env
from hybrid_mxfp8.core import layout as layouts
from hybrid_mxfp8.core.formats import round_up
from hybrid_mxfp8.dispatch.plan import PLANS

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HALF_DTYPES = (torch.bfloat16, torch.float16)

POISON = 0xFF
"""A NaN in values and in scales: a byte that was not written shows, and spreads."""

RAGGED: dict[str, tuple[list[int], int]] = {
    "one token": ([1], 1),
    "one expert": ([200], 200),
    "empty experts": ([0, 3, 0, 0, 130, 17, 0], 150),
    "at tile edges": ([127, 128, 129, 1], 385),
    "all empty": ([0, 0, 0], 0),
    "all empty, padded batch": ([0, 0, 0], 40),
    "rows beyond the groups": ([5, 0, 60], 100),
    "one hot": ([0, 0, 300, 0], 300),
    "a token each": ([1] * 33, 33),
}
"""Counts and T by what they exercise."""

HOSTILE: dict[str, tuple[list[int], int]] = {
    "negative counts": ([-5, 10, -(2**31), 7], 20),
    "one count beyond T": ([100], 10),
    "sum beyond T": ([6, 6, 6, 6], 15),
    "sum wraps int32": ([2**31 - 1, 2**31 - 1, 2, 5], 9),
    "everything negative": ([-1, -1], 4),
    "beyond T, then nothing": ([9, 0, 0], 8),
    "T = 0": ([3, 4], 0),
}
"""What no router should send; as ends, some also fall. None may lead outside a buffer."""

HUGE: dict[str, tuple[list[int], int]] = {
    "sum wraps int64": ([2**62, 2**62, 5], 300),
    "largest": ([2**63 - 1, 2**63 - 1, 2**63 - 1], 10),
    "smallest": ([-(2**63), 4, -(2**63)], 10),
    "low word is small": ([2**32 + 3, 4], 100),
}
"""Counts that need int64."""


class Ragged(NamedTuple):
    """Counts of E experts in a matrix of num_tokens rows, at least their sum."""

    counts: list[int]
    num_tokens: int


@st.composite
def ragged(draw: st.DrawFn, max_experts: int = 12, max_tokens: int = 300) -> Ragged:
    """Counts that favour 0, 1 and the tile edges, and sometimes rows beyond them."""
    sizes = st.one_of(st.sampled_from([0, 0, 1, 31, 32, 33, 127, 128, 129]), st.integers(0, 150))
    counts: list[int] = []
    for count in draw(st.lists(sizes, min_size=1, max_size=max_experts)):
        counts.append(min(count, max_tokens - sum(counts)))
    return Ragged(counts, sum(counts) + draw(st.sampled_from([0, 0, 1, 50])))


def layout(counts: Sequence[int], num_tokens: int | None = None, device: str = "cpu") -> mx.GroupLayout:
    """GroupLayout.from_counts of a list."""
    given = torch.tensor(list(counts), dtype=torch.int32, device=device)
    return mx.GroupLayout.from_counts(given, sum(counts) if num_tokens is None else num_tokens)


def unlooked() -> AbstractContextManager[object]:
    """As on a GPU, where nobody looks at counts and ends: what becomes of any numbers."""
    return unittest.mock.patch.object(layouts, "fault_of", return_value="")


def poisoned_output(groups: mx.GroupLayout, k: int) -> mx.GroupedMXFP8:
    """An operand for ``out=`` all of whose bytes are poison."""
    values = torch.full((groups.num_tokens, k), POISON, dtype=torch.uint8, device=groups.device)
    cols = round_up(k // 32, 4)
    scales = torch.full((groups.scale_rows, cols), POISON, dtype=torch.uint8, device=groups.device)
    return mx.GroupedMXFP8(values.view(torch.float8_e4m3fn), scales, groups)


def poisoned_product(num_tokens: int, n: int, dtype: torch.dtype, device: str | torch.device = "cpu") -> torch.Tensor:
    """(T, N) of NaN."""
    return torch.full((num_tokens, n), float("nan"), dtype=dtype, device=device)


def every_code(dtype: torch.dtype) -> torch.Tensor:
    """(64, 1024): each of the 65,536 codes of a 16-bit dtype, in order; blocks hold neighbours."""
    return torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype).reshape(64, 1024)


def _with_smaller_ones(amax: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(R, 1024): each amax heads a block of fractions of it, down to its 2**-16."""
    j = torch.arange(32, dtype=torch.float64)
    fractions = torch.where(j % 2 == 0, 1.0, -1.0) * 2.0 ** (-j / 2) * (1 + (j % 5) / 16).clamp_max(1.0)
    fractions[0] = 1.0
    blocks = (amax.double().reshape(-1, 1) * fractions).to(dtype)
    blocks[:, 0] = amax.reshape(-1)
    return blocks.reshape(-1, 1024)


def every_amax(dtype: torch.dtype) -> torch.Tensor:
    """(2048, 1024): each of the 65,536 codes of a 16-bit dtype as the amax of a block."""
    return _with_smaller_ones(every_code(dtype).reshape(-1), dtype)


def fp32_edges() -> torch.Tensor:
    """(R, 1024): each exponent with the mantissas where a scale or an element changes, as both."""
    around = [0, 0x080000, 0x100000, 0x180000, 0x1FFFFF, 0x400000, 0x5FFFFF, 0x600000, 0x780000, 0x7FFFFF]
    mantissas = sorted({m + d for m in around for d in (-1, 0, 1) if 0 <= m + d <= 0x7FFFFF})
    exponents = torch.arange(256, dtype=torch.int64) << 23
    bits = (exponents[:, None] + torch.tensor(mantissas)[None, :]).reshape(-1)
    bits = torch.cat([bits, bits + 2**31])
    bits = torch.nn.functional.pad(bits, (0, -bits.numel() % 1024))
    edges = torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32).view(torch.float32)
    finite = edges[torch.isfinite(edges)]
    return torch.cat([edges.reshape(-1, 1024), _with_smaller_ones(finite[: finite.numel() // 32 * 32], torch.float32)])


def special_rows(dtype: torch.dtype) -> torch.Tensor:
    """(8, 128): zeros of both signs, NaN and Inf among finite values, tiny and subnormal values."""
    x = torch.linspace(-3, 3, 8 * 128).reshape(8, 128)
    x[0] = 0.0
    x[1] = -0.0
    x[2, 5], x[2, 40], x[2, 70] = float("nan"), float("inf"), float("-inf")
    x[3, 1], x[3, 2] = float("inf"), float("nan")
    x[4] *= 1e-38
    x[5] *= 1e-42
    x[6, ::2] *= torch.finfo(dtype).max / 4
    x[7] = torch.where(torch.arange(128) % 32 == 0, 2.0**-126, -(2.0**-149))
    return x.to(dtype)


def random_rows(
    rows: int, k: int, dtype: torch.dtype, rng: torch.Generator, device: str | torch.device = "cpu"
) -> torch.Tensor:
    """(rows, K) normal values, each block at a magnitude of its own; made on the device from a seed
    that ``rng`` gives."""
    device = torch.device(device)
    if device.type != "cpu":
        rng = torch.Generator(device).manual_seed(int(torch.randint(0, 2**31, (), generator=rng)))
    x = torch.randn(rows, k // 32, 32, generator=rng, device=device)
    x *= torch.exp2(torch.randint(-6, 7, (rows, k // 32, 1), generator=rng, device=device).float())
    return x.reshape(rows, k).to(dtype)


def device() -> str:
    """Where kernels run: on the GPU unless they are interpreted, or there is none."""
    return "cuda" if torch.cuda.is_available() and not env.triton_interpret() else "cpu"


def to_device(xq: mx.GroupedMXFP8, device: str | torch.device) -> mx.GroupedMXFP8:
    """The same operand elsewhere."""
    groups = xq.groups
    parts = (groups.tokens_per_expert, groups.expert_offsets, groups.scale_offsets)
    there = mx.GroupLayout.unchecked(*(part.to(device) for part in parts), groups.num_tokens)
    return mx.GroupedMXFP8.unchecked(xq.values.to(device), xq.scales.to(device), there)


def aligned_bytes(size: int) -> torch.Tensor:
    """Zeros from a boundary of 256 bytes on, as PyTorch allocates on a GPU."""
    buffer = torch.zeros(size + 256, dtype=torch.uint8)
    start = -buffer.data_ptr() % 256
    return buffer[start : start + size]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Its bytes: two NaN are equal if they are the same NaN."""
    return tensor.contiguous().view(torch.uint8)


def same_bytes(a: mx.GroupedMXFP8 | mx.ExpertWeights, b: mx.GroupedMXFP8 | mx.ExpertWeights) -> None:
    """Both operands' buffers, wherever they are."""
    for name in ("values", "scales"):
        x = bits(getattr(a, name))
        y = bits(getattr(b, name)).to(x.device)
        assert torch.equal(x, y), f"{name}: {int((x != y).sum())} of {x.numel()} bytes differ"


def memory_of(workspace: mx.MoEWorkspace) -> list[torch.Tensor]:
    """All the bytes of a workspace."""
    return [bits(tensor) for tensor in workspace._memory()]


def forget_calls() -> None:
    """Have the next call choose its backend and kernel anew: what it would take was replaced."""
    PLANS.clear()
