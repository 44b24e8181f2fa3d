"""What is written shares no memory with what is read, byte for byte: what only lies beside it is taken.

Overlaps of each argument are in tests/bad_calls.
"""

from __future__ import annotations

import cases
import pytest
import torch
from fake_hopper import aligned_bytes

import hybrid_mxfp8 as mx


def quantize(x: torch.Tensor, groups: mx.GroupLayout, values: torch.Tensor, scales: torch.Tensor) -> None:
    values = values.view(torch.float8_e4m3fn).view(x.shape)
    out = mx.GroupedMXFP8.unchecked(values, scales.view(groups.scale_rows, 4), groups)
    mx.quantize_grouped(x, groups, out=out, backend="reference")


def test_neighbours_do_not_overlap() -> None:
    """Buffers cut from one piece of memory, one behind the other."""
    groups = cases.layout([3, 4], 7)
    x, values, scales = aligned_bytes(7 * 192 + groups.scale_rows * 4).split((7 * 128, 7 * 64, groups.scale_rows * 4))
    quantize(x.view(torch.bfloat16).view(7, 64), groups, values, scales)


def test_what_is_behind_the_last_element_of_a_strided_tensor_is_free() -> None:
    """It ends there, and not where a further row would."""
    groups, end = cases.layout([1, 2], 3), 2 * (2 * 128 + 64)
    memory, scales = aligned_bytes(end + 3 * 64), aligned_bytes(groups.scale_rows * 4)
    x = memory[:end].view(torch.bfloat16).as_strided((3, 64), (128, 1))
    quantize(x, groups, memory[end:], scales)
    with pytest.raises(ValueError, match=r"^out: must not overlap x, got"):
        quantize(x, groups, memory[end - 16 : -16], scales)


@pytest.mark.parametrize("name", ["expert_offsets", "scale_offsets"])
def test_offsets_inside_the_output_are_refused(name: str) -> None:
    groups = cases.layout([1, 2], 3)
    values, scales = aligned_bytes(3 * 64), aligned_bytes(groups.scale_rows * 4)
    inside = scales.view(torch.int32)[:3].copy_(getattr(groups, name))
    groups = mx.GroupLayout.unchecked(**{**vars(groups), name: inside})
    with pytest.raises(ValueError, match=f"^out: must not overlap {name}, got"):
        quantize(torch.ones(3, 64), groups, values, scales)
