"""A BERT encoder in a page of PyTorch that keeps what its feed-forward layers see.

The demo wants activations from inside the layers and nothing else: this is shorter than
installing a model library, and quicker than importing one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class EncoderConfig:
    """The sizes of a BERT encoder, under the names of its ``config.json``."""

    num_hidden_layers: int
    num_attention_heads: int
    layer_norm_eps: float

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> EncoderConfig:
        """From a parsed ``config.json``.

        Raises:
            ValueError: not a BERT encoder with exact GELU.
        """
        for key, expected in (("model_type", "bert"), ("hidden_act", "gelu")):
            if config[key] != expected:
                raise ValueError(f"config: {key} must be {expected!r}, got {config[key]!r}")
        return cls(**{name: config[name] for name in cls.__dataclass_fields__})


FeedForwardInputs = tuple[torch.Tensor, torch.Tensor]
"""What a layer's feed-forward matrices multiply: hidden (L, H) and intermediate (L, I), fp32."""


def encode(weights: Mapping[str, torch.Tensor], config: EncoderConfig, ids: torch.Tensor) -> list[FeedForwardInputs]:
    """The feed-forward inputs of each layer for ids (L,) int64, with a BertModel's fp32 tensors."""

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], config.layer_norm_eps)

    def heads(x: torch.Tensor) -> torch.Tensor:
        split: torch.Tensor = x.unflatten(-1, (config.num_attention_heads, -1)).movedim(-2, -3)
        return split

    x = (
        weights["embeddings.word_embeddings.weight"][ids]
        + weights["embeddings.position_embeddings.weight"][: ids.shape[0]]
        + weights["embeddings.token_type_embeddings.weight"][0]
    )
    x = norm(x, "embeddings.LayerNorm")
    seen = []
    for index in range(config.num_hidden_layers):
        layer = f"encoder.layer.{index}"
        q, k, v = (heads(linear(x, f"{layer}.attention.self.{part}")) for part in ("query", "key", "value"))
        mixed = F.scaled_dot_product_attention(q, k, v).movedim(-3, -2).flatten(-2)
        hidden = norm(x + linear(mixed, f"{layer}.attention.output.dense"), f"{layer}.attention.output.LayerNorm")
        intermediate = F.gelu(linear(hidden, f"{layer}.intermediate.dense"))
        x = norm(hidden + linear(intermediate, f"{layer}.output.dense"), f"{layer}.output.LayerNorm")
        seen.append((hidden, intermediate))
    return seen
