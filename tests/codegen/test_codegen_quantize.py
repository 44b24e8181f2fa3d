"""What the quantizer compiles to: packed conversion, 16-byte accesses, exact arithmetic, no
spills."""

from __future__ import annotations

from pathlib import Path

import kernels
import pytest
import torch
from compiling import Compiled, CompileFor

from hybrid_mxfp8.core.activation import NAMED, SwiGLU
from hybrid_mxfp8.core.formats import grouped_scale_rows, scale_cols
from hybrid_mxfp8.core.layout import GroupLayout
from hybrid_mxfp8.triton_kernels import quantize

E = 32
SIZES = {"decode": 64, "prefill": 16384}
K = 7168

VARIANTS: dict[str, tuple[torch.dtype, bool, SwiGLU | None, int]] = {
    "bf16": (torch.bfloat16, False, None, 32),
    "fp16": (torch.float16, False, None, 32),
    "fp32": (torch.float32, False, None, 32),
    "gather": (torch.bfloat16, True, None, 32),
    "swiglu": (torch.bfloat16, False, NAMED["swiglu"], 32),
    "gather swiglu": (torch.bfloat16, True, NAMED["swiglu"], 32),
    "swigluoai": (torch.bfloat16, False, NAMED["swigluoai"], 32),
    "gather 128": (torch.bfloat16, True, None, 128),
    "swiglu 128": (torch.bfloat16, False, NAMED["swiglu"], 128),
}
"""dtype, gather, swiglu, elements with one scale."""


PACKED_CONVERSION = r"cvt\.rn\.satfinite\.e4m3x2\.f32"
LOAD_16 = r"ld\.global(\.\w+)*\.v4\.b32"
LOAD_1_OR_2 = r"ld\.global(\.\w+)*\.b(8|16)"
STORE_16 = r"st\.global(\.\w+)*\.v4\.b32"
STORE_8 = r"st\.global(\.\w+)*\.v2\.b32"


def grouped(
    t: int, dtype: torch.dtype, gather: bool, swiglu: SwiGLU | None, group: int = 32, *,
    k: int = K, e: int = E, stride: int = 0,
) -> None:  # fmt: skip
    meta = torch.device("meta")
    width = k if swiglu is None else 2 * k
    x = torch.empty_strided((t, width), (stride or width, 1), dtype=dtype, device=meta)
    offsets = torch.empty(e + 1, dtype=torch.int32, device=meta)
    kernels.quantize(
        x,
        GroupLayout(offsets[1:], offsets, offsets, t),
        torch.empty(t, k, dtype=torch.float8_e4m3fn, device=meta),
        torch.empty(grouped_scale_rows(t, e), scale_cols(k), dtype=torch.uint8, device=meta),
        "rceil",
        torch.empty(t, dtype=torch.int32, device=meta) if gather else None,
        swiglu,
        group,
    )


def weights(e: int, n: int, k: int) -> None:
    meta = torch.device("meta")
    kernels.quantize_weights(
        torch.empty(e, n, k, dtype=torch.bfloat16, device=meta),
        torch.empty(e, n, k, dtype=torch.float8_e4m3fn, device=meta),
        torch.empty(e, -(-n // 128) * 128, scale_cols(k), dtype=torch.uint8, device=meta),
    )


def check(compiled: Compiled, folder: Path) -> None:
    """What holds for every variant."""
    assert compiled.count(PACKED_CONVERSION) > 0
    assert compiled.count(r"cvt\.\S*e4m3\S*") == compiled.count(PACKED_CONVERSION)
    # A flushed subnormal would be a wrong code: tiny blocks are scaled by 2**127.
    assert compiled.count(r"mul\.ftz") == 0
    resources = compiled.resources(folder)
    assert resources.stack == 0, "spills"
    assert resources.registers <= 128
    assert compiled.shared <= 8192


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", SIZES)
def test_grouped(compile_for: CompileFor, arch: int, size: str, variant: str, tmp_path: Path) -> None:
    dtype, _, swiglu, _ = VARIANTS[variant]
    compiled = compile_for(arch, quantize, "quantize_kernel", lambda: grouped(SIZES[size], *VARIANTS[variant]))
    check(compiled, tmp_path)
    config = quantize.select_quantize_config(SIZES[size], K, E)
    elements = config.block_rows * config.block_cols // (32 * config.num_warps)  # of one thread
    assert compiled.count(PACKED_CONVERSION) == elements // 2
    assert compiled.count(LOAD_16) == elements * dtype.itemsize // 16 * (1 if swiglu is None else 2)
    # No thread reads or writes elements in narrower pieces: what else is loaded are offsets and
    # indices.
    assert compiled.count(LOAD_1_OR_2) == 0
    # A decode program's threads hold 8 codes each, a prefill program's 16 a row; zeros of padding
    # go by 16 bytes.
    zeros = config.padding_tiles * 512 // (16 * 32 * config.num_warps)
    assert compiled.count(STORE_8) == (size == "decode")
    assert compiled.count(STORE_16) == zeros + elements // 16
    assert compiled.count(r"st\.global(\.\w+)*\.b16") == 0


@pytest.mark.parametrize("e", [1, 8, 128, 1024])
def test_counts(compile_for: CompileFor, arch: int, e: int, tmp_path: Path) -> None:
    """The form that scans the counts itself, for decode batches."""

    def call() -> None:
        meta = torch.device("meta")
        kernels.quantize(
            torch.empty(64, K, dtype=torch.bfloat16, device=meta),
            torch.empty(e, dtype=torch.int32, device=meta),
            torch.empty(64, K, dtype=torch.float8_e4m3fn, device=meta),
            torch.empty(grouped_scale_rows(64, e), scale_cols(K), dtype=torch.uint8, device=meta),
        )

    compiled = compile_for(arch, quantize, "quantize_kernel", call)
    check(compiled, tmp_path)
    assert compiled.count(LOAD_16) >= 1
    assert compiled.count(LOAD_1_OR_2) == 0


@pytest.mark.parametrize("shape", [(8, 4096, 7168), (128, 2880, 2880), (2, 136, 160)], ids=str)
def test_weights(compile_for: CompileFor, arch: int, shape: tuple[int, int, int], tmp_path: Path) -> None:
    compiled = compile_for(arch, quantize, "quantize_kernel", lambda: weights(*shape))
    check(compiled, tmp_path)
    # Where a row has fewer elements than eight for each thread, a thread has less than 16 bytes.
    assert compiled.count(LOAD_16) > 0 or shape[2] <= 256
    assert compiled.count(LOAD_1_OR_2) == 0


@pytest.mark.parametrize("k", [544, 992, 2880])
def test_wide_accesses_where_k_is_no_multiple_of_128(compile_for: CompileFor, arch: int, k: int) -> None:
    """K % 32 is enough: each row starts at a 16-byte boundary, and no 16 bytes straddle K."""
    compiled = compile_for(arch, quantize, "quantize_kernel", lambda: grouped(64, torch.bfloat16, False, None, k=k))
    assert compiled.count(LOAD_16) > 0
    assert compiled.count(LOAD_1_OR_2) == 0


@pytest.mark.parametrize("rounding", ["floor", "even"])
def test_roundings_differ_in_one_constant(compile_for: CompileFor, rounding: str) -> None:
    """The rounding is one added integer: no variant costs an instruction more than rceil."""

    def lines(name: str) -> int:
        meta = torch.device("meta")
        w = torch.empty(1, 128, 512, dtype=torch.bfloat16, device=meta)
        values = torch.empty(1, 128, 512, dtype=torch.float8_e4m3fn, device=meta)
        scales = torch.empty(1, 128, 16, dtype=torch.uint8, device=meta)

        def call() -> None:
            kernels.quantize_weights(w, values, scales, name)

        compiled = compile_for(90, quantize, "quantize_kernel", call)
        return len([line for line in compiled.ptx.splitlines() if line.strip().endswith(";")])

    assert lines(rounding) <= lines("rceil")


@pytest.mark.parametrize("e", [1, 256, 1024, 2000])
def test_many_experts(compile_for: CompileFor, e: int, tmp_path: Path) -> None:
    compiled = compile_for(90, quantize, "quantize_kernel", lambda: grouped(4096, torch.bfloat16, False, None, e=e))
    check(compiled, tmp_path)


def test_a_batch_of_another_size_compiles_nothing_new(compile_for: CompileFor) -> None:
    """Token counts within one configuration share a kernel, whatever they are divisible by."""
    compiled = set()
    for t in (1, 2, 3, 16, 17, 48, 100, 128, 146):
        x = compile_for(90, quantize, "quantize_kernel", lambda t=t: grouped(t, torch.bfloat16, True, None))
        compiled.add(id(x.kernel))
    assert len(compiled) == 1


def test_unaligned_rows_still_compile(compile_for: CompileFor, arch: int, tmp_path: Path) -> None:
    """A row stride that is no multiple of 8 elements rules out wide loads, and nothing else."""

    def call() -> None:
        grouped(64, torch.bfloat16, False, None, stride=7169)

    compiled = compile_for(arch, quantize, "quantize_kernel", call)
    check(compiled, tmp_path)
