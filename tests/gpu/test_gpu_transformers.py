"""Models of transformers with this package's experts, on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers_models as models
from on_gpu import captured

import hybrid_mxfp8 as mx
from hybrid_mxfp8.integrations import transformers as integration

GPU = "cuda"
pytestmark = pytest.mark.gpu


@pytest.fixture(params=models.NAMES)
def model(request: pytest.FixtureRequest) -> Any:
    models.require()
    integration.register()
    return models.make(request.param, GPU, scale=4)


@torch.no_grad()
def test_logits(model: Any) -> None:
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
def test_experts_move_as_they_are_quantized() -> None:
    """From the CPU: the same model as one quantized on the GPU, and the GPU never holds two layers'
    unquantized experts, nor more than one expert in fp32."""
    models.require()
    name, scale = models.NAMES[0], 8
    model = models.make(name, scale=scale)
    layer = sum(p.numel() * p.element_size() for p in models.expert_weights(model)[:2])
    expert = 20 * models.expert_weights(model)[0][0].numel()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    saved = integration.quantize_model_(model, device=GPU, progress=False)
    assert torch.cuda.max_memory_allocated() - before < saved.bytes_after + 1.2 * layer + expert
    whole = models.make(name, GPU, scale=scale)
    integration.quantize_model_(whole, progress=False)
    prompt = models.prompt(GPU)
    assert torch.equal(model.to(GPU)(prompt).logits, whole(prompt).logits)


@torch.no_grad()
def test_compiled(fresh_dynamo: None, model: Any) -> None:
    """The whole model without a break."""
    integration.quantize_model_(model, progress=False)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    prompt = models.prompt(GPU)
    got = compiled(prompt, use_cache=False).logits
    assert mx.signal_to_noise_db(model(prompt, use_cache=False).logits, got) > 35.0


@torch.no_grad()
def test_captured(model: Any) -> None:
    """Once quantized in place; lazily quantized experts would be captured as they are now."""
    model.set_experts_implementation("hybrid_mxfp8")
    experts = models.experts_modules(model)[0]
    x = torch.randn(5, model.config.hidden_size, device=GPU).bfloat16()
    routed = (x, torch.arange(10, device=GPU).view(5, 2) % 4, torch.full((5, 2), 0.5, device=GPU))
    expected = experts(*routed)
    with pytest.raises(ValueError, match=r"quantized by quantize_model_.* before a CUDA graph"):
        captured(lambda: experts(*routed))
    integration.quantize_model_(model, progress=False)
    experts(*routed)
    graph, got = captured(lambda: experts(*routed))
    graph.replay()
    assert torch.equal(got, expected)
