"""GroupLayout: from counts, from ends, by hand."""

from __future__ import annotations

import re

import torch

import hybrid_mxfp8 as mx

from .row import Bad, ints, of_tensor, refused

FORMS: dict[str, tuple[str, str]] = {"from_counts": ("tokens_per_expert", "(E,)"), "from_ends": ("offs", "(E,)"), "from_indptr": ("m_indptr", "(E+1,)")}  # fmt: skip
"""Each way to build a layout: its argument, and that one's shape."""

NINE = {"counts": (3, 0, 5, 1), "ends": (3, 3, 8, 9), "indptr": (0, 3, 3, 8, 9)}
"""The same nine rows in each form."""


def _built(way: str) -> list[Bad]:
    name, dims = FORMS[way]
    good = (0, 2, 3) if way == "from_indptr" else (2, 3)
    row = refused(getattr(mx.GroupLayout, way), lambda: {name: ints(*good), "num_tokens": 5})
    return [
        *of_tensor(row, "built", name, lambda: ints(*good), dims, "int32 or int64", (torch.bool, torch.int16, torch.uint8, torch.float32), "", None),
        *(row(f"{name}: T {value!r}", TypeError, f"^num_tokens: must be an int, got {type(value).__name__}$", num_tokens=value) for value in (None, "5", True, 5.0, torch.tensor(5))),
        row(f"{name}: T negative", ValueError, "^num_tokens: must be at least 0, .* got -7$", num_tokens=-7),
        *(row(f"{name}: T = {value}", ValueError, f"^num_tokens: .* fit int32, got {value}$", num_tokens=value) for value in (2**31, 2**70, 2**31 - 254)),
    ]  # fmt: skip


def _numbers(way: str, given: tuple[int, ...], expected: str, guess: str = "") -> Bad:
    """Numbers that can't be nine rows in this form."""
    name, _ = FORMS[way]
    row = refused(
        getattr(mx.GroupLayout, way), lambda: {name: ints(*given, dtype=torch.int64), "num_tokens": 9}, passes=False
    )
    shown = f"{list(given[:16])} and {len(given) - 16} more" if len(given) > 16 else list(given)
    message = f"{name}: {expected}{f' ({guess})' if guess else ''}, got {shown}"
    return row(f"{way} of {shown}", ValueError, f"^{re.escape(message)}$")


SUM, COUNTS_MEANT = "must have a sum of at most num_tokens = 9", "counts, not offsets?"
ENDS_MEANT, INDPTR_MEANT = "inclusive ends, not counts?", "offsets from 0, not ends or counts?"
NUMBERS = [
    _numbers("from_counts", (3, 0, 5, 3), SUM, COUNTS_MEANT),
    _numbers("from_counts", NINE["ends"], SUM, f"{COUNTS_MEANT} GroupLayout.from_ends takes these"),
    _numbers("from_counts", NINE["indptr"], SUM, f"{COUNTS_MEANT} GroupLayout.from_ends or from_indptr takes these"),
    _numbers("from_counts", tuple(range(40)), SUM, COUNTS_MEANT),
    _numbers("from_counts", (2**62, 2**62, 2**62, 2**62), SUM, COUNTS_MEANT),
    _numbers("from_ends", NINE["counts"], "must not fall", f"{ENDS_MEANT} GroupLayout.from_counts takes these"),
    _numbers("from_ends", (3, 3, 8, 11), "must be at most num_tokens = 9", ENDS_MEANT),
    _numbers("from_indptr", NINE["ends"], "must start with 0", f"{INDPTR_MEANT} GroupLayout.from_ends takes these"),
    _numbers("from_indptr", NINE["counts"], "must start with 0", f"{INDPTR_MEANT} GroupLayout.from_counts takes these"),
    _numbers("from_indptr", (0, 5, 1, 3), "must not fall", f"{INDPTR_MEANT} GroupLayout.from_counts takes these"),
    _numbers("from_indptr", (0, 3, 12), "must be at most num_tokens = 9", INDPTR_MEANT),
    *(_numbers(way, (3, -1, 5), "must be at least 0") for way in FORMS),
]
"""What a CPU can tell of numbers in the wrong form."""


by_hand = refused(
    mx.GroupLayout,
    lambda: {
        "tokens_per_expert": ints(2, 3),
        "expert_offsets": ints(0, 2, 5),
        "scale_offsets": ints(0, 128, 256),
        "num_tokens": 5,
    },
)

BAD = [
    *(bad for way in FORMS for bad in _built(way)),
    *NUMBERS,
    refused(mx.GroupLayout.from_indptr, lambda: {"m_indptr": ints(), "num_tokens": 0}, passes=False)("m_indptr without a 0", ValueError, r"^m_indptr: must have shape \(E\+1,\), with a leading 0, got \(0,\)$"),
    *of_tensor(by_hand, "by hand", "tokens_per_expert", lambda: ints(2, 3), "(E,)", "int32", (torch.int64,), place="^expert_offsets: must be on meta"),
    *(bad for name in ("expert_offsets", "scale_offsets") for bad in (
        *of_tensor(by_hand, "by hand", name, lambda: ints(0, 2, 5), "(E+1,)", "int32", (torch.int64, torch.float32)),
        *(by_hand(f"by hand: {n} of {name}", ValueError, rf"^{name}: must have shape \(E\+1,\) = \(3,\), got \({n},", **{name: ints(*range(n))}) for n in (2, 4)))),
    by_hand("by hand: T a float", TypeError, "^num_tokens: must be an int", num_tokens=5.0),
    by_hand("by hand: T negative", ValueError, "^num_tokens: must be at least 0", num_tokens=-1),
    by_hand("by hand: T beyond int32", ValueError, "^num_tokens: .*int32", num_tokens=2**31 - 1),
]  # fmt: skip
