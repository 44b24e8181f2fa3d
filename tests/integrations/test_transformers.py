"""Models of transformers with MXFP8 experts: logits beside grouped_mm's, generate(), quantization lazily and in place."""

from __future__ import annotations

import copy
import pickle
import sys
import types
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers_models as models

import hybrid_mxfp8 as mx
from hybrid_mxfp8.checkpoint import fp8_blocks
from hybrid_mxfp8.integrations import transformers as integration


@pytest.fixture(autouse=True)
def _transformers() -> None:
    models.require()
    integration.register()


@pytest.fixture(params=models.NAMES)
def model(request: pytest.FixtureRequest) -> torch.nn.Module:
    return models.make(request.param)


def logits(model: torch.nn.Module, implementation: str | None, backend: str = "reference") -> torch.Tensor:
    if implementation is not None:
        model.set_experts_implementation(implementation)
    with torch.no_grad(), mx.use_backend(backend):
        return model(models.prompt()).logits


@pytest.mark.parametrize(("name", "backend"), [("Mixtral", "triton"), *((name, "reference") for name in models.NAMES)])
def test_logits_are_those_of_grouped_mm(name: str, backend: str, request: pytest.FixtureRequest) -> None:
    """Within the noise of the format; without its experts the model is somewhere else altogether."""
    if backend == "triton":
        request.getfixturevalue("interpreter")
    model = models.make(name)
    routing = models.Routing(model)
    expected = logits(model, "grouped_mm")
    routing.replay()
    got = logits(model, "hybrid_mxfp8", backend)
    assert got.dtype == expected.dtype
    assert mx.signal_to_noise_db(expected, got) > models.MIN_SNR_DB
    with torch.no_grad():
        for parameter in models.expert_weights(model):
            parameter.zero_()
    routing.replay()
    assert mx.signal_to_noise_db(expected, logits(model, "grouped_mm")) < models.WITHOUT_EXPERTS_DB


def test_generate(model: torch.nn.Module) -> None:
    model.set_experts_implementation("hybrid_mxfp8")
    with mx.use_backend("reference"):
        tokens = model.generate(models.prompt(), max_new_tokens=4, min_new_tokens=4, do_sample=False)
        again = model.generate(models.prompt(), max_new_tokens=4, min_new_tokens=4, do_sample=False)
        step = logits(model, None)
    assert tokens.shape == (2, models.PROMPT_LENGTH + 4)
    assert torch.equal(tokens, again)
    assert torch.equal(tokens[:, models.PROMPT_LENGTH], step[:, -1].argmax(-1))


def test_quantize_model_in_place(model: torch.nn.Module) -> None:
    """The same bits as lazy quantization; the originals are gone; the numbers are those of the tensors."""
    lazy = logits(model, "hybrid_mxfp8")
    before = sum(p.numel() * p.element_size() for p in models.expert_weights(model))
    model.set_experts_implementation("grouped_mm")
    with mx.use_backend("reference"):
        saved = integration.quantize_model_(model, progress=False)
    assert torch.equal(logits(model, None), lazy)
    names = [name for name, _ in model.named_parameters() if "experts.gate_up_proj" in name]
    assert not names
    buffers = [b for name, b in model.named_buffers() if ".mxfp8." in name]
    assert saved.layers * 4 == len(buffers)
    assert saved.bytes_before == before
    assert saved.bytes_after == sum(b.numel() for b in buffers)
    assert saved.ratio == saved.bytes_after / before < 0.6  # scales of small matrices are padded to whole tiles
    assert "in MXFP8 instead of" in str(saved)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    for buffer in buffers:
        buffer.zero_()
    model.load_state_dict(state)
    assert torch.equal(logits(model, None), lazy)


def test_quantized_model_refuses_what_needs_the_originals(tmp_path: Path) -> None:
    """transformers would load what it saved with random experts; so would it the model within. A copy refuses, too."""
    model = models.make("Mixtral")
    with mx.use_backend("reference"):
        integration.quantize_model_(model, progress=False)
    kept = logits(model, "hybrid_mxfp8")
    for quantized in (model, model.model, copy.deepcopy(model)):
        with pytest.raises(RuntimeError, match=r"save_pretrained: .* keep the original checkpoint"):
            quantized.save_pretrained(tmp_path / "saved")
        with pytest.raises(
            ValueError, match=r"experts_implementation: must be 'hybrid_mxfp8' .*got 'grouped_mm': load"
        ):
            quantized.set_experts_implementation("grouped_mm")
    assert not (tmp_path / "saved").exists()
    with pytest.raises(ValueError, match=r"model: must have experts .* got MixtralForCausalLM, quantized already"):
        integration.quantize_model_(model, progress=False)
    assert torch.equal(logits(model, None), kept)


def gelu(model: torch.nn.Module) -> None:
    models.experts_modules(model)[-1].act_fn = torch.nn.GELU()


def offload_last_layer(model: torch.nn.Module) -> None:
    """As a device_map does: the tensors are on meta until the layer's forward."""
    models.experts_modules(model)[-1].to("meta")


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (gelu, {}, r"^model: must have SwiGLU experts, got model\.layers\.1.*its activation is GELU, not SiLU"),
        (
            offload_last_layer,
            {},
            r"^model: must have all experts in memory, not offloaded .*model\.layers\.1\..* on meta",
        ),
        (offload_last_layer, {"device": "cpu"}, r"^model: must have all experts in memory"),
        (lambda model: model.to("meta"), {"device": "cpu"}, r"^model: must have all experts in memory"),
        (lambda model: None, {"device": "nowhere"}, r"^device: must be a torch\.device"),
    ],
    ids=["no SwiGLU", "offloaded", "offloaded, to the CPU", "meta, to the CPU", "no device"],
)
def test_model_that_can_not_be_quantized_stays_as_it_was(
    change: Callable[[torch.nn.Module], object], options: dict[str, str], message: str, tmp_path: Path
) -> None:
    model = models.make("Mixtral")
    change(model)
    implementation = model.config._experts_implementation
    with pytest.raises(ValueError, match=message):
        integration.quantize_model_(model, progress=False, **options)
    assert not [name for name, _ in model.named_modules() if name.endswith("mxfp8")]
    assert all(isinstance(p, torch.nn.Parameter) for p in models.expert_weights(model))
    assert model.config._experts_implementation == implementation
    if not any(p.is_meta for p in model.parameters()):
        model.save_pretrained(tmp_path)
        assert (tmp_path / "model.safetensors").exists()


def test_what_has_no_experts_is_refused() -> None:
    with pytest.raises(ValueError, match="model: must have MoE layers"):
        integration.quantize_model_(torch.nn.Linear(4, 4), progress=False)


def test_a_meta_model_is_quantized_and_loaded() -> None:
    model, meta = models.make("Mixtral"), models.make("Mixtral", seed=1).to("meta")
    with mx.use_backend("reference"):
        integration.quantize_model_(model, progress=False)
        integration.quantize_model_(meta, progress=False)
    meta.load_state_dict(model.state_dict(), assign=True)
    assert not [name for name, tensor in meta.state_dict().items() if tensor.is_meta]
    loaded, expected = models.experts_modules(meta)[0], models.experts_modules(model)[0]
    with mx.use_backend("reference"):
        assert torch.equal(loaded(*arguments()), expected(*arguments()))


def test_layers_move_one_by_one(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """To meta, which stands for a GPU here: at no time more than one layer's unquantized experts are there."""
    model = models.make("Qwen3-MoE")
    seen: list[tuple[str, ...]] = []
    from_weights = mx.MXFP8Experts.from_weights

    def look(w13: torch.Tensor, w2: torch.Tensor, **options: object) -> mx.MXFP8Experts:
        assert w13.is_meta
        assert w2.is_meta
        tensors = [next((t for t in m.parameters()), None) for m in models.experts_modules(model)]
        seen.append(tuple("quantized" if t is None else t.device.type for t in tensors))
        return from_weights(w13, w2, **options)

    monkeypatch.setattr(mx.MXFP8Experts, "from_weights", look)
    others = {name: p.device for name, p in model.named_parameters() if ".experts." not in name}
    saved = integration.quantize_model_(model, device="meta")
    assert "quantize experts: 100%" in capsys.readouterr().err
    assert seen == [("cpu", "cpu"), ("quantized", "cpu")]
    assert saved.layers == 2
    assert {b.device.type for name, b in model.named_buffers() if ".mxfp8." in name} == {"meta"}
    assert {name: p.device for name, p in model.named_parameters()} == others


@pytest.mark.parametrize(
    ("saved", "said"),
    [
        (
            (48, 48 * 128 * 3 * 768 * 2048 * 2, 48 * 128 * 3 * 768 * 2048 * 33 // 32),  # Qwen3-30B-A3B, from bf16
            "the experts of 48 MoE layers take 29.9 GB in MXFP8 instead of 58.0 GB: 28.1 GB saved, 0.516 of the memory",
        ),
        (
            (1, 32 * 10**6, 33 * 10**6),  # from FP8: a byte and a 32nd instead of a byte
            "the experts of 1 MoE layer take 33.0 MB in MXFP8 instead of 32.0 MB: 1.0 MB more, 1.031 of the memory",
        ),
        ((1, 900, 500), "the experts of 1 MoE layer take 500 bytes in MXFP8 instead of 900 bytes: 400 bytes saved, 0.556 of the memory"),
    ],
    ids=["from bf16", "from FP8", "tiny"],
)  # fmt: skip
def test_memory_in_words(saved: tuple[int, int, int], said: str) -> None:
    assert str(integration.MemorySaved(*saved)) == said


def test_lazy_quantization_follows_the_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for weights that stay; again for weights written to, or replaced."""
    model = models.make("Qwen3-MoE")
    quantized: list[object] = []
    quantize = integration._quantize
    monkeypatch.setattr(integration, "_quantize", lambda module: (quantized.append(module), quantize(module))[1])
    first = logits(model, "hybrid_mxfp8")
    layers = len(quantized)
    assert layers == 2
    assert torch.equal(logits(model, "hybrid_mxfp8"), first)
    assert len(quantized) == layers
    parameter = models.expert_weights(model)[0]
    with torch.no_grad():
        parameter.mul_(2)
    assert not torch.equal(logits(model, "hybrid_mxfp8"), first)
    assert len(quantized) == layers + 1
    model.load_state_dict({name: t.clone() for name, t in model.state_dict().items()})
    logits(model, "hybrid_mxfp8")
    assert len(quantized) == 2 * layers + 1
    assert not [name for name in model.state_dict() if "mxfp8" in name]
    assert len(list(model.modules())) == len(list(models.make("Qwen3-MoE").modules()))


def test_another_parameter_at_the_same_address_is_quantized(experts: torch.nn.Module) -> None:
    """As an allocator gives memory out again: address, version and device are those of the first, which is not kept alive."""
    memory = experts.gate_up_proj.data

    def replace() -> None:
        experts.gate_up_proj = torch.nn.Parameter(memory.data, requires_grad=False)

    def forward() -> torch.Tensor:
        with torch.no_grad(), mx.use_backend("reference"):
            return experts(*arguments())

    replace()
    first = forward()
    version, gone = integration._Version.of(experts.gate_up_proj), weakref.ref(experts.gate_up_proj)
    memory.data.mul_(2)
    replace()
    assert gone() is None
    assert integration._Version.of(experts.gate_up_proj) == version
    assert not torch.equal(forward(), first)


def test_what_is_seen_of_a_parameter(experts: torch.nn.Module) -> None:
    """Writes that PyTorch counts, not those through ``.data``; other memory, as ``Module.to`` gives, by its address."""
    with torch.no_grad(), mx.use_backend("reference"):
        first = experts(*arguments())
        experts.down_proj.data.mul_(2)
        assert torch.equal(experts(*arguments()), first)
        experts.down_proj.copy_(experts.down_proj)
        assert torch.equal(experts(*arguments()), 2 * first)
        version = experts.down_proj._version
        experts.down_proj.data = 2 * experts.down_proj.data
        assert experts.down_proj._version == version
        assert torch.equal(experts(*arguments()), 4 * first)


def test_inference_tensors_are_quantized_once(experts: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """They count no writes."""
    quantized: list[object] = []
    quantize = integration._quantize
    monkeypatch.setattr(integration, "_quantize", lambda module: (quantized.append(module), quantize(module))[1])
    with torch.inference_mode(), mx.use_backend("reference"):
        for name in integration.WEIGHTS:
            setattr(experts, name, torch.nn.Parameter(getattr(experts, name).clone(), requires_grad=False))
        assert experts.down_proj.is_inference()
        assert torch.equal(experts(*arguments()), experts(*arguments()))
    assert len(quantized) == 1


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copy_after_a_forward_quantizes_its_own(
    experts: torch.nn.Module, make_copy: Callable[[torch.nn.Module], torch.nn.Module]
) -> None:
    with torch.no_grad(), mx.use_backend("reference"):
        first = experts(*arguments())
        copied = make_copy(experts)
        assert torch.equal(copied(*arguments()), first)
        copied.down_proj.zero_()
        assert not copied(*arguments()).any()
        assert torch.equal(experts(*arguments()), first)


@pytest.fixture
def experts() -> torch.nn.Module:
    """One experts module of a model."""
    model = models.make("Mixtral")
    model.set_experts_implementation("hybrid_mxfp8")
    return models.experts_modules(model)[0]


def arguments() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    return x, torch.tensor([[0, 1], [2, 3], [1, 4], [0, 0], [3, 2]]), torch.full((5, 2), 0.5)


def add_bias(experts: torch.nn.Module) -> None:
    """Of zeros."""
    experts.has_bias = True
    experts.gate_up_proj_bias = torch.nn.Parameter(torch.zeros(4, 192, dtype=torch.bfloat16))
    experts.down_proj_bias = torch.nn.Parameter(torch.zeros(4, 64, dtype=torch.bfloat16))


def test_experts_with_bias_and_transposed(experts: torch.nn.Module) -> None:
    """As other models of transformers have them; expert id 4 of 4 is a sentinel of expert parallelism."""
    with torch.no_grad(), mx.use_backend("reference"):
        plain = experts(*arguments())
        add_bias(experts)
        assert torch.equal(experts(*arguments()), plain)
        experts.down_proj_bias.fill_(1.0)
        shifted = experts(*arguments()).float() - plain.float()
        torch.testing.assert_close(shifted[0], torch.ones(64), atol=0.05, rtol=0)
        torch.testing.assert_close(
            shifted[2], torch.full((64,), 0.5), atol=0.05, rtol=0
        )  # the sentinel's half is missing
        experts.down_proj_bias.fill_(0.0)
        for name in integration.WEIGHTS:
            setattr(experts, name, torch.nn.Parameter(getattr(experts, name).transpose(1, 2).contiguous()))
        experts.is_transposed = True
        assert torch.equal(experts(*arguments()), plain)


def test_quantizing_in_place_keeps_no_bias_and_no_lazy_copy() -> None:
    model = models.make("Mixtral")
    model.set_experts_implementation("hybrid_mxfp8")
    modules = models.experts_modules(model)
    add_bias(modules[0])
    with torch.no_grad(), mx.use_backend("reference"):
        expected = modules[0](*arguments())
        integration.quantize_model_(model, progress=False)
        assert torch.equal(modules[0](*arguments()), expected)
    for module in modules:
        assert getattr(module, integration._CACHE, None) is None
        assert not list(module.parameters())


def test_backend_of_a_quantized_model_is_that_of_its_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.make("Mixtral")
    integration.quantize_model_(model, progress=False, backend="reference")
    monkeypatch.setenv("HYBRID_MXFP8_BACKEND", "cutlass")  # which can't run here
    modules = models.experts_modules(model)
    assert [module.mxfp8.backend for module in modules] == ["reference"] * len(modules)
    modules[0](*arguments())


def parameter(tensor: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(tensor, requires_grad=False)


def with_gate(module: torch.nn.Module, gate: object) -> None:
    module.__class__ = type("OtherGate", (type(module),), {"_apply_gate": gate})


def lie_the_other_way(module: torch.nn.Module) -> None:
    module.is_transposed = True
    module.down_proj = parameter(torch.zeros(4, 40, 64))


def cut_after_silu(module: torch.nn.Module, gate_up: torch.Tensor) -> torch.Tensor:
    """As in Step-3.7: no SwiGLU of ours, though nearly one."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate).clamp(max=7.0) * up.clamp(-7.0, 7.0)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda e: setattr(e, "has_gate", False), "it has no gate"),
        (lambda e: setattr(e, "is_concatenated", False), "its gate and up rows are interleaved"),
        (lambda e: setattr(e, "act_fn", torch.nn.GELU()), "its activation is GELU, not SiLU"),
        (lambda e: e.__dict__.update(_modules={}, act_fn=torch.nn.functional.gelu), "its activation is gelu, not SiLU"),
        (lambda e: with_gate(e, None), "its gate function is no SwiGLU"),
        (lambda e: with_gate(e, cut_after_silu), "its gate function is no SwiGLU"),
        (lambda e: setattr(e, "down_proj", parameter(torch.zeros(4, 64, 40))), "H = 64 and I = 40 are not both"),
        (lie_the_other_way, "H = 64 and I = 40 are not both"),
        (
            lambda e: setattr(e, "down_proj", parameter(torch.zeros(4, 64, 96, dtype=torch.int8))),
            "its weights are int8",
        ),
    ],
)
def test_experts_it_can_not_compute(experts: torch.nn.Module, change: object, reason: str) -> None:
    change(experts)
    with torch.no_grad(), pytest.raises(ValueError, match=f"experts: must be SwiGLU experts, got .*: .*{reason}"):
        experts(*arguments())


GATES = {
    "lfm2_moe.Lfm2MoeExperts": mx.SwiGLU(),
    "minimax_m3_vl.MiniMaxM3VLExperts": mx.SwiGLU(1.702, 1.0, 7.0),
    "deepseek_v4.DeepseekV4Experts": mx.SwiGLU(limit=7.0),
    "glm5_next.Glm5NextTextExperts": mx.SwiGLU(limit=7.0),
    "hy_v4.HYV4Experts": mx.SwiGLU(limit=7.0),
}
"""Experts with gate functions of their own, or SiLU as a function, in transformers 5.24."""


@pytest.mark.parametrize("name", GATES)
def test_gate_functions_of_their_own(name: str) -> None:
    """Recognized by what they compute, and computed so: against transformers' own forward, in MXFP8's noise."""
    folder, class_name = name.split(".")
    module = pytest.importorskip(
        f"transformers.models.{folder}.modeling_{folder}", reason="a newer transformers has it"
    )
    config = types.SimpleNamespace(
        **{"num_local_experts": 4, "num_experts": 4, "hidden_size": 64, "hidden_act": "silu"},
        **dict.fromkeys(("intermediate_size", "moe_intermediate_size"), 96),
        **{"swiglu_limit": 7.0, "swiglu_alpha": 1.702, "_experts_implementation": "eager"},
    )
    experts = getattr(module, class_name)(config)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(std=4.0 * parameter.shape[2] ** -0.5)
    experts = experts.bfloat16()
    assert integration.why_not(experts) is None
    with torch.no_grad(), mx.use_backend("reference"):
        quantized = integration._quantize(experts)
        assert quantized.activation == GATES[name]
        x, ids, weights = arguments()
        call = (x, ids % 4, weights)  # some versions' own forward takes no sentinel
        assert mx.signal_to_noise_db(experts(*call), quantized(*call)) > 20.0


def test_an_option_that_is_not_known_is_refused(experts: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a later transformers lets experts say of themselves would otherwise be left out without a word."""
    import transformers.integrations.moe as moe

    def later(experts_class: type, *, has_bias: bool = False, has_more: bool = False) -> None: ...

    monkeypatch.setattr(moe, "use_experts_implementation", later)
    experts.has_more = False
    assert integration.why_not(experts) is None
    experts.has_more = True
    assert integration.why_not(experts) == "has_more = True is not supported"


def test_experts_without_gate_weights_are_named(experts: torch.nn.Module) -> None:
    """As Nemotron's, which have up_proj alone."""
    del experts.gate_up_proj
    experts.has_gate = False
    with torch.no_grad(), pytest.raises(ValueError, match=r"experts: must be SwiGLU experts, got .*: it has no gate"):
        experts(*arguments())


# ---------------------------------------------------------------- loaded in FP8


@pytest.fixture
def fp8_model() -> tuple[torch.nn.Module, torch.nn.Module]:
    """A model in bf16, and one with its experts in FP8 as transformers keeps a published FP8 checkpoint's, that stand for the same."""
    model = models.make("Qwen3-MoE", scale=4)  # H = 256, I = 128
    fp8 = models.with_fp8_experts(copy.deepcopy(model))
    with torch.no_grad():
        for plain, quantized in zip(models.experts_modules(model), models.experts_modules(fp8), strict=True):
            for name in integration.WEIGHTS:
                w, s = getattr(quantized, name), getattr(quantized, name + "_scale_inv")
                exact = torch.stack([fp8_blocks.dequantize(w[e], s[e]) for e in range(w.shape[0])])
                assert torch.equal(exact.bfloat16().float(), exact)  # scales are powers of two
                getattr(plain, name).copy_(exact)
    return model, fp8


@pytest.mark.parametrize("how", ["lazily", "in place"])
def test_fp8_experts_become_mxfp8(fp8_model: tuple[torch.nn.Module, torch.nn.Module], how: str) -> None:
    """Without a bf16 copy of the model, and to the bit as from what the FP8 stands for."""
    plain, fp8 = fp8_model
    expected = logits(plain, "hybrid_mxfp8")
    if how == "lazily":
        assert torch.equal(logits(fp8, "hybrid_mxfp8"), expected)
        return
    before = sum(t.nbytes for module in models.experts_modules(fp8) for t in module.parameters())
    with mx.use_backend("reference"):
        saved = integration.quantize_model_(fp8, progress=False)
    assert torch.equal(logits(fp8, None), expected)
    assert (saved.bytes_before, saved.layers) == (before, 2)
    assert not [name for name, _ in fp8.named_parameters() if "experts.gate_up_proj" in name]
    assert not [name for name in fp8.state_dict() if "scale_inv" in name]


def test_fp8_scales_written_in_place_are_seen(fp8_model: tuple[torch.nn.Module, torch.nn.Module]) -> None:
    _, fp8 = fp8_model
    module = models.experts_modules(fp8)[0]
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    call = (x, *arguments()[1:])
    fp8.set_experts_implementation("hybrid_mxfp8")
    with torch.no_grad(), mx.use_backend("reference"):
        before = module(*call)
        module.down_proj_scale_inv.mul_(2.0)
        assert torch.equal(module(*call), before * 2)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda e: setattr(e, "down_proj_scale_inv", None), "its down_proj is not FP8 with a scale for each block"),
        (
            lambda e: setattr(e, "gate_up_proj_scale_inv", parameter(torch.ones(8, 2, 1))),
            "its gate_up_proj is not FP8 with a",
        ),
        (lambda e: setattr(e, "gate_up_proj", parameter(torch.zeros(8, 256, 256))), "its gate_up_proj is not FP8"),
        (lambda e: setattr(e, "has_bias", True), "it is FP8 with a bias or transposed"),
        (lambda e: setattr(e, "is_transposed", True), "it is FP8 with a bias or transposed"),
    ],
    ids=["no scales", "scales of rows", "one of two", "bias", "transposed"],
)
def test_fp8_experts_it_can_not_compute(
    fp8_model: tuple[torch.nn.Module, torch.nn.Module], change: Callable[[torch.nn.Module], None], reason: str
) -> None:
    _, fp8 = fp8_model
    module = models.experts_modules(fp8)[1]
    change(module)
    assert integration.why_not(module) is not None
    with pytest.raises(ValueError, match=f"model: must have SwiGLU experts, got model.layers.1.*{reason}"):
        integration.quantize_model_(fp8, progress=False)
    assert not [name for name, _ in fp8.named_modules() if name.endswith("mxfp8")]


def test_fp8_experts_whose_blocks_mix_gate_and_up() -> None:
    fp8 = models.with_fp8_experts(models.make("Mixtral", scale=2))  # I = 192
    assert integration.why_not(models.experts_modules(fp8)[0]) == "it is FP8 and its I = 192 is no multiple of 128"


def test_gradients_are_refused(experts: torch.nn.Module) -> None:
    x, ids, weights = arguments()
    with mx.use_backend("reference"), pytest.raises(ValueError, match="x: must not require grad"):
        experts(x.requires_grad_(), ids, weights)


def test_compiled_experts(experts: torch.nn.Module) -> None:
    """fullgraph once they have been quantized; before that an error says what to do."""
    torch._dynamo.reset()
    compiled = torch.compile(experts, fullgraph=True, backend="eager")
    with torch.no_grad(), mx.use_backend("reference"):
        with pytest.raises(Exception, match=r"experts: must be quantized before torch\.compile"):
            compiled(*arguments())
        torch._dynamo.reset()
        expected = experts(*arguments())
        assert torch.equal(torch.compile(experts, fullgraph=True, backend="eager")(*arguments()), expected)
    torch._dynamo.reset()


@pytest.mark.parametrize("version", ["5.0.0", "5.6.2", "4.57.6", None])
def test_older_transformers_are_refused(version: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """They have the interface, but their models take no name from it: better said here than by the model."""
    import transformers

    if version is None:
        monkeypatch.setitem(sys.modules, "transformers.integrations.moe", None)
    else:
        monkeypatch.setattr(transformers, "__version__", version)
    with pytest.raises(ImportError, match=rf"needs transformers 5\.7 or newer, .*{version or 'ExpertsInterface'}"):
        integration.register()
