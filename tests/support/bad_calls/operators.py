"""torch.ops.hybrid_mxfp8: plain tensors, past the types of the public functions."""

from __future__ import annotations

from typing import Any

import torch
from guards import Guards

import hybrid_mxfp8 as mx

from .moe import _good as _good_moe
from .row import FLOATS, Bad, E, K, N, Odd, Prepared, T, grouped, ints, layout, normal, of_tensor, refused, weights

OPS = torch.ops.hybrid_mxfp8


def _layout_parts() -> dict[str, Any]:
    return {name: part for name, part in vars(layout()).items() if isinstance(part, torch.Tensor)}


def _quantize() -> dict[str, Any]:
    rest = {"scale_rounding": "rceil", "row_index": None, "activation": None, "backend": None}
    return {"x": normal(T, K), **_layout_parts(), **rest}


def _gemm() -> dict[str, Any]:
    x, w = grouped(), weights()
    operands = {"x_values": x.values, "x_scales": x.scales, "w_values": w.values, "w_scales": w.scales}
    return {**operands, **_layout_parts(), "out_dtype": torch.bfloat16, "backend": None}


def _moe() -> dict[str, Any]:
    good = _good_moe()
    parts = {f"{w}_{part}": getattr(good[f"{w}q"], part) for w in ("w13", "w2") for part in ("values", "scales")}
    rest = {"topk_ids": good["topk_ids"], "topk_weights": good["topk_weights"], "w13_bias": None, "w2_bias": None}
    return {"x": good["x"], **parts, **rest, "activation": "swiglu", "backend": None}


quantize, gemm = refused(OPS.quantize_grouped, _quantize), refused(OPS.grouped_gemm, _gemm)
moe = refused(OPS.moe_forward, _moe)
offsets = refused(OPS.group_offsets, lambda: {"counts_or_ends": ints(2, 3), "num_tokens": 5, "from_ends": False})

LAYOUT: list[tuple[str, type[Exception], str, dict[str, Any]]] = [
    ("E offsets", ValueError, r"^expert_offsets: must have shape \(E\+1,\) = \(4,\), got \(3,\)$", {"expert_offsets": ints(0, 20, 20)}),
    ("counts that don't sum", ValueError, "^expert_offsets: must be 0 and the prefix sums", {"tokens_per_expert": ints(20, 1, 15)}),
]  # fmt: skip

U8 = torch.uint8
BAD: list[Bad] = [
    *(row(f"{word}: {what}", error, message, **changes) for word, row in (("quantize", quantize), ("gemm", gemm)) for what, error, message, changes in LAYOUT),
    *of_tensor(quantize, "operator", "x", lambda: normal(T, K), "(R, K)", FLOATS, (torch.int32,), "", None, more="grad")[1:],
    *of_tensor(quantize, "operator", "row_index", lambda: torch.zeros(T, dtype=torch.int32), "(T,)", "int32", (torch.int64,), place=None, more="")[1:],
    *(row(f"backend of {word}", ValueError, "^backend: must be one of", backend="cuda") for word, row in (("quantize", quantize), ("gemm", gemm), ("moe", moe))),
    *(gemm(f"x_values of {x.dtype}", TypeError, "^x_values: dtype must be uint8 or float8_e4m3fn, got", x_values=x) for x in (torch.zeros(T, K // 4, dtype=torch.int32), torch.zeros(T, K, dtype=torch.float8_e5m2))),
    gemm("values a scalar", ValueError, r"^x_values: must have shape \(T, K\)", x_values=torch.tensor(1, dtype=U8)),
    gemm("weights of float32 with as many bytes", TypeError, "^w_values: dtype must be", w_values=torch.zeros(E, N, K // 4)),
    gemm("weights a matrix", ValueError, r"^w_values: must have shape \(E, N, K\)", w_values=torch.zeros(N, K, dtype=U8)),
    moe("weights of float32 with as many bytes, of a layer", TypeError, "^w2_values: dtype must be", w2_values=torch.zeros(4, 64, 8)),
    *(offsets(f"T = {value}", ValueError, f"^num_tokens: must be at least 0, .*int32, got {value}$", num_tokens=value) for value in (-1, 2**40)),
    offsets("counts of float", TypeError, "^tokens_per_expert: dtype must be", counts_or_ends=torch.ones(2)),
    offsets("ends a matrix", ValueError, r"^offs: must have shape \(E,\)", counts_or_ends=torch.ones(2, 2, dtype=torch.int32), from_ends=True),
]  # fmt: skip


def _as_bytes(what: str, dtype: torch.dtype) -> Odd:
    def prepare(g: Guards) -> Prepared:
        arguments = {name: g.place(value) for name, value in _gemm().items()}
        for name in ("x_values", "w_values"):
            arguments[name] = arguments[name].view(dtype)

        def check(y: torch.Tensor) -> None:
            expected = mx.grouped_gemm(grouped(), weights(), backend="reference")
            owned = int(arguments["expert_offsets"][-1])
            assert mx.calc_diff(y[:owned].cpu(), expected[:owned]) < 1e-5

        return lambda: OPS.grouped_gemm(**arguments), check

    return Odd(what, prepare)


ODD: list[Odd] = [_as_bytes("operands as bytes", torch.uint8), _as_bytes("operands as e4m3", torch.float8_e4m3fn)]
