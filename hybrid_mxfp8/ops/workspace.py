"""MoEWorkspace: the arena of ``moe_forward``, allocated once for the largest batch."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from hybrid_mxfp8.core.checks import check_float_dtype, check_int, fail, short
from hybrid_mxfp8.core.operands import ExpertWeights
from hybrid_mxfp8.dispatch.device import is_capturing
from hybrid_mxfp8.ops.layer import arena, check_rows, choose_backends, shape_of


class MoEWorkspace:
    """The intermediates of ``moe_forward`` for batches of up to ``max_tokens`` tokens, for layers
    of one shape.

    A call with it allocates nothing but its output. Layers that run one after another share one
    workspace.

    A call on another stream than the last call's has its stream wait for that call (an event, no
    sync of the host), so calls never overlap. Two threads at once are refused. A call that is being
    captured into a CUDA graph waits for nothing. The graph goes on using the memory, so the
    workspace must live as long, and nothing sees where the graph is replayed: replays and calls
    must follow one another, as they do on one stream. A workspace that is used without graphs may
    be dropped while its calls are still queued.

    A copy, by ``copy.deepcopy`` or pickle, in this process or another, allocates memory of its own
    for the same batches. It is on the original's device, or where the ``map_location`` of
    ``torch.load`` puts that device's tensors: the layer must be there too.

    Args:
        w13q: (E, 2I, H), of any layer of the shape.
        w2q: (E, H, I).
        max_tokens: the largest M, before routing.
        top_k: experts of a token.
        dtype: of the tokens: bf16, fp16 or fp32.
        backend: as in ``moe_forward``. If a later call has another backend or ``scale_group`` and
            needs more memory, that is allocated once and kept.

    Raises:
        TypeError: wrong type or dtype.
        ValueError: weights that don't fit together, or ``max_tokens`` or ``top_k`` below 1.
    """

    def __init__(
        self,
        w13q: ExpertWeights,
        w2q: ExpertWeights,
        *,
        max_tokens: int,
        top_k: int,
        dtype: torch.dtype = torch.bfloat16,
        backend: str | None = None,
    ) -> None:
        for name, value in (("max_tokens", max_tokens), ("top_k", top_k)):
            check_int(name, value, 1)
        check_float_dtype("dtype", dtype)
        self.shape = shape_of(w13q, w2q, top_k, dtype)
        check_rows("max_tokens", self.shape, max_tokens)
        self.max_tokens = max_tokens
        self._allocate(arena(self.shape, max_tokens, *choose_backends(self.shape, max_tokens, backend)).size)

    def _allocate(self, size: int) -> None:
        """New memory, which no stream or thread has used."""
        self._arena = torch.empty(size, dtype=torch.uint8, device=self.shape.device)
        self._outgrown: list[torch.Tensor] = []  # CUDA graphs may still write them
        self._stream = None if self.shape.device.type != "cuda" else torch.cuda.current_stream(self.shape.device)
        self._threads: dict[int, int] = {}  # by process, as forks have their own: the thread inside a call

    def __getstate__(self) -> dict[str, Any]:
        """What a copy needs to allocate as much; not the memory, which processes would share."""
        place = self._arena.new_empty(0)  # torch.load moves it where map_location says
        return {"shape": self.shape, "max_tokens": self.max_tokens, "size": self._arena.numel(), "place": place}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.shape = state["shape"]._replace(device=state["place"].device)
        self.max_tokens = state["max_tokens"]
        self._allocate(state["size"])

    def __repr__(self) -> str:
        return f"MoEWorkspace({self.shape}, max_tokens={self.max_tokens}, {self.nbytes / 2**20:.1f} MiB)"

    @property
    def nbytes(self) -> int:
        """Bytes of device memory."""
        return sum(memory.numel() for memory in self._memory())

    def _memory(self) -> list[torch.Tensor]:
        """All that was allocated and is kept."""
        return [self._arena, *self._outgrown]

    def check(self, shape: Any, num_tokens: int) -> None:
        """Check that it is large enough for M = ``num_tokens`` of a layer.

        Raises:
            ValueError: a layer of another shape, or more tokens than ``max_tokens``.
        """
        # Other scale groups are no other shape: what they need beyond this is allocated once.
        shape = shape._replace(scale_groups=self.shape.scale_groups, squares=self.shape.squares)
        if shape != self.shape:
            given = {f: v for f, v, own in zip(shape._fields, shape, self.shape, strict=True) if v != own}
            expected = ", ".join(f"{field} = {short(value)}" for field, value in given.items())
            fail("workspace", f"must be made for {expected}", ", ".join(short(getattr(self.shape, f)) for f in given))
        if num_tokens > self.max_tokens:
            fail("x", f"must have at most the workspace's max_tokens = {self.max_tokens} rows", num_tokens)

    @contextmanager
    def arena(self, size: int) -> Iterator[torch.Tensor]:
        """At least ``size`` bytes for the launches of one call, on the current stream.

        Raises:
            ValueError: another thread is in a call with this workspace.
        """
        process, thread = os.getpid(), threading.get_ident()
        holder = self._threads.setdefault(process, thread)  # one atomic operation
        if holder != thread:
            expected = f"must be used by one thread at a time, and thread {holder} is using it"
            fail("workspace", expected, f"thread {thread}")
        try:
            if self._stream is not None:
                self._wait_for_last_stream(self._stream)
            if size > self._arena.numel():  # another backend, or fewer rows, may need more
                self._outgrown.append(self._arena)
                self._arena = torch.empty(size, dtype=torch.uint8, device=self.shape.device)
            yield self._arena
        finally:
            del self._threads[process]

    def _wait_for_last_stream(self, last: torch.cuda.Stream) -> None:
        """Have the current stream wait for what is queued on ``last``, where this was used last."""
        device = self.shape.device
        if torch._C._cuda_getCurrentRawStream(device.index) == last.cuda_stream or is_capturing(device):
            return
        stream = torch.cuda.current_stream(device)
        stream.wait_stream(last)
        # Else PyTorch would reuse the memory, once it is freed, on the stream that allocated it,
        # while calls on this one are still queued. For memory of this stream this does nothing.
        for memory in self._memory():
            memory.record_stream(stream)
        self._stream = stream


def check_workspace(workspace: object) -> None:
    """Check that it is None or a MoEWorkspace."""
    if workspace is not None and not isinstance(workspace, MoEWorkspace):
        raise TypeError(f"workspace: must be a MoEWorkspace, got {type(workspace).__name__}")
