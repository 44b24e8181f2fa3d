"""A call's plan: its launches, made once for a signature and run with any tensors of that
signature.

What changes from batch to batch, such as T, is no part of the signature: plans of other sizes
follow from the first (:mod:`hybrid_mxfp8.dispatch.trace`) in microseconds, unless they take
another tile or kernel.

A plan holds no tensor. Consecutive launches become one program of the C launcher, which also checks
that what is written overlaps nothing else. Where there is no launcher, or a profiler's hooks are
installed, each step runs by itself: slower, with the same result.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import os
from array import array
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.autograd import forward_ad

from hybrid_mxfp8.core.checks import check_no_shared_byte, extent, has_memory
from hybrid_mxfp8.core.operands import ExpertWeights, GroupedMXFP8
from hybrid_mxfp8.dispatch import launcher
from hybrid_mxfp8.dispatch.backend import Steps
from hybrid_mxfp8.dispatch.buffers import Buffer
from hybrid_mxfp8.dispatch.trace import MIN_SIZE, Trace, value_of

ALIGNMENT = 256  # bytes; what starts at such a boundary can be read by every kernel and by TMA
_current_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)
_address = torch.Tensor.data_ptr


class Operand(NamedTuple):
    """A tensor that a plan is run with."""

    name: str  # the argument that an error names where this is written
    label: str  # what an error calls it where another is written over it
    extent: int  # bytes from its first to the end of its last
    written: bool = False  # whether it must share no memory with the others
    may_equal: int = -1  # the operand that may have the same address; -1 if none


class Operands(list[Operand]):
    """The tensors of a plan, in the order in which ``run`` takes them."""

    def add(
        self, name: str, tensor: torch.Tensor, *, written: bool = False, label: str | None = None, may_equal: int = -1
    ) -> Buffer:
        """The next tensor, as launches see it."""
        self.append(Operand(name, label or name, extent(tensor), written, may_equal))
        aligned = tensor.data_ptr() % 16 == 0
        return Buffer(len(self) - 1, 0, tensor.dtype, tensor.shape, aligned, True)

    def buffer(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Buffer:
        """The next tensor, contiguous, aligned and written: one that is allocated for each call."""
        self.append(Operand(name, name, math.prod(shape) * dtype.itemsize, True))
        return Buffer(len(self) - 1, 0, dtype, shape)


@dataclass(eq=False)
class Plan:
    """The launches of one signature and its sizes."""

    device: torch.device
    operands: Operands
    steps: Steps
    result: tuple[int, ...] = ()  # what the caller needs beside, such as the shape of an output or the arena's bytes
    cacheable: bool = True  # whether another call of its signature would be planned alike
    _parts: list[tuple[launcher.Program | None, Steps]] | None = None  # steps as they run
    _step_by_step: Callable[[], bool] = lambda: True  # whether steps must run singly
    _make: Callable[[], Plan] | None = None  # where a template left operands and steps out

    def __post_init__(self) -> None:
        self._index = -1 if self.device.index is None else self.device.index

    def run(self, *tensors: torch.Tensor) -> None:
        """Launch on the current stream; ValueError if what is written overlaps another operand."""
        if (parts := self._parts) is None:
            parts = self._prepare()
        if self._step_by_step():
            self._check_overlap(tensors)
            with torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext():
                for step in self.steps:
                    step.run(tensors, self.device)
            return
        if _several_gpus() and self._index != torch.cuda.current_device():
            with torch.cuda.device(self.device):
                return self.run(*tensors)
        stream = _current_stream(self._index)  # type: ignore[misc]
        addresses = tuple(map(_address, tensors))
        for program, steps in parts:
            if program is None:
                for step in steps:
                    step.run(tensors, self.device)
            elif program.run(program.address, stream, *addresses):
                self._check_overlap(tensors)
                raise AssertionError("the launcher saw an overlap that is none")

    def is_one_program(self) -> bool:
        """Whether the C launcher makes all of its launches, with nothing in between."""
        return [program is None for program, _ in self._prepare()] == [False]

    def _prepare(self) -> list[tuple[launcher.Program | None, Steps]]:
        runs = self.words()
        # A program checks for overlaps before it launches, so one must come first.
        if runs and runs[0][0] is not None:
            self._step_by_step = self.steps[0].hooked
        self._parts = [(None if words is None else launcher.Program(array("q", words)), steps) for words, steps in runs]
        return self._parts

    def words(self) -> list[tuple[list[int] | None, Steps]]:
        """The steps in runs of launches that one program makes, with its words, and of calls."""
        runs: list[tuple[list[int] | None, Steps]] = []
        extents = [operand.extent for operand in self.operands]
        written = [(i, operand.may_equal) for i, operand in enumerate(self.operands) if operand.written]
        encoded = ((step.encode(self.device), step) for step in self.steps)
        for called, group in itertools.groupby(encoded, lambda pair: pair[0] is None):
            launches, steps = zip(*group, strict=True)
            index = self.device.index or 0
            runs.append((None if called else launcher.program_words(index, extents, written, launches), steps))
        return runs

    def _check_overlap(self, tensors: Sequence[torch.Tensor]) -> None:
        """As the launcher does it; a template's plan gets its operands and steps first."""
        make = self._make  # read once: another thread may come here, too
        if make is not None:
            made = make()
            self.operands, self.steps, self._make = made.operands, made.steps, None
        spans = [(t.data_ptr(), t.data_ptr() + o.extent) for t, o in zip(tensors, self.operands, strict=True)]
        for i, written in enumerate(self.operands):
            for j, other in enumerate(self.operands):
                seen_from_other = other.written and j > i
                may_equal = j == written.may_equal and spans[j][0] == spans[i][0]
                if written.written and i != j and not seen_from_other and not may_equal:
                    check_no_shared_byte(written.name, spans[i], other.label, spans[j])


@functools.cache
def _several_gpus() -> bool:
    return torch.cuda.device_count() > 1


def describe_rows(x: torch.Tensor | None, expected_rows: int | None = None) -> tuple[Hashable, ...] | None:
    """What a plan depends on of a vector or matrix. Of the address only the alignment counts. The
    first dimension is one of the sizes: only whether it is ``expected_rows`` counts. TypeError for
    a fake tensor or another subclass that has no memory of its own."""
    if x is None:
        return None
    if not has_memory(type(x)):
        raise TypeError(f"{type(x).__name__} is described by no signature")
    shape = x.shape
    width = shape[-1] if len(shape) > 1 else 0
    return shape[0] == expected_rows, width, x.dtype, x.stride(), x.device, x.data_ptr() & 15, x.requires_grad


def describe(x: torch.Tensor | None) -> tuple[Hashable, ...] | None:
    """What a plan depends on of any tensor, its whole shape included."""
    return None if x is None else (x.shape, describe_rows(x))


def describe_operand(operand: GroupedMXFP8 | ExpertWeights, rows: int | None = None) -> tuple[Hashable, ...]:
    """As :func:`describe` of weights, :func:`describe_rows` of tokens; both are contiguous."""
    values, scales = operand.values, operand.scales
    if not (has_memory(type(values)) and has_memory(type(scales))):
        raise TypeError("tensors without memory are described by no signature")
    shape, scales_shape = values.shape, scales.shape
    if isinstance(operand, ExpertWeights):
        known: tuple[Hashable, ...] = shape, scales_shape, operand.squares
    else:
        known = shape[0] == rows, shape[-1], scales_shape[-1]
    return known, values.device, values.data_ptr() & 15, scales.data_ptr() & 15, operand.scale_group


class Template:
    """A plan as a function of sizes; AttributeError or TypeError for what can't be followed."""

    def __init__(self, sizes: tuple[int, ...], make: Callable[..., Plan]) -> None:
        trace = Trace(sizes)
        plan = make(*trace.sizes)
        [(words, steps)] = plan.words()
        assert words is not None
        self._make, self._device, self._step_by_step = make, plan.device, steps[0].hooked
        self._words = array("q", map(value_of, words))
        self._fill = trace.compiled(words, plan.result)

    def plan(self, sizes: tuple[int, ...]) -> Plan | None:
        """The plan of these sizes; None if they need another template."""
        words = self._words[:]
        result = self._fill(words, *sizes)
        if result is None:
            return None
        parts: list[tuple[launcher.Program | None, Steps]] = [(launcher.Program(words), ())]
        make = functools.partial(self._make, *sizes)
        return Plan(self._device, Operands(), (), result, True, parts, self._step_by_step, make)


class PlanCache:
    """Plans by signature and sizes; full, it drops the oldest."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._plans: dict[Hashable, Plan] = {}
        self._templates: dict[Hashable, tuple[Template, ...]] = {}

    def find(
        self, describe: Callable[..., tuple[Hashable, tuple[int, ...]]], *arguments: Any
    ) -> tuple[Plan | None, Hashable]:
        """The plan of a call, by the signature and sizes that ``describe(*arguments)`` returns; and
        that signature. Both are None under torch.compile, and where ``describe`` raises, as it does
        for arguments of a wrong type and for fake tensors: checks then say what is wrong, if
        anything is."""
        if torch.compiler.is_compiling():
            return None, None
        try:
            signature, sizes = describe(*arguments)
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError):
            return None, None
        return self.get(signature, sizes), signature

    def get(self, signature: Hashable, sizes: tuple[int, ...] = ()) -> Plan | None:
        """The plan; None for a signature that can't be hashed, such as one of symbolic shapes, and
        in forward-mode AD, so that arguments are checked for tangents: no signature shows them."""
        if forward_ad._current_level >= 0:
            return None
        try:
            plan = self._plans.get((signature, sizes))
        except TypeError:
            return None
        if plan is None:
            for template in self._templates.get(signature, ()):
                plan = template.plan(sizes)
                if plan is not None:
                    self._keep(self._plans, (signature, sizes), plan)
                    break
        return plan

    def make(self, signature: Hashable, sizes: tuple[int, ...], make: Callable[..., Plan]) -> Plan:
        """The plan ``make(*sizes)``; unless the signature is None it is kept, with a template for
        other sizes. ``make`` holds no tensor; all that it depends on is in the signature."""
        plan = make(*sizes)
        if signature is not None and plan.cacheable:
            self._keep(self._plans, (signature, sizes), plan)
            templates = self._templates.get(signature, ())
            if sizes and min(sizes) >= MIN_SIZE and len(templates) < MAX_TEMPLATES and plan.is_one_program():
                with contextlib.suppress(AttributeError, TypeError):
                    self._keep(self._templates, signature, (*templates, Template(sizes, make)))
        return plan

    def _keep(self, kept: dict[Hashable, Any], key: Hashable, value: Any) -> None:
        while len(kept) >= self._capacity:
            with contextlib.suppress(RuntimeError, StopIteration):  # another thread was faster
                kept.pop(next(iter(kept)), None)
        kept[key] = value

    def clear(self) -> None:
        """Forget all plans."""
        self._plans.clear()
        self._templates.clear()


MAX_TEMPLATES = 16  # of a signature: one for each choice of tiles and kernels
PLANS = PlanCache(4096)  # of every public function; some kilobytes each

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=PLANS.clear)  # a kernel's handle is of no use in a forked child
