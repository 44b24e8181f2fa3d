"""compat.sglang: callers compute the metadata and give all buffers."""

from __future__ import annotations

import math
import unittest.mock
from typing import Any

import sglang_case
import torch
from guards import Guards

import hybrid_mxfp8 as mx
from hybrid_mxfp8.dispatch import registry

from .gemm import u8
from .row import E4M3, FLOATS, META, Bad, Odd, Prepared, ints, normal, of_tensor, overlapping, refused, shifted

COUNTS = [3, 0, 130]
T, E, N, K = 133, 3, 128, 128
STARTS, SCALE_STARTS, S = (0, 3, 3), (0, 128, 128), 384


def _tokens() -> dict[str, Any]:
    return {
        "input": normal(T, K),
        "tokens_per_expert": ints(*COUNTS),
        "expert_offsets": ints(*STARTS),
        "blockscale_offsets": ints(*SCALE_STARTS),
        "quant_output": e4m3(T, K),
        "scale_factor": u8(S, 4),
    }


def _product() -> dict[str, Any]:
    case = sglang_case.random_case(COUNTS, N, K, torch.bfloat16, seed=3)
    with mx.use_backend("reference"):
        case.quantize()
    return {
        "a": case.w_values,
        "b": case.x_values,
        "sfa": case.w_scales,
        "sfb": case.x_scales,
        "expert_offsets": case.starts,
        "blockscale_offsets": case.scale_starts,
        "tokens_per_expert": case.tokens,
        "workspace": u8(4096),
        "dtype": torch.bfloat16,
    }


def e4m3(*shape: int) -> torch.Tensor:
    return u8(*shape).view(E4M3)


tokens, product = refused(sglang_case.grouped_quant, _tokens), refused(sglang_case.moe_grouped_gemm, _product)

METADATA: list[tuple[str, type[Exception], str, dict[str, Any]]] = [
    ("an expert too few", ValueError, r"^expert_offsets: must have shape \(E,\) = \(2,\), got \(3,\)$", {"tokens_per_expert": ints(3, 130)}),
    ("E+1 offsets", ValueError, r"^expert_offsets: must have shape \(E,\) = \(3,\), got \(4,\)$", {"expert_offsets": ints(0, 3, 3, 133)}),
    ("E+1 scale offsets", ValueError, r"^blockscale_offsets: must have shape \(E,\)", {"blockscale_offsets": ints(0, 128, 128, 384)}),
    ("offsets that don't sum", ValueError, "^expert_offsets: must be the exclusive prefix sum of tokens_per_expert", {"expert_offsets": ints(0, 3, 4)}),
    ("negative counts", ValueError, "^expert_offsets: must be the exclusive prefix sum", {"tokens_per_expert": ints(-3, 0, 130)}),
    ("scale offsets off a tile", ValueError, "^blockscale_offsets: must be multiples of 128", {"blockscale_offsets": ints(0, 100, 128)}),
    ("scale offsets negative", ValueError, "^blockscale_offsets: must be multiples of 128", {"blockscale_offsets": ints(-128, 128, 128)}),
    ("scale offsets too far", ValueError, "^blockscale_offsets: must be multiples of 128 that leave each expert its rows", {"blockscale_offsets": ints(0, 128, 256)}),
    ("scale offsets of another expert", ValueError, "^blockscale_offsets: must be multiples of 128 that leave each expert its rows", {"blockscale_offsets": ints(128, 0, 0)}),
    ("scale offsets huge", ValueError, "^blockscale_offsets: must be", {"blockscale_offsets": ints(0, 128, 2**31 - 128)}),
]  # fmt: skip

BAD: list[Bad] = [
    *(row(f"{word}: {what}", error, message, **changes) for word, row in (("quantizer", tokens), ("product", product)) for what, error, message, changes in METADATA),
    *(bad for word, row in (("quantizer", tokens), ("product", product)) for name in ("tokens_per_expert", "expert_offsets", "blockscale_offsets")
      for bad in of_tensor(row, word, name, lambda: ints(*COUNTS), "(E,)", "int32", (torch.int64, torch.float32))),
    *of_tensor(tokens, "quantizer", "input", lambda: normal(T, K), "(T, K)", FLOATS, (torch.float64,), "must have unit stride", "^quant_output: must be on meta", more="grad"),
    *of_tensor(tokens, "quantizer", "quant_output", lambda: e4m3(T, K), "(T, K)", "float8_e4m3fn", (torch.uint8,), more=""),
    *of_tensor(tokens, "quantizer", "scale_factor", lambda: u8(S, 4), "(S, K/32)", "uint8", (torch.int8,), more=""),
    *of_tensor(product, "product", "a", lambda: e4m3(E, N, K), "(E, N, K)", "float8_e4m3fn", (torch.uint8,), place="^sfa: must be on meta", more=""),
    *of_tensor(product, "product", "b", lambda: e4m3(T, K), "(T, K)", "float8_e4m3fn", (torch.bfloat16,), more=""),
    *of_tensor(product, "product", "sfa", lambda: u8(E, N, 4), "(E, roundup(N, 128), K/32)", "uint8", (torch.float32,), more=""),
    *of_tensor(product, "product", "sfb", lambda: u8(S, 4), "(S, K/32)", "uint8", (torch.float32,), more=""),
    tokens("input of K = 100", ValueError, "^input: K must be a positive multiple of 32, got 100$", input=normal(T, 100)),
    tokens("output a row short", ValueError, r"^quant_output: must have shape \(T, K\)", quant_output=e4m3(T - 1, K)),
    tokens("scales of fewer columns", ValueError, "^scale_factor: must have 4 columns", scale_factor=u8(S, 3)),
    tokens("scales of fewer rows", ValueError, r"^scale_factor: must have at least roundup\(T, 128\) = 256 rows", scale_factor=u8(255, 4)),
    product("a of N = 20", ValueError, "^a: N must be a positive multiple of 8, got 20$", a=e4m3(E, 20, K)),
    product("a of more experts", ValueError, r"^sfa: must have shape .* = \(4, 128, 4\)", a=e4m3(E + 1, N, K)),
    product("b of another K", ValueError, r"^b: must have shape \(T, K\)", b=e4m3(T, 2 * K)),
    product("a and b swapped", ValueError, r"^a: must have shape \(E, N, K\)", a=e4m3(T, K), b=e4m3(E, N, K)),
    product("sfa linear", ValueError, r"^sfa: must have shape \(E, roundup\(N, 128\), K/32\)", sfa=u8(E, N - 1, 4)),
    product("sfb of fewer rows", ValueError, "^sfb: must have at least", sfb=u8(128, 4)),
    product("sfb of more columns", ValueError, "^sfb: must have 4 columns", sfb=u8(S, 8)),
    *(product(f"workspace {what}", error, f"^workspace: {message}", workspace=value) for what, error, message, value in (
        ("None", TypeError, r"must be a torch\.Tensor", None), ("of float", TypeError, "dtype must be uint8", torch.zeros(99)),
        ("with gaps", ValueError, "must be contiguous", u8(99)[::2]), ("on meta", ValueError, "must be on cpu", u8(99).to(META)))),
    *(product(f"dtype {d}", TypeError, "^dtype: must be bfloat16 or float16 or float32", dtype=d) for d in (torch.float64, torch.uint8, None, "bf16")),
]  # fmt: skip


def _needing(**arguments: Any) -> object:
    """The product on a backend that takes the first 8 bytes of its workspace."""
    needy = registry.backend_of("reference")._replace(workspace_size=lambda problem: 8)
    with unittest.mock.patch.dict(registry._backends, reference=needy), mx.use_backend("reference"):
        return sglang_case.moe_grouped_gemm(**arguments)


BAD += [
    *(overlapping(sglang_case.grouped_quant, _tokens, f"{written} in {read}", f"^{written}: must not overlap {read}, got", read, written, by)
      for written, read, by in (("quant_output", "input", 0), ("quant_output", "scale_factor", 0), ("scale_factor", "blockscale_offsets", 12 - S * 4))),
    *(overlapping(_needing, _product, f"workspace in {read}", f"^workspace: must not overlap {read}, got", read, "workspace", 0)
      for read in ("a", "sfa", "b", "sfb", "tokens_per_expert", "blockscale_offsets")),
    shifted(sglang_case.grouped_quant, _tokens, "scales off a 16-byte boundary", "^scale_factor: must start at a 16-byte boundary", "scale_factor", 8),
    shifted(sglang_case.moe_grouped_gemm, _product, "a product's scales off a 16-byte boundary", "^sfb: must start at a 16-byte boundary", "sfb", 8),
]  # fmt: skip


# ---------------------------------------------------------------- odd ones


def _right(what: str, *, rows: int = S, scale_starts: tuple[int, ...] = SCALE_STARTS, shift: int = 0, workspace: tuple[int, ...] = ()) -> Odd:  # fmt: skip
    """Against the public functions; the workspace is as small as its leading dimensions allow."""

    def prepare(g: Guards) -> Prepared:
        x, w = normal(T, K), mx.quantize_weights(normal(E, N, K, seed=4), backend="reference")
        given = g(x, shift)
        metadata = [g(ints(*values)) for values in (COUNTS, STARTS, scale_starts)]
        values, scales = g.out(torch.full((T, K), 0x7F, dtype=torch.uint8).view(E4M3)), g.out(u8(rows, 4))
        a, sfa = g(w.values), g(w.scales)
        needed = mx.grouped_gemm_workspace_size(mx.ExpertWeights(a, sfa), T, out_dtype=torch.float32)
        # A caller's may start anywhere; what the backend needs starts at a 256-byte boundary.
        last = -(-(needed + 255) // math.prod(workspace)) if needed else 0
        space = g.out(u8(*workspace, last))

        def call() -> torch.Tensor:
            sglang_case.grouped_quant(given, *metadata, values, scales)
            counts, starts, places = metadata
            metadata_of_product = starts, places, counts
            return sglang_case.moe_grouped_gemm(a, values, sfa, scales, *metadata_of_product, space, torch.float32)

        def check(d: torch.Tensor) -> None:
            xq = mx.quantize_grouped(x, mx.GroupLayout.from_counts(ints(*COUNTS), T), backend="reference")
            expected = mx.grouped_gemm(xq, w, out_dtype=torch.float32, backend="reference")
            assert torch.equal(values.view(torch.uint8).cpu(), xq.values.view(torch.uint8))
            assert mx.calc_diff(d.cpu(), expected) < 1e-9

        return call, check

    return Odd(what, prepare)


ODD: list[Odd] = [
    _right("as SGLang calls it"),
    _right("scales in another order, with gaps", rows=1024, scale_starts=(896, 384, 128)),
    _right("scale rows that are no whole tile", rows=S + 77),
    _right("input 2 bytes off", shift=2),
    _right("a workspace of three dimensions", workspace=(3, 5)),
]
