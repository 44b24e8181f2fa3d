"""``MXFP8Experts``: the experts of an MoE layer as a module."""

from __future__ import annotations

from typing import Any

import torch

from hybrid_mxfp8.core.activation import SwiGLU, swiglu_of
from hybrid_mxfp8.core.checks import FLOAT_DTYPES, check_tensor
from hybrid_mxfp8.core.operands import ExpertWeights
from hybrid_mxfp8.core.scale_group import find_scale_group
from hybrid_mxfp8.dispatch.device import preferred_scale_group
from hybrid_mxfp8.dispatch.registry import requested
from hybrid_mxfp8.ops.layer import shape_of
from hybrid_mxfp8.ops.moe import check_biases, moe_forward
from hybrid_mxfp8.ops.quantize import quantize_weights
from hybrid_mxfp8.ops.workspace import MoEWorkspace, check_workspace


class MXFP8Experts(torch.nn.Module):
    """The experts of one MoE layer with MXFP8 weights; inference only.

    Weights are buffers of bytes, values and swizzled scales, so that ``module.to(device)`` moves
    them and ``module.to(torch.float16)`` leaves them as they are. Biases are buffers in the dtype
    they come in. The weights' ``scale_group`` is found anew when a state_dict is loaded.

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
        self.register_buffer("w13_values", w13q.values.view(torch.uint8))
        self.register_buffer("w13_scales", w13q.scales)
        self.register_buffer("w2_values", w2q.values.view(torch.uint8))
        self.register_buffer("w2_scales", w2q.scales)
        self.register_buffer("w13_bias", None if w13_bias is None else w13_bias.detach())
        self.register_buffer("w2_bias", None if w2_bias is None else w2_bias.detach())
        self._scale_groups = shape.scale_groups
        self.activation = swiglu_of(activation)
        self.workspace = workspace
        self.backend = backend

    @classmethod
    def from_weights(
        cls, w13: torch.Tensor, w2: torch.Tensor, *, scale_group: int | None = None, **options: Any
    ) -> MXFP8Experts:
        """Quantize w13 (E, 2I, H) and w2 (E, H, I), bf16, fp16 or fp32; ``options`` as for the
        class. ``scale_group``: 32 or 128, as in ``quantize_weights``; None: 128 where the weights
        are on Hopper, whose FP8 tensor cores know no block scales, and 32 elsewhere.

        Raises:
            TypeError, ValueError: as ``quantize_weights`` raises, and weights that don't fit
                together.
        """
        backend = options.get("backend")
        for name, w in (("w13", w13), ("w2", w2)):
            check_tensor(name, w, dtypes=FLOAT_DTYPES, ndim=3, dims="(E, N, K)")
        group = preferred_scale_group(w13.device) if scale_group is None else scale_group
        w13q, w2q = (quantize_weights(w.detach(), scale_group=group, backend=backend) for w in (w13, w2))
        return cls(w13q, w2q, **options)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        w13_group, w2_group = (find_scale_group(w.linear_scales()) for w in (self.w13q, self.w2q))
        self._scale_groups = w13_group, w2_group

    @property
    def w13q(self) -> ExpertWeights:
        """(E, 2I, H), the buffers' memory."""
        values = self.w13_values.view(torch.float8_e4m3fn)
        return ExpertWeights.unchecked(values, self.w13_scales, self._scale_groups[0])

    @property
    def w2q(self) -> ExpertWeights:
        """(E, H, I), the buffers' memory."""
        values = self.w2_values.view(torch.float8_e4m3fn)
        return ExpertWeights.unchecked(values, self.w2_scales, self._scale_groups[1])

    def extra_repr(self) -> str:
        """Shapes, for ``print(module)``."""
        experts, hidden, intermediate = self.w2_values.shape
        bias = self.w13_bias is not None or self.w2_bias is not None
        return f"experts={experts}, hidden={hidden}, intermediate={intermediate}, bias={bias}"

    def forward(self, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
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
