"""A transformers model with MXFP8 experts.

    python examples/transformers_model.py [MODEL]

MODEL is a name or a folder that transformers loads. Without one, it is a tiny Qwen3-MoE with random
weights.
"""

import sys

import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from hybrid_mxfp8.integrations import transformers as mxfp8

TINY = {
    "vocab_size": 128,
    "hidden_size": 64,
    "moe_intermediate_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
}


def load(name: str | None) -> torch.nn.Module:
    """The model in bf16."""
    if name is not None:
        return AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(Qwen3MoeConfig(**TINY), dtype=torch.bfloat16)


def main() -> None:
    """Load, quantize, generate."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load(sys.argv[1] if len(sys.argv) > 1 else None).eval()
    print(mxfp8.quantize_model_(model, device=device))  # the experts go there, layer after layer
    model = model.to(device)  # and the rest

    tokens = torch.tensor([[3, 1, 4, 1, 5]], device=device)
    generated = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=8, do_sample=False)
    print(generated[0].tolist())


if __name__ == "__main__":
    main()
