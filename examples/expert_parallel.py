"""Experts spread over ranks: each rank has tokens of its own, and some of the experts.

    torchrun --standalone --nproc-per-node=2 examples/expert_parallel.py

On GPUs through NCCL, on a CPU through gloo. docs/expert-parallel.md says more.
"""

import os

import torch
import torch.distributed as dist

import hybrid_mxfp8 as mx
from hybrid_mxfp8.distributed import ExpertParallelExperts

E, H, INTER, TOP_K, M = 8, 256, 128, 2, 16  # M tokens on each rank


def main() -> None:
    """One layer, compared with the same layer on one rank."""
    rank = int(os.environ["RANK"])
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    torch.manual_seed(0)  # the same weights everywhere
    w13 = torch.randn(E, 2 * INTER, H, dtype=torch.bfloat16) / H**0.5
    w2 = torch.randn(E, H, INTER, dtype=torch.bfloat16) / INTER**0.5
    experts = ExpertParallelExperts.from_weights(w13, w2, device=device, max_tokens=M)

    torch.manual_seed(1 + rank)  # tokens of its own
    x = torch.randn(M, H, dtype=torch.bfloat16).to(device)
    weights, ids = torch.rand(M, E).softmax(-1).topk(TOP_K)
    weights, ids = weights.to(device), ids.to(device)
    y = experts(x, ids, weights)  # tokens travel in MXFP8, results in bf16

    whole = mx.MXFP8Experts.from_weights(w13.to(device), w2.to(device))
    print(f"rank {rank}: calc_diff {mx.calc_diff(y, whole(x, ids, weights)):.1e}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
