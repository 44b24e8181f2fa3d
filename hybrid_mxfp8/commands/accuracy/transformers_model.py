"""A tiny random Qwen3-MoE of transformers: what its experts multiply, its logits in each format."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any, Final

import torch
import torch.nn.functional as F

from hybrid_mxfp8.commands.accuracy.measure import FORMATS
from hybrid_mxfp8.commands.demo.workload import Operands, Workload
from hybrid_mxfp8.core.metrics import signal_to_noise_db

TOKENS: Final = 256
SIZES: Final = {
    **{"vocab_size": 512, "hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 128},
    **{"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64},
    **{"num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True},
}


def installed() -> bool:
    """Whether transformers is."""
    return importlib.util.find_spec("transformers") is not None


def report(sizes: dict[str, Any] = SIZES, num_tokens: int = TOKENS) -> tuple[Workload, dict[str, float]]:
    """Run the model of a Qwen3MoeConfig in fp32, then with its experts' operands in each format.
    Returns the last layer's operands, and the logits' signal-to-noise in dB by format."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes))
        model.float().eval()
        ids = torch.randint(0, sizes["vocab_size"], (1, num_tokens))
    # With nothing quantized the replaced forward computes as the model does; it records operands.
    truth, seen = logits(model, lambda x: x, ids)
    logits_db = {form.name: signal_to_noise_db(truth, logits(model, form.through, ids)[0]) for form in FORMATS}
    name = f"Qwen3-MoE, {sizes['num_hidden_layers']} layers, {sizes['num_experts']} experts"
    source = f"{name}, RANDOM weights and tokens; the experts of its last layer"
    return Workload(source, False, tuple(seen[-2:])), logits_db


@torch.no_grad()
def logits(
    model: Any, through: Callable[[torch.Tensor], torch.Tensor], ids: torch.Tensor
) -> tuple[torch.Tensor, list[Operands]]:
    """Logits with every operand of the experts' products passed ``through``, and those operands."""
    seen: list[Operands] = []

    def multiply(operands: Operands) -> torch.Tensor:
        seen.append(operands)
        x = through(operands.x).split(list(operands.rows))
        return torch.cat([xe @ through(w).T for xe, w in zip(x, operands.w, strict=True)])

    def replaced(experts: Any) -> Callable[..., torch.Tensor]:
        def forward(hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
            order = top_k_index.reshape(-1).argsort(stable=True)
            token = order // top_k_index.shape[1]
            rows = tuple(torch.bincount(top_k_index.reshape(-1), minlength=experts.num_experts).tolist())
            gate_up = multiply(Operands("gate and up", hidden[token], experts.gate_up_proj.detach(), rows))
            gate, up = gate_up.chunk(2, dim=-1)
            down = multiply(Operands("down", F.silu(gate) * up, experts.down_proj.detach(), rows))
            weighted = down * top_k_weights.reshape(-1)[order].unsqueeze(1)
            return torch.zeros_like(hidden).index_add_(0, token, weighted)

        return forward

    for layer in model.model.layers:
        layer.mlp.experts.forward = replaced(layer.mlp.experts)
    return model(ids).logits, seen
