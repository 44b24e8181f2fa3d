"""A compiled kernel is found again only by arguments that Triton would compile alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cases
import pytest
import torch

import hybrid_mxfp8 as mx
from hybrid_mxfp8 import hardware


@pytest.fixture
def key_of(interpreter: None, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], Any]:
    """key_of(call): the key of the one launch that ``call`` makes; nothing runs."""
    from hybrid_mxfp8.triton_kernels import grouped_gemm, quantize

    keys: list[Any] = []
    for module in (grouped_gemm, quantize):
        monkeypatch.setattr(module, "launch", lambda *args: keys.append(args[-1]))

    def find(call: Callable[[], object]) -> Any:
        keys.clear()
        call()
        (key,) = keys
        return key

    return find


def shifted(tensor: torch.Tensor) -> torch.Tensor:
    """The same values one byte past a 16-byte boundary."""
    raw = torch.empty(tensor.numel() * tensor.itemsize + 16, dtype=torch.uint8)
    offset = -raw.data_ptr() % 16 + 1
    there = raw[offset : offset + tensor.numel() * tensor.itemsize]
    return (
        there.view(tensor.shape) if tensor.dtype == torch.uint8 else there.view(torch.float8_e4m3fn).view(tensor.shape)
    )


def test_each_unaligned_operand_of_a_product_is_a_kernel_of_its_own(key_of: Any, rng: torch.Generator) -> None:
    from hybrid_mxfp8.triton_kernels.grouped_gemm import grouped_gemm

    groups = cases.layout([3, 2], 5)
    xq = mx.quantize_grouped(cases.random_rows(5, 64, torch.bfloat16, rng), groups, backend="reference")
    wq = mx.quantize_weights(torch.randn(2, 16, 64, generator=rng), backend="reference")
    out = torch.empty(5, 16)
    operands = {"x": xq.values, "x scales": xq.scales, "w": wq.values, "w scales": wq.scales}

    def key(unaligned: str | None) -> Any:
        given = {name: shifted(tensor) if name == unaligned else tensor for name, tensor in operands.items()}
        return key_of(lambda: grouped_gemm(given["x"], given["x scales"], groups, given["w"], given["w scales"], out))

    assert len({key(None), *(key(name) for name in operands)}) == 1 + len(operands)


def test_each_unaligned_output_of_the_quantizer_is_a_kernel_of_its_own(key_of: Any, rng: torch.Generator) -> None:
    from hybrid_mxfp8.triton_kernels.quantize import quantize_grouped

    groups = cases.layout([3, 2], 5)
    x = cases.random_rows(5, 64, torch.bfloat16, rng)
    values = torch.empty(5, 64, dtype=torch.float8_e4m3fn)
    scales = torch.empty(groups.scale_rows, 4, dtype=torch.uint8)

    def key(v: torch.Tensor, s: torch.Tensor) -> Any:
        return key_of(lambda: quantize_grouped(x, groups, v, s, scale_rounding="rceil", row_index=None, swiglu=None))

    assert len({key(values, scales), key(shifted(values), scales), key(values, shifted(scales))}) == 3


def test_the_hopper_kernel_is_switched_at_once(interpreter: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from hybrid_mxfp8.triton_kernels import grouped_gemm

    monkeypatch.setattr(grouped_gemm, "_capability", lambda device: (9, 0))
    gpu = torch.device("cuda", 0)
    seen = []
    for value in ("", "0", "1", "0"):
        monkeypatch.setenv("HYBRID_MXFP8_HOPPER_GEMM", value)
        seen.append(grouped_gemm.hopper_config_for(64, 8, 256, 256, gpu) is not None)
    assert seen == [True, False, True, False]


def test_blackwell_takes_what_32_bits_reach(interpreter: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from hybrid_mxfp8.triton_kernels import grouped_gemm

    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(grouped_gemm, "_capability", lambda device: (10, 3))
    assert grouped_gemm.blackwell_takes(256, 4096, 7168, gpu)
    assert not grouped_gemm.blackwell_takes(2**20, 2**11, 32, gpu)
    monkeypatch.setattr(grouped_gemm, "_capability", lambda device: (12, 0))
    assert not grouped_gemm.blackwell_takes(256, 4096, 7168, gpu)


def test_scales_to_write_into_must_be_aligned(interpreter: None, rng: torch.Generator) -> None:
    """Padding is zeroed in words."""
    groups = cases.layout([3, 2], 5)
    out = mx.GroupedMXFP8(
        torch.empty(5, 64, dtype=torch.float8_e4m3fn),
        shifted(torch.empty(groups.scale_rows, 4, dtype=torch.uint8)),
        groups,
    )
    with pytest.raises(ValueError, match=r"^out: must start at a 16-byte boundary, got address 0x"):
        mx.quantize_grouped(cases.random_rows(5, 64, torch.bfloat16, rng), groups, out=out)


def test_a_layout_on_a_gpu_without_triton_comes_from_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("hybrid_mxfp8.groups.compiles_kernels", lambda device: asked.append(device) or False)
    groups = mx.GroupLayout.from_counts(torch.tensor([1, 2]), 3)
    assert asked == [torch.device("cpu")]
    assert groups.expert_offsets.tolist() == [0, 1, 3]
    assert not hardware.compiles_kernels(torch.device("cpu"))
