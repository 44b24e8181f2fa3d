"""A decode step of an MoE layer in a CUDA graph, by PyTorch's recipe: warm up, capture, replay.

    python examples/cuda_graph.py

Needs a GPU. One workspace serves the warm-up on a side stream, the capture and the replays.
"""

import torch

import hybrid_mxfp8 as mx

M, H, INTER, E, TOP_K = 4, 256, 128, 8, 2


def main() -> None:
    """Capture one step, and replay it with other tokens and other experts."""
    torch.manual_seed(0)
    w13q = mx.quantize_weights(torch.randn(E, 2 * INTER, H, device="cuda", dtype=torch.bfloat16) / H**0.5)
    w2q = mx.quantize_weights(torch.randn(E, H, INTER, device="cuda", dtype=torch.bfloat16) / INTER**0.5)
    x = torch.randn(M, H, device="cuda", dtype=torch.bfloat16)  # the graph's inputs: their memory is fixed
    weights, ids = torch.rand(M, E, device="cuda").softmax(-1).topk(TOP_K)
    out = torch.empty_like(x)
    workspace = mx.MoEWorkspace(w13q, w2q, max_tokens=M, top_k=TOP_K)

    def step() -> None:
        mx.moe_forward(x, w13q, w2q, ids, weights, workspace=workspace, out=out)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()  # compiles what is not compiled yet
    torch.cuda.current_stream().wait_stream(side)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    for seed in range(3):
        torch.manual_seed(seed)
        x.normal_()
        new_weights, new_ids = torch.rand(M, E, device="cuda").softmax(-1).topk(TOP_K)
        weights.copy_(new_weights)
        ids.copy_(new_ids)  # no expert's number of tokens is known to the host
        graph.replay()
        print(f"step {seed}: as eager {torch.equal(out, mx.moe_forward(x, w13q, w2q, ids, weights))}")


if __name__ == "__main__":
    if torch.cuda.is_available():
        main()
    else:
        print("needs a GPU: nothing was run")
