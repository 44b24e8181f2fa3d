"""What the quantizer compiles to: packed conversion, 16-byte accesses, exact arithmetic."""

from __future__ import annotations

from typing import Any

import kernels
import pytest
import torch
from compiling import LOAD_16, STORE_16, Compiled, CompileFor, empty

from hybrid_mxfp8.core.activation import NAMED, SwiGLU
from hybrid_mxfp8.core.formats import grouped_scale_rows, scale_cols
from hybrid_mxfp8.core.layout import GroupLayout
from hybrid_mxfp8.core.token_record import TokenRecord
from hybrid_mxfp8.triton_kernels import quantize

E, K = 32, 7168
SIZES = {"decode": 64, "prefill": 16384}
E4M3 = torch.float8_e4m3fn

VARIANTS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "fp16": {"dtype": torch.float16},
    "fp32": {"dtype": torch.float32},
    "gather": {"gather": True},
    "swiglu": {"swiglu": NAMED["swiglu"]},
    "gather swiglu": {"gather": True, "swiglu": NAMED["swiglu"]},
    "swigluoai": {"swiglu": NAMED["swigluoai"]},
    "gather 128": {"gather": True, "group": 128},
    "swiglu 128": {"swiglu": NAMED["swiglu"], "group": 128},
}

PACKED_CONVERSION = r"cvt\.rn\.satfinite\.e4m3x2\.f32"
LOAD_1_OR_2 = r"ld\.global(\.\w+)*\.b(8|16)"
LOAD_8 = r"ld\.global(\.\w+)*\.v2\.b32"
STORE_8 = r"st\.global(\.\w+)*\.v2\.b32"


@pytest.fixture
def compile_quantizer(compile_for: CompileFor) -> CompileFor:
    """compile_quantizer(arch, steps): their launch, with what holds for every variant."""

    def compile_one(arch: int, steps: tuple[Any, ...]) -> Compiled:
        compiled = compile_for(arch, quantize.quantize_kernel, lambda: kernels.launch(*steps))
        assert compiled.count(r"cvt\.\S*e4m3\S*") == compiled.count(PACKED_CONVERSION)
        # A flushed subnormal would be a wrong code: tiny blocks are scaled by 2**127.
        assert compiled.count(r"mul\.ftz") == 0
        assert compiled.usage["REG"] <= 128
        assert compiled.shared <= 8192
        return compiled

    return compile_one


def grouped(
    t: int, dtype: torch.dtype = torch.bfloat16, gather: bool = False, swiglu: SwiGLU | None = None, group: int = 32,
    *, k: int = K, e: int = E, stride: int = 0, counts: bool = False,
) -> tuple[Any, ...]:  # fmt: skip
    width = k if swiglu is None else 2 * k
    offsets = empty(e + 1, dtype=torch.int32)
    x = torch.empty_strided((t, width), (stride or width, 1), dtype=dtype, device="meta")
    return kernels.quantize_steps(
        x,
        empty(e, dtype=torch.int32) if counts else GroupLayout(offsets[1:], offsets, offsets, t),
        empty(t, k, dtype=E4M3),
        empty(grouped_scale_rows(t, e), scale_cols(k), dtype=torch.uint8),
        "rceil",
        empty(t, dtype=torch.int32) if gather else None,
        swiglu,
        group,
    )


def of_layer(tokens: int, top_k: int, copied: bool) -> tuple[Any, ...]:
    """Tokens to the rows of their choices; of MXFP8, in records of their values and scales."""
    x, x_scales, rows = empty(tokens, K, dtype=torch.bfloat16), None, tokens * top_k
    if copied:
        record = TokenRecord(K, top_k)
        x, x_scales, _, _ = record.split(empty(tokens, record.size, dtype=torch.uint8))
    offsets, scales = empty(E + 1, dtype=torch.int32), (grouped_scale_rows(rows, E), scale_cols(K))
    return kernels.quantize_steps(
        x,
        GroupLayout(offsets[1:], offsets, offsets, rows),
        empty(rows, K, dtype=E4M3),
        empty(*scales, dtype=torch.uint8),
        x_scales=x_scales,
        choices=(empty(tokens, top_k, dtype=torch.int32), empty(tokens, top_k, dtype=torch.int64)),
    )


def weights(e: int, n: int, k: int, rounding: str = "rceil") -> tuple[Any, ...]:
    scales = empty(e, -(-n // 128) * 128, scale_cols(k), dtype=torch.uint8)
    return kernels.quantize_weights_steps(
        empty(e, n, k, dtype=torch.bfloat16), empty(e, n, k, dtype=E4M3), scales, rounding
    )


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", SIZES)
def test_grouped(compile_quantizer: CompileFor, arch: int, size: str, variant: str) -> None:
    given = {"dtype": torch.bfloat16, "swiglu": None, **VARIANTS[variant]}
    compiled = compile_quantizer(arch, grouped(SIZES[size], **given))
    config = quantize.select_quantize_config(SIZES[size], K, E)
    elements = config.block_rows * config.block_cols // (32 * config.num_warps)  # of one thread
    assert compiled.count(PACKED_CONVERSION) == elements // 2
    assert compiled.count(LOAD_16) == elements * given["dtype"].itemsize // 16 * (2 if given["swiglu"] else 1)
    # No thread reads or writes elements in narrower pieces: what else is loaded are offsets and
    # indices.
    assert compiled.count(LOAD_1_OR_2) == 0
    # A decode program's threads hold 8 codes each, a prefill program's 16 a row; zeros of padding
    # go by 16 bytes.
    zeros = config.padding_tiles * 512 // (16 * 32 * config.num_warps)
    assert compiled.count(STORE_8) == (size == "decode")
    assert compiled.count(STORE_16) == zeros + elements // 16
    assert compiled.count(r"st\.global(\.\w+)*\.b16") == 0


@pytest.mark.parametrize("copied", [False, True], ids=["bf16", "MXFP8"])
@pytest.mark.parametrize("size", SIZES)
def test_tokens_of_a_layer(compile_quantizer: CompileFor, arch: int, size: str, copied: bool) -> None:
    """Each is read once and written to 8 rows; those in MXFP8 with no arithmetic."""
    tokens, top_k = SIZES[size], 8
    compiled = compile_quantizer(arch, of_layer(tokens, top_k, copied))
    assert quantize.choices_of_a_program(tokens * top_k, K, top_k) == top_k
    config = quantize.select_quantize_config(tokens, K, 1, choices=top_k)
    elements = config.block_rows * config.block_cols // (32 * config.num_warps)  # of one thread
    wide, narrow = elements // 16, elements // 8 % 2
    zeros = config.padding_tiles * 512 // (16 * 32 * config.num_warps)
    assert compiled.count(PACKED_CONVERSION) == (0 if copied else elements // 2)
    assert compiled.count(LOAD_1_OR_2) == copied, "a scale"
    if copied:
        assert (compiled.count(LOAD_16), compiled.count(LOAD_8)) == (wide, narrow)
    else:
        assert compiled.count(LOAD_16) == 2 * wide + narrow
    assert (compiled.count(STORE_16), compiled.count(STORE_8)) == (zeros + top_k * wide, top_k * narrow)


# Counts are scanned by the kernel itself, for decode batches.
WIDE = {f"counts of {e} experts": grouped(64, e=e, counts=True) for e in (1, 8, 128, 1024)}
# K % 32 is enough: each row starts at a 16-byte boundary, and no 16 bytes straddle K.
WIDE |= {f"K = {k}": grouped(64, k=k) for k in (544, 992, 2880)}
WIDE |= {f"weights {shape}": weights(*shape) for shape in ((8, 4096, 7168), (128, 2880, 2880))}


@pytest.mark.parametrize("what", WIDE)
def test_wide_accesses(compile_quantizer: CompileFor, arch: int, what: str) -> None:
    compiled = compile_quantizer(arch, WIDE[what])
    assert compiled.count(PACKED_CONVERSION) > 0
    assert compiled.count(LOAD_16) > 0
    assert compiled.count(LOAD_1_OR_2) == 0


def test_rows_that_give_a_thread_less_than_16_bytes(compile_quantizer: CompileFor, arch: int) -> None:
    """Fewer elements than eight for each thread."""
    compiled = compile_quantizer(arch, weights(2, 136, 160))
    assert compiled.count(PACKED_CONVERSION) > 0
    assert compiled.count(LOAD_1_OR_2) == 0


def test_unaligned_rows_still_compile(compile_quantizer: CompileFor, arch: int) -> None:
    """A row stride that is no multiple of 8 elements rules out wide loads, and nothing else."""
    assert compile_quantizer(arch, grouped(64, stride=7169)).count(PACKED_CONVERSION) > 0


@pytest.mark.parametrize("e", [1, 256, 1024, 2000])
def test_many_experts(compile_quantizer: CompileFor, e: int) -> None:
    assert compile_quantizer(90, grouped(4096, e=e)).count(PACKED_CONVERSION) > 0


@pytest.mark.parametrize("rounding", ["floor", "even"])
def test_roundings_differ_in_one_constant(compile_quantizer: CompileFor, rounding: str) -> None:
    """The rounding is one added integer: no variant costs an instruction more than rceil."""
    ours, rceil = (compile_quantizer(90, weights(1, 128, 512, name)).count(r";\s*\n") for name in (rounding, "rceil"))
    assert ours <= rceil


def test_a_batch_of_another_size_compiles_nothing_new(compile_quantizer: CompileFor) -> None:
    """Token counts within one configuration share a kernel, whatever they are divisible by."""
    sizes = (1, 2, 3, 16, 17, 48, 100, 128, 146)
    assert len({id(compile_quantizer(90, grouped(t, gather=True)).kernel) for t in sizes}) == 1
