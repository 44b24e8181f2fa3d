"""A tiny Qwen3-MoE of the transformers library with random weights: what its experts multiply, and its logits in each format."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.nn.functional as F

from hybrid_mxfp8.commands.accuracy.formats import FORMATS
from hybrid_mxfp8.commands.demo.workload import Operands, Workload
from hybrid_mxfp8.core.metrics import signal_to_noise_db

TOKENS: Final = 256
SIZES: Final = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
}


@dataclass(frozen=True)
class ModelReport:
    """The operands of the last layer's experts, and by format the logits' signal-to-noise in dB against fp32."""

    workload: Workload
    logits_db: dict[str, float]


def installed() -> bool:
    """Whether transformers is."""
    return importlib.util.find_spec("transformers") is not None


def report(sizes: dict[str, Any] | None = None, num_tokens: int | None = None) -> ModelReport:
    """Run the model in fp32, then with its experts' operands through each format.

    Args:
        sizes: of a Qwen3MoeConfig; default :data:`SIZES`.
        num_tokens: length of the one sequence of random ids; default :data:`TOKENS`.

    Raises:
        ModuleNotFoundError: transformers is not installed.
    """
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = SIZES if sizes is None else sizes
    num_tokens = TOKENS if num_tokens is None else num_tokens
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes))
        model.float().eval()
        ids = torch.randint(0, sizes["vocab_size"], (1, num_tokens))
    layers = [layer.mlp.experts for layer in model.model.layers]
    seen: list[Operands] = []
    with torch.no_grad():
        # The replacement with nothing quantized is the model itself, and tells what the last layer's experts see.
        truth = _logits(model, layers, lambda x: x, ids, seen)
        logits_db = {
            form.name: signal_to_noise_db(truth, _logits(model, layers, form.through, ids)) for form in FORMATS
        }
    name = f"Qwen3-MoE, {sizes['num_hidden_layers']} layers, {sizes['num_experts']} experts"
    workload = Workload(f"{name}, RANDOM weights and tokens; the experts of its last layer", False, tuple(seen[-2:]))
    return ModelReport(workload, logits_db)


def _logits(
    model: Any,
    layers: list[Any],
    through: Callable[[torch.Tensor], torch.Tensor],
    ids: torch.Tensor,
    seen: list[Operands] | None = None,
) -> torch.Tensor:
    """Logits with every operand of the experts' products passed ``through``; operands are added to ``seen``."""

    def replaced(experts: Any) -> Callable[..., torch.Tensor]:
        def forward(hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
            order = top_k_index.reshape(-1).argsort(stable=True)
            token = order // top_k_index.shape[1]
            rows = torch.bincount(top_k_index.reshape(-1), minlength=experts.num_experts).tolist()
            up = Operands("gate and up", hidden[token], experts.gate_up_proj.detach(), tuple(rows))
            gate, linear = _multiply(up, through).chunk(2, dim=-1)
            down = Operands("down", F.silu(gate) * linear, experts.down_proj.detach(), tuple(rows))
            if seen is not None:
                seen.extend((up, down))
            weighted = _multiply(down, through) * top_k_weights.reshape(-1)[order].unsqueeze(1)
            return torch.zeros_like(hidden).index_add_(0, token, weighted)

        return forward

    for experts in layers:
        experts.forward = replaced(experts)
    logits: torch.Tensor = model(ids).logits
    return logits


def _multiply(operands: Operands, through: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """(T, N) fp32."""
    x = through(operands.x)
    return torch.cat([xe @ through(w).T for xe, w in zip(x.split(list(operands.rows)), operands.w, strict=True)])
