"""A compiled kernel is found again only by arguments that Triton would compile alike."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Hashable
from typing import Any

import cases
import pytest
import torch
from fake_hopper import aligned_bytes, stand_in
from fake_triton import Flat, Kernel

import hybrid_mxfp8 as mx
from hybrid_mxfp8.dispatch import device as hardware

LAUNCHERS = ("combine", "dequantize_tokens", "expert_bias", "group_layout", "grouped_gemm", "quantize", "route")


def specialized(kernel: Any, arguments: tuple[Any, ...]) -> tuple[Hashable, ...]:
    """What Triton compiles a kernel for: dtypes, pointers on a 16-byte boundary, integers that are 1 or multiples of 16."""
    free = kernel.kwargs["do_not_specialize"] or ()
    found: list[Hashable] = [kernel.fn.__name__]
    for name, value in zip(kernel.arg_names, arguments, strict=False):
        number = value.data_ptr() if isinstance(value, torch.Tensor) else value
        kind = value.dtype if isinstance(value, torch.Tensor) else type(value)
        found.append((name, kind, None if value is None or name in free else (number % 16 == 0, number == 1)))
    return tuple(found)


def off(tensor: torch.Tensor) -> torch.Tensor:
    """The same values one element past a 16-byte boundary."""
    raw = torch.empty(tensor.numel() * tensor.itemsize + 32, dtype=torch.uint8)
    offset = -raw.data_ptr() % 16 + tensor.itemsize
    there = raw[offset : offset + tensor.numel() * tensor.itemsize].view(tensor.dtype).view(tensor.shape)
    there.view(torch.uint8).copy_(tensor.contiguous().view(torch.uint8))
    return there


def quantizations() -> list[Callable[[], object]]:
    from hybrid_mxfp8.triton_kernels.quantize import quantize_counts, quantize_grouped, quantize_weights

    groups, x = cases.layout([3, 2], 5), torch.zeros(5, 64)
    values, scales = torch.empty(5, 64, dtype=torch.float8_e4m3fn), torch.empty(groups.scale_rows, 4, dtype=torch.uint8)
    options: dict[str, Any] = {"scale_rounding": "rceil", "row_index": None, "swiglu": None}

    def weights(w: torch.Tensor) -> Callable[[], object]:
        e, n, k = w.shape
        into = torch.empty(e, n, k, dtype=torch.float8_e4m3fn), torch.empty(e, 128, 4, dtype=torch.uint8)
        return lambda: quantize_weights(w, *into, scale_rounding="rceil")

    rows = [x, off(x), x.bfloat16(), x.half(), torch.zeros(5, 65)[:, :64], torch.zeros(400).as_strided((5, 64), (1, 1))]
    given = [torch.tensor([3, 2], dtype=dtype) for dtype in (torch.int32, torch.int64)]
    matrices = [torch.zeros(2, 1, 64), torch.zeros(2, 32, 64), torch.zeros(2, 32, 64)[:, :24]]
    matrices += [torch.zeros(2, 24 * 64 + 1)[:, : 24 * 64].unflatten(1, (24, 64)), torch.zeros(2, 24, 65)[:, :, :64]]
    return [
        *(lambda r=r: quantize_grouped(r, groups, values, scales, **options) for r in rows),
        lambda: quantize_grouped(x, groups, off(values), scales, **options),
        lambda: quantize_grouped(x, groups, values, off(scales), **options),
        *(lambda c=c: quantize_counts(x, c, values, scales, **options) for c in given),
        *(weights(w) for w in matrices),
    ]


def products() -> list[Callable[[], object]]:
    from hybrid_mxfp8.triton_kernels.gemm.portable import grouped_gemm

    groups = cases.layout([3, 2], 5)
    xq = mx.quantize_grouped(torch.zeros(5, 64), groups, backend="reference")

    def product(n: int, dtype: torch.dtype, shifted: int | None = None) -> Callable[[], object]:
        wq = mx.quantize_weights(torch.zeros(2, n, 64), backend="reference")
        operands = [xq.values, xq.scales, wq.values, wq.scales]
        x, xs, w, ws = (off(t) if i == shifted else t for i, t in enumerate(operands))
        return lambda: grouped_gemm(x, xs, groups, w, ws, torch.empty(5, n, dtype=dtype))

    calls = [product(n, dtype) for n in (8, 16) for dtype in cases.DTYPES]
    return [*calls, *(product(16, torch.float32, shifted) for shifted in range(4))]


def steps_of_a_layer() -> list[Callable[[], object]]:
    from hybrid_mxfp8.triton_kernels.moe.combine import combine
    from hybrid_mxfp8.triton_kernels.moe.expert_bias import add_expert_bias

    inverse_permutation = torch.zeros(5, 2, dtype=torch.int32)
    ids, long, weights, bias = (
        inverse_permutation.clone(),
        inverse_permutation.long(),
        torch.ones(5, 2),
        torch.zeros(3, 64),
    )
    y, out = torch.zeros(10, 64), torch.zeros(5, 64)
    arguments: list[tuple[Any, ...]] = [
        (y, inverse_permutation, ids, weights, None, out),
        (off(y), inverse_permutation, ids, weights, None, out),
        (y.half(), inverse_permutation, ids, weights, None, out),
        (y, inverse_permutation, ids, weights.half(), None, out),
        (y, inverse_permutation, ids, weights, None, off(out)),
        (y, inverse_permutation, ids, weights, None, out.half()),
        (y, inverse_permutation, ids, weights, None, torch.zeros(5, 65)[:, :64]),
        (torch.zeros(10, 56), inverse_permutation, ids, weights, None, torch.zeros(5, 64)[:, :56]),
        (y, inverse_permutation, ids, weights, bias, out),
        (y, inverse_permutation, long, weights, bias, out),
        (y, inverse_permutation, ids, weights, off(bias), out),
        (y, inverse_permutation, ids, weights, bias.half(), out),
    ]
    biased: list[tuple[Any, ...]] = [
        (y, inverse_permutation, ids, bias),
        (off(y), inverse_permutation, ids, bias),
        (y.half(), inverse_permutation, ids, bias),
        (y, inverse_permutation, long, bias),
        (y, inverse_permutation, ids, off(bias)),
        (y, inverse_permutation, ids, bias.half()),
        (torch.zeros(10, 56), inverse_permutation, ids, torch.zeros(3, 56)),
    ]
    return [*(lambda a=a: combine(*a) for a in arguments), *(lambda b=b: add_expert_bias(*b) for b in biased)]


def routings() -> list[Callable[[], object]]:
    from hybrid_mxfp8.triton_kernels.group_layout import group_offsets
    from hybrid_mxfp8.triton_kernels.moe.route import route, scratch_elements

    def routed(tokens: int, dtype: torch.dtype, shifted: bool) -> Callable[[], object]:
        ids = torch.zeros(tokens, 2, dtype=dtype)
        out = [torch.zeros(size, dtype=torch.int32) for size in (2 * tokens, (tokens, 2), 17)]
        scratch = torch.zeros(scratch_elements(2 * tokens, 5), dtype=torch.int32)
        return lambda: route(off(ids) if shifted else ids, 5, out[0], out[1], out[2], scratch)

    dtypes = (torch.int32, torch.int64)
    return [
        *(routed(tokens, dtype, shifted) for tokens in (8, 3000) for dtype in dtypes for shifted in (False, True)),
        *(lambda d=d: group_offsets(torch.tensor([3, 2], dtype=d), 5, False) for d in dtypes),
    ]


def expansions() -> list[Callable[[], object]]:
    from hybrid_mxfp8.triton_kernels.gemm.dequantize_tokens import dequantize_tokens
    from hybrid_mxfp8.triton_kernels.gemm.hopper_config import HopperGemmConfig, WorkspaceLayout

    groups = cases.layout([3, 2], 5)
    xq = mx.quantize_grouped(torch.zeros(5, 64), groups, backend="reference")
    layout = WorkspaceLayout.of(5, 2, 64, HopperGemmConfig(16, 16, 64, 2))
    workspace = torch.zeros(layout.size + 256, dtype=torch.uint8)
    workspace = workspace[-workspace.data_ptr() % 256 :][: layout.size]
    return [
        lambda: dequantize_tokens(xq.values, xq.scales, groups, workspace, layout, 16, 5),
        lambda: dequantize_tokens(off(xq.values), xq.scales, groups, workspace, layout, 16, 5),
        lambda: dequantize_tokens(xq.values, off(xq.scales), groups, workspace, layout, 16, 5),
        lambda: dequantize_tokens(xq.values, xq.scales, groups, off(workspace), layout, 16, 5),
    ]


@pytest.mark.parametrize(
    "calls", [quantizations, products, steps_of_a_layer, routings, expansions], ids=lambda f: f.__name__
)
def test_a_key_says_all_that_triton_specializes_on(
    calls: Callable[[], list[Callable[[], object]]], interpreter: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is found by a key was compiled for other arguments: it must be what Triton would compile for these."""
    compiled: dict[Hashable, tuple[Hashable, ...]] = {}

    def record(kernel: Any, programs: int, arguments: Any, constants: Any, options: Any, key: Hashable) -> None:
        found = specialized(kernel, arguments)
        assert compiled.setdefault((key, constants, options), found) == found

    made = calls()
    for name in LAUNCHERS:
        monkeypatch.setattr(importlib.import_module(f"hybrid_mxfp8.triton_kernels.{name}"), "launch", record)
    for call in made:
        call()
    assert len(set(compiled.values())) > len(made) // 2


def test_alignment_is_of_16_bytes(interpreter: None) -> None:
    from hybrid_mxfp8.triton_kernels.launch import aligned

    buffer = aligned_bytes(64)
    assert [by for by in range(33) if aligned(buffer[by:])] == [0, 16, 32]
    assert aligned(buffer, buffer[16:])
    assert not aligned(buffer, buffer[8:])


@pytest.mark.parametrize("changed", ["nothing", "device", "constants", "options", "key"])
def test_a_kernel_is_loaded_for_each_device_constant_and_option(
    changed: str, interpreter: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And launched at once: a first launch is the one that Triton makes while it compiles."""
    from hybrid_mxfp8.triton_kernels.launch import launch

    device = stand_in(monkeypatch, "3.6")
    kernel, x = Kernel("k", device, Flat), torch.zeros(4)
    given: dict[str, Any] = {"constants": (64,), "options": (("num_warps", 4),), "key": "k", "device": "cpu"}
    other: dict[str, Any] = {"constants": (32,), "options": (("num_warps", 8),), "key": "l", "device": "meta"}
    for arguments in (given, given | {name: value for name, value in other.items() if name == changed}):
        device.take()
        launch(
            kernel, 1, (x.to(arguments["device"]), 5), arguments["constants"], arguments["options"], arguments["key"]
        )
        assert len(device.launches) == 1
    assert device.by_triton == ([] if changed == "nothing" else ["k"])


def test_no_programs_are_no_launch(interpreter: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from hybrid_mxfp8.triton_kernels.launch import launch

    device = stand_in(monkeypatch, "3.6")
    assert launch(Kernel("k", device, Flat), 0, (torch.zeros(1),), (), (), "k") is None
    assert device.launches == []


def test_the_hopper_kernel_is_switched_at_once(interpreter: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from hybrid_mxfp8.triton_kernels.gemm import portable as grouped_gemm

    monkeypatch.setattr(grouped_gemm, "_capability", lambda device: (9, 0))
    gpu = torch.device("cuda", 0)
    seen = []
    for value in ("", "0", "1", "0"):
        monkeypatch.setenv("HYBRID_MXFP8_HOPPER_GEMM", value)
        seen.append(grouped_gemm.hopper_config_for(64, 8, 256, 256, gpu) is not None)
    assert seen == [True, False, True, False]


@pytest.mark.parametrize(
    ("capability", "num_experts", "n", "k", "taken"),
    [
        ((10, 3), 256, 4096, 7168, True),
        ((12, 0), 256, 4096, 7168, False),
        ((10, 0), 2**20, 2**11 - 8, 32, True),
        ((10, 0), 2**20, 2**11, 32, False),  # 2**31 rows
        ((10, 0), 1, 2**31 - 136, 32, True),
        ((10, 0), 1, 2**31 - 120, 32, False),  # the last tile's rows reach beyond
        ((10, 0), 2**16, 128, 2**22 - 128, True),
        ((10, 0), 2**16, 128, 2**22, False),  # 2**31 scale tiles
    ],
)
def test_blackwell_takes_what_32_bits_reach(
    capability: tuple[int, int],
    num_experts: int,
    n: int,
    k: int,
    taken: bool,
    interpreter: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from hybrid_mxfp8.triton_kernels.gemm import portable as grouped_gemm

    monkeypatch.setattr(grouped_gemm, "_capability", lambda device: capability)
    assert grouped_gemm.blackwell_takes(num_experts, n, k, torch.device("cuda", 0)) is taken


def test_scales_to_write_into_must_be_aligned(interpreter: None, rng: torch.Generator) -> None:
    """Padding is zeroed in words."""
    groups = cases.layout([3, 2], 5)
    out = mx.GroupedMXFP8(
        torch.empty(5, 64, dtype=torch.float8_e4m3fn),
        off(torch.empty(groups.scale_rows, 4, dtype=torch.uint8)),
        groups,
    )
    with pytest.raises(ValueError, match=r"^out: must start at a 16-byte boundary, got address 0x"):
        mx.quantize_grouped(cases.random_rows(5, 64, torch.bfloat16, rng), groups, out=out)


def test_a_layout_on_a_gpu_without_triton_comes_from_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("hybrid_mxfp8.core.layout.compiles_kernels", lambda device: asked.append(device) or False)
    groups = mx.GroupLayout.from_counts(torch.tensor([1, 2]), 3)
    assert asked == [torch.device("cpu")]
    assert groups.expert_offsets.tolist() == [0, 1, 3]
    assert not hardware.compiles_kernels(torch.device("cpu"))
