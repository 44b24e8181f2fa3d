"""torch.ops.hybrid_mxfp8: opcheck, one graph without breaks for all token counts, eager's bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cases
import moe_truth
import pytest
import torch
import torch._dynamo
from recorder import Recorder
from torch._dynamo.testing import CompileCounter
from torch.fx.experimental.proxy_tensor import make_fx

import hybrid_mxfp8 as mx

OPS = torch.ops.hybrid_mxfp8
E, N, K = 4, 16, 64
pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def operands(backend: str, rng: torch.Generator) -> dict[str, tuple[Any, ...]]:
    """Arguments of every operator."""
    x = cases.random_rows(9, K, torch.bfloat16, rng)
    w = torch.randn(E, N, K, generator=rng)
    counts, ends = (torch.tensor(given, dtype=torch.int32) for given in ([4, 0, 3, 0], [4, 4, 7, 7]))
    # Defined everywhere: rows that no expert owns stay as they were, and opcheck compares two runs.
    full = cases.layout([4, 0, 5, 0])
    full_layout = (full.tokens_per_expert, full.expert_offsets, full.scale_offsets)
    xq, wq = mx.quantize_grouped(x, full, backend="reference"), mx.quantize_weights(w, backend="reference")
    gemm = (xq.values.view(torch.uint8), xq.scales, *full_layout, wq.values.view(torch.uint8), wq.scales)
    index = torch.arange(9, dtype=torch.int32)
    layer = moe_truth.make_layer(rng, tokens=3, experts=3, hidden=32, dropped=True, bias=True)
    experts = mx.MXFP8Experts.from_weights(layer.w13, layer.w2, backend="reference")
    moe = (experts.w13_values, experts.w13_scales, experts.w2_values, experts.w2_scales, layer.ids, layer.weights)
    tokens = mx.quantize_tokens(layer.x, backend="reference")
    plain = (None, None, "swiglu", backend)
    return {
        "group_offsets counts": (counts, 9, False),
        "group_offsets ends": (ends, 9, True),
        "quantize_grouped": (x, *full_layout, "rceil", None, None, backend),
        "quantize_grouped gather swiglu": (x, *full_layout, "even", index, "swiglu", backend, 128),
        "quantize_weights": (w, "floor", backend, 128),
        "grouped_gemm": (*gemm, torch.float32, backend),
        "moe_forward": (layer.x, *moe, *plain),
        "moe_forward bias": (layer.x, *moe, layer.w13_bias, layer.w2_bias, "swiglu", backend),
        "moe_forward tokens": (tokens.values.view(torch.uint8), *moe, *plain, 32, 32, tokens.scales, torch.float16),
        "moe_forward tokens of bf16": (tokens.values.view(torch.uint8), *moe, *plain, 32, 32, tokens.scales),
        "pack_tokens": (layer.x, layer.ids, layer.weights, 5, 3, backend),
        "pack_tokens ids alone": (layer.x, layer.ids, None, 5, 3, backend),
    }


@pytest.mark.parametrize("call", operands("reference", torch.Generator()))
def test_opcheck(backend: str, device: str, rng: torch.Generator, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Schema, fake implementation, tracing with static and dynamic shapes. New memory is zeroed:
    scale rows beyond the groups are not written, and opcheck compares all bytes."""
    arguments = tuple(a.to(device) if isinstance(a, torch.Tensor) else a for a in operands(backend, rng)[call])
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).zero_())
    results = torch.library.opcheck(getattr(OPS, call.split()[0]).default, arguments)
    assert set(results.values()) == {"SUCCESS"}, results


def moe(layer: moe_truth.Layer, backend: str) -> tuple[Callable[..., torch.Tensor], tuple[torch.Tensor, ...]]:
    experts = mx.MXFP8Experts.from_weights(
        layer.w13, layer.w2, w13_bias=layer.w13_bias, w2_bias=layer.w2_bias, scale_group=128, backend=backend
    )
    return experts, (layer.x, layer.ids, layer.weights)


def quantized(layer: moe_truth.Layer) -> tuple[moe_truth.Layer, mx.ExpertWeights, mx.ExpertWeights]:
    return layer, mx.quantize_weights(layer.w13), mx.quantize_weights(layer.w2)


@pytest.mark.parametrize("how", ["eager", "aot_eager"])
def test_moe_compiles_whole(cpu_backend: str, rng: torch.Generator, how: str) -> None:
    """fullgraph, with a residual around it, and the bits of the eager layer."""
    layer = moe_truth.make_layer(rng, bias=True, dropped=True)
    experts, arguments = moe(layer, cpu_backend)

    def block(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        y = x + experts(x * 2, ids, weights)
        return y + experts(mx.quantize_tokens(y, backend=cpu_backend), ids, weights)

    assert torch.equal(torch.compile(block, fullgraph=True, backend=how)(*arguments), block(*arguments))


def test_moe_compiles_once_for_all_routings_and_batch_sizes(rng: torch.Generator) -> None:
    layer = moe_truth.make_layer(rng, tokens=300, experts=40, dropped=True)
    experts, arguments = moe(layer, "reference")
    counter = CompileCounter()
    compiled = torch.compile(experts, fullgraph=True, backend=counter)
    for tokens in (5, 300, 2, 31):  # below and above E: the bound on scale rows has a minimum in it
        for shift in (0, 1):
            x, ids, weights = (a[:tokens].clone() for a in arguments)
            batch = (x, (ids + shift) % 40, weights)
            for tensor in batch:
                torch._dynamo.mark_dynamic(tensor, 0)
            assert torch.equal(compiled(*batch), experts(*batch))
    assert counter.frame_count == 1


def from_layout(x: torch.Tensor, counts: torch.Tensor, w: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    groups = mx.GroupLayout.from_indptr(torch.nn.functional.pad(counts.cumsum(0), (1, 0)), x.shape[0])
    xq = mx.quantize_grouped(x, groups, row_index=index)
    return mx.grouped_gemm(xq, mx.quantize_weights(w), out_dtype=torch.float32)


def from_counts(x: torch.Tensor, counts: torch.Tensor, w: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    xq = mx.quantize_grouped(x, counts, row_index=index, activation="swiglu", scale_group=128)
    assert (xq.values.dtype, xq.scale_group) == (torch.float8_e4m3fn, 128)
    return mx.grouped_gemm(
        xq, mx.quantize_weights(w[:, :, : x.shape[1] // 2], scale_group=128), out_dtype=torch.float32
    )


def arrived(x: torch.Tensor, counts: torch.Tensor, w: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    codes, scales = x.abs().to(torch.uint8), x[:, : K // 32].abs().to(torch.uint8)
    xq = mx.GroupedMXFP8.from_linear_scales(codes, scales, mx.GroupLayout.from_counts(counts, x.shape[0]))
    return torch.cat([xq.scales.flatten(), xq.linear_scales().flatten()])


@pytest.mark.parametrize("function", [from_layout, from_counts, arrived])
def test_functions_compile_once_for_all_counts(rng: torch.Generator, function: Callable[..., torch.Tensor]) -> None:
    """The functions themselves trace: layouts and operands are built inside the graph."""
    w = torch.randn(E, N, K, generator=rng)
    counter = CompileCounter()
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    with mx.use_backend("reference"):
        for tokens in (9, 3, 200):
            x, index = 50 * torch.randn(tokens, K, generator=rng), torch.randperm(tokens, generator=rng).int()
            torch._dynamo.mark_dynamic(x, 0)
            torch._dynamo.mark_dynamic(index, 0)
            for first in (tokens, 2):
                counts = torch.tensor([first, 0, tokens - first, 0])
                assert torch.equal(compiled(x, counts, w, index), function(x, counts, w, index))
    assert counter.frame_count == 1


def test_backend_is_chosen_when_the_graph_runs(rng: torch.Generator) -> None:
    layer, w13q, w2q = quantized(moe_truth.make_layer(rng))
    compiled = torch.compile(
        lambda x: mx.moe_forward(x, w13q, w2q, layer.ids, layer.weights), fullgraph=True, backend="eager"
    )
    with mx.use_backend("reference"):
        compiled(layer.x)
    with mx.use_backend("cutlass"), pytest.raises(mx.BackendUnavailableError, match="backend cutlass"):
        compiled(layer.x)


def test_out_of_a_compiled_layer(rng: torch.Generator) -> None:
    layer, w13q, w2q = quantized(moe_truth.make_layer(rng))

    def forward(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return mx.moe_forward(x, w13q, w2q, layer.ids, layer.weights, backend="reference", out=out)

    out = torch.zeros_like(layer.x)
    returned = torch.compile(forward, fullgraph=True, backend="aot_eager")(layer.x, out)
    assert torch.equal(out, forward(layer.x, torch.empty_like(out)))
    assert torch.equal(out, returned)


def test_a_wrong_out_of_a_traced_layer_is_refused(rng: torch.Generator) -> None:
    """And not converted by the copy that fills it."""
    layer, w13q, w2q = quantized(moe_truth.to(moe_truth.make_layer(rng), "meta"))
    call = (layer.x, w13q, w2q, layer.ids, layer.weights)
    assert mx.moe_forward(*call, out=torch.empty_like(layer.x)).shape == layer.x.shape
    with pytest.raises(TypeError, match=r"^out: dtype must be bfloat16, got float32"):
        mx.moe_forward(*call, out=torch.empty(layer.x.shape, device="meta"))


def test_buffers_are_refused_under_compile(rng: torch.Generator) -> None:
    """Rows that no expert owns keep what they hold; a traced call could only copy over them."""
    x, groups = cases.random_rows(9, K, torch.bfloat16, rng), cases.layout([9])
    xq = mx.quantize_grouped(x, groups, backend="reference")

    def quantize(x: torch.Tensor) -> torch.Tensor:
        return mx.quantize_grouped(x, groups, out=xq, backend="reference").values

    with pytest.raises(Exception, match=r"out: must be None under torch\.compile"):
        torch.compile(quantize, fullgraph=True, backend="eager")(x)


def test_gradients_are_refused(rng: torch.Generator) -> None:
    """Traced, too: a silent loss of gradients would be worse."""
    layer = moe_truth.make_layer(rng)
    experts, (x, ids, weights) = moe(layer, "reference")
    x = x.clone().requires_grad_()
    compiled = torch.compile(experts, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="x: must not require grad"):
        compiled(x, ids, weights)
    with torch.no_grad():
        assert torch.equal(compiled(x, ids, weights), experts(x, ids, weights))


class _Product(torch.nn.Module):
    """Of rows and the counts of their experts, by way of a layout or not."""

    def __init__(self, w: mx.ExpertWeights, layout: bool) -> None:
        super().__init__()
        self.w, self.layout = w, layout

    def forward(self, x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        groups = mx.GroupLayout.from_counts(counts, x.shape[0]) if self.layout else counts
        return mx.grouped_gemm(mx.quantize_grouped(x, groups), self.w)


@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
@pytest.mark.parametrize("what", ["layer", "counts", "layout"])
def test_export(rng: torch.Generator, what: str, strict: bool) -> None:
    """The number of tokens is left open; without ``strict`` it comes as a SymInt."""
    tokens = {0: torch.export.Dim("tokens", min=2, max=4096)}
    if what == "layer":
        module, arguments = moe(moe_truth.make_layer(rng), "reference")
        batches = [tuple(a[:size].clone() for a in arguments) for size in (9, 4)]
        shapes = (tokens, tokens, tokens)
    else:
        module = _Product(mx.quantize_weights(torch.randn(3, 16, 64, generator=rng)), what == "layout")
        x = torch.randn(40, 64, generator=rng)
        batches = [(x[:size], torch.tensor([size - 5, size % 5, 5 - size % 5])) for size in (40, 7)]
        shapes = (tokens, None)
    program = torch.export.export(module, batches[0], dynamic_shapes=shapes, strict=strict)
    for batch in batches:
        assert torch.equal(program.module()(*batch), module(*batch))


def test_symbolic_shapes_are_no_key(rng: torch.Generator) -> None:
    """They can't be hashed; make_fx traces with them where torch.compile is not asked."""
    layer, w13q, w2q = quantized(moe_truth.make_layer(rng))

    def forward(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, *parts: torch.Tensor) -> torch.Tensor:
        w13q, w2q = (mx.ExpertWeights(parts[i].view(torch.float8_e4m3fn), parts[i + 1]) for i in (0, 2))
        return mx.moe_forward(x, w13q, w2q, ids, weights, backend="reference")

    def multiply(x: torch.Tensor, counts: torch.Tensor, values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        w = mx.ExpertWeights(values.view(torch.float8_e4m3fn), scales)
        return mx.grouped_gemm(mx.quantize_grouped(x, counts), w)

    w13, w2 = ((w.values.view(torch.uint8), w.scales) for w in (w13q, w2q))
    counts = torch.tensor([4, 0, 3, 2, 0])
    calls = ((forward, (layer.x, layer.ids, layer.weights, *w13, *w2)), (multiply, (layer.x, counts, *w13)))
    for function, arguments in calls:
        traced = make_fx(function, tracing_mode="symbolic")(*arguments)
        assert torch.equal(traced(*arguments), function(*arguments))


def test_eager_calls_do_not_pass_the_dispatcher(rng: torch.Generator) -> None:
    layer = moe_truth.make_layer(rng)
    experts, arguments = moe(layer, "reference")
    with Recorder() as recorder:
        experts(*arguments)
        mx.quantize_grouped(layer.x, cases.layout([9]), backend="reference")
    assert recorder.names
    assert not [name for name in recorder.names if name.startswith("hybrid_mxfp8")]
