"""What a plan knows of a tensor: everything but its address.

A plan is made once for a signature and then run with other tensors of the same metadata. So it
says where its launches read and write by the tensor of the call (its index among those handed to
``run``) and the first byte in it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch


class Buffer(NamedTuple):
    """Memory that a launch reads or writes."""

    operand: int  # index among the tensors that the plan is run with
    offset: int  # bytes from that tensor's first
    dtype: torch.dtype
    shape: tuple[int, ...]  # of the contiguous tensor there; a whole one may have any strides
    aligned: bool = True  # whether the first byte is at a 16-byte boundary
    whole: bool = False  # whether it is the tensor as handed in, and no part of it

    def view(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """The tensor that lies there."""
        tensor = tensors[self.operand]
        if self.whole:
            return tensor
        size = math.prod(self.shape) * self.dtype.itemsize
        memory = tensor.view(-1).view(torch.uint8)[self.offset : self.offset + size]
        return memory.view(self.dtype).view(self.shape)


class TensorMap(NamedTuple):
    """A contiguous matrix as TMA reads it, box by box."""

    buffer: Buffer  # its first element
    shape: tuple[int, ...]  # of the matrix, the contiguous dimension last
    box: tuple[int, ...]  # elements of one load, as ``shape``
    layout: Any = None  # Gluon's, of a box in shared memory; None in plain Triton


class Metadata(NamedTuple):
    """A tensor without its memory: what a plan may be made of."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    device: torch.device
    address: int = 0

    def stride(self, dim: int | None = None) -> Any:
        """As a tensor's."""
        return self.strides if dim is None else self.strides[dim]

    def data_ptr(self) -> int:
        """The address, modulo 16."""
        return self.address


def metadata(value: Any) -> Any:
    """A tensor's Metadata; an operand or a layout with it for tensors; all else as it is."""
    return _map(torch.Tensor, lambda t: Metadata(t.dtype, t.shape, t.stride(), t.device, t.data_ptr() % 16), value)


def with_rows(value: Any, rows: int) -> Any:
    """The same Metadata with another first dimension."""
    return _map(Metadata, lambda m: m._replace(shape=(rows, *m.shape[1:])), value)


def _map(kind: type, function: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, kind):
        return function(value)
    if not dataclasses.is_dataclass(value):
        return value
    copy = object.__new__(type(value))
    vars(copy).update({name: _map(kind, function, field) for name, field in vars(value).items()})
    return copy
