"""Memory with guard bytes: copies of tensors inside one buffer of bytes. A write beyond a tensor,
into another or into the space between the rows of a strided one shows up as a changed byte."""

from __future__ import annotations

import functools
from typing import Any

import torch

import hybrid_mxfp8 as mx
from hybrid_mxfp8.core.checks import Checked

GUARD = 512
"""Bytes before and behind each tensor, at least."""


@functools.cache
def _noise(size: int) -> torch.Tensor:
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(8))


class Guards:
    """One buffer; tensors are copied into it, and checked all at once."""

    def __init__(self, device: str = "cpu", size: int = 4 << 20) -> None:
        self._memory = _noise(size).to(device, copy=True)
        self._writable: list[torch.Tensor] = []
        self._end = 0
        self._before: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor, shift: int = 0) -> torch.Tensor:
        """A copy with x's strides, ``shift`` bytes behind a 256-byte boundary, to be read."""
        if x.device.type == "meta":
            return x
        itemsize = x.element_size()
        elements = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
        size = elements * itemsize if x.numel() else 0
        start = self._end + GUARD
        start += -(self._memory.data_ptr() + start) % 256 + shift
        self._end = start + size
        assert self._end + GUARD <= self._memory.numel(), "the test needs a larger buffer"
        flat = self._memory[start : start + size].view(torch.uint8)
        flat = flat.view(x.dtype) if size else torch.empty(0, dtype=x.dtype, device=self._memory.device)
        view = flat.as_strided(x.shape, x.stride(), flat.storage_offset())
        if x.numel():
            # Where a stride is 0, many elements are one.
            once = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in x.stride())
            view[once].copy_(x.detach()[once])
        self._before = None
        return view.requires_grad_() if x.requires_grad else view

    def out(self, x: torch.Tensor, shift: int = 0) -> torch.Tensor:
        """As a call, but the elements may be written."""
        view = self(x, shift)
        self._writable.append(view)
        return view

    def raw(self, size: int, shift: int = 0) -> torch.Tensor:
        """``size`` bytes of zeros that may be written, to be cut into views by the test."""
        return self.out(torch.zeros(size, dtype=torch.uint8), shift)

    def place(self, value: Any) -> Any:
        """Tensors, and those of layouts and operands, among guard bytes; all else as it is."""
        if isinstance(value, Checked):
            return type(value)(**{name: self.place(part) for name, part in vars(value).items()})
        dense = isinstance(value, torch.Tensor) and value.layout == torch.strided
        return self(value) if dense else value

    def ready(self) -> None:
        """Remember what all bytes are now; the call that is tried comes next."""
        self._before = self._memory.clone()

    def check(self, *, refused: bool = False) -> None:
        """Every byte is what it was; where the call was not refused, but for outputs."""
        assert self._before is not None, "ready() comes before the call"
        changed = self._memory != self._before
        if not refused:
            for view in self._writable:
                # The same elements of the mask, each as the bytes it has.
                size, stride = list(view.shape), list(view.stride())
                item = view.element_size()
                first = view.storage_offset() * item
                mask = changed.as_strided([*size, item], [*(s * item for s in stride), 1], first)
                mask.fill_(False)
        where = changed.nonzero().flatten()[:4].tolist()
        assert not where, f"bytes changed that must not, the first at {where} of the buffer"


def check_alive(device: str) -> None:
    """A small call with a known result, which fails where an earlier one left a GPU in an error."""
    if device == "cuda":
        torch.cuda.synchronize()
        xq = mx.quantize_grouped(torch.ones(4, 32, device=device), torch.tensor([4], device=device))
        wq = mx.quantize_weights(torch.ones(1, 8, 32, device=device))
        assert mx.grouped_gemm(xq, wq).tolist() == [[32.0] * 8] * 4
