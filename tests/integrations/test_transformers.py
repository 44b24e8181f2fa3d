"""Models of transformers with MXFP8 experts, beside their own grouped_mm; lazily and in place."""

from __future__ import annotations

import copy
import pickle
import sys
import types
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import transformers_models as models
from torch.nn import Module
from torch.nn.utils import parametrize

import hybrid_mxfp8 as mx
from hybrid_mxfp8.checkpoint import fp8_blocks
from hybrid_mxfp8.integrations import transformers as integration


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    models.require()
    integration.register()
    with torch.no_grad(), mx.use_backend("reference"):
        yield


@pytest.fixture
def experts() -> Module:
    """One experts module of a model."""
    model = models.make("Mixtral")
    model.set_experts_implementation("hybrid_mxfp8")
    return models.experts_modules(model)[0]


def logits(model: Module, implementation: str | None = None) -> torch.Tensor:
    if implementation is not None:
        model.set_experts_implementation(implementation)
    return model(models.prompt()).logits


def arguments(hidden: int = 64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.randn(5, hidden, generator=torch.Generator().manual_seed(0)).bfloat16()
    return x, torch.tensor([[0, 1], [2, 3], [1, 4], [0, 0], [3, 2]]), torch.full((5, 2), 0.5)


def parameter(tensor: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(tensor, requires_grad=False)


# ---------------------------------------------------------------- whole models


@pytest.mark.parametrize(
    ("name", "backend"), [("Mixtral", "triton"), ("gpt-oss", "triton"), *((name, "reference") for name in models.NAMES)]
)
def test_logits_are_those_of_grouped_mm(name: str, backend: str, request: pytest.FixtureRequest) -> None:
    """Within the noise of the format; without its experts the model is somewhere else."""
    if backend == "triton":
        request.getfixturevalue("interpreter")
    model = models.make(name)
    routing = models.Routing(model)
    expected = logits(model, "grouped_mm")
    routing.replay()
    with mx.use_backend(backend):
        got = logits(model, "hybrid_mxfp8")
    assert got.dtype == expected.dtype
    assert mx.signal_to_noise_db(expected, got) > models.MIN_SNR_DB
    for weight in models.expert_weights(model):
        weight.zero_()
    routing.replay()
    assert mx.signal_to_noise_db(expected, logits(model, "grouped_mm")) < models.WITHOUT_EXPERTS_DB


@pytest.mark.parametrize("name", models.NAMES)
def test_quantize_model_in_place(name: str) -> None:
    """The same bits as lazily; the originals are gone; the numbers are those of the tensors."""
    model = models.make(name)
    lazy = logits(model, "hybrid_mxfp8")
    before = sum(p.nbytes for m in models.experts_modules(model) for p in m.parameters())
    model.set_experts_implementation("grouped_mm")
    saved = integration.quantize_model_(model, progress=False)
    assert torch.equal(logits(model), lazy)
    assert not [name for name, _ in model.named_parameters() if "experts.gate_up_proj" in name]
    assert not any(module in integration._CACHE for module in models.experts_modules(model))
    buffers = [b for name, b in model.named_buffers() if ".mxfp8." in name]
    assert len(buffers) == saved.layers * (6 if models.experts_modules(model)[0].has_bias else 4)
    assert (saved.bytes_before, saved.bytes_after) == (before, sum(b.nbytes for b in buffers))
    assert saved.ratio == saved.bytes_after / before < 0.6  # scales of small matrices are padded to whole tiles
    state = {name: t.clone() for name, t in model.state_dict().items()}
    for buffer in buffers:
        buffer.zero_()
    model.load_state_dict(state)
    assert torch.equal(logits(model), lazy)


def test_quantized_model_refuses_what_needs_the_originals(tmp_path: Path) -> None:
    """transformers would load what it saved with random experts. A copy refuses, too."""
    model = models.make("Mixtral")
    integration.quantize_model_(model, progress=False, scale_group=128, backend="reference")
    assert {module.mxfp8.backend for module in models.experts_modules(model)} == {"reference"}
    assert {module.mxfp8.w2q.scale_group for module in models.experts_modules(model)} == {128}
    kept = logits(model, "hybrid_mxfp8")
    other = r"experts_implementation: must be 'hybrid_mxfp8' .*got 'grouped_mm': load"
    for quantized in (model, model.model, copy.deepcopy(model)):
        with pytest.raises(RuntimeError, match=r"save_pretrained: .* keep the original checkpoint"):
            quantized.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=other):
            quantized.set_experts_implementation("grouped_mm")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"model: must have experts .* got MixtralForCausalLM, quantized already"):
        integration.quantize_model_(model, progress=False)
    assert torch.equal(logits(model), kept)
    with pytest.raises(ValueError, match="model: must have MoE layers"):
        integration.quantize_model_(torch.nn.Linear(4, 4), progress=False)


def test_quantized_experts_refuse_what_goes_round_the_model() -> None:
    """Another implementation from outside; new experts, which strict=False would pass over."""
    model = models.make("Mixtral")
    original = {name: t.clone() for name, t in model.state_dict().items()}
    integration.quantize_model_(model.model, progress=False)
    model.set_experts_implementation("hybrid_mxfp8")
    kept = logits(model)
    for strict in (True, False):
        with pytest.raises(ValueError, match=r"^state_dict: must hold quantized .*got model\.layers\.0\..*gate_up_"):
            model.load_state_dict(original, strict=strict)
    assert torch.equal(logits(model), kept)
    with pytest.raises(ValueError, match=r"^experts_implementation: must be 'hybrid_mxfp8' .*got 'grouped_mm'"):
        logits(model, "grouped_mm")
    wrapped = torch.nn.Sequential(models.make("Mixtral"))
    with pytest.raises(ValueError, match=r"^model: must be a PreTrainedModel, not what wraps one, got Sequential"):
        integration.quantize_model_(wrapped, progress=False)


def last(model: Module) -> Module:
    return models.experts_modules(model)[-1]


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda m: setattr(last(m), "act_fn", torch.nn.GELU()), {}, r"SwiGLU experts, got model\.layers\.1.*: its activation is GELU"),
        (lambda m: last(m).to("meta"), {}, r"all experts in memory, not offloaded .*model\.layers\.1\..* on meta"),
        (lambda m: last(m).to("meta"), {"device": "cpu"}, "all experts in memory"),
        (lambda m: m.to("meta"), {"device": "cpu"}, "all experts in memory"),
        (lambda m: setattr(m.to("meta"), "_hf_hook", "accelerate's"), {}, r"not offloaded .*model\.layers\.0\..* on meta"),
        (lambda m: None, {"device": "nowhere"}, r"^device: must be a torch\.device"),
        (lambda m: None, {"device": "mps"}, r"^device: this PyTorch can't use 'mps'"),
        (lambda m: None, {"scale_group": 64}, r"^scale_group: must be 32 or 128, got 64"),
        (lambda m: parametrize.register_parametrization(last(m), "down_proj", torch.nn.Identity()), {}, "plain parameters"),
    ],
    ids=[
        *("no SwiGLU", "offloaded", "offloaded, to the CPU", "meta, to the CPU", "all offloaded", "no device", "no mps"),
        *("no such group", "parametrized"),
    ],
)  # fmt: skip
def test_model_that_can_not_be_quantized_stays_as_it_was(
    change: Callable[[Module], object], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """On meta are the layers that a device_map offloads."""
    model = models.make("Mixtral")
    change(model)
    implementation, kinds = model.config._experts_implementation, [*map(type, models.expert_weights(model))]
    with pytest.raises(ValueError, match=message):
        integration.quantize_model_(model, progress=False, **options)
    assert not [name for name, _ in model.named_modules() if name.endswith("mxfp8")]
    assert [*map(type, models.expert_weights(model))] == kinds
    assert model.config._experts_implementation == implementation
    if not any(p.is_meta for p in model.parameters()):
        model.save_pretrained(tmp_path)


def test_a_backend_that_can_not_quantize_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.make("Mixtral")
    before = model(models.prompt()).logits
    monkeypatch.setattr(integration, "_quantize", mock.Mock(side_effect=mx.BackendUnavailableError("backend: none")))
    with pytest.raises(mx.BackendUnavailableError, match=r"^backend: none"):
        integration.quantize_model_(model, progress=False)
    assert torch.equal(model(models.prompt()).logits, before)


def test_a_meta_model_is_quantized_and_loaded() -> None:
    model, meta = models.make("Mixtral"), models.make("Mixtral", seed=1).to("meta")
    for each in (model, meta):
        integration.quantize_model_(each, progress=False)
    meta.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(last(meta)(*arguments()), last(model)(*arguments()))


def test_layers_move_one_by_one(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """To meta, which stands for a GPU: never more than one layer's unquantized experts."""
    model = models.make("Qwen3-MoE")
    seen: list[tuple[str, ...]] = []
    from_weights = mx.MXFP8Experts.from_weights

    def look(w13: torch.Tensor, w2: torch.Tensor, **options: object) -> mx.MXFP8Experts:
        assert (w13.is_meta, w2.is_meta) == (True, True)
        tensors = [next((t for t in m.parameters()), None) for m in models.experts_modules(model)]
        seen.append(tuple("quantized" if t is None else t.device.type for t in tensors))
        return from_weights(w13, w2, **options)

    monkeypatch.setattr(mx.MXFP8Experts, "from_weights", look)
    others = {name: p.device for name, p in model.named_parameters() if ".experts." not in name}
    integration.quantize_model_(model, device="meta")
    assert "quantize experts: 100%" in capsys.readouterr().err
    assert seen == [("cpu", "cpu"), ("quantized", "cpu")]
    assert {b.device.type for name, b in model.named_buffers() if ".mxfp8." in name} == {"meta"}
    assert {name: p.device for name, p in model.named_parameters()} == others


@pytest.mark.parametrize(
    ("layers", "before", "after", "said"),
    [  # Qwen3-30B-A3B from bf16; from FP8, a byte and a 32nd instead of a byte
        ("48 MoE layers", 57982058496, 29897998848, "29.9 GB in MXFP8 instead of 58.0 GB: 28.1 GB saved, 0.516"),
        ("1 MoE layer", 32 * 10**6, 33 * 10**6, "33.0 MB in MXFP8 instead of 32.0 MB: 1.0 MB more, 1.031"),
        ("1 MoE layer", 900, 500, "500 bytes in MXFP8 instead of 900 bytes: 400 bytes saved, 0.556"),
    ],
)
def test_memory_in_words(layers: str, before: int, after: int, said: str) -> None:
    saved = integration.MemorySaved(int(layers.split()[0]), before, after)
    assert str(saved) == f"the experts of {layers} take {said} of the memory"


# ---------------------------------------------------------------- when experts are quantized anew


def test_lazy_quantization_follows_the_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for weights that stay; again for weights written to, or replaced."""
    quantized: list[Module] = []
    quantize = integration._quantize
    monkeypatch.setattr(integration, "_quantize", lambda module: (quantized.append(module), quantize(module))[1])
    model = models.make("Qwen3-MoE")
    first = logits(model, "hybrid_mxfp8")
    assert torch.equal(logits(model, "hybrid_mxfp8"), first)
    assert len(quantized) == 2
    models.expert_weights(model)[0].mul_(2)
    assert not torch.equal(logits(model, "hybrid_mxfp8"), first)
    assert len(quantized) == 3
    model.load_state_dict({name: t.clone() for name, t in model.state_dict().items()})
    logits(model, "hybrid_mxfp8")
    assert len(quantized) == 5
    assert not [name for name in model.state_dict() if "mxfp8" in name]
    assert len(list(model.modules())) == len(list(models.make("Qwen3-MoE").modules()))


def test_another_parameter_at_the_same_address_is_quantized(experts: Module) -> None:
    """As an allocator gives memory out again: address, version and device are the first's."""
    memory = experts.gate_up_proj.data
    experts.gate_up_proj = parameter(memory.data)
    first = experts(*arguments())
    gone = weakref.ref(experts.gate_up_proj)
    place = experts.gate_up_proj.data_ptr(), experts.gate_up_proj._version
    memory.data.mul_(2)
    experts.gate_up_proj = parameter(memory.data)
    assert gone() is None
    assert (experts.gate_up_proj.data_ptr(), experts.gate_up_proj._version) == place
    assert not torch.equal(experts(*arguments()), first)


def test_what_is_seen_of_a_parameter(experts: Module) -> None:
    """Writes that PyTorch counts, not those through ``.data``; other memory by its address."""
    first = experts(*arguments())
    experts.down_proj.data.mul_(2)
    assert torch.equal(experts(*arguments()), first)
    experts.down_proj.copy_(experts.down_proj)
    assert torch.equal(experts(*arguments()), 2 * first)
    version = experts.down_proj._version
    experts.down_proj.data = 2 * experts.down_proj.data
    assert experts.down_proj._version == version
    assert torch.equal(experts(*arguments()), 4 * first)


def test_other_memory_at_the_same_address_is_quantized(experts: Module) -> None:
    """As a module may get that goes to another dtype and back; parameter and version stay."""
    memory = experts.down_proj.detach().clone().view(torch.int16).numpy()
    experts.down_proj.data = torch.from_numpy(memory).view(torch.bfloat16)
    first, address = experts(*arguments()), experts.down_proj.data_ptr()
    memory[:] = (torch.from_numpy(memory).view(torch.bfloat16) * 2).view(torch.int16).numpy()
    experts.down_proj.data = torch.from_numpy(memory).view(torch.bfloat16)
    assert experts.down_proj.data_ptr() == address
    assert torch.equal(experts(*arguments()), 2 * first)


def test_inference_tensors_count_no_writes_and_are_refused(experts: Module) -> None:
    """Other parameters count those made in inference mode, too."""
    with torch.inference_mode():
        first = experts(*arguments())
        experts.down_proj.mul_(2)
        assert torch.equal(experts(*arguments()), 2 * first)
        experts.down_proj = parameter(experts.down_proj.clone())
        assert experts.down_proj.is_inference()
        with pytest.raises(ValueError, match=r"^experts: must be quantized by quantize_model_\(model\) if they are"):
            experts(*arguments())


def test_parameters_that_other_processes_share_are_refused(experts: Module) -> None:
    experts.share_memory()
    with pytest.raises(ValueError, match=r"^experts: must be quantized by quantize_model_\(model\) if other proc"):
        experts(*arguments())


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copy_after_a_forward_quantizes_its_own(experts: Module, make_copy: Callable[[Module], Module]) -> None:
    first = experts(*arguments())
    copied = make_copy(experts)
    assert torch.equal(copied(*arguments()), first)
    copied.down_proj.zero_()
    assert not copied(*arguments()).any()
    assert torch.equal(experts(*arguments()), first)


@pytest.mark.parametrize(("backend", "fullgraph"), [("eager", True), ("aot_eager", True), ("aot_eager", False)])
def test_compiled_experts(backend: str, fullgraph: bool, fresh_dynamo: None) -> None:
    """In one graph once they are quantized in place; before, even after a forward, an error."""
    model = models.make("Mixtral")
    expected = logits(model, "hybrid_mxfp8")
    with pytest.raises(Exception, match=r"experts: must be quantized by quantize_model_\(model\) before torch\.co"):
        torch.compile(model, fullgraph=fullgraph, backend=backend)(models.prompt(), use_cache=False)
    torch._dynamo.reset()
    integration.quantize_model_(model, progress=False)
    got = torch.compile(model, fullgraph=fullgraph, backend=backend)(models.prompt(), use_cache=False).logits
    assert mx.signal_to_noise_db(expected, got) > 35.0


# ---------------------------------------------------------------- what experts may be


def test_experts_with_bias_and_transposed(experts: Module) -> None:
    """As other models have them; expert id 4 of 4 is a sentinel of expert parallelism."""
    plain = experts(*arguments())
    experts.has_bias = True
    experts.gate_up_proj_bias = parameter(torch.zeros(4, 192, dtype=torch.bfloat16))
    experts.down_proj_bias = parameter(torch.zeros(4, 64, dtype=torch.bfloat16))
    assert torch.equal(experts(*arguments()), plain)
    experts.down_proj_bias.fill_(1.0)
    shifted = experts(*arguments()).float() - plain.float()
    torch.testing.assert_close(shifted[0], torch.ones(64), atol=0.05, rtol=0)
    torch.testing.assert_close(shifted[2], torch.full((64,), 0.5), atol=0.05, rtol=0)  # the sentinel's half is missing
    experts.down_proj_bias.fill_(0.0)
    for name in integration.WEIGHTS:
        setattr(experts, name, parameter(getattr(experts, name).transpose(1, 2).contiguous()))
    experts.is_transposed = True
    assert torch.equal(experts(*arguments()), plain)
    x, *rest = arguments()
    with torch.enable_grad(), pytest.raises(ValueError, match="x: must not require grad"):
        experts(x.requires_grad_(), *rest)


def with_gate(module: Module, gate: object) -> None:
    module.__class__ = type("OtherGate", (type(module),), {"_apply_gate": gate})


def cut_after_silu(module: Module, gate_up: torch.Tensor) -> torch.Tensor:
    """As in Step-3.7: no SwiGLU of ours, though nearly one."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate).clamp(max=7.0) * up.clamp(-7.0, 7.0)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda e: (delattr(e, "gate_up_proj"), setattr(e, "has_gate", False)), "it has no gate"),  # as Nemotron's
        (lambda e: setattr(e, "is_concatenated", False), "its gate function is no SwiGLU of rows in turns"),
        (lambda e: setattr(e, "num_experts", 8), "4 of its 8 experts are here"),
        (lambda e: setattr(e, "act_fn", torch.nn.GELU()), "its activation is GELU, not SiLU"),
        (lambda e: e.__dict__.update(_modules={}, act_fn=torch.nn.functional.gelu), "its activation is gelu, not SiLU"),
        (lambda e: with_gate(e, None), "its gate function is no SwiGLU"),
        (lambda e: with_gate(e, cut_after_silu), "its gate function is no SwiGLU"),
        (lambda e: setattr(e, "down_proj", parameter(torch.zeros(4, 64, 40))), "H = 64 and I = 40 are not both"),
        (lambda e: (setattr(e, "is_transposed", True), setattr(e, "down_proj", parameter(torch.zeros(4, 40, 64)))), "I = 40 are not"),
        (lambda e: setattr(e, "down_proj", parameter(torch.zeros(4, 64, 96, dtype=torch.int8))), "its weights are int8"),
    ],
)  # fmt: skip
def test_experts_it_can_not_compute(experts: Module, change: Callable[[Module], object], reason: str) -> None:
    change(experts)
    with pytest.raises(ValueError, match=f"experts: must be SwiGLU experts, got .*: .*{reason}"):
        experts(*arguments())


GATES = {
    "lfm2_moe.Lfm2MoeExperts": mx.SwiGLU(),
    "minimax_m3_vl.MiniMaxM3VLExperts": mx.SwiGLU(1.702, 1.0, 7.0),
    "deepseek_v4.DeepseekV4Experts": mx.SwiGLU(limit=7.0),
    "glm5_next.Glm5NextTextExperts": mx.SwiGLU(limit=7.0),
    "hy_v4.HYV4Experts": mx.SwiGLU(limit=7.0),
    "gpt_oss.GptOssExperts": mx.SwiGLU(1.702, 1.0, 7.0),
    "openai_privacy_filter.OpenAIPrivacyFilterExperts": mx.SwiGLU(1.702, 1.0, 7.0),
}
"""Experts with gate functions of their own, or SiLU as a function, in transformers 5.24."""


@pytest.mark.parametrize("name", GATES)
def test_gate_functions_of_their_own(name: str) -> None:
    """Recognized by what they compute; against transformers' own forward."""
    folder, class_name = name.split(".")
    path = f"transformers.models.{folder}.modeling_{folder}"
    module = pytest.importorskip(path, reason="a newer transformers has it")
    config = types.SimpleNamespace(
        **{"num_local_experts": 4, "num_experts": 4, "hidden_size": 64, "hidden_act": "silu"},
        **{"intermediate_size": 96, "moe_intermediate_size": 96, "swiglu_limit": 7.0, "swiglu_alpha": 1.702},
        _experts_implementation="eager",
    )
    experts = getattr(module, class_name)(config)
    models.fill(experts, 4.0)
    experts = experts.bfloat16()
    assert integration.why_not(experts) is None
    quantized = integration._quantize(experts)
    assert quantized.activation == GATES[name]
    x, ids, weights = arguments()
    call = (x, ids % 4, weights)  # some versions' own forward takes no sentinel
    assert mx.signal_to_noise_db(experts(*call), quantized(*call)) > 20.0


@pytest.mark.parametrize("limit", [31.0, 100.0])
def test_a_limit_beyond_what_activations_reach_is_kept(limit: float) -> None:
    path = "transformers.models.deepseek_v4.modeling_deepseek_v4"
    module = pytest.importorskip(path, reason="a newer transformers has it")
    config = types.SimpleNamespace(
        **{"num_local_experts": 2, "hidden_size": 64, "hidden_act": "silu", "moe_intermediate_size": 32},
        **{"intermediate_size": 32, "swiglu_limit": limit, "_experts_implementation": "eager"},
    )
    assert integration._activation(module.DeepseekV4Experts(config)) == mx.SwiGLU(limit=limit)


def test_an_option_that_is_not_known_is_refused(experts: Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a later transformers lets experts say of themselves must not be left out."""
    import transformers.integrations.moe as moe

    def later(experts_class: type, *, has_bias: bool = False, has_more: bool = False) -> None: ...

    monkeypatch.setattr(moe, "use_experts_implementation", later)
    for has_more, reason in ((False, None), (True, "has_more = True is not supported")):
        experts.has_more = has_more
        assert integration.why_not(experts) == reason


# ---------------------------------------------------------------- loaded in FP8


@pytest.fixture
def plain() -> Module:
    return models.make("Qwen3-MoE", scale=4)  # H = 256, I = 128


@pytest.fixture
def fp8(plain: Module) -> Module:
    """With experts as of an FP8 checkpoint; ``plain`` gets what they stand for."""
    fp8 = models.with_fp8_experts(copy.deepcopy(plain))
    for there, here in zip(models.experts_modules(plain), models.experts_modules(fp8), strict=True):
        for name in integration.WEIGHTS:
            weights, scales = getattr(here, name), getattr(here, name + "_scale_inv")  # powers of two: exact in bf16
            getattr(there, name).copy_(torch.stack(list(map(fp8_blocks.dequantize, weights, scales))))
    return fp8


def test_fp8_experts_become_mxfp8(plain: Module, fp8: Module) -> None:
    """To the bit as from what the FP8 stands for, lazily and in place."""
    expected = logits(plain, "hybrid_mxfp8")
    assert torch.equal(logits(fp8, "hybrid_mxfp8"), expected)
    before = sum(t.nbytes for module in models.experts_modules(fp8) for t in module.parameters())
    saved = integration.quantize_model_(fp8, progress=False)
    assert torch.equal(logits(fp8), expected)
    assert (saved.bytes_before, saved.layers) == (before, 2)
    assert not [name for name, _ in fp8.named_parameters() if "experts.gate_up_proj" in name]
    assert not [name for name in fp8.state_dict() if "scale_inv" in name]


def test_fp8_scales_written_in_place_are_seen(fp8: Module) -> None:
    fp8.set_experts_implementation("hybrid_mxfp8")
    before = last(fp8)(*arguments(256))
    last(fp8).down_proj_scale_inv.mul_(2.0)
    assert torch.equal(last(fp8)(*arguments(256)), before * 2)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda e: setattr(e, "down_proj_scale_inv", None), "its down_proj is not FP8 with a scale for each block"),
        (lambda e: setattr(e, "gate_up_proj_scale_inv", parameter(torch.ones(8, 2, 1))), "its gate_up_proj is not FP8"),
        (lambda e: setattr(e, "gate_up_proj", parameter(torch.zeros(8, 256, 256))), "its gate_up_proj is not FP8"),
        (lambda e: setattr(e, "down_proj_scale_inv", parameter(torch.ones(8, 256, 4))), "down_proj is MXFP8 already"),
        (lambda e: setattr(e, "has_bias", True), "it is FP8 with a bias, transposed or interleaved"),
        (lambda e: setattr(e, "is_transposed", True), "it is FP8 with a bias, transposed or interleaved"),
    ],
    ids=["no scales", "scales of rows", "one of two", "MXFP8", "bias", "transposed"],
)
def test_fp8_experts_it_can_not_compute(fp8: Module, change: Callable[[Module], None], reason: str) -> None:
    change(last(fp8))
    with pytest.raises(ValueError, match=f"model: must have SwiGLU experts, got model.layers.1.*{reason}"):
        integration.quantize_model_(fp8, progress=False)
    assert not [name for name, _ in fp8.named_modules() if name.endswith("mxfp8")]
    fp8.set_experts_implementation("hybrid_mxfp8")
    with pytest.raises(ValueError, match=reason):
        last(fp8)(*arguments(256))


def test_fp8_experts_whose_blocks_mix_gate_and_up() -> None:
    fp8 = models.with_fp8_experts(models.make("Mixtral", scale=2))  # I = 192
    assert integration.why_not(last(fp8)) == "it is FP8 and its I = 192 is no multiple of 128"


@pytest.mark.parametrize("version", ["5.6.2", "4.57.6", None])
def test_older_transformers_are_refused(version: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """They have the interface, but their models take no name from it."""
    import transformers

    if version is None:
        monkeypatch.setitem(sys.modules, "transformers.integrations.moe", None)
    else:
        monkeypatch.setattr(transformers, "__version__", version)
    with pytest.raises(ImportError, match=rf"needs transformers 5\.7 or newer, .*{version or 'ExpertsInterface'}"):
        integration.register()
