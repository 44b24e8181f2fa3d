"""The MoE layer: route, quantize, multiply, activate and quantize, multiply, combine. All on the device, no host sync.

    topk_ids ──route──► the token of each row, the row of each choice, the rows' layout
    x ──quantize (gather)──► xq ──grouped GEMM, w13──► h = [gate | up]   (+ w13_bias)
    h ──quantize (swiglu)──► hq ──grouped GEMM, w2───► y
    y, topk_weights, w2_bias ──combine──► out

Six launches for up to 4096 choices in a batch, eight for more, one more for ``w13_bias``, and one more for each product
whose kernel needs another before it (the cutlass backend, the Hopper kernel).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from hybrid_mxfp8.core.activation import SwiGLU, swiglu_of
from hybrid_mxfp8.core.checks import FLOAT_DTYPES, check_tensor, is_tracing
from hybrid_mxfp8.core.operands import ExpertWeights
from hybrid_mxfp8.dispatch.registry import TRITON, in_force, requested, settled
from hybrid_mxfp8.dispatch.repeats import Launched, together
from hybrid_mxfp8.ops.grouped_gemm import quantize_weights
from hybrid_mxfp8.ops.moe_checks import (
    Inputs,
    Layer,
    check_biases,
    check_layer,
    check_out,
    check_out_apart,
    layers_seen,
    looks,
    place_of,
)
from hybrid_mxfp8.ops.workspace import MoEWorkspace, allocate, choose_backends, shape_of
from hybrid_mxfp8.reference import routing as moe_reference


def moe_forward(
    x: torch.Tensor,
    w13q: ExpertWeights,
    w2q: ExpertWeights,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    *,
    activation: str | SwiGLU = "swiglu",
    w13_bias: torch.Tensor | None = None,
    w2_bias: torch.Tensor | None = None,
    workspace: MoEWorkspace | None = None,
    backend: str | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The experts of an MoE layer: ``out[m] = sum_k topk_weights[m, k] * expert[topk_ids[m, k]](x[m])``.

    An expert is ``w2 @ (silu(g) * u) + w2_bias`` with ``[g; u] = w13 @ x + w13_bias``, or has another activation of g and u.
    Tokens and activations are quantized to MXFP8; products and the activation are computed in fp32, the sum over k too, always
    in the order of k, so equal inputs give equal bits. Between the products rows are held in x's dtype.

    Against the layer of unquantized weights in fp64, normal data give a signal-to-noise ratio of 23.6 to 23.8 dB (measured with
    H from 256 to 2048). The format allows no more: gate and up bring the noise of a product of MXFP8 operands each, 28.5 dB, the
    operands of the second product 31.5 dB each, and their sum is at 23.7 dB.

    Under ``torch.compile`` the whole layer is one operator, ``hybrid_mxfp8::moe_forward``: no graph break, and no
    recompilation when routing changes. There the intermediates come from PyTorch's allocator and ``workspace`` is not used.

    Args:
        x: (M, H) bf16, fp16 or fp32, H % 32 == 0, unit column stride.
        w13q: E experts of (2I, H), the I rows of gate first, then those of up: transformers' ``gate_up_proj``, vLLM's w13.
        w2q: E experts of (H, I), I % 32 == 0.
        topk_ids: (M, top_k) int32 or int64; copied if not contiguous. Choices outside 0 .. E-1 (those of other ranks, or
            padding) contribute nothing.
        topk_weights: (M, top_k) bf16, fp16 or fp32; copied if not contiguous.
        activation: ``swiglu``, silu(g) * u; ``swigluoai``, that of gpt-oss and MiniMax-M3; or a :class:`SwiGLU`.
        w13_bias: (E, 2I), contiguous, added in fp32 in a launch of its own.
        w2_bias: (E, H), contiguous, added in fp32 by the combine.
        workspace: made for this shape and at least M tokens; then a batch size seen before allocates only ``out``.
        backend: overrides ``use_backend()`` and HYBRID_MXFP8_BACKEND. ``reference`` syncs.
        out: (M, H) of x's dtype, unit column stride, rows apart; written and returned. It may be x itself, which is read
            before anything is written; it must not overlap another argument, nor x in part.

    Returns:
        (M, H) of x's dtype; zero where all choices of a token are dropped.

    Raises:
        TypeError: wrong type or dtype.
        ValueError: wrong shape, stride, device or option; an argument that requires grad; a workspace that doesn't fit,
            or that another stream or thread is using.
        BackendUnavailableError: the named backend can't run this here.
    """
    inputs = Inputs(x, w13q, w2q, topk_ids, topk_weights, w13_bias, w2_bias)
    looked = looks(inputs, activation)
    layer = None if looked is None else layers_seen.get(looked)
    if layer is None:
        layer = check_layer(inputs, activation)
        if is_tracing(x):
            if out is not None:
                check_out(out, x)
            _check_workspace(workspace)
            result: torch.Tensor = torch.ops.hybrid_mxfp8.moe_forward(
                x,
                w13q.values,
                w13q.scales,
                w2q.values,
                w2q.scales,
                topk_ids,
                topk_weights,
                w13_bias,
                w2_bias,
                layer.swiglu.spec,
                backend,
            )
            return result if out is None else out.copy_(result)
        if looked is not None:
            layers_seen.add(looked, layer)
    _check_workspace(workspace)
    force = in_force(backend)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    repeatable = looked is not None and layer.read_in_place and _is_settled(force[0], layer.shape.device)
    place = repeat = None
    if workspace is not None and repeatable:
        place = place_of(layer, force, y, inputs)
        repeat = None if place is None else workspace.places.get(place)
    if repeat is None:
        if out is not None:
            check_out(out, x)
            check_out_apart(out, inputs)
    elif workspace is not None:
        with workspace.in_use():
            if repeat():
                return y
    if not (x.shape[0] and layer.shape.top_k):
        return y.zero_()
    if not layer.read_in_place:
        inputs = inputs._replace(topk_ids=topk_ids.contiguous(), topk_weights=topk_weights.contiguous())
    launched = _run(inputs, workspace, force[0], layer, y)
    if workspace is not None and place is not None:
        workspace.places.remember(place, repeat, launched)
    return y


def _check_workspace(workspace: object) -> None:
    if workspace is not None and not isinstance(workspace, MoEWorkspace):
        raise TypeError(f"workspace: must be a MoEWorkspace, got {type(workspace).__name__}")


def _is_settled(name: str, device: torch.device) -> bool:
    """Whether requests for this backend come to the same one at every call, for the products and the quantizer."""
    return settled("grouped_gemm", name, device) is not None and settled("quantize", name, device) is not None


class _Steps(NamedTuple):
    """The steps that are neither quantization nor product: the kernels, or their twins."""

    route: Callable[..., Launched | None]
    add_expert_bias: Callable[..., Launched | None]
    combine: Callable[..., Launched | None]


def _steps(triton: bool) -> _Steps:
    if not triton:
        return _Steps(moe_reference.route, moe_reference.add_expert_bias, moe_reference.combine)
    from hybrid_mxfp8.triton_kernels.moe import combine, expert_bias, route

    return _Steps(route.route, expert_bias.add_expert_bias, combine.combine)


def _run(
    inputs: Inputs, workspace: MoEWorkspace | None, backend: str, layer: Layer, out: torch.Tensor
) -> Launched | None:
    """Launch everything, past the public functions' checks: inputs are checked and contiguous, M and top_k at least 1."""
    shape = layer.shape
    x, w13q, w2q, topk_ids, topk_weights, w13_bias, w2_bias = inputs
    num_tokens = x.shape[0]
    backends = choose_backends(shape, num_tokens, backend)
    quantizer, up, down = backends
    steps = _steps(quantizer.name == TRITON)
    if workspace is not None:
        workspace.check(shape, num_tokens)
    with contextlib.nullcontext() if workspace is None else workspace.in_use():
        make = allocate if workspace is None else workspace.buffers
        b = make(shape, num_tokens, backends)
        xq, hq = b.xq, b.hq
        routed = steps.route(topk_ids, shape.experts, b.sorted_token_ids, b.inverse_permutation, b.layout, b.scratch)
        quantized = quantizer.quantize_grouped(x, b.groups, xq.values, xq.scales, "rceil", b.sorted_token_ids, None)
        launched = [routed, quantized.launched, up.grouped_gemm(xq, w13q, b.h, b.gemm)]
        if w13_bias is not None:
            launched.append(steps.add_expert_bias(b.h, b.inverse_permutation, topk_ids, w13_bias))
        quantized = quantizer.quantize_grouped(b.h, b.groups, hq.values, hq.scales, "rceil", None, layer.swiglu)
        launched += [quantized.launched, down.grouped_gemm(hq, w2q, b.y, b.gemm)]
        launched.append(steps.combine(b.y, b.inverse_permutation, topk_ids, topk_weights, w2_bias, out))
    return together(*launched)


class MXFP8Experts(torch.nn.Module):
    """The experts of one MoE layer with MXFP8 weights; inference only.

    Weights are buffers of bytes, values and swizzled scales, so that ``module.to(device)`` moves them and
    ``module.to(torch.float16)`` leaves them as they are. Biases are buffers in the dtype they come in.

    Args:
        w13q: E experts of (2I, H), gate rows first, then up.
        w2q: E experts of (H, I).
        w13_bias: (E, 2I) bf16, fp16 or fp32, or None.
        w2_bias: (E, H), or None.
        activation: as in ``moe_forward``; also an attribute, a :class:`SwiGLU`.
        workspace: shared by the layers that run one after another, or None; also an attribute.
        backend: as in ``moe_forward``.

    Raises:
        TypeError, ValueError: weights, biases or a workspace that don't fit together; no such activation or backend.
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
        _check_workspace(workspace)
        requested(backend)
        self.register_buffer("w13_values", w13q.values.view(torch.uint8))
        self.register_buffer("w13_scales", w13q.scales)
        self.register_buffer("w2_values", w2q.values.view(torch.uint8))
        self.register_buffer("w2_scales", w2q.scales)
        self.register_buffer("w13_bias", None if w13_bias is None else w13_bias.detach())
        self.register_buffer("w2_bias", None if w2_bias is None else w2_bias.detach())
        self.activation = swiglu_of(activation)
        self.workspace = workspace
        self.backend = backend

    @classmethod
    def from_weights(cls, w13: torch.Tensor, w2: torch.Tensor, **options: Any) -> MXFP8Experts:
        """Quantize w13 (E, 2I, H) and w2 (E, H, I), bf16, fp16 or fp32; ``options`` as for the class.

        Raises:
            TypeError, ValueError: as ``quantize_weights`` raises, and weights that don't fit together.
        """
        backend = options.get("backend")
        for name, w in (("w13", w13), ("w2", w2)):
            check_tensor(name, w, dtypes=FLOAT_DTYPES, ndim=3, dims="(E, N, K)")
        w13q, w2q = (quantize_weights(w.detach(), backend=backend) for w in (w13, w2))
        return cls(w13q, w2q, **options)

    @property
    def w13q(self) -> ExpertWeights:
        """(E, 2I, H), the buffers' memory."""
        return ExpertWeights.unchecked(self.w13_values.view(torch.float8_e4m3fn), self.w13_scales)

    @property
    def w2q(self) -> ExpertWeights:
        """(E, H, I), the buffers' memory."""
        return ExpertWeights.unchecked(self.w2_values.view(torch.float8_e4m3fn), self.w2_scales)

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
