"""Routing, expert bias and combine in plain PyTorch: the twins of the kernels, bit for bit, on any
device."""

from __future__ import annotations

import torch

from hybrid_mxfp8 import reference


def route(
    topk_ids: torch.Tensor,
    num_experts: int,
    sorted_token_ids: torch.Tensor,
    inverse_permutation: torch.Tensor,
    layout: torch.Tensor,
    scratch: torch.Tensor | None = None,
) -> None:
    """Sort the (token, k) slots of a batch by expert, stably; arguments as for
    ``triton_kernels.route.route``.

    Args:
        topk_ids: (M, top_k) int32 or int64; S = M * top_k slots. Outside 0 .. E-1: dropped, sorted
            behind all experts.
        num_experts: E.
        sorted_token_ids: (S,) int32, written: the token of each row.
        inverse_permutation: (M, top_k) int32, written: the row of each slot, -1 for a dropped one.
        layout: (3E+2,) int32, written: tokens (E,), expert offsets (E+1,), scale offsets (E+1,) of
            the rows.
        scratch: not used.
    """
    ids = topk_ids.reshape(-1).to(torch.int64)
    experts = torch.where((ids >= 0) & (ids < num_experts), ids, num_experts)
    order = torch.sort(experts, stable=True).indices
    rows = torch.empty_like(order)
    rows[order] = torch.arange(order.numel(), device=order.device)
    sorted_token_ids.copy_(order // topk_ids.shape[1])
    inverse_permutation.view(-1).copy_(torch.where(experts < num_experts, rows, -1))
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=ids.device)
    counts.scatter_add_(0, experts, torch.ones_like(experts))
    layout.copy_(torch.cat(reference.group_offsets(counts[:num_experts], ids.numel(), from_ends=False)))


def add_expert_bias(
    y: torch.Tensor, inverse_permutation: torch.Tensor, topk_ids: torch.Tensor, bias: torch.Tensor
) -> None:
    """y[inverse_permutation[m, k]] += bias[topk_ids[m, k]], summed in fp32 and rounded to y's
    dtype.

    Args:
        y: (T, N) bf16, fp16 or fp32; changed.
        inverse_permutation: (M, top_k) int32; -1 is skipped.
        topk_ids: (M, top_k) int32 or int64.
        bias: (E, N) bf16, fp16 or fp32.
    """
    rows, ids = inverse_permutation.reshape(-1).to(torch.int64), topk_ids.reshape(-1).to(torch.int64)
    live = rows >= 0
    # Rows of dropped slots land in one extra row, so that no shape depends on device data.
    target = torch.where(live, rows, y.shape[0])
    added = torch.zeros(y.shape[0] + 1, y.shape[1], dtype=torch.float32, device=y.device)
    added[target] = bias[torch.where(live, ids, 0)].float()
    owned = torch.zeros(y.shape[0] + 1, dtype=torch.bool, device=y.device)
    owned[target] = True
    y.copy_(torch.where(owned[:-1].unsqueeze(1), (y.float() + added[:-1]).to(y.dtype), y))


def combine(
    y: torch.Tensor,
    inverse_permutation: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """out[m] = sum over k of topk_weights[m, k] * (y[inverse_permutation[m, k]] + bias[topk_ids[m,
    k]]), in fp32, in the order of k.

    Args:
        y: (T, H) bf16, fp16 or fp32, T >= 1.
        inverse_permutation: (M, top_k) int32; a slot whose row is -1 contributes nothing.
        topk_ids: (M, top_k) int32 or int64.
        topk_weights: (M, top_k) bf16, fp16 or fp32.
        bias: (E, H) bf16, fp16 or fp32, or None.
        out: (M, H) bf16, fp16 or fp32, written.
    """
    total = torch.zeros(out.shape, dtype=torch.float32, device=out.device)
    for k in range(inverse_permutation.shape[1]):
        rows = inverse_permutation[:, k].to(torch.int64)
        live = rows >= 0
        value = y[torch.where(live, rows, 0)].float()
        if bias is not None:
            value = value + bias[torch.where(live, topk_ids[:, k].to(torch.int64), 0)].float()
        weighted = topk_weights[:, k].float().unsqueeze(1) * value
        total = torch.where(live.unsqueeze(1), total + weighted, total)
    out.copy_(total.to(out.dtype))
