"""Counts scanned by the quantizer itself: the same bytes and the same layout as a layout built first."""

from __future__ import annotations

import cases
import pytest
import torch

import hybrid_mxfp8 as mx
from hybrid_mxfp8.triton_kernels import quantize
from hybrid_mxfp8.triton_kernels.quantize import can_fuse_counts

COUNTS = [
    pytest.param([3, 0, 130, 17], 150, id="ragged"),
    pytest.param([1, 1, 1], 8, id="rows beyond"),
    pytest.param([0, 0, 0], 4, id="nothing"),
    pytest.param([0, 0, 5, -3, 1000], 40, id="negative and too many"),
    pytest.param([2**31 - 1, 2**31 - 1, 1], 9, id="sums beyond int32"),
    pytest.param([1] * 300, 300, id="many experts"),
    pytest.param([7], 7, id="one expert"),
]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("counts", "num_tokens"), COUNTS)
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_counts_give_what_their_layout_gives(
    interpreter: None, rng: torch.Generator, counts: list[int], num_tokens: int, dtype: torch.dtype, backend: str
) -> None:
    x = cases.random_rows(num_tokens, 160, torch.bfloat16, rng)
    given = torch.tensor(counts, dtype=dtype)
    groups = mx.GroupLayout.from_counts(given, num_tokens)
    expected = mx.quantize_grouped(x, groups, out=cases.poisoned_output(groups, 160), backend="reference")
    result = mx.quantize_grouped(x, given, out=cases.poisoned_output(groups, 160), backend=backend)
    assert torch.equal(result.values.view(torch.uint8), expected.values.view(torch.uint8))
    assert torch.equal(result.scales, expected.scales)
    assert result.groups.num_tokens == num_tokens
    for name in ("tokens_per_expert", "expert_offsets", "scale_offsets"):
        assert torch.equal(getattr(result.groups, name), getattr(groups, name)), name


def test_gather_and_swiglu_with_counts(interpreter: None, rng: torch.Generator) -> None:
    x = cases.random_rows(5, 128, torch.bfloat16, rng)
    index = torch.tensor([4, 0, 0, 2, 3, 1, 4], dtype=torch.int32)
    counts = torch.tensor([2, 4, 1], dtype=torch.int32)
    groups = mx.GroupLayout.from_counts(counts, 7)
    for activation in (None, "swiglu"):
        fused = mx.quantize_grouped(x, counts, row_index=index, activation=activation, backend="triton")
        plain = mx.quantize_grouped(x, groups, row_index=index, activation=activation, backend="triton")
        assert torch.equal(fused.values.view(torch.uint8), plain.values.view(torch.uint8))
        assert torch.equal(fused.scales[:384], plain.scales[:384])


def test_a_decode_batch_is_one_launch(interpreter: None, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_second_launch(*args: object) -> None:
        raise AssertionError("a layout was built by itself")

    monkeypatch.setattr(mx.GroupLayout, "from_counts", no_second_launch)
    mx.quantize_grouped(cases.random_rows(3, 64, torch.bfloat16, rng), torch.tensor([1, 2]), backend="triton")


def test_too_large_a_batch_builds_its_layout_first(
    interpreter: None, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize, "FUSED_COUNTS_MAX_ELEMENTS", 64)
    monkeypatch.setattr(quantize, "quantize_counts", None)
    mx.quantize_grouped(cases.random_rows(3, 64, torch.bfloat16, rng), torch.tensor([1, 2]), backend="triton")


@pytest.mark.parametrize(
    ("num_rows", "k", "num_experts", "expected"),
    [
        (1, 32, 1, True),
        (256, 7168, 256, True),
        (8, 4096, 1024, True),
        (8, 4096, 1025, False),
        (512, 7168, 8, False),
        (0, 32, 4, False),
        (4, 32, 0, False),
    ],
)
def test_can_fuse_counts(num_rows: int, k: int, num_experts: int, expected: bool) -> None:
    assert can_fuse_counts(num_rows, k, num_experts) is expected


def test_errors(rng: torch.Generator) -> None:
    x = cases.random_rows(3, 64, torch.bfloat16, rng)
    with pytest.raises(TypeError, match=r"groups: dtype must be int32 or int64, got float32"):
        mx.quantize_grouped(x, torch.ones(2))
    with pytest.raises(ValueError, match=r"groups: must have shape \(E,\), got \(1, 2\)"):
        mx.quantize_grouped(x, torch.ones(1, 2, dtype=torch.int32))
    with pytest.raises(TypeError, match=r"groups: must be a GroupLayout or a tensor of counts \(E,\), got list"):
        mx.quantize_grouped(x, [1, 2])  # type: ignore[arg-type]
