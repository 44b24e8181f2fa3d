"""A call's plan: its launches, made once for a signature and run with any tensors of that
signature.

    plan = PLANS.get(signature)        shapes, dtypes, strides, alignment, device, options, settings
    if plan is None: ...               checks, choice of backend, configuration, compilation
    plan.run(x, values, scales, ...)   one call into C, on the current stream

A plan holds no tensor. Consecutive kernel launches become one program of the C launcher
(:mod:`hybrid_mxfp8.dispatch.launcher`), which also checks that what is written overlaps nothing
else. Where there is no launcher, or a profiler's hooks are installed, each step runs by itself:
slower, with the same result.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch

from hybrid_mxfp8.core.checks import extent, fail, has_memory
from hybrid_mxfp8.dispatch import launcher
from hybrid_mxfp8.dispatch.backend import Steps
from hybrid_mxfp8.dispatch.buffers import Buffer

ALIGNMENT = 256
"""Bytes; what starts at such a boundary can be read by every kernel and by TMA."""

_current_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)


class Operand(NamedTuple):
    """A tensor that a plan is run with.

    Attributes:
        name: the argument that an error names where this is written.
        label: what an error calls it where another is written over it.
        extent: bytes from its first to behind its last.
        written: whether it must share no memory with the others.
        may_equal: the operand that it may be, address for address; -1 if none.
    """

    name: str
    label: str
    extent: int
    written: bool = False
    may_equal: int = -1


class Operands:
    """Collects the tensors of a plan in the order in which ``run`` takes them."""

    def __init__(self) -> None:
        self.list: list[Operand] = []

    def add(
        self,
        name: str,
        tensor: torch.Tensor,
        *,
        written: bool = False,
        label: str | None = None,
        may_equal: int = -1,
    ) -> Buffer:
        """The next tensor, as launches see it."""
        self.list.append(Operand(name, label or name, extent(tensor), written, may_equal))
        aligned = tensor.data_ptr() % 16 == 0
        return Buffer(len(self.list) - 1, 0, tensor.dtype, tensor.shape, aligned, True)

    def buffer(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Buffer:
        """The next tensor, contiguous, aligned and written: one that is allocated for each call."""
        self.list.append(Operand(name, name, math.prod(shape) * dtype.itemsize, True))
        return Buffer(len(self.list) - 1, 0, dtype, shape)


class Plan:
    """The launches of one signature.

    Attributes:
        operands: what ``run`` takes, in order.
        arena_bytes: of the operand named ``workspace``; 0 if there is none.
        result: what else the caller needs, such as shapes of outputs.
        lasting: whether another call of its signature would be planned alike.
    """

    __slots__ = ("_device", "_hooked", "_index", "_parts", "arena_bytes", "lasting", "operands", "result")

    def __init__(
        self,
        device: torch.device,
        operands: Operands,
        steps: Steps,
        *,
        arena_bytes: int = 0,
        result: Any = None,
        lasting: bool = True,
    ) -> None:
        self.lasting = lasting
        self.operands = tuple(operands.list)
        self.arena_bytes = arena_bytes
        self.result = result
        self._device = device
        self._index = -1 if device.index is None else device.index
        self._parts = _programs(device, self.operands, steps)
        # A program checks for overlaps before it launches, so one must come first.
        first, first_steps = self._parts[0] if self._parts else (None, ())
        self._hooked = first_steps[0].hooked if first is not None else _always

    def run(self, *tensors: torch.Tensor) -> None:
        """Make the launches on the current stream.

        Raises:
            ValueError: what is written overlaps another operand.
        """
        if not self._hooked():
            if _several_gpus() and self._index != torch.cuda.current_device():
                with torch.cuda.device(self._device):
                    self._launch(tensors)
            else:
                self._launch(tensors)
            return
        self._check_overlap(tensors)
        if self._device.type == "cuda":
            with torch.cuda.device(self._device):
                self._run_steps(tensors)
        else:
            self._run_steps(tensors)

    def _launch(self, tensors: tuple[torch.Tensor, ...]) -> None:
        stream = _current_stream(self._index)  # type: ignore[misc]
        addresses = [tensor.data_ptr() for tensor in tensors]
        for program, steps in self._parts:
            if program is None:
                for step in steps:
                    step.run(tensors, self._device)
            elif launcher.load().run(program.address, stream, *addresses):
                self._check_overlap(tensors)
                raise AssertionError("the launcher saw an overlap that is none")

    def _run_steps(self, tensors: tuple[torch.Tensor, ...]) -> None:
        for _, steps in self._parts:
            for step in steps:
                step.run(tensors, self._device)

    def _check_overlap(self, tensors: Sequence[torch.Tensor]) -> None:
        """As the launcher does it."""
        spans = [(t.data_ptr(), t.data_ptr() + o.extent) for t, o in zip(tensors, self.operands, strict=True)]
        for written, (start, end) in enumerate(spans):
            operand = self.operands[written]
            if not operand.written or start == end:
                continue
            for other, (other_start, other_end) in enumerate(spans):
                if other == written or other_start == other_end:
                    continue
                if other > written and self.operands[other].written:
                    continue  # its turn comes
                if other == operand.may_equal and other_start == start:
                    continue
                if start < other_end and other_start < end:
                    fail(
                        operand.name,
                        f"must not overlap {self.operands[other].label}",
                        f"addresses {start:#x} .. {end:#x}, and {other_start:#x} .. {other_end:#x}",
                    )


def _always() -> bool:
    return True


def _programs(
    device: torch.device, operands: tuple[Operand, ...], steps: Steps
) -> list[tuple[launcher.Program | None, Steps]]:
    """Steps in runs: those that the C launcher makes together, and those that must be called."""
    parts: list[tuple[launcher.Program | None, Steps]] = []
    extents = [operand.extent for operand in operands]
    written = [(i, operand.may_equal) for i, operand in enumerate(operands) if operand.written]
    launches: list[Sequence[int]] = []
    together: list[Any] = []

    def close() -> None:
        if launches:
            program = launcher.program(device.index or 0, extents, written, launches)
            parts.append((program, tuple(together)))
            launches.clear()
            together.clear()

    for step in steps:
        words = step.encode(device)
        if words is None:
            close()
            parts.append((None, (step,)))
        else:
            launches.append(words)
            together.append(step)
    close()
    return parts


_gpus: list[int] = []


def _several_gpus() -> bool:
    if not _gpus:
        _gpus.append(torch.cuda.device_count())
    return _gpus[0] > 1


# ---------------------------------------------------------------- signatures and the cache


def describe(x: torch.Tensor | None) -> tuple[Hashable, ...] | None:
    """All of a tensor that a plan depends on: everything but its address, of which the alignment
    counts.

    Raises:
        TypeError: a fake tensor or another subclass that has no memory of its own.
    """
    if x is None:
        return None
    if not has_memory(type(x)):
        raise TypeError(f"{type(x).__name__} is described by no signature")
    return x.dtype, x.shape, x.stride(), x.device, x.data_ptr() & 15, x.requires_grad


class PlanCache:
    """Plans by signature; full, it drops the oldest."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._plans: dict[Hashable, Plan] = {}

    def get(self, signature: Hashable) -> Plan | None:
        """The plan; None for a signature that can't be hashed, such as one of symbolic shapes."""
        try:
            return self._plans.get(signature)
        except TypeError:
            return None

    def add(self, signature: Hashable, plan: Plan) -> None:
        """Keep a plan, if it is a lasting one."""
        if not plan.lasting:
            return
        plans = self._plans
        while len(plans) >= self._capacity:
            with contextlib.suppress(RuntimeError, StopIteration):  # another thread was faster
                plans.pop(next(iter(plans)), None)
        plans[signature] = plan

    def clear(self) -> None:
        """Forget all plans."""
        self._plans.clear()


PLANS = PlanCache(4096)
"""Of every public function; some kilobytes each."""

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=PLANS.clear)  # a kernel's handle is of no use in a forked child
