"""torch.ops.hybrid_mxfp8: plain tensors, past the types of the public functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from guards import Guards

import hybrid_mxfp8 as mx

from .moe import _good as _good_moe
from .row import COUNTS, E4M3, Bad, E, K, N, Odd, T, grouped, ints, layout, normal, refused, weights

OPS = torch.ops.hybrid_mxfp8


def _by_name(operator: Any, names: tuple[str, ...]) -> Callable[..., object]:
    return lambda **arguments: operator(*(arguments[name] for name in names))


def _quantize() -> dict[str, Any]:
    groups = layout()
    return {
        "x": normal(T, K),
        "tokens_per_expert": groups.tokens_per_expert,
        "expert_offsets": groups.expert_offsets,
        "scale_offsets": groups.scale_offsets,
        "scale_rounding": "rceil",
        "row_index": None,
        "activation": None,
        "backend": None,
    }


def _gemm() -> dict[str, Any]:
    x, w = grouped(), weights()
    return {
        "x_values": x.values,
        "x_scales": x.scales,
        "tokens_per_expert": x.groups.tokens_per_expert,
        "expert_offsets": x.groups.expert_offsets,
        "scale_offsets": x.groups.scale_offsets,
        "w_values": w.values,
        "w_scales": w.scales,
        "out_dtype": torch.bfloat16,
        "backend": None,
    }


def _moe() -> dict[str, Any]:
    good = _good_moe()
    w13, w2 = good.pop("w13q"), good.pop("w2q")
    return {
        "x": good["x"],
        "w13_values": w13.values,
        "w13_scales": w13.scales,
        "w2_values": w2.values,
        "w2_scales": w2.scales,
        "topk_ids": good["topk_ids"],
        "topk_weights": good["topk_weights"],
        "w13_bias": None,
        "w2_bias": None,
        "activation": "swiglu",
        "backend": None,
    }


quantize = refused(_by_name(OPS.quantize_grouped, tuple(_quantize())), _quantize)
gemm = refused(_by_name(OPS.grouped_gemm, tuple(_gemm())), _gemm)
moe = refused(_by_name(OPS.moe_forward, tuple(_moe())), _moe)
offsets = refused(
    _by_name(OPS.group_offsets, ("counts", "num_tokens", "from_ends")),
    lambda: {"counts": ints(2, 3), "num_tokens": 5, "from_ends": False},
)

LAYOUT: list[tuple[str, type[Exception], str, dict[str, Any]]] = [
    ("E offsets", ValueError, r"^expert_offsets: must have shape \(E\+1,\) = \(4,\), got \(3,\)$", {"expert_offsets": ints(0, 20, 20)}),
    ("no offsets", ValueError, r"^expert_offsets: must have shape", {"expert_offsets": ints()}),
    ("offsets of int64", TypeError, "^expert_offsets: dtype must be int32", {"expert_offsets": ints(0, 20, 20, 35, dtype=torch.int64)}),
    ("E scale offsets", ValueError, r"^scale_offsets: must have shape", {"scale_offsets": ints(0, 128, 128)}),
    ("counts that don't sum", ValueError, "^expert_offsets: must be 0 and the prefix sums", {"tokens_per_expert": ints(20, 1, 15)}),
    ("counts negative", ValueError, "^tokens_per_expert: must be at least 0", {"tokens_per_expert": ints(20, -5, 15)}),
    ("counts beyond T", ValueError, "^tokens_per_expert: must have a sum of at most num_tokens = 40", {"tokens_per_expert": ints(20, 0, 25)}),
    ("counts of fewer experts", ValueError, "^expert_offsets: must have shape", {"tokens_per_expert": ints(20, 15)}),
]  # fmt: skip

BAD: list[Bad] = [
    *(row(f"{word}: {what}", error, message, **changes) for word, row in (("quantize", quantize), ("gemm", gemm)) for what, error, message, changes in LAYOUT),
    quantize("quantize: x flat", ValueError, r"^x: must have shape \(R, K\)", x=normal(T * K)),
    quantize("quantize: x a scalar", ValueError, r"^x: must have shape \(R, K\)", x=torch.tensor(1.0)),
    quantize("quantize: x of int32", TypeError, "^x: dtype must be", x=torch.ones(T, K, dtype=torch.int32)),
    quantize("quantize: x with grad", ValueError, "^x: must not require grad", x=lambda: normal(T, K).requires_grad_()),
    quantize("quantize: x of K = 40", ValueError, "^x: K must be", x=normal(T, 40)),
    quantize("quantize: rounding", ValueError, "^scale_rounding: must be one of", scale_rounding="up"),
    quantize("quantize: activation", ValueError, "^activation: must be", activation="gelu"),
    quantize("quantize: index a scalar", ValueError, r"^row_index: must have shape \(T,\)", row_index=torch.tensor(1, dtype=torch.int32)),
    quantize("quantize: index of int64", TypeError, "^row_index: dtype must be int32", row_index=torch.zeros(T, dtype=torch.int64)),
    quantize("quantize: backend", ValueError, "^backend: must be one of", backend="cuda"),
    gemm("gemm: values of int32 with as many bytes", TypeError, "^x_values: dtype must be uint8 or float8_e4m3fn, got int32$", x_values=torch.zeros(T, K // 4, dtype=torch.int32)),
    gemm("gemm: values of e5m2", TypeError, "^x_values: dtype must be", x_values=torch.zeros(T, K, dtype=torch.float8_e5m2)),
    gemm("gemm: values a scalar", ValueError, r"^x_values: must have shape \(T, K\)", x_values=torch.tensor(1, dtype=torch.uint8)),
    gemm("gemm: weights of float32 with as many bytes", TypeError, "^w_values: dtype must be", w_values=torch.zeros(E, N, K // 4)),
    gemm("gemm: weights a matrix", ValueError, r"^w_values: must have shape \(E, N, K\)", w_values=torch.zeros(N, K, dtype=torch.uint8)),
    gemm("gemm: weights transposed", ValueError, "^values: must be contiguous", w_values=torch.zeros(E, K, N, dtype=torch.uint8).mT),
    gemm("gemm: scales of another shape", ValueError, "^scales: must have shape", x_scales=torch.zeros(128, 4, dtype=torch.uint8)),
    gemm("gemm: linear weight scales", ValueError, "^scales: must have shape", w_scales=torch.zeros(E, N, 3, dtype=torch.uint8)),
    gemm("gemm: out dtype", TypeError, "^out_dtype: must be", out_dtype=torch.float64),
    gemm("gemm: backend", ValueError, "^backend: must be one of", backend="cublas"),
    moe("moe: weights of float32 with as many bytes", TypeError, "^w2_values: dtype must be", w2_values=torch.zeros(4, 64, 8)),
    moe("moe: weights of another H", ValueError, r"^scales: must have shape", w13_values=torch.zeros(4, 64, 256, dtype=torch.uint8)),
    moe("moe: ids of int16", TypeError, "^topk_ids: dtype must be", topk_ids=torch.zeros(7, 2, dtype=torch.int16)),
    moe("moe: activation", ValueError, "^activation: must be", activation="relu"),
    moe("moe: backend", ValueError, "^backend: must be one of", backend="vllm"),
    offsets("offsets: T negative", ValueError, "^num_tokens: must be at least 0", num_tokens=-1),
    offsets("offsets: T beyond int32", ValueError, "^num_tokens: .*int32", num_tokens=2**40),
    offsets("offsets: counts of float", TypeError, "^tokens_per_expert: dtype must be", counts=torch.ones(2)),
    offsets("offsets: ends a matrix", ValueError, r"^offs: must have shape \(E,\)", counts=torch.ones(2, 2, dtype=torch.int32), from_ends=True),
]  # fmt: skip


def _as_bytes(what: str, dtype: torch.dtype) -> Odd:
    def prepare(g: Guards) -> tuple[Callable[[], object], Callable[[Any], None]]:
        arguments = {name: g.place(value) for name, value in _gemm().items()}
        for name in ("x_values", "w_values"):
            arguments[name] = arguments[name].view(dtype)

        def check(y: torch.Tensor) -> None:
            expected = mx.grouped_gemm(grouped(), weights(), backend="reference")
            rows = sum(COUNTS)
            assert mx.calc_diff(y[:rows].cpu(), expected[:rows]) < 1e-5

        return lambda: OPS.grouped_gemm(*arguments.values()), check

    return Odd(what, prepare)


ODD: list[Odd] = [_as_bytes("operands as bytes", torch.uint8), _as_bytes("operands as e4m3", E4M3)]
