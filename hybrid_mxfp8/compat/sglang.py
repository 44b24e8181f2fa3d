"""The two functions of SGLang's ``sglang.jit_kernel.mxfp8`` (0.5.11 to 0.5.22), over any backend of
this package: with its names, argument order, shapes and in-place effects, so that a caller changes
its import alone.

SGLang's operand ``a`` is the weights, ``b`` the tokens, ``m`` is N. ``use_backend()`` and
HYBRID_MXFP8_BACKEND choose the backend. Each call spends one small launch on turning the caller's
metadata into a layout; none syncs, and both can be captured in a CUDA graph. Under
``torch.compile`` each is one operator.

Rows must be sorted by expert without gaps, so that ``expert_offsets`` is the exclusive prefix sum
of ``tokens_per_expert``, and ``blockscale_offsets`` be multiples of 128 whose experts don't
overlap, in any order and with any gaps. On CPU tensors, where looking is free, both are checked.
On a GPU, metadata that break them give wrong numbers but lead no kernel outside its buffers.
"""

from __future__ import annotations

from typing import Any

import torch

from hybrid_mxfp8.core import checks
from hybrid_mxfp8.core.formats import MAX_INT32, SCALE_TILE_ROWS, padded_scale_rows, round_up, scale_cols
from hybrid_mxfp8.core.layout import GroupLayout, group_offsets
from hybrid_mxfp8.core.operands import ExpertWeights, GroupedMXFP8
from hybrid_mxfp8.dispatch.plan import ALIGNMENT
from hybrid_mxfp8.ops.group_layout import build_around
from hybrid_mxfp8.ops.grouped_gemm import grouped_gemm, grouped_gemm_bytes
from hybrid_mxfp8.ops.quantize import quantize_into
from hybrid_mxfp8.ops.torch_library import define_operators

__all__ = ["es_sm100_mxfp8_blockscaled_grouped_quant", "es_sm100_mxfp8_blockscaled_moe_grouped_gemm"]


def es_sm100_mxfp8_blockscaled_grouped_quant(
    input: torch.Tensor,
    tokens_per_expert: torch.Tensor,
    expert_offsets: torch.Tensor,
    blockscale_offsets: torch.Tensor,
    quant_output: torch.Tensor,
    scale_factor: torch.Tensor,
) -> None:
    """Quantize rows sorted by expert into the caller's buffers.

    Args:
        input: (T, K) bf16, fp16 or fp32, K % 32 == 0, unit stride along K.
        tokens_per_expert: (E,) int32.
        expert_offsets: (E,) int32, the exclusive prefix sum of ``tokens_per_expert``.
        blockscale_offsets: (E,) int32, the first row of each expert's scales in ``scale_factor``;
            multiples of 128.
        quant_output: (T, K) float8_e4m3fn, contiguous; written. Rows that no expert owns keep what
            they hold. Neither it nor ``scale_factor`` may overlap another argument.
        scale_factor: (S, K/32) uint8, contiguous, S at least roundup(T, 128) and enough for every
            expert's rows rounded up to 128; written, swizzled in 128x4 tiles, padding of each
            expert zero. Rows of no expert are unspecified. With K % 128 != 0 it has roundup(K/32,
            4) columns.

    Raises:
        TypeError: wrong type or dtype.
        ValueError: wrong shape, stride or device.
        BackendUnavailableError: the backend asked for by name can't run here.
    """
    if torch.compiler.is_compiling():
        torch.ops.hybrid_mxfp8.sglang_grouped_quant(
            input, tokens_per_expert, expert_offsets, blockscale_offsets, quant_output.view(torch.uint8), scale_factor
        )
        return
    checks.check_unquantized("input", input, "(T, K)")
    num_tokens, k = input.shape
    device = input.device
    checks.check_k("input", k)
    checks.check_tensor(
        "quant_output", quant_output, dtypes=(torch.float8_e4m3fn,), ndim=2, dims="(T, K)", device=device
    )
    checks.check_shape("quant_output", quant_output, (num_tokens, k), "(T, K)")
    checks.check_contiguous("quant_output", quant_output)
    scales = _scale_tiles("scale_factor", scale_factor, num_tokens, k, device)
    _check_metadata(tokens_per_expert, expert_offsets, blockscale_offsets, device)
    if checks.is_tracing(input):  # meta or fake: nothing to compute
        return
    checks.check_aligned("scale_factor", scale_factor)
    inputs = {"input": input, "tokens_per_expert": tokens_per_expert, "blockscale_offsets": blockscale_offsets}
    checks.check_no_overlap("quant_output", quant_output, **inputs, scale_factor=scale_factor)
    checks.check_no_overlap("scale_factor", scale_factor, **inputs)
    groups = _layout(tokens_per_expert, expert_offsets, blockscale_offsets, num_tokens, scales.shape[0])
    quantize_into(input, groups, quant_output, scales)


def es_sm100_mxfp8_blockscaled_moe_grouped_gemm(
    a: torch.Tensor,
    b: torch.Tensor,
    sfa: torch.Tensor,
    sfb: torch.Tensor,
    expert_offsets: torch.Tensor,
    blockscale_offsets: torch.Tensor,
    tokens_per_expert: torch.Tensor,
    workspace: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Multiply each expert's tokens by its weights: ``d[t] = b[t] @ a[e].T`` for rows t of expert
    e.

    Args:
        a: weights (E, N, K) float8_e4m3fn, contiguous, N % 8 == 0, K % 32 == 0.
        b: tokens (T, K) float8_e4m3fn, contiguous, sorted by expert.
        sfa: scales of ``a``, (E, roundup(N, 128), K/32) uint8, swizzled, contiguous.
        sfb: scales of ``b``, (S, K/32) uint8, swizzled, contiguous; S as for the quantizer.
        expert_offsets: (E,) int32, the exclusive prefix sum of ``tokens_per_expert``.
        blockscale_offsets: (E,) int32, the first row of each expert's scales in ``sfb``; multiples
            of 128.
        tokens_per_expert: (E,) int32.
        workspace: uint8, contiguous, of any shape and alignment; what the backend needs is taken
            from it, the rest is not touched. Where it is too small, as SGLang's 16 MiB can be on
            other GPUs than SM100, memory is allocated instead. Two streams must not share it. Under
            ``torch.compile`` it is not used.
        dtype: of the result: bf16, fp16 or fp32.

    Returns:
        d (T, N) of ``dtype``; rows that no expert owns are not written.

    Raises:
        TypeError: wrong type or dtype.
        ValueError: operands that don't fit together.
        BackendUnavailableError: the backend asked for by name can't run this problem here.
    """
    if torch.compiler.is_compiling():
        product: torch.Tensor = torch.ops.hybrid_mxfp8.sglang_moe_grouped_gemm(
            a, b, sfa, sfb, expert_offsets, blockscale_offsets, tokens_per_expert, dtype
        )
        return product
    rank = workspace.ndim if isinstance(workspace, torch.Tensor) else 1
    checks.check_tensor("workspace", workspace, dtypes=(torch.uint8,), ndim=rank, dims="(bytes,)")
    checks.check_contiguous("workspace", workspace)
    checks.check_tensor("a", a, dtypes=(torch.float8_e4m3fn,), ndim=3, dims="(E, N, K)")
    num_experts, n, k = a.shape
    device = a.device
    checks.check_n("a", n)
    checks.check_k("a", k)
    dims = "(E, roundup(N, 128), K/32)"
    checks.check_tensor("sfa", sfa, dtypes=(torch.uint8,), ndim=3, dims=dims, device=device)
    checks.check_shape("sfa", sfa, (num_experts, padded_scale_rows(n), scale_cols(k)), dims)
    checks.check_contiguous("a", a)
    checks.check_contiguous("sfa", sfa)
    checks.check_tensor("b", b, dtypes=(torch.float8_e4m3fn,), ndim=2, dims="(T, K)", device=device)
    num_tokens = b.shape[0]
    checks.check_shape("b", b, (num_tokens, k), "(T, K)")
    checks.check_contiguous("b", b)
    scales = _scale_tiles("sfb", sfb, num_tokens, k, device)
    _check_metadata(tokens_per_expert, expert_offsets, blockscale_offsets, device)
    checks.check_shape("tokens_per_expert", tokens_per_expert, (num_experts,), "(E,)")
    checks.check_float_dtype("dtype", dtype)
    if workspace.device != device:
        checks.fail("workspace", f"must be on {device}, as the other arguments", workspace.device)
    if checks.is_tracing(b):  # meta or fake: nothing to compute
        return b.new_empty(num_tokens, n, dtype=dtype)
    checks.check_aligned("sfb", sfb)
    groups = _layout(tokens_per_expert, expert_offsets, blockscale_offsets, num_tokens, scales.shape[0])
    x, w = GroupedMXFP8.unchecked(values=b, scales=scales, groups=groups), ExpertWeights(a, sfa)
    memory = _aligned_part(workspace, grouped_gemm_bytes(x, w, dtype))
    if memory is not None:
        metadata = {"tokens_per_expert": tokens_per_expert, "blockscale_offsets": blockscale_offsets}
        checks.check_no_overlap("workspace", memory, a=a, b=b, sfa=sfa, sfb=sfb, **metadata)
    return grouped_gemm(x, w, out_dtype=dtype, workspace=memory)


def _scale_tiles(name: str, scales: torch.Tensor, num_tokens: int, k: int, device: torch.device) -> torch.Tensor:
    """The whole 128x4 tiles of a caller's scale buffer, (S rounded down to 128, C), as a view."""
    checks.check_tensor(name, scales, dtypes=(torch.uint8,), ndim=2, dims="(S, K/32)", device=device)
    rows, cols = scales.shape
    if cols != scale_cols(k):
        checks.fail(name, f"must have {scale_cols(k)} columns, K/32 rounded up to 4", cols)
    checks.check_contiguous(name, scales)
    least = round_up(num_tokens, SCALE_TILE_ROWS)
    if rows < least:
        checks.fail(
            name, f"must have at least roundup(T, 128) = {least} rows, and each expert's rounded up to 128", rows
        )
    if rows > MAX_INT32:
        checks.fail(name, "must have fewer than 2**31 rows", rows)
    return scales[: rows // SCALE_TILE_ROWS * SCALE_TILE_ROWS]


def _check_metadata(
    tokens_per_expert: torch.Tensor,
    expert_offsets: torch.Tensor,
    blockscale_offsets: torch.Tensor,
    device: torch.device,
) -> None:
    checks.check_tensor(
        "tokens_per_expert", tokens_per_expert, dtypes=(torch.int32,), ndim=1, dims="(E,)", device=device
    )
    checks.check_contiguous("tokens_per_expert", tokens_per_expert)
    for name, offsets in (("expert_offsets", expert_offsets), ("blockscale_offsets", blockscale_offsets)):
        checks.check_tensor(name, offsets, dtypes=(torch.int32,), ndim=1, dims="(E,)", device=device)
        checks.check_shape(name, offsets, tuple(tokens_per_expert.shape), "(E,)")
        checks.check_contiguous(name, offsets)


def _layout(
    tokens_per_expert: torch.Tensor,
    expert_offsets: torch.Tensor,
    blockscale_offsets: torch.Tensor,
    num_tokens: int,
    num_scale_rows: int,
) -> GroupLayout:
    """The layout that the caller's metadata describe: rows from the counts, scale positions as they
    are given. On a CPU, where looking is free, the offsets must belong to the counts and leave each
    expert its rows."""
    if tokens_per_expert.numel() and not tokens_per_expert.is_cuda:
        tokens, offsets, _ = group_offsets(tokens_per_expert, num_tokens, from_ends=False)
        if not torch.equal(offsets[:-1], expert_offsets):
            expected = f"must be the exclusive prefix sum of tokens_per_expert, {offsets[:-1].tolist()}"
            checks.fail("expert_offsets", expected, expert_offsets.tolist())
        starts = blockscale_offsets.long()
        ends = starts + -(-tokens // SCALE_TILE_ROWS) * SCALE_TILE_ROWS
        first, order = starts[tokens > 0].sort()
        shared = (first[1:] < ends[tokens > 0][order][:-1]).any()
        if (starts % SCALE_TILE_ROWS).any() or starts.amin() < 0 or ends.amax() > num_scale_rows or shared:
            expected = f"must be multiples of 128 that leave each expert its rows among {num_scale_rows}"
            checks.fail("blockscale_offsets", expected, blockscale_offsets.tolist())
    buffer = build_around(tokens_per_expert, blockscale_offsets, num_tokens, num_scale_rows)
    return GroupLayout.from_buffer(buffer, tokens_per_expert.shape[0], num_tokens)


def _aligned_part(workspace: torch.Tensor, needed: int) -> torch.Tensor | None:
    """The first ``needed`` bytes of a workspace at an aligned address; None for too few."""
    flat = workspace.view(-1)
    skipped = -flat.data_ptr() % ALIGNMENT if needed else 0
    return flat[skipped : skipped + needed] if skipped + needed <= flat.numel() else None


def _grouped_quant(*arguments: torch.Tensor) -> None:
    *inputs, values, scales = arguments
    es_sm100_mxfp8_blockscaled_grouped_quant(*[*inputs, values.view(torch.float8_e4m3fn), scales])


def _moe_grouped_gemm(*arguments: Any) -> torch.Tensor:
    a, b, *others, dtype = arguments
    operands = [a.view(torch.float8_e4m3fn), b.view(torch.float8_e4m3fn), *others]
    return es_sm100_mxfp8_blockscaled_moe_grouped_gemm(*[*operands, a.new_empty(0, dtype=torch.uint8), dtype])


def _moe_grouped_gemm_fake(a: torch.Tensor, b: torch.Tensor, *others: Any) -> torch.Tensor:
    return b.new_empty(b.shape[0], a.shape[1], dtype=others[-1])


LIBRARY = define_operators(
    {
        "sglang_grouped_quant(Tensor input, Tensor tokens_per_expert, Tensor expert_offsets, Tensor blockscale_offsets,"
        " Tensor(a!) quant_output, Tensor(b!) scale_factor) -> ()": (_grouped_quant, lambda *arguments: None),
        "sglang_moe_grouped_gemm(Tensor a, Tensor b, Tensor sfa, Tensor sfb, Tensor expert_offsets,"
        " Tensor blockscale_offsets, Tensor tokens_per_expert, ScalarType dtype) -> Tensor": (
            _moe_grouped_gemm,
            _moe_grouped_gemm_fake,
        ),
    }
)
