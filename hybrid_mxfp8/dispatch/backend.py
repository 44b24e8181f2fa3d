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
        """Whether hooks, such as a profiler's, are to see each launch: only ``run`` calls them."""
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
    """One way to multiply."""

    name: str  # as users write it
    made_for: Callable[[torch.device], bool]  # whether auto warns where it can't run on a device
    available: Callable[[torch.device], Support]  # whether it can run at all on a device
    can_run: Callable[[Problem], Support]  # whether it is available, and takes this problem
    workspace_size: Callable[[Problem], int]  # bytes that a call needs beside its output
    workspace_bound: Callable[[Problem], int]  # bytes for every call of up to as many rows
    plan: Callable[[Problem, GemmBuffers], Steps]  # the steps of one product; T, E >= 1
    explain: Callable[[Problem], str]  # configuration and why, one line


class Quantizer(NamedTuple):
    """Quantization, and the other kernels around a product: ``reference`` says what each computes,
    ``triton_kernels`` has the arguments by name. ``route_scratch(choices, E)`` is the number of
    int32 elements of route's ``scratch``; fewer choices never need more."""

    name: str  # of the backend whose package it comes from
    quantize: Callable[[QuantizeProblem, QuantizeBuffers], Steps]  # T and E at least 1
    group_offsets: Callable[[Buffer, Buffer, int, bool], Steps]
    caller_layout: Callable[[Buffer, Buffer, Buffer, int, int], Steps]
    pack_tokens: Callable[[Buffer, int, Buffer | None, Buffer | None, Buffer, int, int], Steps]
    route: Callable[[Buffer, Buffer, Buffer, Buffer, int], Steps]
    route_scratch: Callable[[int, int], int]
    add_expert_bias: Callable[[Buffer, Buffer, Buffer, Buffer], Steps]
    combine: Callable[[Buffer, Buffer, Buffer, Buffer, Buffer | None, Buffer, int], Steps]
