"""Experts spread over ranks: each rank has tokens of its own, and some of the experts.

    torchrun --standalone --nproc-per-node=2 examples/expert_parallel.py

On GPUs through NCCL, on a CPU through gloo. docs/expert-parallel.md has other ways to split a
layer.
"""

import os

import torch
import torch.distributed as dist

import hybrid_mxfp8 as mx

E, H, INTER, TOP_K, M = 8, 256, 128, 2, 16  # M tokens on each rank


def gather(mine: torch.Tensor) -> torch.Tensor:
    """Every rank's rows: (M, ...) to (ranks * M, ...)."""
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    return torch.cat(everyone)


def main() -> None:
    """One layer, compared with the same layer on one rank."""
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    torch.manual_seed(0)  # the same weights everywhere
    w13 = torch.randn(E, 2 * INTER, H, dtype=torch.bfloat16) / H**0.5
    w2 = torch.randn(E, H, INTER, dtype=torch.bfloat16) / INTER**0.5
    first, end = rank * E // ranks, (rank + 1) * E // ranks
    experts = mx.MXFP8Experts.from_weights(w13[first:end].to(device), w2[first:end].to(device))

    torch.manual_seed(1 + rank)  # tokens of its own
    x = torch.randn(M, H, dtype=torch.bfloat16).to(device)
    weights, ids = torch.rand(M, E).softmax(-1).topk(TOP_K)
    weights, ids = weights.to(device), ids.to(device)

    # Ids are counted from this rank's first expert; those of other ranks fall outside and are
    # skipped.
    parts = experts(gather(x), gather(ids) - first, gather(weights))  # (ranks * M, H)
    dist.all_reduce(parts)
    y = parts[rank * M : (rank + 1) * M]

    whole = mx.MXFP8Experts.from_weights(w13.to(device), w2.to(device))
    print(f"rank {rank}: calc_diff {mx.calc_diff(y, whole(x, ids, weights)):.1e}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
