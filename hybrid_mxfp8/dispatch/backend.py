"""What a kernel package offers: a backend that multiplies, and a quantizer with all else that moves tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from hybrid_mxfp8.dispatch.buffers import Buffer
from hybrid_mxfp8.dispatch.problem import (
    GemmBuffers,
    Problem,
    QuantizeBuffers,
    QuantizeProblem,
    Support,
)


class Step(Protocol):
    """Part of a plan: a kernel launch, or a call of something that launches."""

    def run(self, tensors: Sequence[torch.Tensor]) -> None:
        """Do it, on the current stream, with the tensors that the plan is run with."""
        ...

    def encode(self) -> list[int] | None:
        """The words of this launch for ``dispatch.launcher``; None where ``run`` must be called."""
        ...

    def hooked(self) -> bool:
        """Whether something, such as a profiler, is to see each launch, which only ``run`` shows it."""
        ...


Steps = tuple[Step, ...]


class Call(NamedTuple):
    """A step that calls a function of tensors."""

    function: Callable[..., None]
    arguments: tuple[Any, ...]

    def run(self, tensors: Sequence[torch.Tensor]) -> None:
        """With the tensor that lies in each buffer."""
        self.function(*[a.view(tensors) if isinstance(a, Buffer) else a for a in self.arguments])

    def encode(self) -> None:
        """Not a kernel launch."""

    def hooked(self) -> bool:
        """Always called."""
        return True


class Backend(Protocol):
    """One way to multiply.

    Attributes:
        name: as users write it.
        about: one line for tables.
    """

    name: str
    about: str

    def made_for(self, device: torch.device) -> bool:
        """Whether the device is one that this backend is meant for: if it can't run there, a warning is due."""
        ...

    def available(self, device: torch.device) -> Support:
        """Whether it can run at all on a device."""
        ...

    def can_run(self, problem: Problem) -> Support:
        """Whether it is available, and takes this problem."""
        ...

    def workspace_size(self, problem: Problem) -> int:
        """Bytes of device memory that a call needs beside its output."""
        ...

    def workspace_bound(self, problem: Problem) -> int:
        """Bytes that suffice for every call of up to as many rows."""
        ...

    def plan(self, problem: Problem, buffers: GemmBuffers) -> Steps:
        """The launches of one product; T and E are at least 1."""
        ...

    def explain(self, problem: Problem) -> str:
        """Configuration and why, one line."""
        ...


class Quantizer(NamedTuple):
    """Quantization, and the other kernels around a product. Each function returns the steps of a plan.

    Attributes:
        name: of the backend whose package it comes from.
        available: whether it can run on a device.
        quantize: rows to e4m3 values and swizzled scales; T and E at least 1.
        group_offsets: (counts or ends (E,), layout (3E+2,) int32, T, whether ends, device).
        caller_layout: (counts (E,), first scale rows (E,), layout, T, S, device).
        route: (topk_ids (M, top_k), sorted_token_ids (T,), inverse_permutation (M, top_k), layout, scratch, E, device).
        route_scratch: (choices, E) -> int32 elements of ``scratch``; never more for fewer choices.
        add_expert_bias: (y (T, N), inverse_permutation, topk_ids, bias (E, N), device), in place.
        combine: (y (T, H), inverse_permutation, topk_ids, topk_weights, bias or None, out (M, H), its row stride, device).
    """

    name: str
    available: Callable[[torch.device], Support]
    quantize: Callable[[QuantizeProblem, QuantizeBuffers], Steps]
    group_offsets: Callable[[Buffer, Buffer, int, bool, torch.device], Steps]
    caller_layout: Callable[[Buffer, Buffer, Buffer, int, int, torch.device], Steps]
    route: Callable[[Buffer, Buffer, Buffer, Buffer, Buffer, int, torch.device], Steps]
    route_scratch: Callable[[int, int], int]
    add_expert_bias: Callable[[Buffer, Buffer, Buffer, Buffer, torch.device], Steps]
    combine: Callable[[Buffer, Buffer, Buffer, Buffer, Buffer | None, Buffer, int, torch.device], Steps]
