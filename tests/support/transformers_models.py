"""Tiny random models of transformers, in bf16, with experts that matter to the logits."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import metadata
from typing import Any

import pytest
import torch

NAMES = ("Qwen3-MoE", "Mixtral", "DeepSeek-V3", "gpt-oss")
PROMPT_LENGTH = 7

MIN_SNR_DB = 18.0
"""Logits in MXFP8 beside grouped_mm in bf16, both with the routing of the latter: 19.8 to 24.1 dB
on a CPU, over five seeds. A layer of experts alone is at 23.7 dB. With routing of its own, a near
tie that falls the other way makes it another model.
"""
WITHOUT_EXPERTS_DB = 6.0
"""Logits with the experts' weights zeroed are no nearer than this: experts dominate."""


def require() -> None:
    """Skip without transformers 5.7; one that is there and can't be imported is a failure."""
    reason = "needs transformers 5.7 or newer: pip install 'transformers>=5.7'"
    try:
        version = metadata.version("transformers")
    except metadata.PackageNotFoundError:
        pytest.skip(reason)
    if tuple(map(int, version.split(".")[:2])) < (5, 7):
        pytest.skip(f"{reason}, this is {version}")


def make(name: str, device: str = "cpu", scale: int = 1, seed: int = 0) -> Any:
    """A model for inference; ``scale`` multiplies its widths."""
    import transformers

    family, sizes = {
        "Qwen3-MoE": ("Qwen3Moe", {"head_dim": 16, "intermediate_size": 64, "num_experts": 8}),
        "Mixtral": ("Mixtral", {"intermediate_size": 96 * scale, "num_local_experts": 4}),
        "gpt-oss": ("GptOss", {"head_dim": 16, "intermediate_size": 96 * scale, "num_local_experts": 4}),
        "DeepSeek-V3": (
            "DeepseekV3",
            {"intermediate_size": 64, "n_routed_experts": 8, "n_shared_experts": 1, "n_group": 2, "topk_group": 1}
            | {"first_k_dense_replace": 1, "q_lora_rank": 32, "kv_lora_rank": 32}
            | dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 16),
        ),
    }[name]
    if name in ("Qwen3-MoE", "DeepSeek-V3"):
        sizes["moe_intermediate_size"] = 32 * scale
    sizes |= {"hidden_size": 64 * scale, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
    sizes |= {"vocab_size": 97, "max_position_embeddings": 64, "num_experts_per_tok": 2}
    sizes |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**sizes)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        # The default initialization leaves experts that add next to nothing to the residual stream.
        for module in experts_modules(model):
            fill(module, 2.0)
    return model.to(device=device, dtype=torch.bfloat16).eval()


def fill(experts: torch.nn.Module, gain: float) -> None:
    """Normal weights, whose products have ``gain`` times their input's deviation, and biases."""
    for parameter in experts.parameters():
        is_weight = parameter.ndim == 3
        parameter.normal_(std=gain * parameter.shape[1 if experts.is_transposed else 2] ** -0.5 if is_weight else 1.0)


def with_fp8_experts(model: Any) -> Any:
    """The same model with random experts in FP8, a power of two as the scale of each block of
    128x128.

    By the modules that transformers puts in place of a model's own when it loads an FP8 checkpoint.
    """
    from transformers.integrations import finegrained_fp8 as fp8
    from transformers.integrations.moe import use_experts_implementation

    rng = torch.Generator().manual_seed(0)
    for name, module in list(model.named_modules()):
        if not hasattr(module, "is_concatenated"):
            continue
        wrapped = use_experts_implementation(
            experts_class=fp8.FP8Experts, experts_interface=fp8.ALL_FP8_EXPERTS_FUNCTIONS
        )
        experts = wrapped(config=module.config, block_size=(128, 128))
        with torch.no_grad():
            for weight in (experts.gate_up_proj, experts.down_proj):
                weight.copy_((torch.randn(weight.shape, generator=rng) * 64).to(torch.float8_e4m3fn))
            for scale in (experts.gate_up_proj_scale_inv, experts.down_proj_scale_inv):
                scale.copy_(2.0 ** torch.randint(-10, -7, scale.shape, generator=rng))
        model.set_submodule(name, experts)
    return model.eval()


def experts_modules(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The experts of every MoE layer."""
    return [m for m in model.modules() if hasattr(m, "is_concatenated") and hasattr(m, "down_proj")]


def expert_weights(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """gate_up_proj and down_proj of every MoE layer."""
    return [getattr(m, name) for m in experts_modules(model) for name in ("gate_up_proj", "down_proj")]


class Routing:
    """Routing of a first forward, replayed in a later one: ids and weights of every MoE layer."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._recorded: list[tuple[Any, ...]] = []
        self._replayed: Iterator[tuple[Any, ...]] | None = None
        for module in experts_modules(model):
            module.register_forward_pre_hook(self._hook)

    def replay(self) -> None:
        """The next forward takes the recorded routing."""
        self._replayed = iter(self._recorded)

    def _hook(self, module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if self._replayed is None:
            self._recorded.append(args[1:])
            return args
        return (args[0], *next(self._replayed))


def prompt(device: str = "cpu") -> torch.Tensor:
    """(2, PROMPT_LENGTH) token ids."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, 97, (2, PROMPT_LENGTH), generator=generator).to(device)
