"""GroupLayout: from counts, from ends, by hand; and the device data that no router should send."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cases
import torch
import truth
from guards import Guards

import hybrid_mxfp8 as mx

from .row import META, Bad, Odd, ints, refused, shapes

ARGUMENT = {mx.GroupLayout.from_counts: "tokens_per_expert", mx.GroupLayout.from_ends: "offs"}
DTYPES = (torch.bool, torch.int8, torch.int16, torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _built(build: Callable[..., mx.GroupLayout]) -> list[Bad]:
    name = ARGUMENT[build]
    row = refused(build, lambda: {name: ints(2, 3), "num_tokens": 5})
    rows = [
        *(
            row(f"{name} of {dtype}", TypeError, f"^{name}: dtype must be int32 or int64, got {str(dtype)[6:]}$", **{name: torch.ones(3).to(dtype)})
            for dtype in DTYPES
        ),
        row(f"{name} a tuple", TypeError, rf"^{name}: must be a torch\.Tensor", **{name: (1, 2)}),
        row(f"{name} None", TypeError, rf"^{name}: must be a torch\.Tensor", **{name: None}),
        row(f"{name} a scalar", ValueError, rf"^{name}: must have shape \(E,\), got \(\)$", **{name: torch.tensor(3)}),
        row(f"{name} a matrix", ValueError, rf"^{name}: must have shape \(E,\), got \(1, 2\)$", **{name: torch.ones(1, 2, dtype=torch.int32)}),
        row(f"{name} sparse", TypeError, rf"^{name}: must be a dense tensor, got layout sparse_coo$", **{name: ints(1, 2).to_sparse()}),
        row(f"{name}: T None", TypeError, "^num_tokens: must be an int, got NoneType$", num_tokens=None),
        row(f"{name}: T a string", TypeError, "^num_tokens: must be an int, got str$", num_tokens="5"),
        row(f"{name}: T True", TypeError, "^num_tokens: must be an int, got bool$", num_tokens=True),
        row(f"{name}: T a float", TypeError, "^num_tokens: must be an int, got float$", num_tokens=5.0),
        row(f"{name}: T a tensor", TypeError, "^num_tokens: must be an int, got Tensor$", num_tokens=torch.tensor(5)),
        row(f"{name}: T negative", ValueError, "^num_tokens: must be at least 0, .* got -7$", num_tokens=-7),
        row(f"{name}: T beyond int32", ValueError, "^num_tokens: .* fit int32, got 2147483648$", num_tokens=2**31),
        row(f"{name}: T beyond int64", ValueError, "^num_tokens: .* fit int32, got", num_tokens=2**70),
        row(f"{name}: padding beyond int32", ValueError, "^num_tokens: .* fit int32, got", num_tokens=2**31 - 254),
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
    by_hand("by hand: counts a list", TypeError, r"^tokens_per_expert: must be a torch\.Tensor", tokens_per_expert=[2, 3]),
    by_hand("by hand: counts int64", TypeError, "^tokens_per_expert: dtype must be int32", tokens_per_expert=ints(2, 3, dtype=torch.int64)),
    by_hand("by hand: counts a matrix", ValueError, r"^tokens_per_expert: must have shape \(E,\)", tokens_per_expert=torch.ones(2, 1, dtype=torch.int32)),
    by_hand("by hand: counts with gaps", ValueError, "^tokens_per_expert: must be contiguous", tokens_per_expert=ints(2, 0, 3, 0)[::2]),
    by_hand("by hand: E offsets", ValueError, r"^expert_offsets: must have shape \(E\+1,\) = \(3,\), got \(2,\)$", expert_offsets=ints(0, 2)),
    by_hand("by hand: E+2 offsets", ValueError, r"^expert_offsets: must have shape \(E\+1,\) = \(3,\), got \(4,\)$", expert_offsets=ints(0, 2, 5, 5)),
    by_hand("by hand: no offsets", ValueError, r"^expert_offsets: must have shape", expert_offsets=ints()),
    by_hand("by hand: offsets int64", TypeError, "^expert_offsets: dtype must be int32, got int64$", expert_offsets=ints(0, 2, 5, dtype=torch.int64)),
    by_hand("by hand: offsets float", TypeError, "^expert_offsets: dtype must be int32, got float32$", expert_offsets=torch.zeros(3)),
    by_hand("by hand: offsets with gaps", ValueError, "^expert_offsets: must be contiguous", expert_offsets=ints(0, 0, 2, 0, 5, 0)[::2]),
    by_hand("by hand: offsets elsewhere", ValueError, "^expert_offsets: must be on cpu", expert_offsets=ints(0, 2, 5).to(META)),
    by_hand("by hand: E scale offsets", ValueError, r"^scale_offsets: must have shape \(E\+1,\) = \(3,\), got \(2,\)$", scale_offsets=ints(0, 128)),
    by_hand("by hand: scale offsets None", TypeError, r"^scale_offsets: must be a torch\.Tensor", scale_offsets=None),
    by_hand("by hand: scale offsets elsewhere", ValueError, "^scale_offsets: must be on cpu", scale_offsets=ints(0, 2, 5).to(META)),
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
