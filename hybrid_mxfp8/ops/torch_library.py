"""``torch.ops.hybrid_mxfp8``: the public functions as PyTorch operators, which torch.compile and
torch.export can trace.

Each takes plain tensors, returns new ones, and has a fake implementation that knows their shapes.
The public functions call them only while something is being traced: an eager call through the
dispatcher would cost the host several microseconds more. No operator has a derivative; the public
functions refuse inputs that require grad.

| operator | of | returns |
| --- | --- | --- |
| ``group_offsets`` | ``GroupLayout.from_counts``, ``from_ends`` | (3E+2,) int32: a layout's three tensors |
| ``quantize_grouped`` | the function of this name | values (T, K), scales (S, C), both uint8 |
| ``quantize_weights`` | the function of this name | values (E, N, K), scales (E, roundup(N, 128), C), both uint8 |
| ``grouped_gemm`` | the function of this name | (T, N) |
| ``moe_forward`` | the function of this name: one operator, so a compiled layer is dispatched once | (M, H) |
| ``pack_tokens`` | ``quantize_tokens``, and what ``ExpertParallelExperts`` sends | (R, bytes) uint8 |

Values of e4m3 come out as their bytes (uint8) and go in as bytes or as float8_e4m3fn: PyTorch lacks
the arithmetic on float8 with which opcheck compares. ``backend`` None means what ``use_backend()``,
else the environment, says when the operator runs.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch

from hybrid_mxfp8.core.checks import FLOAT_DTYPES, check_tensor
from hybrid_mxfp8.core.formats import BLOCK_SIZE, SCALE_TILE_ROWS, padded_scale_rows, scale_cols
from hybrid_mxfp8.core.layout import GroupLayout
from hybrid_mxfp8.core.operands import ExpertWeights, GroupedMXFP8, MXFP8Tokens
from hybrid_mxfp8.core.token_record import TokenRecord
from hybrid_mxfp8.ops import grouped_gemm, moe, quantize, tokens

NAMESPACE = "hybrid_mxfp8"


def _group_offsets(counts_or_ends: torch.Tensor, num_tokens: int, from_ends: bool) -> torch.Tensor:
    build = GroupLayout.from_ends if from_ends else GroupLayout.from_counts
    layout = build(counts_or_ends, num_tokens)
    # A copy, even where all three are views of one buffer: an operator must not return such views.
    return torch.cat([layout.tokens_per_expert, layout.expert_offsets, layout.scale_offsets])


def _quantize_grouped(
    x: torch.Tensor,
    tokens_per_expert: torch.Tensor,
    expert_offsets: torch.Tensor,
    scale_offsets: torch.Tensor,
    scale_rounding: str,
    row_index: torch.Tensor | None,
    activation: str | None,
    backend: str | None,
    scale_group: int = BLOCK_SIZE,
) -> tuple[torch.Tensor, torch.Tensor]:
    if row_index is None:
        num_tokens = check_tensor("x", x, dtypes=FLOAT_DTYPES, ndim=2, dims="(R, K)").shape[0]
    else:
        num_tokens = check_tensor("row_index", row_index, dtypes=(torch.int32,), ndim=1, dims="(T,)").shape[0]
    groups = GroupLayout(tokens_per_expert, expert_offsets, scale_offsets, num_tokens)
    scaling: dict[str, Any] = {"scale_rounding": scale_rounding, "scale_group": scale_group, "activation": activation}
    xq = quantize.quantize_grouped(x, groups, row_index=row_index, backend=backend, **scaling)
    return xq.values.view(torch.uint8), xq.scales


def _quantize_grouped_fake(
    x: torch.Tensor, tokens_per_expert: torch.Tensor, row_index: Any, activation: str | None, **others: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    num_tokens = x.shape[0] if row_index is None else row_index.shape[0]
    k = x.shape[1] if activation is None else x.shape[1] // 2
    # formats.grouped_scale_rows with a symbolic minimum: a plain one would tie the graph to T < E
    # or T >= E.
    groups = torch.sym_min(tokens_per_expert.shape[0], num_tokens)
    scale_rows = (num_tokens + (SCALE_TILE_ROWS - 1) * groups) // SCALE_TILE_ROWS * SCALE_TILE_ROWS
    return (x.new_empty(num_tokens, k, dtype=torch.uint8), x.new_empty(scale_rows, scale_cols(k), dtype=torch.uint8))


def _quantize_weights(
    w: torch.Tensor, scale_rounding: str, backend: str | None, scale_group: int = BLOCK_SIZE
) -> tuple[torch.Tensor, torch.Tensor]:
    wq = quantize.quantize_weights(w, scale_rounding=scale_rounding, scale_group=scale_group, backend=backend)
    return wq.values.view(torch.uint8), wq.scales


def _quantize_weights_fake(w: torch.Tensor, **others: Any) -> tuple[torch.Tensor, torch.Tensor]:
    num_experts, n, k = w.shape
    scales = w.new_empty(num_experts, padded_scale_rows(n), scale_cols(k), dtype=torch.uint8)
    return w.new_empty(num_experts, n, k, dtype=torch.uint8), scales


def _e4m3(name: str, values: torch.Tensor, ndim: int, dims: str) -> torch.Tensor:
    """``values`` as float8_e4m3fn; checked first: wider elements would change the view's shape."""
    check_tensor(name, values, dtypes=(torch.uint8, torch.float8_e4m3fn), ndim=ndim, dims=dims)
    return values.view(torch.float8_e4m3fn)


def _weights(name: str, values: torch.Tensor, scales: torch.Tensor, scale_group: int, squares: bool) -> ExpertWeights:
    return ExpertWeights(_e4m3(name, values, 3, "(E, N, K)"), scales, scale_group, squares and scale_group == 128)


def _grouped_gemm(
    x_values: torch.Tensor,
    x_scales: torch.Tensor,
    tokens_per_expert: torch.Tensor,
    expert_offsets: torch.Tensor,
    scale_offsets: torch.Tensor,
    w_values: torch.Tensor,
    w_scales: torch.Tensor,
    out_dtype: torch.dtype,
    backend: str | None,
    scale_group: int = BLOCK_SIZE,
    squares: bool = False,
) -> torch.Tensor:
    x_values = _e4m3("x_values", x_values, 2, "(T, K)")
    groups = GroupLayout(tokens_per_expert, expert_offsets, scale_offsets, x_values.shape[0])
    x = GroupedMXFP8(x_values, x_scales, groups, scale_group)
    w = _weights("w_values", w_values, w_scales, scale_group, squares)
    return grouped_gemm.grouped_gemm(x, w, out_dtype=out_dtype, backend=backend)


def _moe_forward(
    x: torch.Tensor,
    w13_values: torch.Tensor,
    w13_scales: torch.Tensor,
    w2_values: torch.Tensor,
    w2_scales: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    w13_bias: torch.Tensor | None,
    w2_bias: torch.Tensor | None,
    activation: str,
    backend: str | None,
    w13_scale_group: int = BLOCK_SIZE,
    w2_scale_group: int = BLOCK_SIZE,
    x_scales: torch.Tensor | None = None,
    x_dtype: torch.dtype | None = None,
    x_scale_group: int = BLOCK_SIZE,
    w13_squares: bool = False,
    w2_squares: bool = False,
) -> torch.Tensor:
    given: torch.Tensor | MXFP8Tokens = x
    if x_scales is not None:
        given = MXFP8Tokens(_e4m3("x", x, 2, "(M, H)"), x_scales, x_dtype or torch.bfloat16, x_scale_group)
    w13q = _weights("w13_values", w13_values, w13_scales, w13_scale_group, w13_squares)
    w2q = _weights("w2_values", w2_values, w2_scales, w2_scale_group, w2_squares)
    options: dict[str, Any] = {"w13_bias": w13_bias, "w2_bias": w2_bias, "activation": activation, "backend": backend}
    return moe.moe_forward(given, w13q, w2q, topk_ids, topk_weights, **options)


def _moe_forward_fake(x: torch.Tensor, x_scales: Any = None, x_dtype: Any = None, **others: Any) -> torch.Tensor:
    return x.new_empty(x.shape, dtype=x.dtype if x_scales is None else x_dtype or torch.bfloat16)


def _pack_tokens(
    x: torch.Tensor,
    topk_ids: torch.Tensor | None,
    topk_weights: torch.Tensor | None,
    num_records: int,
    num_experts: int,
    backend: str | None,
    scale_group: int = BLOCK_SIZE,
) -> torch.Tensor:
    sizes = {"num_records": num_records, "num_experts": num_experts, "scale_group": scale_group}
    return tokens.pack_tokens(x, topk_ids, topk_weights, **sizes, backend=backend)


def _pack_tokens_fake(
    x: torch.Tensor, topk_ids: torch.Tensor | None, topk_weights: torch.Tensor | None, num_records: int, **others: Any
) -> torch.Tensor:
    record = TokenRecord(x.shape[1], 0 if topk_ids is None or topk_weights is None else topk_ids.shape[1])
    return x.new_empty(num_records, record.size, dtype=torch.uint8)


def define_operators(operators: Mapping[str, tuple[Callable[..., Any], Callable[..., Any]]]) -> torch.library.Library:
    """Define operators by schema, real and fake; they live as long as the library returned."""
    library = torch.library.Library(NAMESPACE, "FRAGMENT")
    for schema, (real, fake) in operators.items():
        library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        name = schema.partition("(")[0]
        library.impl(name, real, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)
    return library


def _by_name(real: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """``fake``, called with the arguments that are given for ``real`` by their names."""
    bind = inspect.signature(real).bind
    return lambda *args, **kwargs: fake(**bind(*args, **kwargs).arguments)


_FAKES: dict[Callable[..., Any], Callable[..., Any]] = {
    _group_offsets: lambda counts_or_ends, **_: counts_or_ends.new_empty(
        3 * counts_or_ends.shape[0] + 2, dtype=torch.int32
    ),
    _quantize_grouped: _quantize_grouped_fake,
    _quantize_weights: _quantize_weights_fake,
    _grouped_gemm: lambda x_values, w_values, out_dtype, **_: x_values.new_empty(
        x_values.shape[0], w_values.shape[1], dtype=out_dtype
    ),
    _moe_forward: _moe_forward_fake,
    _pack_tokens: _pack_tokens_fake,
}
_infer = functools.partial(torch.library.infer_schema, mutates_args=())
LIBRARY = define_operators({_infer(f, op_name=f.__name__[1:]): (f, _by_name(f, fake)) for f, fake in _FAKES.items()})
