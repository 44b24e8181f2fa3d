"""MoEWorkspace: every intermediate of an MoE forward, allocated once for the largest batch.

A smaller batch gets views of the same memory, which are kept, so that a batch size seen before costs the host nothing.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from hybrid_mxfp8 import env
from hybrid_mxfp8.core.checks import FLOAT_DTYPES, check_int, check_n, fail, short
from hybrid_mxfp8.core.formats import MAX_INT32, grouped_scale_rows, scale_cols
from hybrid_mxfp8.core.layout import GroupLayout
from hybrid_mxfp8.core.operands import ExpertWeights, GroupedMXFP8
from hybrid_mxfp8.dispatch.registry import TRITON, Backend, Problem, choose, choose_quantizer
from hybrid_mxfp8.dispatch.repeats import Places

KEPT_BATCH_SIZES = 256
"""Batch sizes whose views a workspace keeps: more than a server captures graphs of."""

KEPT_PLACES = 4096
"""Calls that a workspace can repeat, of all layers and batch sizes: some 10 KB of host memory each."""


class MoEShape(NamedTuple):
    """All of an MoE layer that sizes its intermediates, but for the number of tokens.

    H and I are ``hidden`` and ``intermediate``: tokens are (M, H), the weights (E, 2I, H) and (E, H, I).
    """

    experts: int
    hidden: int
    intermediate: int
    top_k: int
    dtype: torch.dtype
    device: torch.device

    def problems(self, num_tokens: int) -> tuple[Problem, Problem]:
        """The two products for M = ``num_tokens``."""
        rows = num_tokens * self.top_k
        up = Problem(self.experts, 2 * self.intermediate, self.hidden, rows, self.dtype, self.device)
        return up, Problem(self.experts, self.hidden, self.intermediate, rows, self.dtype, self.device)


def shape_of(w13q: ExpertWeights, w2q: ExpertWeights, top_k: int, dtype: torch.dtype) -> MoEShape:
    """The shape of a layer.

    Raises:
        TypeError: not ExpertWeights.
        ValueError: weights that are not (E, 2I, H) and (E, H, I) with E >= 1 and H, I multiples of 32, on one device.
    """
    for name, w in (("w13q", w13q), ("w2q", w2q)):
        if not isinstance(w, ExpertWeights):
            raise TypeError(f"{name}: must be an ExpertWeights (from quantize_weights), got {type(w).__name__}")
    experts, hidden, intermediate = w2q.values.shape
    if not experts:
        fail("w13q", "must have at least 1 expert", 0)
    if w13q.values.shape != (experts, 2 * intermediate, hidden):
        expected = (experts, 2 * intermediate, hidden)
        fail("w13q", f"must be (E, 2I, H) = {expected}, as w2q is (E, H, I)", tuple(w13q.values.shape))
    check_n("w13q", 2 * intermediate)
    check_n("w2q", hidden)
    if w2q.values.device != w13q.values.device:
        fail("w2q", f"must be on {w13q.values.device}, as w13q", w2q.values.device)
    return MoEShape(experts, hidden, intermediate, top_k, dtype, w2q.values.device)


class Backends(NamedTuple):
    """What runs a layer: the quantizer (whose backend routes and combines, too), and the two products."""

    quantizer: Backend
    up: Backend
    down: Backend

    @property
    def names(self) -> tuple[str, str, str]:
        """Theirs."""
        return self.quantizer.name, self.up.name, self.down.name


def choose_backends(shape: MoEShape, num_tokens: int, backend: str | None) -> Backends:
    """Raises as ``backends.choose`` does."""
    up, down = (choose(problem, backend) for problem in shape.problems(num_tokens))
    return Backends(choose_quantizer(shape.device, backend), up, down)


@dataclass(frozen=True)
class Buffers:
    """The intermediates of one batch size; T = M * top_k rows, sorted by expert.

    Attributes:
        sorted_token_ids: (T,) int32, the token of each row.
        inverse_permutation: (M, top_k) int32, the row of each choice of each token.
        layout: (3E+2,) int32; ``groups`` is views of it.
        scratch: int32, of the routing kernels.
        xq: tokens (T, H) in MXFP8.
        h: (T, 2I), gate and up.
        hq: the activation (T, I) in MXFP8.
        y: (T, H), the experts' outputs.
        gemm: uint8, the workspace of both products, or None.
    """

    sorted_token_ids: torch.Tensor
    inverse_permutation: torch.Tensor
    layout: torch.Tensor
    scratch: torch.Tensor
    xq: GroupedMXFP8
    h: torch.Tensor
    hq: GroupedMXFP8
    y: torch.Tensor
    gemm: torch.Tensor | None

    @property
    def groups(self) -> GroupLayout:
        """The rows' layout."""
        return self.xq.groups


def _scratch_elements(shape: MoEShape, num_tokens: int, backends: Backends) -> int:
    if backends.quantizer.name != TRITON:
        return 0
    from hybrid_mxfp8.triton_kernels.moe.route import scratch_elements

    return scratch_elements(num_tokens * shape.top_k, shape.experts)


def _gemm_bytes(shape: MoEShape, num_tokens: int, backends: Backends) -> int:
    up, down = shape.problems(num_tokens)
    return max(backends.up.workspace_size(up), backends.down.workspace_size(down))


def _check_rows(name: str, shape: MoEShape, num_tokens: int) -> None:
    rows = num_tokens * shape.top_k
    if rows + 127 * min(shape.experts, rows) > MAX_INT32:
        fail(name, "M * top_k, and each expert's padding, must fit int32", rows)


def allocate(shape: MoEShape, num_tokens: int, backends: Backends) -> Buffers:
    """New buffers for M = ``num_tokens`` >= 1.

    Raises:
        ValueError: more rows, padded to scale tiles, than int32 counts.
    """
    _check_rows("x", shape, num_tokens)
    gemm_bytes = _gemm_bytes(shape, num_tokens, backends)
    return _allocate(shape, num_tokens, _scratch_elements(shape, num_tokens, backends), gemm_bytes)


def _allocate(shape: MoEShape, num_tokens: int, scratch_elements: int, gemm_bytes: int) -> Buffers:
    rows = num_tokens * shape.top_k
    device = shape.device
    scale_rows = grouped_scale_rows(rows, shape.experts)

    def empty(*size: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    layout = empty(3 * shape.experts + 2)
    tokens, offsets, scale_offsets = layout.split((shape.experts, shape.experts + 1, shape.experts + 1))
    groups = GroupLayout.unchecked(tokens, offsets, scale_offsets, rows)

    def operand(k: int) -> GroupedMXFP8:
        values = empty(rows, k, dtype=torch.float8_e4m3fn)
        return GroupedMXFP8.unchecked(values, empty(scale_rows, scale_cols(k), dtype=torch.uint8), groups)

    return Buffers(
        sorted_token_ids=empty(rows),
        inverse_permutation=empty(num_tokens, shape.top_k),
        layout=layout,
        scratch=empty(scratch_elements),
        xq=operand(shape.hidden),
        h=empty(rows, 2 * shape.intermediate, dtype=shape.dtype),
        hq=operand(shape.intermediate),
        y=empty(rows, shape.hidden, dtype=shape.dtype),
        gemm=empty(gemm_bytes, dtype=torch.uint8) if gemm_bytes else None,
    )


def _narrow(largest: Buffers, shape: MoEShape, num_tokens: int) -> Buffers:
    """The first rows of each buffer."""
    rows = num_tokens * shape.top_k
    scale_rows = grouped_scale_rows(rows, shape.experts)
    whole = largest.groups
    groups = GroupLayout.unchecked(whole.tokens_per_expert, whole.expert_offsets, whole.scale_offsets, rows)

    def operand(whole: GroupedMXFP8) -> GroupedMXFP8:
        return GroupedMXFP8.unchecked(whole.values[:rows], whole.scales[:scale_rows], groups)

    return Buffers(
        sorted_token_ids=largest.sorted_token_ids[:rows],
        inverse_permutation=largest.inverse_permutation[:num_tokens],
        layout=largest.layout,
        scratch=largest.scratch,
        xq=operand(largest.xq),
        h=largest.h[:rows],
        hq=operand(largest.hq),
        y=largest.y[:rows],
        gemm=largest.gemm,
    )


class MoEWorkspace:
    """The intermediates of ``moe_forward`` for batches of up to ``max_tokens`` tokens, for layers of one shape.

    A call that has seen its batch size before allocates nothing but its output. Layers that run one after another share
    one workspace.

    Two streams must not share one, nor two threads at once: both are refused. The workspace belongs to the stream of its
    first call until another takes it over with :meth:`move_to_current_stream`. A call that is being captured into a CUDA
    graph may come on any stream. The graph keeps using the memory, so the workspace must live as long, and where the
    graph is replayed is not seen: replays and calls must follow one another, as they do on one stream. A workspace that is
    used without graphs may be dropped while its calls are still queued.

    A copy, by ``copy.deepcopy`` or pickle, in this process or another, allocates memory of its own for the same batches, and
    belongs to no stream. It is on the original's device, or where the ``map_location`` of ``torch.load`` puts that device's
    tensors: the layer must be there too.

    Args:
        w13q: (E, 2I, H), of any layer of the shape.
        w2q: (E, H, I).
        max_tokens: the largest M, before routing.
        top_k: experts of a token.
        dtype: of the tokens: bf16, fp16 or fp32.
        backend: as in ``moe_forward``; what another one that runs later needs beyond this is allocated once, and kept.

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
        if dtype not in FLOAT_DTYPES:
            raise TypeError(f"dtype: must be {' or '.join(map(short, FLOAT_DTYPES))}, got {short(dtype)}")
        self.shape = shape_of(w13q, w2q, top_k, dtype)
        _check_rows("max_tokens", self.shape, max_tokens)
        self.max_tokens = max_tokens
        self._start(allocate(self.shape, max_tokens, choose_backends(self.shape, max_tokens, backend)))

    def _start(self, largest: Buffers) -> None:
        """With new memory, which no stream or thread has used."""
        self._largest = largest
        self._outgrown: list[torch.Tensor] = []  # CUDA graphs may still write them
        self._views: OrderedDict[tuple[int, tuple[str, str, str], str], Buffers] = OrderedDict()
        self._stream = _current_stream(self.shape.device)  # that of the memory, then that of the calls
        self._owned = False
        self.places = Places(KEPT_PLACES)
        self._threads: dict[int, int] = {}  # of each process the thread inside a call: a fork's child has its own

    def __getstate__(self) -> dict[str, Any]:
        """What a copy needs to allocate as much. No memory: pickle would take views apart, and processes would share it."""
        largest = self._largest
        return {
            "shape": self.shape,
            "max_tokens": self.max_tokens,
            "scratch_elements": largest.scratch.numel(),
            "gemm_bytes": 0 if largest.gemm is None else largest.gemm.numel(),
            "place": largest.layout.new_empty(0),  # torch.load moves it where map_location says
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.shape = state["shape"]._replace(device=state["place"].device)
        self.max_tokens = state["max_tokens"]
        self._start(_allocate(self.shape, self.max_tokens, state["scratch_elements"], state["gemm_bytes"]))

    def __repr__(self) -> str:
        return f"MoEWorkspace({self.shape}, max_tokens={self.max_tokens}, {self.nbytes / 2**20:.1f} MiB)"

    @property
    def nbytes(self) -> int:
        """Bytes of device memory."""
        return sum(t.numel() * t.element_size() for t in self._memory())

    def _memory(self) -> list[torch.Tensor]:
        """All that was allocated, each tensor a storage of its own."""
        b = self._largest
        tensors = [
            b.sorted_token_ids,
            b.inverse_permutation,
            b.layout,
            b.scratch,
            b.h,
            b.y,
            *(() if b.gemm is None else (b.gemm,)),
        ]
        tensors += self._outgrown
        return tensors + [t for operand in (b.xq, b.hq) for t in (operand.values, operand.scales)]

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """What surrounds a call's launches.

        Raises:
            ValueError: another thread is in a call with this workspace, or another stream owns it.
        """
        process, thread = os.getpid(), threading.get_ident()
        holder = self._threads.setdefault(process, thread)  # one atomic operation
        if holder != thread:
            fail(
                "workspace",
                f"must be used by one thread at a time, and thread {holder} is using it",
                f"thread {thread}",
            )
        try:
            self._check_stream()
            yield
        finally:
            del self._threads[process]

    def _check_stream(self) -> None:
        if self.shape.device.type != "cuda":
            return
        stream = torch.cuda.current_stream(self.shape.device)
        if (self._owned and stream == self._stream) or _is_capturing(self.shape.device):
            return
        if self._owned and self._stream is not None:
            fail(
                "workspace",
                f"must be used on one stream, and its last call was on {self._stream.cuda_stream:#x} (give this stream a "
                "workspace of its own, or let it take this one over: workspace.move_to_current_stream())",
                f"stream {stream.cuda_stream:#x}",
            )
        self._give_to(stream)

    def _give_to(self, stream: torch.cuda.Stream) -> None:
        """After all that was queued where the workspace was used last, or where its memory was used before."""
        if self._stream is not None and self._stream != stream:
            stream.wait_stream(self._stream)
            # Else PyTorch gives the memory out again, once it is free, where it was allocated, and beside calls that are
            # still queued here. What was allocated on this stream is not recorded by it.
            for tensor in self._memory():
                tensor.record_stream(stream)
        self._stream, self._owned = stream, True

    def move_to_current_stream(self) -> None:
        """Let the current stream wait for the workspace's calls on the stream that owns it, and own it from now on.

        Without a sync of the host. Not needed, and without effect, while a CUDA graph is being captured. The other stream
        must not be one that is.
        """
        if self.shape.device.type != "cuda" or _is_capturing(self.shape.device):
            return
        self._give_to(torch.cuda.current_stream(self.shape.device))

    def check(self, shape: MoEShape, num_tokens: int) -> None:
        """That it holds M = ``num_tokens`` of a layer.

        Raises:
            ValueError: a layer of another shape, or more tokens than ``max_tokens``.
        """
        if shape != self.shape:
            given = {f: v for f, v, own in zip(shape._fields, shape, self.shape, strict=True) if v != own}
            expected = ", ".join(f"{field} = {short(value)}" for field, value in given.items())
            fail("workspace", f"must be made for {expected}", ", ".join(short(getattr(self.shape, f)) for f in given))
        if num_tokens > self.max_tokens:
            fail("x", f"must have at most the workspace's max_tokens = {self.max_tokens} rows", num_tokens)

    def buffers(self, shape: MoEShape, num_tokens: int, backends: Backends) -> Buffers:
        """Views for M = ``num_tokens`` >= 1 of what :meth:`check` found to fit."""
        key = (num_tokens, backends.names, env.hopper_gemm_as_set())
        found = self._views.get(key)
        if found is not None:
            return found
        self._grow(num_tokens, backends)
        views = _narrow(self._largest, shape, num_tokens)
        self._views[key] = views
        if len(self._views) > KEPT_BATCH_SIZES:
            self._views.popitem(last=False)
        return views

    def _grow(self, num_tokens: int, backends: Backends) -> None:
        """To what these backends need, for this batch and the largest: not always less for fewer rows."""
        sizes = (num_tokens, self.max_tokens)
        gemm, gemm_bytes = self._largest.gemm, max(_gemm_bytes(self.shape, size, backends) for size in sizes)
        if gemm_bytes > (0 if gemm is None else gemm.numel()):
            self._outgrown += [] if gemm is None else [gemm]
            gemm = torch.empty(gemm_bytes, dtype=torch.uint8, device=self.shape.device)
        scratch, elements = self._largest.scratch, max(_scratch_elements(self.shape, size, backends) for size in sizes)
        if elements > scratch.numel():
            self._outgrown.append(scratch)
            scratch = torch.empty(elements, dtype=torch.int32, device=self.shape.device)
        self._largest = replace(self._largest, gemm=gemm, scratch=scratch)


def _current_stream(device: torch.device) -> torch.cuda.Stream | None:
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


def _is_capturing(device: torch.device) -> bool:
    """Whether the device's current stream is being captured into a CUDA graph."""
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()
