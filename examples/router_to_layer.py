"""From a router's output to an MoE layer's: the router in bf16, the experts in MXFP8.

    python examples/router_to_layer.py

Prints how far the layer is from the one with unquantized weights.
"""

import torch

import hybrid_mxfp8 as mx

M, H, INTER, E, TOP_K = 32, 256, 128, 8, 2
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)

router = torch.nn.Linear(H, E, bias=False, device=device, dtype=torch.bfloat16)
w13 = torch.randn(E, 2 * INTER, H, device=device, dtype=torch.bfloat16) / H**0.5  # gate rows, then up
w2 = torch.randn(E, H, INTER, device=device, dtype=torch.bfloat16) / INTER**0.5
experts = mx.MXFP8Experts.from_weights(w13, w2)  # quantizes once


@torch.no_grad()
def moe_layer(x: torch.Tensor) -> torch.Tensor:
    """(M, H) to (M, H), as in Mixtral and Qwen3-MoE: softmax, top-k, weights that add up to one."""
    weights, ids = router(x).float().softmax(-1).topk(TOP_K)
    return experts(x, ids, weights / weights.sum(-1, keepdim=True))


@torch.no_grad()
def unquantized(x: torch.Tensor) -> torch.Tensor:
    """The same layer in fp32, expert by expert."""
    weights, ids = router(x).float().softmax(-1).topk(TOP_K)
    weights = weights / weights.sum(-1, keepdim=True)
    y = torch.zeros(M, H, device=device)
    for e in range(E):
        token, choice = (ids == e).nonzero(as_tuple=True)
        gate, up = (x[token].float() @ w13[e].float().T).chunk(2, dim=-1)
        y[token] += weights[token, choice, None] * (torch.nn.functional.silu(gate) * up @ w2[e].float().T)
    return y


x = torch.randn(M, H, device=device, dtype=torch.bfloat16)
y = moe_layer(x)
print(f"{tuple(y.shape)} {y.dtype}: {mx.signal_to_noise_db(unquantized(x), y):.1f} dB, experts {experts}")
