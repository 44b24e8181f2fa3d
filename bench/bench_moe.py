"""The contenders of a moe case: one layer's experts, tokens and routing in, tokens out.

The baseline is the same layer in bf16 as transformers computes it
(``experts_implementation="grouped_mm"``): sort, gather, torch's grouped_mm, activation,
grouped_mm, weighted sum, each a kernel of its own. The router is part of neither. Weights have the
groups that ``MXFP8Experts`` takes on the card.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch

import hybrid_mxfp8 as mx
from hybrid_mxfp8.core.formats import BLOCK_SIZE

from . import work
from .bench_grouped_gemm import BACKENDS, Kept, weight_bytes
from .bench_quantize import SEED, Prepared
from .peers import Absent, Contender, Field
from .sglang_moe import Blocks, fp8_blocks, sglang_moe
from .shapes import Case
from .timing import num_sets

BASELINE = "transformers bf16 grouped_mm"
CHECKED_TOKENS = 4
MIN_SNR_DB = 22.0
"""Of normal data; ``moe_forward`` documents 23.6 to 23.8 dB, over many more elements."""


@dataclass(frozen=True)
class Layer:
    """w13 (E, 2I, H) and w2 (E, H, I) in bf16, quantized, and in FP8 if a contender takes that."""

    w13: torch.Tensor
    w2: torch.Tensor
    w13q: mx.ExpertWeights
    w2q: mx.ExpertWeights
    blocks: tuple[Blocks, ...]


@dataclass(frozen=True)
class Inputs:
    """Rotating sets: x (M, H), ids and weights (M, top_k), out (M, H); set 0's (E,) counts."""

    x: list[torch.Tensor]
    ids: list[torch.Tensor]
    weights: list[torch.Tensor]
    out: list[torch.Tensor]
    counts: list[int]


def make_layer(experts: int, intermediate: int, hidden: int, fp8: bool, device: str) -> Layer:
    """Scaled so that activations stay near 1."""
    w13, w2 = (
        torch.empty(experts, n, k, dtype=torch.bfloat16, device=device).normal_(std=k**-0.5)
        for n, k in ((2 * intermediate, hidden), (hidden, intermediate))
    )
    quantized = mx.MXFP8Experts.from_weights(w13, w2)
    return Layer(w13, w2, quantized.w13q, quantized.w2q, tuple(map(fp8_blocks, (w13, w2) if fp8 else ())))


def why_not() -> str | None:
    """Why there is no baseline; None if there is."""
    if importlib.util.find_spec("transformers") is None:
        return "transformers is not installed, whose layer is the baseline: pip install 'transformers>=5.7'"
    return None


def quantized_bytes(case: Case) -> int:
    """The experts in MXFP8."""
    return weight_bytes(case.num_experts, 2 * case.n, case.k) + weight_bytes(case.num_experts, case.k, case.n)


def bf16_bytes(case: Case) -> int:
    """The experts in bf16."""
    return work.BF16 * case.num_experts * 3 * case.n * case.k


def plan_sets(case: Case, l2_bytes: int) -> int:
    """Sets of tokens, routed to different experts: together they leave the L2 cache behind."""
    active = min(case.num_experts, case.num_tokens * case.top_k)
    counts = [1] * active
    return max(num_sets(work.moe(counts, case.num_tokens, case.k, case.n).bytes, l2_bytes), 2)


def make_inputs(case: Case, sets: int, device: str) -> Inputs:
    """Tokens and routings of every set; each token visits top_k different experts, drawn evenly."""
    generator = torch.Generator().manual_seed(SEED)
    ids = [
        torch.rand(case.num_tokens, case.num_experts, generator=generator).topk(case.top_k, dim=1).indices
        for _ in range(sets)
    ]
    weights = [torch.rand(i.shape, generator=generator).softmax(dim=1).to(device) for i in ids]
    x = list(torch.empty(sets, case.num_tokens, case.k, dtype=torch.bfloat16, device=device).normal_())
    counts = torch.bincount(ids[0].reshape(-1), minlength=case.num_experts).tolist()
    return Inputs(x, [i.to(device) for i in ids], weights, [torch.empty_like(each) for each in x], counts)


def truth(layer: Layer, inputs: Inputs, tokens: list[int]) -> torch.Tensor:
    """fp32 outputs of these tokens of set 0, from the unquantized weights."""
    intermediate = layer.w2.shape[2]
    rows = []
    for m in tokens:
        x = inputs.x[0][m].float()
        row = torch.zeros_like(x)
        for e, weight in zip(inputs.ids[0][m].tolist(), inputs.weights[0][m].tolist(), strict=True):
            gate, up = (layer.w13[e].float() @ x).split(intermediate)
            row += weight * (layer.w2[e].float() @ (torch.nn.functional.silu(gate) * up))
        rows.append(row)
    return torch.stack(rows)


def check_layer(layer: Layer, inputs: Inputs, y: Callable[[], torch.Tensor]) -> Callable[[], str]:
    """A check of sampled tokens of set 0 against fp32."""

    def check() -> str:
        last = inputs.x[0].shape[0] - 1
        tokens = sorted({round(i * last / (CHECKED_TOKENS - 1)) for i in range(CHECKED_TOKENS)})
        snr = mx.signal_to_noise_db(truth(layer, inputs, tokens), y()[tokens])
        if not snr > MIN_SNR_DB:
            raise AssertionError(f"{snr:.1f} dB on {len(tokens)} tokens against fp32, expected more than {MIN_SNR_DB}")
        return f"{snr:.1f} dB on {len(tokens)} tokens against fp32"

    return check


def _ours(case: Case, layer: Layer, inputs: Inputs, backend: str) -> Contender:
    memory = quantized_bytes(case) / bf16_bytes(case)
    workspace = mx.MoEWorkspace(layer.w13q, layer.w2q, max_tokens=case.num_tokens, top_k=case.top_k, backend=backend)

    def call(i: int) -> object:
        return mx.moe_forward(
            inputs.x[i],
            layer.w13q,
            layer.w2q,
            inputs.ids[i],
            inputs.weights[i],
            workspace=workspace,
            backend=backend,
            out=inputs.out[i],
        )

    scales = "squares" if layer.w13q.squares else f"groups of {layer.w13q.scale_group}"
    return Contender(
        f"moe_forward ({backend})",
        call,
        work.moe(inputs.counts, case.num_tokens, case.k, case.n),
        ours=True,
        precision="mxfp8" if layer.w13q.scale_group == BLOCK_SIZE else "fp8",
        note=f"{scales}; experts in {memory:.3f} of bf16's memory",
        check=check_layer(layer, inputs, lambda: inputs.out[0]),
    )


def _transformers(case: Case, layer: Layer, inputs: Inputs) -> Contender:
    """transformers' function on an experts module with what its version asks for."""
    from transformers import Qwen3MoeConfig
    from transformers.integrations.moe import grouped_mm_experts_forward
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    num_experts, hidden, intermediate = layer.w2.shape
    config = Qwen3MoeConfig(hidden_size=hidden, moe_intermediate_size=intermediate, num_experts=num_experts)
    with torch.device("meta"):
        module = Qwen3MoeExperts(config)
    module.gate_up_proj = torch.nn.Parameter(layer.w13, requires_grad=False)
    module.down_proj = torch.nn.Parameter(layer.w2, requires_grad=False)

    def forward(i: int) -> torch.Tensor:
        y = grouped_mm_experts_forward(module, inputs.x[i], inputs.ids[i], inputs.weights[i])
        assert isinstance(y, torch.Tensor)
        return y

    return Contender(
        BASELINE,
        forward,
        work.moe_bf16(inputs.counts, case.num_tokens, case.k, case.n),
        note="allocates its intermediates and output",
        check=check_layer(layer, inputs, lambda: forward(0)),
    )


def prepare(
    case: Case,
    l2_bytes: int,
    store: Kept[Layer],
    sglang: ModuleType | str,
    device: str = "cuda",
) -> Prepared:
    """Inputs and contenders; the layer stays in ``store``, ``sglang`` is what ``load`` returned."""
    fp8 = not isinstance(sglang, str)
    shape = (case.num_experts, case.n, case.k)
    layer = store.get(shape, lambda: make_layer(*shape, fp8, device))
    sets = plan_sets(case, l2_bytes)
    inputs = make_inputs(case, sets, device)
    baseline = _transformers(case, layer, inputs)
    answers = mx.backends(torch.device(device))
    field: Field = [_ours(case, layer, inputs, name) for name in BACKENDS if answers[name][0]]
    field += sglang_moe(sglang, case, layer, inputs, functools.partial(check_layer, layer, inputs))
    absent = [Absent(f"moe_forward ({name})", answers[name][1]) for name in BACKENDS if not answers[name][0]]
    job = work.moe(inputs.counts, case.num_tokens, case.k, case.n)
    return Prepared(case, [*field, baseline, *absent], baseline.name, sets, job)
