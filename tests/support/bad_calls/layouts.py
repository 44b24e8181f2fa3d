"""GroupLayout: from counts, from ends, by hand; and the device data that no router should send."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cases
import torch
import truth
from guards import Guards

import hybrid_mxfp8 as mx

from .row import META, Bad, Odd, ints, of_tensor, refused, shapes

ARGUMENT = {mx.GroupLayout.from_counts: "tokens_per_expert", mx.GroupLayout.from_ends: "offs"}


def _built(build: Callable[..., mx.GroupLayout]) -> list[Bad]:
    name = ARGUMENT[build]
    row = refused(build, lambda: {name: ints(2, 3), "num_tokens": 5})
    rows = [
        *of_tensor(row, "built", name, lambda: ints(2, 3), "(E,)", "int32 or int64", (torch.bool, torch.int16, torch.uint8, torch.float32), "", None),
        *(row(f"{name}: T {value!r}", TypeError, f"^num_tokens: must be an int, got {type(value).__name__}$", num_tokens=value) for value in (None, "5", True, 5.0, torch.tensor(5))),
        row(f"{name}: T negative", ValueError, "^num_tokens: must be at least 0, .* got -7$", num_tokens=-7),
        *(row(f"{name}: T = {value}", ValueError, f"^num_tokens: .* fit int32, got {value}$", num_tokens=value) for value in (2**31, 2**70, 2**31 - 254)),
    ]  # fmt: skip
    return rows


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
    *_built(mx.GroupLayout.from_counts),
    *_built(mx.GroupLayout.from_ends),
    *of_tensor(by_hand, "by hand", "tokens_per_expert", lambda: ints(2, 3), "(E,)", "int32", (torch.int64,), place="^expert_offsets: must be on meta"),
    *(bad for name in ("expert_offsets", "scale_offsets") for bad in (
        *of_tensor(by_hand, "by hand", name, lambda: ints(0, 2, 5), "(E+1,)", "int32", (torch.int64, torch.float32)),
        *(by_hand(f"by hand: {n} of {name}", ValueError, rf"^{name}: must have shape \(E\+1,\) = \(3,\), got \({n},", **{name: ints(*range(n))}) for n in (2, 4)))),
    by_hand("by hand: T a float", TypeError, "^num_tokens: must be an int", num_tokens=5.0),
    by_hand("by hand: T negative", ValueError, "^num_tokens: must be at least 0", num_tokens=-1),
    by_hand("by hand: T beyond int32", ValueError, "^num_tokens: .*int32", num_tokens=2**31 - 1),
]  # fmt: skip


def _valid(what: str, given: torch.Tensor, num_tokens: int, *, ends: bool = False) -> Odd:
    """The layout that truth computes in plain Python, whatever the data."""

    def prepare(g: Guards) -> tuple[Callable[[], object], Callable[[Any], None]]:
        tensor = g(given)
        build = mx.GroupLayout.from_ends if ends else mx.GroupLayout.from_counts
        expected = (truth.layout_from_ends if ends else truth.layout)(given.tolist(), num_tokens)

        def check(result: mx.GroupLayout) -> None:
            got = (result.tokens_per_expert, result.expert_offsets, result.scale_offsets)
            assert tuple(t.tolist() for t in got) == expected
            assert all(t.dtype == torch.int32 for t in got)

        return lambda: build(tensor, num_tokens), check

    return Odd(what, prepare)


def _hostile(ends: bool) -> list[Odd]:
    word = "ends" if ends else "counts"
    rows = [
        _valid(f"{word}: {what}", ints(*given, dtype=torch.int64 if what in cases.HUGE else torch.int32), t, ends=ends)
        for what, (given, t) in {**cases.HOSTILE, **cases.HUGE}.items()
    ]
    return [
        *rows,
        _valid(f"{word}: not monotone", ints(9, 2, 7, 1, 30), 20, ends=ends),
        _valid(f"{word}: every second of twice as many", ints(3, 90, 4, 90, 2, 90)[::2], 9, ends=ends),
        _valid(f"{word}: one for all experts", ints(4).expand(5), 20, ends=ends),
        _valid(f"{word}: E = 0", ints(), 7, ends=ends),
        _valid(f"{word}: E = 0, T = 0", ints(), 0, ends=ends),
        _valid(f"{word}: E = 1", ints(5), 5, ends=ends),
        _valid(f"{word}: E = 4096", torch.arange(4096, dtype=torch.int32) % 3, 4000, ends=ends),
        _valid(f"{word}: the largest T", ints(2**31 - 1, 5), 2**31 - 1 - 254, ends=ends),
    ]


def _six(device: Any) -> mx.GroupLayout:
    build = mx.GroupLayout.from_counts if device is META else mx.GroupLayout.from_ends
    return build(torch.ones(6, dtype=torch.int64, device=device), 9)


def _is_layout(groups: mx.GroupLayout) -> None:
    assert groups.expert_offsets.shape == groups.scale_offsets.shape == (7,)
    assert groups.scale_rows == 768


def _many(device: Any) -> mx.GroupLayout:
    """At most as many experts are padded as there are tokens: of 2**25 nine can have any."""
    return mx.GroupLayout.from_counts(torch.empty(2**25, dtype=torch.int32, device=META), 9)


def _has_nine(groups: mx.GroupLayout) -> None:
    assert groups.num_tokens == 9


ODD = [*_hostile(False), *_hostile(True), *shapes("counts and ends", _six, _is_layout), shapes("2**25 experts", _many, _has_nine)[0]]  # fmt: skip
