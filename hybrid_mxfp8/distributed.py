"""``ExpertParallelExperts``: the experts of one MoE layer spread over ranks, on torch.distributed.

A rank quantizes its own tokens, so they travel as MXFP8: 33 bytes instead of 64 for 32 elements.
What arrives is routed and gathered as it is, with the bits that bf16 tokens would have given. Each
rank's part of the sum travels back in the tokens' dtype.

    all_gather   pack ──all_gather──► the rank's experts ──reduce_scatter──► y       no host sync
    all_to_all   pack ──all_to_all──► the rank's experts ──all_to_all──► sum ──► y   one sync

A token and its choices are one record of bytes (``core.token_record``), so each arrow is one
collective.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hybrid_mxfp8.checkpoint.reader import count_experts, load_experts
from hybrid_mxfp8.core.checks import FLOAT_DTYPES, check_int, check_tensor, fail, is_tracing, wait_for
from hybrid_mxfp8.core.operands import MXFP8Tokens
from hybrid_mxfp8.core.token_record import TokenRecord
from hybrid_mxfp8.ops.experts import MXFP8Experts
from hybrid_mxfp8.ops.tokens import check_tokens, pack_tokens, sum_rows

__all__ = ["ExpertParallelExperts", "experts_of_rank"]

DISPATCHES = ("all_gather", "all_to_all")

# PyTorch 2.13 renamed both.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def experts_of_rank(num_experts: int, rank: int, ranks: int) -> range:
    """The experts that a rank holds: as many as another's, or one more or less."""
    return range(rank * num_experts // ranks, (rank + 1) * num_experts // ranks)


class ExpertParallelExperts(torch.nn.Module):
    """A rank's experts, and the collectives that bring it tokens; inference only.

    Every rank calls it at the same time, with tokens of its own, and gets their results. Parts of a
    sum are rounded to the tokens' dtype before they are added, on each rank.

    - ``dispatch="all_gather"``: every rank gets all tokens and computes those of its experts. All
      ranks are padded to ``max_tokens``; then nothing waits for the GPU, so that a call can be
      captured in a CUDA graph and compiled whole. Without ``max_tokens`` they are padded to the
      largest number, which they tell each other in one small exchange on the host.
    - ``dispatch="all_to_all"``: a token goes only to the ranks of its experts, for many ranks. Each
      call waits once for the GPU, to know how many go where: no CUDA graph, no compilation.

    Making one is a call of all ranks, too: they agree on the scale group in which tokens travel.
    A rank that dies, or raises before it takes part, makes the others raise or end as the group's
    backend does it, within the group's timeout.

    Args:
        experts: this rank's: those of :func:`experts_of_rank`, in this order.
        num_experts: E, of all ranks; at least one a rank.
        group: of the ranks; default: all. For ``all_gather`` with no ``max_tokens`` it needs a
            backend for CPU tensors, too: ``init_process_group("cpu:gloo,cuda:nccl")``.
        dispatch: ``all_gather`` or ``all_to_all``.
        max_tokens: the most tokens of a rank, the same number on all of them; for ``all_gather``.

    Raises:
        TypeError, ValueError: no such dispatch, a number of experts that is not the rank's, or a
            group without what it needs.
    """

    def __init__(
        self,
        experts: MXFP8Experts,
        *,
        num_experts: int,
        group: dist.ProcessGroup | None = None,
        dispatch: str = "all_gather",
        max_tokens: int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(experts, MXFP8Experts):
            raise TypeError(f"experts: must be an MXFP8Experts, got {type(experts).__name__}")
        self.group, own = _own_experts(check_int("num_experts", num_experts, 1), group)
        if experts.w2q.num_experts != len(own):
            fail("experts", f"must be {len(own)}, numbers {own.start} .. {own.stop - 1}", experts.w2q.num_experts)
        if dispatch not in DISPATCHES:
            fail("dispatch", f"must be one of {', '.join(DISPATCHES)}", repr(dispatch))
        if max_tokens is not None:
            check_int("max_tokens", max_tokens, 1)
            if dispatch == "all_to_all":
                fail("max_tokens", "must be None with dispatch all_to_all, which pads nothing", max_tokens)
        elif dispatch == "all_gather" and "cpu:" not in dist.get_backend_config(self.group):
            expected = "must have a backend for CPU tensors, such as cpu:gloo,cuda:nccl, where max_tokens is None"
            fail("group", expected, dist.get_backend_config(self.group))
        self._agree(experts, max_tokens or 0)
        self.experts = experts
        self.num_experts = num_experts
        self.dispatch = dispatch
        self.max_tokens = max_tokens
        self._first = own.start
        self._ranks = dist.get_world_size(self.group)

    def _agree(self, experts: MXFP8Experts, max_tokens: int) -> None:
        """Tokens travel in the smallest scale group of a rank's w13; ``max_tokens`` must be one."""
        sent = [experts.w13q.scale_group, max_tokens, -max_tokens]
        agreed = torch.tensor(sent, device=experts.w13_values.device)
        dist.all_reduce(agreed, dist.ReduceOp.MIN, group=self.group)
        self._scale_group, least, most = agreed.tolist()
        if least != -most:
            fail("max_tokens", "must be the same on all ranks", f"{least or None} .. {-most}")

    @classmethod
    def from_weights(
        cls,
        w13: torch.Tensor,
        w2: torch.Tensor,
        *,
        group: dist.ProcessGroup | None = None,
        dispatch: str = "all_gather",
        max_tokens: int | None = None,
        device: torch.device | str | None = None,
        w13_bias: torch.Tensor | None = None,
        w2_bias: torch.Tensor | None = None,
        **options: Any,
    ) -> ExpertParallelExperts:
        """Quantize this rank's of all E experts. ``group``, ``dispatch`` and ``max_tokens`` are as
        for the class.

        Args:
            w13: (E, 2I, H) bf16, fp16 or fp32, of all ranks; may be on the CPU, or memory-mapped.
            w2: (E, H, I).
            device: where the rank's are quantized and kept; default: where w13 is.
            w13_bias: (E, 2I), of all ranks, or None.
            w2_bias: (E, H), or None.
            **options: ``transposed``, ``interleaved`` and ``scale_group`` as for
                ``MXFP8Experts.from_weights``; ``activation``, ``workspace`` (its ``max_tokens``
                counts those of all ranks) and ``backend`` as for ``MXFP8Experts``.

        Raises:
            TypeError, ValueError: as ``MXFP8Experts.from_weights`` and the class.
        """
        check_tensor("w13", w13, dtypes=FLOAT_DTYPES, ndim=3, dims="(E, 2I, H)")
        num_experts = w13.shape[0]
        group, own = _own_experts(num_experts, group)
        kept: dict[str, Any] = {"w13": w13, "w2": w2, "w13_bias": w13_bias, "w2_bias": w2_bias}
        for name, tensor in kept.items():
            if tensor is not None:
                if tensor.shape[:1] != (num_experts,):
                    fail(name, f"must have w13's E = {num_experts} first", tuple(tensor.shape))
                kept[name] = tensor[own.start : own.stop].to(device)
        experts = MXFP8Experts.from_weights(**kept, **options)
        return cls(experts, num_experts=num_experts, group=group, dispatch=dispatch, max_tokens=max_tokens)

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        names: tuple[str | Sequence[str], str | Sequence[str]],
        *,
        group: dist.ProcessGroup | None = None,
        dispatch: str = "all_gather",
        max_tokens: int | None = None,
        device: torch.device | str | None = None,
        **options: Any,
    ) -> ExpertParallelExperts:
        """Read this rank's experts, and of the others only the files' headers. ``group``,
        ``dispatch`` and ``max_tokens`` are as for the class.

        Args:
            path: an MXFP8 checkpoint, as for ``load_experts``.
            names: those of w13 and of w2, each as for ``load_experts``: such as
                ``(["experts.*.gate_proj.weight", "experts.*.up_proj.weight"],
                "experts.*.down_proj.weight")``.
            device: where they go; default the CPU.
            **options: of ``MXFP8Experts``; biases are this rank's alone.

        Raises:
            TypeError, ValueError, FileNotFoundError: as ``load_experts`` and the class.
        """
        if isinstance(names, str) or len(names) != 2:
            fail("names", "must be a pair, the names of w13 and of w2", repr(names))
        w13, w2 = names
        num_experts = count_experts(path, w2 if isinstance(w2, str) else w2[0])
        group, own = _own_experts(num_experts, group)
        w13q, w2q = (load_experts(path, each, experts=own, device=device) for each in (w13, w2))
        experts = MXFP8Experts(w13q, w2q, **options)
        return cls(experts, num_experts=num_experts, group=group, dispatch=dispatch, max_tokens=max_tokens)

    def extra_repr(self) -> str:
        """What the rank holds, for ``print(module)``."""
        own = f"{self._first} .. {self._first + self.experts.w2q.num_experts - 1}"
        return f"experts {own} of {self.num_experts}, dispatch={self.dispatch}, max_tokens={self.max_tokens}"

    def forward(self, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        """This rank's tokens through the experts of all ranks.

        Args:
            x: (M, H) bf16, fp16 or fp32, the same dtype on all ranks; M may differ, and be 0.
            topk_ids: (M, top_k) int32 or int64, numbers of all E experts; others, such as -1,
                contribute nothing. top_k is the same on all ranks.
            topk_weights: (M, top_k) bf16, fp16 or fp32.

        Returns:
            (M, H) of x's dtype.

        Raises:
            TypeError, ValueError: as ``moe_forward``, before anything is sent; more than
                ``max_tokens`` tokens.
            RuntimeError: with gloo, another rank failed or the group's timeout has passed.
        """
        x, topk_ids, topk_weights = wait_for(x, topk_ids, topk_weights)
        check_tensor("x", x, dtypes=FLOAT_DTYPES, ndim=2, dims="(M, H)")
        check_tensor("topk_ids", topk_ids, dtypes=(torch.int32, torch.int64), ndim=2, dims="(M, top_k)")
        check_tensor("topk_weights", topk_weights, dtypes=FLOAT_DTYPES, ndim=2, dims="(M, top_k)")
        if x.shape[1] != self.experts.w2_values.shape[1]:
            expected = f"must have shape (M, H) with the experts' H = {self.experts.w2_values.shape[1]}"
            fail("x", expected, tuple(x.shape))
        if self.dispatch == "all_to_all":
            return self._all_to_all(x, topk_ids, topk_weights)
        num_records = self.max_tokens or self._most_tokens(x, topk_ids, topk_weights)
        sent = self._pack(x, topk_ids, topk_weights, num_records)
        if not sent.numel():
            return torch.empty_like(x)
        received = sent.new_empty(self._ranks * num_records, sent.shape[1])
        _all_gather(received, sent, group=self.group)
        parts = self._compute(received, x, topk_ids)
        y = parts.new_empty(num_records, x.shape[1])
        _reduce_scatter(y, parts, group=self.group)
        return y[: x.shape[0]]

    def _pack(
        self, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, num_records: int
    ) -> torch.Tensor:
        sizes = {"num_records": num_records, "num_experts": self.num_experts, "scale_group": self._scale_group}
        return pack_tokens(x, topk_ids, topk_weights, **sizes, backend=self.experts.backend)

    def _compute(self, received: torch.Tensor, x: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
        """This rank's part of the sum of the tokens in records: (records, H)."""
        record = TokenRecord(x.shape[1], topk_ids.shape[1])
        values, scales, ids, weights = record.split(received)
        given = {"values": values, "scales": scales, "dtype": x.dtype, "scale_group": self._scale_group}
        tokens = MXFP8Tokens.unchecked(**given)
        # Numbers of other ranks' experts, and -1, fall outside those of this rank and are skipped.
        part: torch.Tensor = self.experts(tokens, ids - self._first, weights)
        return part

    def _most_tokens(self, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> int:
        """The largest number of tokens of a rank."""
        if is_tracing(x):
            fail("max_tokens", "must be given under torch.compile", None)
        check_tokens(x, topk_ids, topk_weights)  # before other ranks count on this one
        most = torch.tensor(x.shape[0], device="cpu")  # no rank waits for its GPU
        dist.all_reduce(most, dist.ReduceOp.MAX, group=self.group)
        return int(most)

    def _all_to_all(self, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        records = self._pack(x, topk_ids, topk_weights, x.shape[0])
        goes, places = _destinations(topk_ids, self.num_experts, self._ranks)
        counts = goes.sum(1)
        arriving = torch.empty_like(counts)
        dist.all_to_all_single(arriving, counts, group=self.group)
        sent_splits, received_splits = torch.stack((counts, arriving)).tolist()  # the one sync
        # Tokens in the order of the ranks they go to: a stable sort puts those that go first.
        order = torch.sort(goes.flatten(), descending=True, stable=True).indices[: sum(sent_splits)]
        sent = records.view(torch.int64)[order % max(x.shape[0], 1)].view(torch.uint8)  # wide copies
        received = records.new_empty(sum(received_splits), records.shape[1])
        dist.all_to_all_single(received, sent, received_splits, sent_splits, group=self.group)
        parts = self._compute(received, x, topk_ids)
        returned = parts.new_empty(sum(sent_splits), x.shape[1])
        dist.all_to_all_single(returned, parts, sent_splits, received_splits, group=self.group)
        return sum_rows(returned, places, backend=self.experts.backend)


def _own_experts(num_experts: int, group: dist.ProcessGroup | None) -> tuple[dist.ProcessGroup, range]:
    """The group, or that of all ranks, and the experts of this rank in it."""
    if group is None:
        group = dist.group.WORLD
    if group is None:
        fail("group", "must be a process group, or torch.distributed be initialized", None)
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group: must be a process group of this rank, got {type(group).__name__}")
    ranks = dist.get_world_size(group)
    if num_experts < ranks:
        fail("num_experts", f"must be at least one for each of {ranks} ranks", num_experts)
    return group, experts_of_rank(num_experts, dist.get_rank(group), ranks)


def _destinations(topk_ids: torch.Tensor, num_experts: int, ranks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which tokens go to which of R ranks, each at most once, (R, M) bool; and of each choice of
    ``topk_ids`` (M, top_k) its row among all that go, int32, in the order of ranks and then of
    tokens: -1 for one that goes nowhere, or along with an earlier choice. No sync."""
    valid = (topk_ids >= 0) & (topk_ids < num_experts)
    # The inverse of experts_of_rank; one more rank takes what goes nowhere.
    owner = torch.where(valid, ((topk_ids.to(torch.int64) + 1) * ranks - 1) // num_experts, ranks)
    goes = torch.zeros(topk_ids.shape[0], ranks + 1, dtype=torch.bool, device=topk_ids.device)
    goes = goes.scatter_(1, owner, True).t()[:ranks].contiguous()
    row = goes.flatten().cumsum(0).view_as(goes) - 1
    same = owner.unsqueeze(2) == owner.unsqueeze(1)
    repeated = same.tril(-1).any(2)
    places = row.t().gather(1, owner.clamp_max(ranks - 1))
    # Row by row, as kernels read it: the result of an operator has its inputs' strides.
    return goes, torch.where(valid & ~repeated, places, -1).to(torch.int32).contiguous()
