"""GroupLayout: which rows belong to which expert, and where each expert's scales start.

Built on the device from the router's counts, with no host sync: one small launch on a GPU. Only
``num_tokens`` and the number of experts are known to the host; they size every buffer.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch

from hybrid_mxfp8.core import checks
from hybrid_mxfp8.core.formats import SCALE_TILE_ROWS, grouped_scale_rows

Form = Literal["counts", "ends", "indptr"]  # rows of each expert, their ends, or offsets from 0

_MEANT: Final[dict[Form, str]] = {
    "counts": "counts, not offsets?",
    "ends": "inclusive ends, not counts?",
    "indptr": "offsets from 0, not ends or counts?",
}


@dataclass(frozen=True, eq=False)
class GroupLayout(checks.Checked):
    """Rows sorted by expert: rows expert_offsets[e] .. expert_offsets[e+1] belong to expert e.

    Attributes:
        tokens_per_expert: (E,) int32.
        expert_offsets: (E+1,) int32, exclusive prefix sum; the last entry is the number of rows in
            use.
        scale_offsets: (E+1,) int32, exclusive prefix sum of roundup(tokens, 128), in rows.
        num_tokens: T, rows of the token matrix; at least the rows in use, more for a padded batch.

    ``from_counts``, ``from_ends`` and ``from_indptr`` make one of what callers have. On a CPU,
    where reading is free, numbers that don't fit ``num_tokens`` rows are an error, with a guess of
    what they are. On a GPU they are not read, and the layout is valid whatever they are: negative
    counts act as 0, ends that fall as empty experts, and rows beyond ``num_tokens`` are cut off.

    One made of its three tensors must hold the same sums. A CPU checks that; on a GPU wrong sums
    give wrong results, but lead no kernel outside its buffers.

    Raises:
        TypeError, ValueError: a tensor of another dtype, shape or device, or not contiguous;
            ``num_tokens`` no int, negative or too large for int32 offsets; on a CPU, numbers that
            are no layout of ``num_tokens`` rows.
    """

    tokens_per_expert: torch.Tensor
    expert_offsets: torch.Tensor
    scale_offsets: torch.Tensor
    num_tokens: int

    def __post_init__(self) -> None:
        tokens = checks.check_tensor(
            "tokens_per_expert", self.tokens_per_expert, dtypes=(torch.int32,), ndim=1, dims="(E,)"
        )
        checks.check_contiguous("tokens_per_expert", tokens)
        num_experts = tokens.shape[0]
        for name, offsets in (("expert_offsets", self.expert_offsets), ("scale_offsets", self.scale_offsets)):
            checks.check_tensor(name, offsets, dtypes=(torch.int32,), ndim=1, dims="(E+1,)", device=tokens.device)
            checks.check_shape(name, offsets, (num_experts + 1,), "(E+1,)")
            checks.check_contiguous(name, offsets)
        checks.check_num_tokens(self.num_tokens, num_experts)
        if tokens.device.type == "cpu" and not checks.is_tracing(tokens):
            check_numbers("tokens_per_expert", tokens, self.num_tokens, "counts")
            valid = group_offsets(tokens, self.num_tokens, from_ends=False)
            for name, given, expected, of in (
                ("expert_offsets", self.expert_offsets, valid[1], "tokens_per_expert"),
                ("scale_offsets", self.scale_offsets, valid[2], "tokens_per_expert rounded up to 128"),
            ):
                if not torch.equal(given, expected):
                    checks.fail(name, f"must be 0 and the prefix sums of {of}, {expected.tolist()}", given.tolist())

    @property
    def num_experts(self) -> int:
        """E."""
        return self.tokens_per_expert.shape[0]

    @property
    def scale_rows(self) -> int:
        """S: rows of the scale tensor, the tightest bound known without a sync."""
        return grouped_scale_rows(self.num_tokens, self.num_experts)

    @property
    def device(self) -> torch.device:
        """Where the three tensors are."""
        return self.tokens_per_expert.device

    @classmethod
    def from_counts(cls, tokens_per_expert: torch.Tensor, num_tokens: int) -> GroupLayout:
        """The layout of ``tokens_per_expert`` (E,) int32 or int64 rows per expert, in a matrix of
        ``num_tokens`` rows.

        Raises:
            TypeError: ``tokens_per_expert`` is no int32 or int64 tensor, or ``num_tokens`` no int.
            ValueError: rank other than 1, ``num_tokens`` negative or too large for int32 offsets;
                on a CPU a negative count, or a sum above ``num_tokens``.
        """
        return cls._build("tokens_per_expert", tokens_per_expert, num_tokens, "counts")

    @classmethod
    def from_ends(cls, offs: torch.Tensor, num_tokens: int) -> GroupLayout:
        """The layout of ``offs`` (E,) int32 or int64: the end of each expert's rows, as
        ``torch.nn.functional.grouped_mm`` takes them.

        Raises as ``from_counts``; on a CPU ValueError also for an end below the one before or above
        ``num_tokens``.
        """
        return cls._build("offs", offs, num_tokens, "ends")

    @classmethod
    def from_indptr(cls, m_indptr: torch.Tensor, num_tokens: int) -> GroupLayout:
        """The layout of ``m_indptr`` (E+1,) int32 or int64: 0, then the end of each expert's rows,
        as FlashInfer's grouped GEMMs take them.

        Raises as ``from_ends``; ValueError also for no entry, and on a CPU for a first one other
        than 0.
        """
        return cls._build("m_indptr", m_indptr, num_tokens, "indptr")

    @classmethod
    def _build(cls, name: str, given: Any, num_tokens: Any, form: Form) -> GroupLayout:
        dims = "(E+1,)" if form == "indptr" else "(E,)"
        (given,) = checks.wait_for(given)
        checks.check_tensor(name, given, dtypes=(torch.int32, torch.int64), ndim=1, dims=dims)
        if form == "indptr" and not given.shape[0]:
            checks.fail(name, "must have shape (E+1,), with a leading 0", (0,))
        # int: PyTorch 2.11 can't subtract a bool from a symbolic size.
        checks.check_num_tokens(num_tokens, given.shape[0] - int(form == "indptr"))
        check_numbers(name, given, num_tokens, form)
        if form == "indptr":
            given = given[1:]
        from_ends = form != "counts"
        if checks.is_tracing(given):
            layout = torch.ops.hybrid_mxfp8.group_offsets(given, num_tokens, from_ends)
        elif given.device.type == "cpu" or launch is None:
            return cls.unchecked(*group_offsets(given, num_tokens, from_ends), num_tokens)
        else:
            layout = launch(given, num_tokens, from_ends)
        return cls.from_buffer(layout, given.shape[0], num_tokens)

    @classmethod
    def from_buffer(cls, layout: torch.Tensor, num_experts: int, num_tokens: int) -> GroupLayout:
        """Views of (3E+2,) int32: tokens (E,), expert offsets (E+1,), scale offsets (E+1,)."""
        # Faster than Tensor.split, which calls this from Python.
        sizes = (num_experts, num_experts + 1, num_experts + 1)
        tokens, offsets, scale_offsets = torch.split_with_sizes(layout, sizes)
        return cls.unchecked(
            tokens_per_expert=tokens, expert_offsets=offsets, scale_offsets=scale_offsets, num_tokens=num_tokens
        )


def check_numbers(name: str, given: torch.Tensor, num_tokens: int, form: Form) -> None:
    """On a CPU, check that numbers are of ``form``; the error says which other they may have."""
    if not given.is_cpu or checks.is_tracing(given):
        return
    numbers = given.tolist()
    if fault := fault_of(numbers, num_tokens, form):
        if min(numbers) >= 0:
            fits = " or ".join(f"from_{other}" for other in _MEANT if not fault_of(numbers, num_tokens, other))
            fault += f" ({_MEANT[form]}" + (f" GroupLayout.{fits} takes these)" if fits else ")")
        checks.fail(name, fault, numbers if len(numbers) <= 16 else f"{numbers[:16]} and {len(numbers) - 16} more")


def fault_of(numbers: Sequence[int], num_tokens: int, form: Form) -> str:
    """The rule of counts, ends or an indptr that the numbers break; empty if none."""
    if min(numbers, default=0) < 0:
        return "must be at least 0"
    if form == "counts":
        return f"must have a sum of at most num_tokens = {num_tokens}" if sum(numbers) > num_tokens else ""
    if form == "indptr" and any(numbers[:1]):
        return "must start with 0"
    if any(end < before for before, end in itertools.pairwise(numbers)):
        return "must not fall"
    return f"must be at most num_tokens = {num_tokens}" if any(end > num_tokens for end in numbers[-1:]) else ""


launch: Callable[[torch.Tensor, int, bool], torch.Tensor] | None = None
"""Builds layouts on GPUs; ``ops.group_layout`` sets it, as no kernel is known to this package."""


def group_offsets(
    counts_or_ends: torch.Tensor, num_tokens: int, from_ends: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """tokens_per_expert (E,), expert_offsets (E+1,), scale_offsets (E+1,), all int32, of (E,)
    counts or inclusive ends. Whatever the data, the result is a valid layout of ``num_tokens``
    rows: negative counts act as 0, ends that fall act as the largest before them, and no expert
    reaches beyond ``num_tokens``. So no kernel that trusts the layout can leave its buffers."""
    # Clamped before it is summed: the sum of E counts of at most T fits int64, that of any E counts
    # does not.
    given = counts_or_ends.to(torch.int64).clamp(0, num_tokens)
    ends = given.cumsum(0).clamp_max(num_tokens)
    if from_ends and given.numel():
        ends = given.cummax(0).values
    offsets = torch.nn.functional.pad(ends, (1, 0))
    tokens = offsets.diff()
    scale_offsets = torch.nn.functional.pad((-(-tokens // SCALE_TILE_ROWS) * SCALE_TILE_ROWS).cumsum(0), (1, 0))
    return tokens.to(torch.int32), offsets.to(torch.int32), scale_offsets.to(torch.int32)


def caller_offsets(
    tokens_per_expert: torch.Tensor, scale_starts: torch.Tensor, num_tokens: int, num_scale_rows: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A layout whose scales start where the caller says, (E,) int32, cut to 0 .. S. The last scale
    offset is the largest end of the padded scales of an expert that has tokens."""
    tokens, offsets, _ = group_offsets(tokens_per_expert, num_tokens, from_ends=False)
    starts = scale_starts.to(torch.int64).clamp(0, num_scale_rows)
    ends = torch.where(tokens > 0, starts + -(-tokens // SCALE_TILE_ROWS) * SCALE_TILE_ROWS, 0)
    last = torch.cat([ends.new_zeros(1), ends]).amax(0, keepdim=True).clamp_max(num_scale_rows)
    return tokens, offsets, torch.cat([starts, last]).to(torch.int32)
