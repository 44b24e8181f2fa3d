"""The two functions of SGLang's ``sglang.jit_kernel.mxfp8`` (0.5.11 to 0.5.22), over any backend of this package.

Names, argument order, shapes and in-place effects are SGLang's, so that a caller changes its import alone::

    from hybrid_mxfp8.compat.sglang import (
        es_sm100_mxfp8_blockscaled_grouped_quant,
        es_sm100_mxfp8_blockscaled_moe_grouped_gemm,
    )

SGLang's names turned into this package's: its operand ``a`` is the weights, ``b`` the tokens, ``m`` is N.
``use_backend()`` and HYBRID_MXFP8_BACKEND choose the backend. Each call spends one small launch on turning the
caller's metadata into a layout; none syncs, and both can be captured in a CUDA graph. Under ``torch.compile`` each
is one operator, ``torch.ops.hybrid_mxfp8.sglang_grouped_quant`` and ``sglang_moe_grouped_gemm``.

What is assumed of device data, because to look would sync: rows are sorted by expert without gaps, so that
``expert_offsets`` is the exclusive prefix sum of ``tokens_per_expert``; ``blockscale_offsets`` are multiples of 128
whose experts don't overlap, in any order and with any gaps. On CPU tensors, where looking is free, the first
assumption and the bounds of the second are checked. On a GPU, metadata that break them give wrong numbers but lead no
kernel outside its buffers.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch

from hybrid_mxfp8.core import layout as core_layout
from hybrid_mxfp8.core.checks import (
    FLOAT_DTYPES,
    check_aligned,
    check_contiguous,
    check_k,
    check_n,
    check_no_grad,
    check_shape,
    check_tensor,
    fail,
    is_tracing,
    short,
)
from hybrid_mxfp8.core.formats import MAX_INT32, SCALE_TILE_ROWS, padded_scale_rows, round_up, scale_cols
from hybrid_mxfp8.dispatch.backend import Steps
from hybrid_mxfp8.dispatch.buffers import Buffer
from hybrid_mxfp8.dispatch.plan import ALIGNMENT, PLANS, Operands, Plan, describe
from hybrid_mxfp8.dispatch.problem import GemmBuffers, Problem, QuantizeBuffers, QuantizeProblem, split_layout
from hybrid_mxfp8.dispatch.registry import choose, choose_quantizer, settings

_QUANTIZE, _MULTIPLY = object(), object()


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
        blockscale_offsets: (E,) int32, the first row of each expert's scales in ``scale_factor``; multiples of 128.
        quant_output: (T, K) float8_e4m3fn, contiguous; written. Rows that no expert owns keep what they hold. Neither it
            nor ``scale_factor`` may overlap another argument.
        scale_factor: (S, K/32) uint8, contiguous, S at least roundup(T, 128) and enough for every expert's rows rounded
            up to 128; written, swizzled in 128x4 tiles, padding of each expert zero. Rows of no expert are unspecified.
            With K % 128 != 0 it has roundup(K/32, 4) columns.

    Raises:
        TypeError: wrong type or dtype.
        ValueError: wrong shape, stride or device.
        BackendUnavailableError: the backend asked for by name can't run here.
    """
    if torch.compiler.is_compiling():
        torch.ops.hybrid_mxfp8.sglang_grouped_quant(
            input,
            tokens_per_expert,
            expert_offsets,
            blockscale_offsets,
            quant_output.view(torch.uint8),
            scale_factor,
        )
        return
    metadata = (tokens_per_expert, expert_offsets, blockscale_offsets)
    signature = _signature(_QUANTIZE, input, *metadata, quant_output, scale_factor)
    plan = None if signature is None else PLANS.get(signature)
    if plan is None:
        _check_quantize(input, *metadata, quant_output, scale_factor)
        if is_tracing(input):  # meta or fake: nothing to compute
            return
        check_aligned("scale_factor", scale_factor)
        plan = _plan_quantize(input, *metadata, quant_output, scale_factor)
        if signature is not None:
            PLANS.add(signature, plan)
    scales = _whole_tiles(scale_factor)
    _check_on_host(*metadata, input.shape[0], scales.shape[0])
    layout = _new_layout(tokens_per_expert)
    plan.run(input, scales, quant_output, tokens_per_expert, blockscale_offsets, layout)


def _signature(kind: object, *tensors: torch.Tensor | None) -> tuple[Hashable, ...] | None:
    """All that checks and launches depend on; None for what has none, such as fake tensors."""
    try:
        return (kind, settings(None), torch.is_grad_enabled(), *map(describe, tensors))
    except (AttributeError, RuntimeError, TypeError):
        return None


def _check_quantize(
    input: torch.Tensor,
    tokens_per_expert: torch.Tensor,
    expert_offsets: torch.Tensor,
    blockscale_offsets: torch.Tensor,
    quant_output: torch.Tensor,
    scale_factor: torch.Tensor,
) -> None:
    check_tensor("input", input, dtypes=FLOAT_DTYPES, ndim=2, dims="(T, K)")
    check_no_grad("input", input)
    num_tokens, k = input.shape
    device = input.device
    check_k("input", k)
    if input.stride(1) != 1 and input.numel():
        fail("input", "must have unit stride along K", f"strides {input.stride()}")
    check_tensor("quant_output", quant_output, dtypes=(torch.float8_e4m3fn,), ndim=2, dims="(T, K)", device=device)
    check_shape("quant_output", quant_output, (num_tokens, k), "(T, K)")
    check_contiguous("quant_output", quant_output)
    _check_scales("scale_factor", scale_factor, num_tokens, k, device)
    _check_metadata(tokens_per_expert, expert_offsets, blockscale_offsets, device)


def _plan_quantize(
    input: torch.Tensor,
    tokens_per_expert: torch.Tensor,
    expert_offsets: torch.Tensor,
    blockscale_offsets: torch.Tensor,
    quant_output: torch.Tensor,
    scale_factor: torch.Tensor,
) -> Plan:
    """The launches, of (input, scales in whole tiles, quant_output, counts, scale positions, a new layout)."""
    (num_tokens, k), num_experts, device = input.shape, tokens_per_expert.shape[0], input.device
    operands = Operands()
    x = operands.add("input", input)
    scales = operands.add("scale_factor", _whole_tiles(scale_factor), written=True)
    values = operands.add("quant_output", quant_output, written=True)
    layout, steps = _add_layout(operands, tokens_per_expert, blockscale_offsets, num_tokens, scales.shape[0])
    if not (num_tokens and num_experts):
        return Plan(device, operands, ())
    _, expert, scale = split_layout(layout, num_experts)
    problem = QuantizeProblem(
        num_tokens, num_experts, k, "offsets", "rceil", None, num_tokens, input.stride(0), 0, device
    )
    buffers = QuantizeBuffers(x, None, values, scales, None, None, expert, scale)
    return Plan(device, operands, (*steps, *choose_quantizer(device).quantize(problem, buffers)))


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
    """Multiply each expert's tokens by its weights: ``d[t] = b[t] @ a[e].T`` for rows t of expert e.

    Args:
        a: weights (E, N, K) float8_e4m3fn, contiguous, N % 8 == 0, K % 32 == 0.
        b: tokens (T, K) float8_e4m3fn, contiguous, sorted by expert.
        sfa: scales of ``a``, (E, roundup(N, 128), K/32) uint8, swizzled, contiguous.
        sfb: scales of ``b``, (S, K/32) uint8, swizzled, contiguous; S as for the quantizer.
        expert_offsets: (E,) int32, the exclusive prefix sum of ``tokens_per_expert``.
        blockscale_offsets: (E,) int32, the first row of each expert's scales in ``sfb``; multiples of 128.
        tokens_per_expert: (E,) int32.
        workspace: uint8, contiguous, of any shape and alignment; what the backend needs is taken from it, the rest is
            not touched. Where it is too small, as SGLang's 16 MiB can be on other GPUs than SM100, memory is allocated
            instead. Two streams must not share it. Under ``torch.compile`` it is not used.
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
    check_tensor("workspace", workspace, dtypes=(torch.uint8,), ndim=rank, dims="(bytes,)")
    check_contiguous("workspace", workspace)
    return _multiply(a, b, sfa, sfb, expert_offsets, blockscale_offsets, tokens_per_expert, workspace, dtype)


def _multiply(
    a: torch.Tensor,
    b: torch.Tensor,
    sfa: torch.Tensor,
    sfb: torch.Tensor,
    expert_offsets: torch.Tensor,
    blockscale_offsets: torch.Tensor,
    tokens_per_expert: torch.Tensor,
    workspace: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The product; without a workspace one is allocated."""
    operands = (a, b, sfa, sfb, tokens_per_expert, expert_offsets, blockscale_offsets)
    signature = _signature((_MULTIPLY, dtype), *operands, workspace)
    plan = None if signature is None else PLANS.get(signature)
    if plan is None:
        _check_multiply(*operands, workspace, dtype)
        if is_tracing(b):  # meta or fake: nothing to compute
            return b.new_empty(b.shape[0], a.shape[1], dtype=dtype)
        check_aligned("sfb", sfb)
        plan = _plan_multiply(*operands, workspace, dtype)
        if signature is not None:
            PLANS.add(signature, plan)
    scales = _whole_tiles(sfb)
    _check_on_host(tokens_per_expert, expert_offsets, blockscale_offsets, b.shape[0], scales.shape[0])
    d = torch.empty(b.shape[0], a.shape[1], dtype=dtype, device=a.device)
    memory = _aligned_part(workspace, plan.result, a.device)
    layout = _new_layout(tokens_per_expert)
    plan.run(a, b, sfa, scales, d, memory, tokens_per_expert, blockscale_offsets, layout)
    return d


def _check_multiply(
    a: torch.Tensor,
    b: torch.Tensor,
    sfa: torch.Tensor,
    sfb: torch.Tensor,
    tokens_per_expert: torch.Tensor,
    expert_offsets: torch.Tensor,
    blockscale_offsets: torch.Tensor,
    workspace: torch.Tensor | None,
    dtype: torch.dtype,
) -> None:
    check_tensor("a", a, dtypes=(torch.float8_e4m3fn,), ndim=3, dims="(E, N, K)")
    num_experts, n, k = a.shape
    device = a.device
    check_n("a", n)
    check_k("a", k)
    check_tensor("sfa", sfa, dtypes=(torch.uint8,), ndim=3, dims="(E, roundup(N, 128), K/32)", device=device)
    check_shape("sfa", sfa, (num_experts, padded_scale_rows(n), scale_cols(k)), "(E, roundup(N, 128), K/32)")
    for name, tensor in (("a", a), ("sfa", sfa)):
        check_contiguous(name, tensor)
        check_no_grad(name, tensor)
    check_tensor("b", b, dtypes=(torch.float8_e4m3fn,), ndim=2, dims="(T, K)", device=device)
    num_tokens = b.shape[0]
    check_shape("b", b, (num_tokens, k), "(T, K)")
    check_contiguous("b", b)
    _check_scales("sfb", sfb, num_tokens, k, device)
    _check_metadata(tokens_per_expert, expert_offsets, blockscale_offsets, device)
    check_shape("tokens_per_expert", tokens_per_expert, (num_experts,), "(E,)")
    if dtype not in FLOAT_DTYPES:
        raise TypeError(f"dtype: must be {' or '.join(map(short, FLOAT_DTYPES))}, got {short(dtype)}")
    if workspace is not None and workspace.device != device:
        fail("workspace", f"must be on {device}, as the other arguments", workspace.device)


def _plan_multiply(
    a: torch.Tensor,
    b: torch.Tensor,
    sfa: torch.Tensor,
    sfb: torch.Tensor,
    tokens_per_expert: torch.Tensor,
    expert_offsets: torch.Tensor,
    blockscale_offsets: torch.Tensor,
    workspace: torch.Tensor | None,
    dtype: torch.dtype,
) -> Plan:
    """The launches, of (a, b, sfa, sfb in whole tiles, d, workspace, counts, scale positions, a new layout)."""
    num_experts, n, k = a.shape
    num_tokens = b.shape[0]
    problem = Problem(num_experts, n, k, num_tokens, dtype, a.device)
    backend = choose(problem)
    needed = backend.workspace_size(problem)
    operands = Operands()
    w, x = operands.add("a", a), operands.add("b", b)
    w_scales, x_scales = operands.add("sfa", sfa), operands.add("sfb", _whole_tiles(sfb))
    d = operands.buffer("d", dtype, (num_tokens, n))
    memory = operands.buffer("workspace", torch.uint8, (needed,))
    layout, steps = _add_layout(operands, tokens_per_expert, blockscale_offsets, num_tokens, x_scales.shape[0])
    if not (num_tokens and num_experts):
        return Plan(a.device, operands, (), result=needed)
    parts = split_layout(layout, num_experts)
    buffers = GemmBuffers(x, x_scales, *parts, w, w_scales, d, memory if needed else None)
    return Plan(a.device, operands, (*steps, *backend.plan(problem, buffers)), result=needed)


def _check_scales(name: str, scales: torch.Tensor, num_tokens: int, k: int, device: torch.device) -> None:
    check_tensor(name, scales, dtypes=(torch.uint8,), ndim=2, dims="(S, K/32)", device=device)
    rows, cols = scales.shape
    if cols != scale_cols(k):
        fail(name, f"must have {scale_cols(k)} columns, K/32 rounded up to 4", cols)
    check_contiguous(name, scales)
    least = round_up(num_tokens, SCALE_TILE_ROWS)
    if rows < least:
        fail(name, f"must have at least roundup(T, 128) = {least} rows, and each expert's rounded up to 128", rows)
    if rows > MAX_INT32:
        fail(name, "must have fewer than 2**31 rows", rows)


def _whole_tiles(scales: torch.Tensor) -> torch.Tensor:
    """The whole 128x4 tiles of a caller's scale buffer: (S rounded down to 128, C), the same memory."""
    rows = scales.shape[0] // SCALE_TILE_ROWS * SCALE_TILE_ROWS
    return scales if rows == scales.shape[0] else scales[:rows]


def _check_metadata(
    tokens_per_expert: torch.Tensor,
    expert_offsets: torch.Tensor,
    blockscale_offsets: torch.Tensor,
    device: torch.device,
) -> None:
    check_tensor("tokens_per_expert", tokens_per_expert, dtypes=(torch.int32,), ndim=1, dims="(E,)", device=device)
    check_contiguous("tokens_per_expert", tokens_per_expert)
    for name, offsets in (("expert_offsets", expert_offsets), ("blockscale_offsets", blockscale_offsets)):
        check_tensor(name, offsets, dtypes=(torch.int32,), ndim=1, dims="(E,)", device=device)
        check_shape(name, offsets, tuple(tokens_per_expert.shape), "(E,)")
        check_contiguous(name, offsets)


def _new_layout(tokens_per_expert: torch.Tensor) -> torch.Tensor:
    size = 3 * tokens_per_expert.shape[0] + 2
    return torch.empty(size, dtype=torch.int32, device=tokens_per_expert.device)


def _add_layout(
    operands: Operands,
    tokens_per_expert: torch.Tensor,
    blockscale_offsets: torch.Tensor,
    num_tokens: int,
    num_scale_rows: int,
) -> tuple[Buffer, Steps]:
    """The layout that the caller's metadata describe: rows from the counts, scale positions as they are given."""
    counts = operands.add("tokens_per_expert", tokens_per_expert)
    starts = operands.add("blockscale_offsets", blockscale_offsets)
    num_experts, device = tokens_per_expert.shape[0], tokens_per_expert.device
    layout = operands.buffer("layout", torch.int32, (3 * num_experts + 2,))
    quantizer = choose_quantizer(device, "auto")
    return layout, quantizer.caller_layout(counts, starts, layout, num_tokens, num_scale_rows, device)


def _check_on_host(
    tokens_per_expert: torch.Tensor,
    expert_offsets: torch.Tensor,
    blockscale_offsets: torch.Tensor,
    num_tokens: int,
    num_scale_rows: int,
) -> None:
    """On a CPU, where looking is free: that the offsets belong to the counts and leave each expert its rows."""
    if tokens_per_expert.is_cuda or not tokens_per_expert.numel():
        return
    tokens, offsets, _ = core_layout.group_offsets(tokens_per_expert, num_tokens, from_ends=False)
    if not torch.equal(offsets[:-1], expert_offsets):
        fail(
            "expert_offsets",
            f"must be the exclusive prefix sum of tokens_per_expert, {offsets[:-1].tolist()}",
            expert_offsets.tolist(),
        )
    ends = blockscale_offsets.to(torch.int64) + -(-tokens // SCALE_TILE_ROWS) * SCALE_TILE_ROWS
    if (
        (blockscale_offsets % SCALE_TILE_ROWS).any()
        or int(blockscale_offsets.amin()) < 0
        or int(ends.amax()) > num_scale_rows
    ):
        fail(
            "blockscale_offsets",
            f"must be multiples of 128 that leave each expert its rows among {num_scale_rows}",
            blockscale_offsets.tolist(),
        )


def _aligned_part(workspace: torch.Tensor | None, needed: int, device: torch.device) -> torch.Tensor:
    """The first ``needed`` bytes of a workspace that start at an aligned address; new memory where there are too few."""
    if workspace is not None:
        flat = workspace.view(-1)
        skipped = -flat.data_ptr() % ALIGNMENT
        if skipped + needed <= flat.numel():
            return flat[skipped : skipped + needed]
    return torch.empty(needed, dtype=torch.uint8, device=device)


# ---------------------------------------------------------------- operators


def _grouped_quant_operator(
    input: torch.Tensor,
    tokens_per_expert: torch.Tensor,
    expert_offsets: torch.Tensor,
    blockscale_offsets: torch.Tensor,
    quant_output: torch.Tensor,
    scale_factor: torch.Tensor,
) -> None:
    values = quant_output.view(torch.float8_e4m3fn)
    es_sm100_mxfp8_blockscaled_grouped_quant(
        input, tokens_per_expert, expert_offsets, blockscale_offsets, values, scale_factor
    )


def _moe_grouped_gemm_operator(
    a: torch.Tensor,
    b: torch.Tensor,
    sfa: torch.Tensor,
    sfb: torch.Tensor,
    expert_offsets: torch.Tensor,
    blockscale_offsets: torch.Tensor,
    tokens_per_expert: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    a, b = a.view(torch.float8_e4m3fn), b.view(torch.float8_e4m3fn)
    return _multiply(a, b, sfa, sfb, expert_offsets, blockscale_offsets, tokens_per_expert, None, dtype)


def _moe_grouped_gemm_fake(
    a: torch.Tensor,
    b: torch.Tensor,
    sfa: torch.Tensor,
    sfb: torch.Tensor,
    expert_offsets: torch.Tensor,
    blockscale_offsets: torch.Tensor,
    tokens_per_expert: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    return b.new_empty(b.shape[0], a.shape[1], dtype=dtype)


def _register() -> torch.library.Library:
    """Define the operators, as :mod:`hybrid_mxfp8.ops.torch_library` does: e4m3 goes in as such or as bytes, into buffers as bytes."""
    library = torch.library.Library("hybrid_mxfp8", "FRAGMENT")
    tags = (torch.Tag.pt2_compliant_tag,)
    library.define(
        "sglang_grouped_quant(Tensor input, Tensor tokens_per_expert, Tensor expert_offsets, Tensor blockscale_offsets,"
        " Tensor(a!) quant_output, Tensor(b!) scale_factor) -> ()",
        tags=tags,
    )
    library.define(
        "sglang_moe_grouped_gemm(Tensor a, Tensor b, Tensor sfa, Tensor sfb, Tensor expert_offsets,"
        " Tensor blockscale_offsets, Tensor tokens_per_expert, ScalarType dtype) -> Tensor",
        tags=tags,
    )
    library.impl("sglang_grouped_quant", _grouped_quant_operator, "CompositeExplicitAutograd")
    library.impl("sglang_moe_grouped_gemm", _moe_grouped_gemm_operator, "CompositeExplicitAutograd")
    torch.library.register_fake("hybrid_mxfp8::sglang_grouped_quant", lambda *arguments: None, lib=library)
    torch.library.register_fake("hybrid_mxfp8::sglang_moe_grouped_gemm", _moe_grouped_gemm_fake, lib=library)
    return library


LIBRARY = _register()
