"""compat.sglang: callers compute the metadata and give all buffers."""

from __future__ import annotations

import math
import unittest.mock
from collections.abc import Callable
from typing import Any

import sglang_case
import torch
from guards import Guards

import hybrid_mxfp8 as mx
from hybrid_mxfp8.dispatch import registry

from .row import E4M3, META, Bad, Odd, ints, normal, overlapping, refused, shapes, shifted

COUNTS = [3, 0, 130]
T, E, N, K = 133, 3, 128, 128
STARTS, SCALE_STARTS, S = (0, 3, 3), (0, 128, 128), 384


def _case() -> sglang_case.Case:
    case = sglang_case.random_case(COUNTS, N, K, torch.bfloat16, seed=3)
    with mx.use_backend("reference"):
        case.quantize()
    return case


def _tokens() -> dict[str, Any]:
    return {
        "input": normal(T, K),
        "tokens_per_expert": ints(*COUNTS),
        "expert_offsets": ints(*STARTS),
        "blockscale_offsets": ints(*SCALE_STARTS),
        "quant_output": torch.zeros(T, K, dtype=torch.uint8).view(E4M3),
        "scale_factor": torch.zeros(S, 4, dtype=torch.uint8),
    }


def _product() -> dict[str, Any]:
    case = _case()
    return {
        "a": case.w_values,
        "b": case.x_values,
        "sfa": case.w_scales,
        "sfb": case.x_scales,
        "expert_offsets": case.starts,
        "blockscale_offsets": case.scale_starts,
        "tokens_per_expert": case.tokens,
        "workspace": torch.zeros(4096, dtype=torch.uint8),
        "dtype": torch.bfloat16,
    }


def u8(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.uint8)


def e4m3(*shape: int) -> torch.Tensor:
    return u8(*shape).view(E4M3)


tokens, product = refused(sglang_case.grouped_quant, _tokens), refused(sglang_case.moe_grouped_gemm, _product)

METADATA: list[tuple[str, type[Exception], str, dict[str, Any]]] = [
    entry
    for name in ("tokens_per_expert", "expert_offsets", "blockscale_offsets")
    for entry in (
        (f"{name} a list", TypeError, rf"^{name}: must be a torch\.Tensor", {name: COUNTS}),
        (f"{name} of int64", TypeError, f"^{name}: dtype must be int32, got int64$", {name: ints(*COUNTS, dtype=torch.int64)}),
        (f"{name} of float", TypeError, f"^{name}: dtype must be int32, got float32$", {name: torch.zeros(E)}),
        (f"{name} a matrix", ValueError, rf"^{name}: must have shape \(E,\)", {name: ints(*COUNTS).view(E, 1)}),
        (f"{name} with gaps", ValueError, f"^{name}: must be contiguous", {name: torch.zeros(2 * E, dtype=torch.int32)[::2]}),
        (f"{name} on meta", ValueError, f"^{name}: must be on cpu", {name: ints(*COUNTS).to(META)}),
    )
]  # fmt: skip
METADATA += [
    ("an expert too few", ValueError, r"^expert_offsets: must have shape \(E,\) = \(2,\), got \(3,\)$", {"tokens_per_expert": ints(3, 130)}),
    ("E+1 offsets", ValueError, r"^expert_offsets: must have shape \(E,\) = \(3,\), got \(4,\)$", {"expert_offsets": ints(0, 3, 3, 133)}),
    ("E+1 scale offsets", ValueError, r"^blockscale_offsets: must have shape \(E,\)", {"blockscale_offsets": ints(0, 128, 128, 384)}),
    ("offsets that don't sum", ValueError, "^expert_offsets: must be the exclusive prefix sum of tokens_per_expert", {"expert_offsets": ints(0, 3, 4)}),
    ("offsets that fall", ValueError, "^expert_offsets: must be the exclusive prefix sum", {"expert_offsets": ints(0, 3, 0)}),
    ("inclusive ends", ValueError, "^expert_offsets: must be the exclusive prefix sum", {"expert_offsets": ints(3, 3, 133)}),
    ("negative counts", ValueError, "^expert_offsets: must be the exclusive prefix sum", {"tokens_per_expert": ints(-3, 0, 130)}),
    ("counts beyond T", ValueError, "^expert_offsets: must be the exclusive prefix sum", {"tokens_per_expert": ints(300, 0, 130)}),
    ("scale offsets off a tile", ValueError, "^blockscale_offsets: must be multiples of 128", {"blockscale_offsets": ints(0, 100, 128)}),
    ("scale offsets negative", ValueError, "^blockscale_offsets: must be multiples of 128", {"blockscale_offsets": ints(-128, 128, 128)}),
    ("scale offsets too far", ValueError, "^blockscale_offsets: must be multiples of 128 that leave each expert its rows", {"blockscale_offsets": ints(0, 128, 256)}),
    ("scale offsets huge", ValueError, "^blockscale_offsets: must be", {"blockscale_offsets": ints(0, 128, 2**31 - 128)}),
]  # fmt: skip

BAD: list[Bad] = [
    *(row(f"{word}: {what}", error, message, **changes) for word, row in (("quantizer", tokens), ("product", product)) for what, error, message, changes in METADATA),
    tokens("input None", TypeError, r"^input: must be a torch\.Tensor", input=None),
    tokens("input of float64", TypeError, "^input: dtype must be", input=torch.zeros(T, K, dtype=torch.float64)),
    tokens("input flat", ValueError, r"^input: must have shape \(T, K\)", input=normal(T * K)),
    tokens("input of K = 100", ValueError, "^input: K must be", input=normal(T, 100)),
    tokens("input transposed", ValueError, "^input: must have unit stride", input=normal(K, T).T),
    tokens("input with grad", ValueError, "^input: must not require grad", input=lambda: normal(T, K).requires_grad_()),
    tokens("input on meta", ValueError, "^quant_output: must be on meta", input=normal(T, K).to(META)),
    tokens("output None", TypeError, r"^quant_output: must be a torch\.Tensor", quant_output=None),
    tokens("output of bytes", TypeError, "^quant_output: dtype must be float8_e4m3fn, got uint8$", quant_output=u8(T, K)),
    tokens("output a row short", ValueError, r"^quant_output: must have shape \(T, K\)", quant_output=e4m3(T - 1, K)),
    tokens("output in wider rows", ValueError, "^quant_output: must be contiguous", quant_output=e4m3(T, 2 * K)[:, :K]),
    tokens("scales of e8m0", TypeError, "^scale_factor: dtype must be uint8", scale_factor=u8(S, 4).view(torch.float8_e8m0fnu)),
    tokens("scales of fewer columns", ValueError, "^scale_factor: must have 4 columns", scale_factor=u8(S, 3)),
    tokens("scales of fewer rows", ValueError, r"^scale_factor: must have at least roundup\(T, 128\) = 256 rows", scale_factor=u8(255, 4)),
    tokens("scales with gaps", ValueError, "^scale_factor: must be contiguous", scale_factor=u8(S, 8)[:, :4]),
    product("a None", TypeError, r"^a: must be a torch\.Tensor", a=None),
    product("a of bytes", TypeError, "^a: dtype must be float8_e4m3fn", a=u8(E, N, K)),
    product("a one matrix", ValueError, r"^a: must have shape \(E, N, K\)", a=e4m3(N, K)),
    product("a of N = 20", ValueError, "^a: N must be a positive multiple of 8, got 20$", a=e4m3(E, 20, K)),
    product("a transposed", ValueError, "^a: must be contiguous", a=e4m3(E, K, N).mT),
    product("a of more experts", ValueError, "^sfa: must have shape", a=e4m3(E + 1, N, K)),
    product("b of another K", ValueError, r"^b: must have shape \(T, K\)", b=e4m3(T, 2 * K)),
    product("b of bf16", TypeError, "^b: dtype must be float8_e4m3fn", b=normal(T, K)),
    product("b on meta", ValueError, "^b: must be on cpu", b=e4m3(T, K).to(META)),
    product("a and b swapped", ValueError, r"^a: must have shape \(E, N, K\)", a=e4m3(T, K), b=e4m3(E, N, K)),
    product("sfa linear", ValueError, "^sfa: must have shape", sfa=u8(E, N - 1, 4)),
    product("sfa of float", TypeError, "^sfa: dtype must be uint8", sfa=torch.zeros(E, N, 4)),
    product("sfb of fewer rows", ValueError, "^sfb: must have at least", sfb=u8(128, 4)),
    product("sfb of more columns", ValueError, "^sfb: must have 4 columns", sfb=u8(S, 8)),
    product("workspace None", TypeError, r"^workspace: must be a torch\.Tensor", workspace=None),
    product("workspace of float", TypeError, "^workspace: dtype must be uint8", workspace=torch.zeros(99)),
    product("workspace with gaps", ValueError, "^workspace: must be contiguous", workspace=u8(99)[::2]),
    product("workspace on meta", ValueError, "^workspace: must be on cpu", workspace=u8(99).to(META)),
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
    """Both functions, against the public ones; the workspace is as small as its leading dimensions allow."""

    def prepare(g: Guards) -> tuple[Callable[[], object], Callable[[Any], None]]:
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
            result: torch.Tensor = sglang_case.moe_grouped_gemm(
                a, values, sfa, scales, starts, places, counts, space, torch.float32
            )
            return result

        def check(d: torch.Tensor) -> None:
            xq = mx.quantize_grouped(x, mx.GroupLayout.from_counts(ints(*COUNTS), T), backend="reference")
            expected = mx.grouped_gemm(xq, w, out_dtype=torch.float32, backend="reference")
            assert torch.equal(values.view(torch.uint8).cpu(), xq.values.view(torch.uint8))
            assert mx.calc_diff(d.cpu(), expected) < 1e-9

        return call, check

    return Odd(what, prepare)


def _on_meta(device: Any) -> torch.Tensor:
    given = {name: value.to(META) for name, value in _tokens().items()}
    sglang_case.grouped_quant(**given)
    product = {"a": e4m3(E, N, K), "sfa": u8(E, N, 4), "workspace": u8(9)}
    product |= {"b": given["quant_output"], "sfb": given["scale_factor"]}
    metadata = {name: given[name] for name in ("tokens_per_expert", "expert_offsets", "blockscale_offsets")}
    result: torch.Tensor = sglang_case.moe_grouped_gemm(
        **{name: value.to(META) for name, value in {**product, **metadata}.items()}, dtype=torch.float16
    )
    return result


def _is_product(d: torch.Tensor) -> None:
    assert (d.shape, d.dtype) == ((T, N), torch.float16)


ODD: list[Odd] = [
    _right("as SGLang calls it"),
    _right("scales in another order, with gaps", rows=1024, scale_starts=(896, 384, 128)),
    _right("scale rows that are no whole tile", rows=S + 77),
    _right("input 2 bytes off", shift=2),
    _right("a workspace of three dimensions", workspace=(3, 5)),
    shapes("tensors", _on_meta, _is_product)[0],
]
