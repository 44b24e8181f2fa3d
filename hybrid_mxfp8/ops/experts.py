"""``MXFP8Experts``: the experts of an MoE layer as a module."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from hybrid_mxfp8.core.activation import SwiGLU, swiglu_of
from hybrid_mxfp8.core.checks import (
    FLOAT_DTYPES,
    check_k,
    check_shape,
    check_tensor,
    fail,
    is_tracing,
    short,
)
from hybrid_mxfp8.core.formats import BLOCK_SIZE
from hybrid_mxfp8.core.operands import ExpertWeights, MXFP8Tokens, check_weights
from hybrid_mxfp8.core.scales import find_scale_group
from hybrid_mxfp8.dispatch.device import preferred_scale_group
from hybrid_mxfp8.dispatch.registry import requested
from hybrid_mxfp8.ops.layer import shape_of
from hybrid_mxfp8.ops.moe import check_biases, moe_forward
from hybrid_mxfp8.ops.quantize import quantize_weights
from hybrid_mxfp8.ops.workspace import MoEWorkspace, check_workspace

BYTES: Final[Mapping[str, torch.dtype]] = {
    "w13_values": torch.float8_e4m3fn,
    "w13_scales": torch.float8_e8m0fnu,
    "w2_values": torch.float8_e4m3fn,
    "w2_scales": torch.float8_e8m0fnu,
}
"""The buffers of :class:`MXFP8Experts` that hold bytes, and the dtypes that they stand for."""


def gate_then_up(x: torch.Tensor, dim: int) -> torch.Tensor:
    """Reorder 2I entries along ``dim`` < 0: from gate and up in turns to all gate, then all up."""
    return torch.cat(x.unflatten(dim, (-1, 2)).unbind(dim), dim)


def group_into_squares_(w: ExpertWeights) -> ExpertWeights:
    """Turn groups of 128 into squares, in place: Hopper's FP8 kernel multiplies those faster. Other
    weights stay as they are."""
    return w.regroup_into(w.values, w.scales, 128, squares=True) if w.scale_group == 128 else w


class TensorState:
    """A tensor as it was: this object, in this memory, and how many writes PyTorch has counted;
    those through ``.data`` and to inference tensors it does not. References are weak, so that a
    tensor which was replaced is freed; no other is taken for it, not even one that gets the same
    address, as ``module.half().bfloat16()`` may. A copy of this object is of no tensor."""

    def __init__(self, tensor: torch.Tensor | None = None) -> None:
        self._tensor = None if tensor is None else weakref.ref(tensor)
        # Held so that no new storage gets this one's address.
        self._storage = None if tensor is None else StorageWeakRef(tensor.untyped_storage())
        self._place = None if tensor is None else _place(tensor)

    def holds(self, tensor: torch.Tensor | None) -> bool:
        """Whether this is that tensor, with memory and contents unchanged."""
        if tensor is None or self._tensor is None:
            return False
        return self._tensor() is tensor and self._place == _place(tensor)

    def __reduce__(self) -> tuple[type[TensorState], tuple[()]]:
        return TensorState, ()


def _place(tensor: torch.Tensor) -> tuple[object, ...]:
    version = 0 if tensor.is_inference() else tensor._version
    return tensor.untyped_storage()._cdata, tensor.data_ptr(), tensor.stride(), version


class MXFP8Experts(torch.nn.Module):
    """The experts of one MoE layer with MXFP8 weights; inference only.

    Weights are buffers of bytes, values and swizzled scales, so that ``module.to(device)`` moves
    them and ``module.to(torch.float16)`` leaves them as they are. Biases are buffers in the dtype
    they come in. ``load_state_dict`` takes values and scales as bytes or in the dtypes that they
    stand for, float8_e4m3fn and float8_e8m0fnu, and keeps the bytes; it refuses other dtypes, and
    finds the weights' ``scale_group`` anew. So does the next eager call once a buffer has been
    replaced or written in place, but for writes that PyTorch does not count: through ``.data``,
    NumPy or DLPack (``copy_`` to the buffer itself), and all to inference tensors. A compiled call
    does not look: after writes other than by ``load_state_dict`` read ``w13q`` and ``w2q`` once, or
    it may multiply groups of 32 as if they were of 128. A CUDA graph keeps the groups that it was
    captured with.

    Args:
        w13q: E experts of (2I, H), gate rows first, then up.
        w2q: E experts of (H, I).
        w13_bias: (E, 2I) bf16, fp16 or fp32, or None.
        w2_bias: (E, H), or None.
        activation: as in ``moe_forward``; also an attribute, a ``SwiGLU``.
        workspace: shared by the layers that run one after another, or None; also an attribute.
        backend: as in ``moe_forward``.

    Raises:
        TypeError, ValueError: weights, biases or a workspace that don't fit together; no such
            activation or backend.
    """

    w13_values: torch.Tensor
    w13_scales: torch.Tensor
    w2_values: torch.Tensor
    w2_scales: torch.Tensor
    w13_bias: torch.Tensor | None
    w2_bias: torch.Tensor | None

    def __init__(
        self,
        w13q: ExpertWeights,
        w2q: ExpertWeights,
        *,
        w13_bias: torch.Tensor | None = None,
        w2_bias: torch.Tensor | None = None,
        activation: str | SwiGLU = "swiglu",
        workspace: MoEWorkspace | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        shape = shape_of(w13q, w2q, 1, torch.bfloat16)
        check_biases(shape, w13_bias, w2_bias)
        check_workspace(workspace)
        requested(backend)
        # Of w13 and w2: values and scales as they were examined, and the (group, squares) found.
        self._scalings: dict[str, tuple[tuple[TensorState, ...], tuple[int, bool]]] = {}
        for name, w in (("w13", w13q), ("w2", w2q)):
            values = w.values.view(torch.uint8)
            self.register_buffer(f"{name}_values", values)
            self.register_buffer(f"{name}_scales", w.scales)
            known = (None, None) if is_tracing(w.scales) else (values, w.scales)  # fake tensors have no address
            self._scalings[name] = (tuple(map(TensorState, known)), (w.scale_group, w.squares))
        self.register_buffer("w13_bias", None if w13_bias is None else w13_bias.detach())
        self.register_buffer("w2_bias", None if w2_bias is None else w2_bias.detach())
        self.activation = swiglu_of(activation)
        self.workspace = workspace
        self.backend = backend

    @classmethod
    def from_weights(
        cls,
        w13: torch.Tensor,
        w2: torch.Tensor,
        *,
        w13_bias: torch.Tensor | None = None,
        transposed: bool = False,
        interleaved: bool = False,
        scale_group: int | None = None,
        **options: Any,
    ) -> MXFP8Experts:
        """Quantize w13 (E, 2I, H) and w2 (E, H, I), bf16, fp16 or fp32.

        Args:
            w13: gate rows first, then up.
            w2: the second product's weights.
            w13_bias: (E, 2I), in w13's order of rows, or None.
            transposed: w13 is (E, H, 2I) and w2 (E, I, H).
            interleaved: gate and up rows of w13 and its bias alternate, gate first. gpt-oss is
                both.
            scale_group: 32 or 128, as in ``quantize_weights``. None: squares of 128x128 for weights
                on Hopper, whose FP8 tensor cores know no block scales, else 32.
            options: as for the class.

        Raises:
            TypeError, ValueError: as ``quantize_weights`` raises, and weights that don't fit
                together.
        """
        dims = "(E, K, N)" if transposed else "(E, N, K)"
        for name, w in (("w13", w13), ("w2", w2)):
            check_tensor(name, w, dtypes=FLOAT_DTYPES, ndim=3, dims=dims)
            check_k(name, w.shape[1 if transposed else 2])
        if transposed:
            w13, w2 = w13.transpose(1, 2), w2.transpose(1, 2)
        if interleaved:
            if w13.shape[1] % 2:
                fail("w13", "must have an even number of rows, gate and up in turns", w13.shape[1])
            if w13_bias is not None:
                check_tensor("w13_bias", w13_bias, dtypes=FLOAT_DTYPES, ndim=2, dims="(E, N)")
                check_shape("w13_bias", w13_bias, (w13.shape[0], w13.shape[1]), "(E, N)")
                w13_bias = gate_then_up(w13_bias, -1)
            w13 = gate_then_up(w13, -2)
        backend = options.get("backend")
        group = preferred_scale_group(w13.device) if scale_group is None else scale_group
        whole = (w.detach().contiguous() if transposed else w.detach() for w in (w13, w2))
        w13q, w2q = (quantize_weights(w, scale_group=group, backend=backend) for w in whole)
        if scale_group is None:
            w13q, w2q = group_into_squares_(w13q), group_into_squares_(w2q)
        return cls(w13q, w2q, w13_bias=w13_bias, **options)

    @property
    def w13q(self) -> ExpertWeights:
        """(E, 2I, H), the buffers' memory."""
        return self._weights("w13")

    @property
    def w2q(self) -> ExpertWeights:
        """(E, H, I), the buffers' memory."""
        return self._weights("w2")

    def _weights(self, name: str) -> ExpertWeights:
        """Check and examine the buffers if anyone may have replaced them: plans assume that they
        are contiguous, and scales that may have changed get their group and squares found again."""
        values, scales = getattr(self, f"{name}_values"), getattr(self, f"{name}_scales")
        examined, found = self._scalings[name]
        if torch.compiler.is_compiling() or not all(map(TensorState.holds, examined, (values, scales))):
            dtypes = (torch.float8_e4m3fn, torch.uint8)
            check_tensor(f"{name}_values", values, dtypes=dtypes, ndim=3, dims="(E, N, K)")
            check_weights(values.view(torch.float8_e4m3fn), scales, f"{name}_")
            if not is_tracing(scales):
                states = TensorState(values), TensorState(scales)  # before they are read
                if not examined[1].holds(scales):  # a look at them makes the host wait
                    found = find_scale_group(ExpertWeights.unchecked(values, scales).linear_scales())
                self._scalings[name] = states, found
        values = values.view(torch.float8_e4m3fn)
        scale_group, squares = found
        return ExpertWeights.unchecked(values=values, scales=scales, scale_group=scale_group, squares=squares)

    def extra_repr(self) -> str:
        """Shapes and what both weights' scales cover, for ``print(module)``."""
        experts, hidden, intermediate = self.w2_values.shape
        bias = self.w13_bias is not None or self.w2_bias is not None
        (_, w13), (_, w2) = self._scalings.values()
        scales = f"scale_group={min(w13[0], w2[0])}, squares={w13[1] and w2[1]}"
        return f"experts={experts}, hidden={hidden}, intermediate={intermediate}, bias={bias}, {scales}"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """As of any module, but values and scales are copied as bytes, not converted to uint8."""
        *_, error_msgs = args
        for name, dtype in BYTES.items():
            key = prefix + name
            given = state_dict.get(key)
            if not isinstance(given, torch.Tensor):
                continue
            if given.dtype in (torch.uint8, dtype):
                state_dict[key] = given.view(torch.uint8).contiguous()
            else:
                error_msgs.append(f"{key}: dtype must be uint8 or {short(dtype)}, got {short(given.dtype)}")
                del state_dict[key]
        super()._load_from_state_dict(state_dict, prefix, *args)
        # Examined now: inference tensors and compiled calls don't show that bytes have changed.
        for name in ("w13", "w2"):
            self._scalings[name] = ((TensorState(), TensorState()), (BLOCK_SIZE, False))
            if not is_tracing(getattr(self, f"{name}_scales")):
                self._weights(name)

    def forward(
        self, x: torch.Tensor | MXFP8Tokens, topk_ids: torch.Tensor, topk_weights: torch.Tensor
    ) -> torch.Tensor:
        """(M, H), (M, top_k), (M, top_k) to (M, H); see ``moe_forward``."""
        return moe_forward(
            x,
            self.w13q,
            self.w2q,
            topk_ids,
            topk_weights,
            w13_bias=self.w13_bias,
            w2_bias=self.w2_bias,
            activation=self.activation,
            workspace=self.workspace,
            backend=self.backend,
        )
