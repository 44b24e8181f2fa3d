"""What a kernel package offers: a backend that multiplies, and a quantizer with all else that moves
tokens.

Neither launches anything: each function returns the steps of a plan.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from hybrid_mxfp8.dispatch.buffers import Buffer
from hybrid_mxfp8.dispatch.problem import GemmBuffers, Problem, QuantizeBuffers, QuantizeProblem, Support


class Step(Protocol):
    """Part of a plan: a kernel launch, or a call of something that launches."""

    def run(self, tensors: Sequence[torch.Tensor], device: torch.device) -> None:
        """Do it, on the device's current stream, with the tensors that the plan is run with."""
        ...

    def encode(self, device: torch.device) -> Sequence[int] | None:
        """The words of this launch for ``dispatch.launcher``; None where ``run`` must be called."""
        ...

    def hooked(self) -> bool:
        """Whether something, such as a profiler, is to see each launch, which only ``run`` shows
        it."""
        ...


Steps = tuple[Step, ...]


class Call(NamedTuple):
    """A step that calls a function of tensors."""

    function: Callable[..., None]
    arguments: tuple[Any, ...]

    def run(self, tensors: Sequence[torch.Tensor], device: torch.device) -> None:
        """With the tensor that lies in each buffer."""
        self.function(*[a.view(tensors) if isinstance(a, Buffer) else a for a in self.arguments])

    def encode(self, device: torch.device) -> None:
        """Not a kernel launch."""

    def hooked(self) -> bool:
        """Always called."""
        return True


class Backend(NamedTuple):
    """One way to multiply.

    Attributes:
        name: as users write it.
        about: one line for tables.
        made_for: whether a device is one that it is meant for: if it can't run there, a warning is
            due.
        available: whether it can run at all on a device.
        can_run: whether it is available, and takes this problem.
        workspace_size: bytes of device memory that a call needs beside its output.
        workspace_bound: bytes that suffice for every call of up to as many rows.
        plan: the steps of one product; T and E are at least 1.
        explain: configuration and why, one line.
    """

    name: str
    about: str
    made_for: Callable[[torch.device], bool]
    available: Callable[[torch.device], Support]
    can_run: Callable[[Problem], Support]
    workspace_size: Callable[[Problem], int]
    workspace_bound: Callable[[Problem], int]
    plan: Callable[[Problem, GemmBuffers], Steps]
    explain: Callable[[Problem], str]


class Quantizer(NamedTuple):
    """Quantization, and the other kernels around a product.

    Attributes:
        name: of the backend whose package it comes from.
        available: whether it can run on a device.
        quantize: rows to e4m3 values and swizzled scales; T and E at least 1.
        group_offsets: (counts or ends (E,), layout (3E+2,) int32, T, whether ends).
        caller_layout: (counts (E,), first scale rows (E,), layout, T, S).
        pack_tokens: (x (M, H), its row stride, topk_ids (M, top_k) and topk_weights, or None,
            records (R, bytes), E).
        route: (topk_ids (M, top_k), sorted_token_ids (T,), inverse_permutation (M, top_k), layout,
            scratch, E).
        route_scratch: (choices, E) -> int32 elements of ``scratch``; never more for fewer choices.
        add_expert_bias: (y (T, N), inverse_permutation, topk_ids, bias (E, N)), in place.
        combine: (y (T, H), inverse_permutation, topk_ids, topk_weights, bias or None, out (M, H),
            its row stride).
    """

    name: str
    available: Callable[[torch.device], Support]
    quantize: Callable[[QuantizeProblem, QuantizeBuffers], Steps]
    group_offsets: Callable[[Buffer, Buffer, int, bool], Steps]
    caller_layout: Callable[[Buffer, Buffer, Buffer, int, int], Steps]
    pack_tokens: Callable[[Buffer, int, Buffer | None, Buffer | None, Buffer, int, int], Steps]
    route: Callable[[Buffer, Buffer, Buffer, Buffer, Buffer, int], Steps]
    route_scratch: Callable[[int, int], int]
    add_expert_bias: Callable[[Buffer, Buffer, Buffer, Buffer], Steps]
    combine: Callable[[Buffer, Buffer, Buffer, Buffer, Buffer | None, Buffer, int], Steps]
