"""The kernels' launchers, called directly: the one place that knows what they take.

Tests go through the public functions where these reach what is tested.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch

import hybrid_mxfp8 as mx


def quantize(
    x: torch.Tensor, groups: mx.GroupLayout | torch.Tensor, values: torch.Tensor, scales: torch.Tensor,
    rounding: str = "rceil", row_index: torch.Tensor | None = None, swiglu: mx.SwiGLU | None = None,
) -> None:  # fmt: skip
    """Of a layout; or of counts (E,), which the kernel scans itself."""
    from hybrid_mxfp8.triton_kernels import quantize as module

    launch = module.quantize_grouped if isinstance(groups, mx.GroupLayout) else module.quantize_counts
    launch(x, groups, values, scales, scale_rounding=rounding, row_index=row_index, swiglu=swiglu)


def quantize_weights(w: torch.Tensor, values: torch.Tensor, scales: torch.Tensor, rounding: str = "rceil") -> None:
    from hybrid_mxfp8.triton_kernels import quantize as module

    module.quantize_weights(w, values, scales, scale_rounding=rounding)


def group_offsets(
    given: torch.Tensor, num_tokens: int, from_ends: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from hybrid_mxfp8.triton_kernels import group_layout

    parts: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = group_layout.group_offsets(given, num_tokens, from_ends)
    return parts


def caller_layout(
    tokens: torch.Tensor, starts: torch.Tensor, num_tokens: int, rows: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from hybrid_mxfp8.triton_kernels import caller_layout as module

    parts: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = module.caller_layout(tokens, starts, num_tokens, rows)
    return parts


def portable(x: mx.GroupedMXFP8, w: mx.ExpertWeights, out: torch.Tensor) -> None:
    """The triton backend's product: whichever of its kernels takes it."""
    from hybrid_mxfp8.triton_kernels.gemm import portable as module

    module.grouped_gemm(x.values, x.scales, x.groups, w.values, w.scales, out)


def blackwell(x: mx.GroupedMXFP8, w: mx.ExpertWeights, out: torch.Tensor, config: Any) -> None:
    from hybrid_mxfp8.triton_kernels.gemm import blackwell as module

    module.grouped_gemm_blackwell(x.values, x.scales, x.groups, w.values, w.scales, out, config)


def hopper(
    x: mx.GroupedMXFP8, w: mx.ExpertWeights, out: torch.Tensor, workspace: torch.Tensor, config: Any, programs: int
) -> None:
    from hybrid_mxfp8.triton_kernels.gemm import hopper as module

    module.hopper_grouped_gemm(x.values, x.scales, x.groups, w.values, w.scales, out, workspace, config, programs)


def dequantize_tokens(x: mx.GroupedMXFP8, workspace: torch.Tensor, layout: Any, block_t: int, rows: int) -> None:
    from hybrid_mxfp8.triton_kernels.gemm import dequantize_tokens as module

    module.dequantize_tokens(x.values, x.scales, x.groups, workspace, layout, block_t, rows)


def one_thread() -> AbstractContextManager[object]:
    """What holds the interpreter's launches, one at a time, in this process."""
    from hybrid_mxfp8.triton_kernels import launch

    lock: AbstractContextManager[object] = launch._one_thread()
    return lock


def scratch_elements(slots: int, experts: int) -> int:
    from hybrid_mxfp8.triton_kernels.moe import route as module

    return int(module.scratch_elements(slots, experts))


def route(
    ids: torch.Tensor, experts: int, sorted_token_ids: torch.Tensor, inverse_permutation: torch.Tensor,
    layout: torch.Tensor, scratch: torch.Tensor,
) -> None:  # fmt: skip
    from hybrid_mxfp8.triton_kernels.moe import route as module

    module.route(ids, experts, sorted_token_ids, inverse_permutation, layout, scratch)


def add_expert_bias(y: torch.Tensor, inverse_permutation: torch.Tensor, ids: torch.Tensor, bias: torch.Tensor) -> None:
    from hybrid_mxfp8.triton_kernels.moe import expert_bias as module

    module.add_expert_bias(y, inverse_permutation, ids, bias)


def combine(
    y: torch.Tensor, inverse_permutation: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor,
    bias: torch.Tensor | None, out: torch.Tensor,
) -> None:  # fmt: skip
    from hybrid_mxfp8.triton_kernels.moe import combine as module

    module.combine(y, inverse_permutation, ids, weights, bias, out)
