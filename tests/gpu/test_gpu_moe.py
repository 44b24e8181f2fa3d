"""The MoE layer on a GPU: kernels beside their twins, no sync, no allocation, CUDA graphs, torch.compile, transformers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import moe_truth
import pytest
import torch
import transformers_models as models

import hybrid_mxfp8 as mx
from hybrid_mxfp8.checkpoint import fp8_blocks
from hybrid_mxfp8.integrations import transformers as integration
from hybrid_mxfp8.reference import routing as moe_reference

pytestmark = pytest.mark.gpu

GPU = "cuda"
MIN_SNR_DB = 23.0
"""As ``moe_forward`` documents, with room: 23.6 to 23.8 dB measured."""


def make(rng: torch.Generator, **shape: Any) -> moe_truth.Layer:
    size = {"tokens": 33, "experts": 16, "hidden": 512, "intermediate": 256, "top_k": 4, **shape}
    return moe_truth.to(moe_truth.make_layer(rng, **size), GPU)


Forward = Callable[..., torch.Tensor]


def forward_of(layer: moe_truth.Layer, backend: str | None = "triton") -> Forward:
    """forward(x, ids, weights, **options) of the layer's experts."""
    w13q, w2q = (mx.quantize_weights(w) for w in (layer.w13, layer.w2))

    def forward(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, **options: Any) -> torch.Tensor:
        bias = {"w13_bias": layer.w13_bias, "w2_bias": layer.w2_bias}
        return mx.moe_forward(x, w13q, w2q, ids, weights, backend=backend, **bias, **options)

    return forward


def workspace_of(layer: moe_truth.Layer, max_tokens: int) -> mx.MoEWorkspace:
    w13q, w2q = (mx.quantize_weights(w) for w in (layer.w13, layer.w2))
    top_k = layer.ids.shape[1]
    return mx.MoEWorkspace(w13q, w2q, max_tokens=max_tokens, top_k=top_k, dtype=layer.x.dtype, backend="triton")


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
@pytest.mark.parametrize(
    ("tokens", "top_k", "experts"),
    [(1, 1, 1), (1, 8, 256), (16, 8, 128), (37, 6, 72), (512, 8, 1024), (513, 8, 256), (3001, 3, 31)],
)
def test_route_is_its_twin(rng: torch.Generator, tokens: int, top_k: int, experts: int, dtype: torch.dtype) -> None:
    check_route(torch.randint(-2, experts + 2, (tokens, top_k), generator=rng).to(GPU, dtype), experts)


@pytest.mark.parametrize("experts", [8, 1024])
def test_route_of_a_million_slots(rng: torch.Generator, experts: int) -> None:
    check_route(torch.randint(-2, experts + 2, (131072, 8), generator=rng).to(GPU), experts)
    check_route(torch.full((131072, 8), experts - 1, device=GPU), experts)


def check_route(ids: torch.Tensor, experts: int) -> None:
    from hybrid_mxfp8.triton_kernels.moe import route

    def outputs() -> dict[str, torch.Tensor]:
        sizes = {"sorted_token_ids": (ids.numel(),), "inverse_permutation": ids.shape, "layout": (3 * experts + 2,)}
        return {name: torch.full(size, -77, dtype=torch.int32, device=GPU) for name, size in sizes.items()}

    got, expected = outputs(), outputs()
    scratch = torch.full((route.scratch_elements(ids.numel(), experts),), -5, dtype=torch.int32, device=GPU)
    route.route(ids, experts, **got, scratch=scratch)
    moe_reference.route(ids, experts, **expected)
    for name in expected:
        assert torch.equal(got[name], expected[name]), name


@pytest.mark.sanitizer
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("hidden", [32, 2880, 7168])
def test_combine_and_bias_are_their_twins(rng: torch.Generator, hidden: int, dtype: torch.dtype, bias: bool) -> None:
    """Bit for bit: the kernel multiplies and adds without fusing, as PyTorch does."""
    from hybrid_mxfp8.triton_kernels.moe import combine, expert_bias

    tokens, top_k, experts = 19, 8, 12
    ids = torch.randint(-1, experts + 1, (tokens, top_k), generator=rng).to(GPU)
    inverse_permutation = torch.empty(tokens, top_k, dtype=torch.int32, device=GPU)
    rows = torch.empty(tokens * top_k, dtype=torch.int32, device=GPU)
    moe_reference.route(
        ids, experts, rows, inverse_permutation, torch.empty(3 * experts + 2, dtype=torch.int32, device=GPU)
    )
    y = torch.randn(tokens * top_k, hidden, generator=rng).to(GPU, dtype)
    weights = torch.randn(tokens, top_k, generator=rng).to(GPU)
    expert_biases = torch.randn(experts, hidden, generator=rng).to(GPU, dtype)
    got, expected = (torch.empty(tokens, hidden, dtype=dtype, device=GPU) for _ in range(2))
    combine.combine(y, inverse_permutation, ids, weights, expert_biases if bias else None, got)
    moe_reference.combine(y, inverse_permutation, ids, weights, expert_biases if bias else None, expected)
    assert torch.equal(got, expected)
    if bias:
        added = y.clone()
        expert_bias.add_expert_bias(added, inverse_permutation, ids, expert_biases)
        moe_reference.add_expert_bias(y, inverse_permutation, ids, expert_biases)
        assert torch.equal(added, y)


@pytest.mark.sanitizer
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_signal_to_noise(rng: torch.Generator, dtype: torch.dtype, bias: bool) -> None:
    layer = make(rng, dtype=dtype, bias=bias, dropped=True)
    y = forward_of(layer)(layer.x, layer.ids, layer.weights)
    assert mx.signal_to_noise_db(moe_truth.forward(layer), y.cpu()) > MIN_SNR_DB


def test_another_activation(rng: torch.Generator) -> None:
    """The launches of one activation must not be taken for another's, with a workspace neither."""
    layer = make(rng, bias=True)
    forward, workspace = forward_of(layer), workspace_of(layer, 64)
    truths = {
        "swigluoai": moe_truth.forward(layer, moe_truth.swigluoai),
        "swiglu": moe_truth.forward(layer),
    }
    out = torch.empty_like(layer.x)
    for _ in range(4):
        for name, truth in truths.items():
            for where in (None, workspace):
                y = forward(layer.x, layer.ids, layer.weights, activation=name, workspace=where, out=out)
                assert mx.signal_to_noise_db(truth, y.cpu()) > MIN_SNR_DB


@pytest.mark.parametrize("tokens", [1, 8, 200, 3000])
def test_backends_agree(rng: torch.Generator, tokens: int) -> None:
    """Few and many tokens, one launch of routing and three; products differ in the order of additions alone."""
    layer = make(rng, tokens=tokens, experts=64, top_k=6, dropped=True)
    arguments = (layer.x, layer.ids, layer.weights)
    expected = forward_of(layer, "reference")(*arguments)
    assert mx.signal_to_noise_db(expected, forward_of(layer)(*arguments)) > 40.0
    assert mx.signal_to_noise_db(expected, forward_of(layer, None)(*arguments)) > 40.0


def test_warm_call_neither_syncs_nor_allocates(rng: torch.Generator, no_sync: None) -> None:
    torch.cuda.set_sync_debug_mode("default")
    layer = make(rng, bias=True)
    forward, workspace = forward_of(layer), workspace_of(layer, 64)
    arguments, out = (layer.x, layer.ids, layer.weights), torch.empty_like(layer.x)
    forward(*arguments, workspace=workspace, out=out)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    forward(*arguments, workspace=workspace, out=out)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    forward(*arguments)  # without a workspace it allocates, but does not sync either


@pytest.mark.parametrize("tokens", [16, 1200])
def test_graph_replays_with_other_counts(rng: torch.Generator, tokens: int) -> None:
    """Captured once; then other tokens, routed elsewhere, none routed at all, all to one expert: eager's bits each time."""
    layer = make(rng, tokens=tokens, bias=True)
    forward, workspace = forward_of(layer), workspace_of(layer, tokens)
    x, ids, weights = layer.x.clone(), layer.ids.clone(), layer.weights.clone()
    out = torch.empty_like(x)
    forward(x, ids, weights, workspace=workspace, out=out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        forward(x, ids, weights, workspace=workspace, out=out)
    for spread in (None, 16, 1, 3, 0):
        if spread is not None:
            x.copy_(torch.randn(x.shape, generator=rng))
            weights.copy_(torch.rand(weights.shape, generator=rng))
            ids.copy_(torch.randint(0, spread, ids.shape, generator=rng) if spread else torch.full(ids.shape, -1))
        graph.replay()
        assert torch.equal(out, forward(x, ids, weights)), spread
        assert bool(out.any()) == (spread != 0)


def test_compiled_by_inductor(rng: torch.Generator) -> None:
    """fullgraph, one compilation for routings and batch sizes, eager's bits."""
    torch._dynamo.reset()
    layer = make(rng, tokens=80, dropped=True)
    forward = forward_of(layer)
    compiled = torch.compile(forward, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=False):
        for step, tokens in enumerate((80, 7, 33)):
            batch = (layer.x[:tokens].clone(), (layer.ids[:tokens] + step) % 16, layer.weights[:tokens].clone())
            for tensor in batch:
                torch._dynamo.mark_dynamic(tensor, 0)
            with torch._dynamo.config.patch(error_on_recompile=step > 0):
                assert torch.equal(compiled(*batch), forward(*batch))
    torch._dynamo.reset()


def test_compiled_with_cuda_graphs(rng: torch.Generator) -> None:
    torch._dynamo.reset()
    layer = make(rng, tokens=24)
    forward = forward_of(layer)
    compiled = torch.compile(
        lambda x, ids, weights: forward(x + 1, ids, weights) * 2, mode="reduce-overhead", fullgraph=True
    )
    for shift in range(5):
        ids = (layer.ids + shift) % 16
        expected = forward(layer.x + 1, ids, layer.weights) * 2
        assert torch.equal(compiled(layer.x, ids, layer.weights).clone(), expected)
    torch._dynamo.reset()


def test_functions_compiled_by_inductor(rng: torch.Generator) -> None:
    """quantize and GEMM as operators of their own, the layout built in the graph."""
    torch._dynamo.reset()
    w = torch.randn(4, 64, 128, generator=rng).to(GPU)
    wq = mx.quantize_weights(w)

    def product(x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        return mx.grouped_gemm(mx.quantize_grouped(x * 2, counts), wq).float() + 1

    compiled = torch.compile(product, fullgraph=True)
    x = torch.randn(40, 128, generator=rng).to(GPU)
    for counts in ([40, 0, 0, 0], [3, 17, 0, 20]):
        given = torch.tensor(counts, dtype=torch.int32, device=GPU)
        assert torch.equal(compiled(x, given), product(x, given))
    torch._dynamo.reset()


@pytest.mark.parametrize("call", ["group_offsets", "grouped_gemm", "moe_forward"])
def test_opcheck(rng: torch.Generator, call: str) -> None:
    layer = make(rng, tokens=9, experts=4, hidden=64, intermediate=32, top_k=2, bias=True)
    counts = torch.tensor([4, 0, 3, 2], dtype=torch.int32, device=GPU)
    layout = [t.clone() for t in vars(mx.GroupLayout.from_counts(counts, 9)).values() if isinstance(t, torch.Tensor)]
    xq = mx.quantize_grouped(layer.x, counts)
    w13q, w2q = mx.quantize_weights(layer.w13), mx.quantize_weights(layer.w2)
    bytes13, bytes2 = w13q.values.view(torch.uint8), w2q.values.view(torch.uint8)
    arguments: dict[str, tuple[Any, ...]] = {
        "group_offsets": (counts, 9, False),
        "grouped_gemm": (
            xq.values.view(torch.uint8), xq.scales, *layout, bytes13, w13q.scales, torch.bfloat16, "triton",
        ),
        "moe_forward": (
            layer.x, bytes13, w13q.scales, bytes2, w2q.scales, layer.ids, layer.weights,
            layer.w13_bias, layer.w2_bias, "swiglu", "triton",
        ),
    }  # fmt: skip
    results = torch.library.opcheck(getattr(torch.ops.hybrid_mxfp8, call).default, arguments[call])
    assert set(results.values()) == {"SUCCESS"}, results


def test_module_moves_to_the_gpu(rng: torch.Generator) -> None:
    layer = moe_truth.make_layer(rng)
    experts = mx.MXFP8Experts.from_weights(layer.w13, layer.w2, backend=None).to(GPU)
    y = experts(layer.x.to(GPU), layer.ids.to(GPU), layer.weights.to(GPU))
    there = moe_truth.to(layer, GPU)
    assert torch.equal(y, forward_of(there, None)(there.x, there.ids, there.weights))


@pytest.fixture(params=models.NAMES)
def model(request: pytest.FixtureRequest) -> Any:
    models.require()
    integration.register()
    return models.make(request.param, GPU, scale=4)


@torch.no_grad()
def test_transformers_logits(model: Any) -> None:
    routing, prompt = models.Routing(model), models.prompt(GPU)
    model.set_experts_implementation("grouped_mm")
    expected = model(prompt).logits
    model.set_experts_implementation("hybrid_mxfp8")
    routing.replay()
    got = model(prompt).logits
    assert mx.signal_to_noise_db(expected, got) > models.MIN_SNR_DB
    saved = integration.quantize_model_(model, progress=False)
    assert saved.ratio < 0.55
    routing.replay()
    assert torch.equal(model(prompt).logits, got)


@torch.no_grad()
def test_transformers_generate(model: Any) -> None:
    integration.quantize_model_(model, progress=False)
    prompt = models.prompt(GPU)
    tokens = model.generate(prompt, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    assert tokens.shape == (2, models.PROMPT_LENGTH + 8)
    assert torch.equal(tokens, model.generate(prompt, max_new_tokens=8, min_new_tokens=8, do_sample=False))


@torch.no_grad()
def test_transformers_experts_move_as_they_are_quantized() -> None:
    """From the CPU: the same model as one quantized on the GPU, and the GPU never holds two layers' unquantized experts."""
    models.require()
    name, scale = models.NAMES[0], 8
    model = models.make(name, scale=scale)
    layer = sum(p.numel() * p.element_size() for p in models.expert_weights(model)[:2])
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    saved = integration.quantize_model_(model, device=GPU, progress=False)
    assert torch.cuda.max_memory_allocated() - before < saved.bytes_after + 1.2 * layer
    whole = models.make(name, GPU, scale=scale)
    integration.quantize_model_(whole, progress=False)
    prompt = models.prompt(GPU)
    assert torch.equal(model.to(GPU)(prompt).logits, whole(prompt).logits)


@torch.no_grad()
def test_transformers_fp8_experts_become_mxfp8() -> None:
    """From the CPU as on the GPU, and as from what the FP8 stands for: its scales are powers of two."""
    models.require()
    plain = models.make("Qwen3-MoE", scale=4)
    fp8 = models.with_fp8_experts(copy.deepcopy(plain))
    for exact, quantized in zip(models.experts_modules(plain), models.experts_modules(fp8), strict=True):
        for weight in integration.WEIGHTS:
            values, scales = getattr(quantized, weight), getattr(quantized, weight + "_scale_inv")
            getattr(exact, weight).copy_(torch.stack([*map(fp8_blocks.dequantize, values, scales)]))
    moved, prompt = copy.deepcopy(fp8), models.prompt(GPU)
    integration.quantize_model_(moved, device=GPU, progress=False)
    logits = []
    for model in (plain.to(GPU), fp8.to(GPU), moved.to(GPU)):
        model.set_experts_implementation("hybrid_mxfp8")
        logits.append(model(prompt).logits)
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])


@torch.no_grad()
def test_transformers_compiled(model: Any) -> None:
    """The whole model without a break."""
    torch._dynamo.reset()
    integration.quantize_model_(model, progress=False)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    prompt = models.prompt(GPU)
    got = compiled(prompt, use_cache=False).logits
    assert mx.signal_to_noise_db(model(prompt, use_cache=False).logits, got) > 35.0
    torch._dynamo.reset()
