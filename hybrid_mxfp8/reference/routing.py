"""Routing, expert bias and combine in PyTorch: the kernels' twins, bit for bit."""

from __future__ import annotations

import torch

from hybrid_mxfp8 import reference


def route(
    topk_ids: torch.Tensor,  # (M, top_k) int32 or int64
    num_experts: int,  # E
    sorted_token_ids: torch.Tensor,  # (S,) int32, written: the token of each row
    inverse_permutation: torch.Tensor,  # (M, top_k) int32, written: the row of each slot, or -1
    layout: torch.Tensor,  # (3E+2,) int32, written: see GroupLayout.from_buffer
    scratch: torch.Tensor | None = None,  # not used
) -> None:
    """Sort the (token, k) slots of a batch by expert, stably: S = M * top_k of them. A slot with an
    id outside 0 .. E-1 is dropped: sorted behind all experts."""
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
    """y[row of slot] += bias (E, N)[id], summed in fp32, for y (T, N); row -1 is skipped."""
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
    y: torch.Tensor,  # (T, H) bf16, fp16 or fp32, T >= 1
    inverse_permutation: torch.Tensor,  # (M, top_k) int32; a slot of row -1 adds nothing
    topk_ids: torch.Tensor,  # (M, top_k) int32 or int64
    topk_weights: torch.Tensor,  # (M, top_k) bf16, fp16 or fp32
    bias: torch.Tensor | None,  # (E, H) bf16, fp16 or fp32
    out: torch.Tensor,  # (M, H) bf16, fp16 or fp32, written
) -> None:
    """out[m] = sum over k of topk_weights[m, k] * (y[inverse_permutation[m, k]] + bias[topk_ids[m,
    k]]), in fp32, in the order of k."""
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
