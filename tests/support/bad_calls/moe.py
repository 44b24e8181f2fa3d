"""moe_forward, MXFP8Experts and MoEWorkspace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import moe_truth
import torch
from guards import Guards

import hybrid_mxfp8 as mx

from .row import FLOATS, NOT_FLOATS, Bad, Odd, Prepared, grad, meta, normal, of_tensor, overlapping, refused

M, E, H, I, TOP_K = 7, 4, 64, 32, 2  # noqa: E741  # as in all documentation


def w13(e: int = E, n: int = 2 * I, k: int = H) -> mx.ExpertWeights:
    return mx.quantize_weights(normal(e, n, k, seed=5) * 0.1, backend="reference")


def w2(e: int = E, n: int = H, k: int = I) -> mx.ExpertWeights:
    return mx.quantize_weights(normal(e, n, k, seed=6) * 0.1, backend="reference")


def ids(m: int = M, top_k: int = TOP_K, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return (torch.arange(m * top_k).reshape(m, top_k) % E).to(dtype)


def _good() -> dict[str, Any]:
    return {
        "x": normal(M, H),
        "w13q": w13(),
        "w2q": w2(),
        "topk_ids": ids(),
        "topk_weights": torch.rand(M, TOP_K, generator=torch.Generator().manual_seed(3)),
    }


def _workspace(**changes: Any) -> Callable[[], mx.MoEWorkspace]:
    return lambda: mx.MoEWorkspace(w13(), w2(), **{"max_tokens": M, "top_k": TOP_K, **changes})


forward = refused(mx.moe_forward, lambda: {**_good(), "scale_group": 32})
into = refused(mx.moe_forward, lambda: _all())
tokens = refused(mx.quantize_tokens, lambda: {"x": normal(M, H)})
module = refused(mx.MXFP8Experts, lambda: {"w13q": w13(), "w2q": w2()})
made = refused(mx.MXFP8Experts.from_weights, lambda: {"w13": normal(E, 2 * I, H), "w2": normal(E, H, I)})
space = refused(mx.MoEWorkspace, lambda: {"w13q": w13(), "w2q": w2(), "max_tokens": M, "top_k": TOP_K})

WEIGHTS: list[tuple[str, type[Exception], str, dict[str, Any]]] = [
    ("w13 a tensor", TypeError, "^w13q: must be an ExpertWeights .* got Tensor$", {"w13q": normal(E, 2 * I, H)}),
    ("w13 and w2 swapped", ValueError, r"^w13q: must be \(E, 2I, H\) = ", {"w13q": w2, "w2q": w13}),
    ("w13 of fewer experts", ValueError, r"^w13q: must be \(E, 2I, H\) = \(4, 64, 64\)", {"w13q": lambda: w13(e=3)}),
    ("no experts", ValueError, "^w13q: must have at least 1 expert, got 0$", {"w13q": lambda: w13(e=0), "w2q": lambda: w2(e=0)}),
    *((f"(E, K, N) of {which}", ValueError, rf"^{name}: must be .*\(transposed\?\), got \({shape}\)$", {"w13q": lambda a=a: w13(E, *a), "w2q": lambda b=b: w2(E, *b)}) for which, name, shape, a, b in (
        ("w13", "w13q", "4, 96, 128", (96, 128), (96, 64)), ("w2", "w2q", "4, 64, 96", (128, 96), (64, 96)), ("both", "w13q", "4, 96, 128", (96, 128), (64, 96)))),
    ("w2 on meta", ValueError, "^w2q: must be on cpu, as (x|w13q), got meta$", {"w2q": lambda: meta(w2())}),
]  # fmt: skip

BAD: list[Bad] = [
    *(row(f"{word}: {what}", error, message, **changes) for word, row in (("forward", forward), ("module", module), ("workspace", space)) for what, error, message, changes in WEIGHTS),
    forward("forward: both weights on meta", ValueError, "^w13q: must be on cpu, as x, got meta$", w13q=lambda: meta(w13()), w2q=lambda: meta(w2())),
    *of_tensor(forward, "forward", "x", lambda: normal(M, H), "(M, H)", FLOATS, NOT_FLOATS, "must have unit stride along its columns", "^x: must be on cpu, as w13q, got meta$", more="grad"),
    *of_tensor(forward, "forward", "topk_ids", ids, "(M, top_k)", "int32 or int64", (torch.int16, torch.uint8, torch.float32, torch.bool), "", more=""),
    *of_tensor(forward, "forward", "topk_weights", lambda: torch.ones(M, TOP_K), "(M, top_k)", FLOATS, (torch.float64, torch.int32), "", more="grad"),
    *of_tensor(into, "forward", "out", lambda: normal(M, H), "(M, H)", "bfloat16", (torch.float32,), "must have unit stride along its columns", more="grad"),
    *(forward(f"x of shape {s}", ValueError, r"^x: must have shape \(M, H\)", x=torch.zeros(s)) for s in ((M + 1, H), (M - 1, H), (M, H + 32), (M, 0))),
    forward("MXFP8 tokens of another H", ValueError, r"^x: must have shape \(M, H\) .* = \(7, 64\), got \(7, 32\)$", x=lambda: mx.quantize_tokens(normal(M, 32))),
    forward("out of another dtype than MXFP8 tokens", TypeError, "^out: dtype must be float16", x=lambda: mx.quantize_tokens(normal(M, H, dtype=torch.float16)), out=normal(M, H)),
    forward("workspace of another dtype than MXFP8 tokens", ValueError, "^workspace: must be made for dtype = float32", x=lambda: mx.quantize_tokens(normal(M, H, dtype=torch.float32)), workspace=_workspace()),
    *of_tensor(tokens, "quantize_tokens", "x", lambda: normal(M, H), "(M, H)", FLOATS, NOT_FLOATS, "must have unit stride along its columns", None, more="grad"),
    *(tokens(f"quantize_tokens: H of {k}", ValueError, f"^x: K must be a positive multiple of 32, got {k}$", x=normal(M, k)) for k in (0, 33)),
    tokens("quantize_tokens: backend unknown", ValueError, "^backend: must be one of", backend="vllm"),
    forward("ids of fewer tokens", ValueError, r"^x: must have shape \(M, H\) with topk_ids' M", topk_ids=ids(M - 1)),
    forward("weights of another top_k", ValueError, r"^topk_weights: must have shape \(M, top_k\) = \(7, 2\)", topk_weights=torch.ones(M, 3)),
    *(forward(f"activation {a!r}", ValueError, "^activation: must be 'swiglu' .*, got", activation=a) for a in ("gelu", "silu", "", None, 1)),
    *(row(f"{word}: scale_group {g!r}", ValueError, "^scale_group: must be 32 or 128, got", scale_group=g)
      for word, row in (("forward", forward), ("from_weights", made), ("quantize_tokens", tokens)) for g in (64, "128", 32.0)),
    *(forward(f"backend {b!r}", ValueError, "^backend: must be one of", backend=b) for b in ("vllm", "", 1)),
    forward("backend unknown, no tokens", ValueError, "^backend: must be one of", x=normal(0, H), topk_ids=ids(0), topk_weights=torch.ones(0, TOP_K), backend="vllm"),
    *(bad
      for word, row in (("forward", forward), ("module", module))
      for name, n in (("w13_bias", 2 * I), ("w2_bias", H))
      for bad in (
          *of_tensor(row, word, name, lambda n=n: torch.zeros(E, n), "(E, N)", FLOATS, (torch.float64,), more=""),
          row(f"{word}: {name} of fewer experts", ValueError, rf"^{name}: must have shape \(E, N\)", **{name: torch.zeros(E - 1, n)}),
          row(f"{word}: {name} too narrow", ValueError, rf"^{name}: must have shape \(E, N\)", **{name: torch.zeros(E, n - 1)}),
      )),
    forward("w2_bias with grad", ValueError, "^w2_bias: must not require grad", w2_bias=lambda: grad(torch.zeros(E, H))),
    into("out of fewer rows", ValueError, r"^out: must have shape \(M, H\)", out=normal(M - 1, H)),
    into("out one row for all", ValueError, "^out: must have a row stride of at least H = 64, got 0$", out=normal(1, H).expand(M, H)),
    into("out with rows that overlap", ValueError, "^out: must have a row stride of at least H = 64, got 32$", out=lambda: normal(M * H).as_strided((M, H), (32, 1))),
    *(row(f"{word}: {what}", TypeError, "^workspace: must be a MoEWorkspace, got", workspace=value)
      for word, row in (("forward", forward), ("module", module))
      for what, value in (("workspace bytes", torch.zeros(99, dtype=torch.uint8)), ("workspace a number", 1 << 20), ("workspace a class", mx.MoEWorkspace))),
    forward("workspace wrong, no tokens", TypeError, "^workspace: must be a MoEWorkspace", x=normal(0, H), topk_ids=ids(0), topk_weights=torch.ones(0, TOP_K), workspace="none"),
    forward("a token too many for the workspace", ValueError, "^x: must have at most the workspace's max_tokens = 6 rows, got 7$", workspace=_workspace(max_tokens=M - 1)),
    forward("workspace of another top_k and dtype", ValueError, "^workspace: must be made for top_k = 2, dtype = bfloat16, got 1, float16$", workspace=_workspace(top_k=1, dtype=torch.float16)),
    forward("workspace on another device", ValueError, "^workspace: must be made for device = cpu, got meta$", workspace=lambda: mx.MoEWorkspace(meta(w13()), meta(w2()), max_tokens=M, top_k=TOP_K)),
    forward("workspace of another H", ValueError, "^workspace: must be made for", workspace=lambda: mx.MoEWorkspace(w13(k=96), w2(n=96), max_tokens=M, top_k=TOP_K)),
    forward("workspace of more experts", ValueError, "^workspace: must be made for", workspace=lambda: mx.MoEWorkspace(w13(e=5), w2(e=5), max_tokens=M, top_k=TOP_K)),
    *(module(f"module: backend {b!r}", ValueError, "^backend: must be one of", backend=b) for b in ("cuda", 3)),
    made("from_weights: w13 a list", TypeError, r"^w13: must be a torch\.Tensor", w13=[1.0]),
    made("from_weights: w13 of float64", TypeError, "^w13: dtype must be", w13=torch.zeros(E, 2 * I, H, dtype=torch.float64)),
    made("from_weights: one matrix", ValueError, r"^w2: must have shape \(E, N, K\)", w2=normal(H, I)),
    made("from_weights: K of w2", ValueError, "^w2: K must be a positive multiple of 32, got 40$", w2=normal(E, H, 40)),
    made("from_weights: w13 and w2 swapped", ValueError, r"^w13q: must be \(E, 2I, H\)", w13=normal(E, H, I), w2=normal(E, 2 * I, H)),
    *(made(f"from_weights: in turns, {name} {what}", error, f"^{name}: {message}", **{name: value}, interleaved=True)
      for name, what, error, message, value in (
          ("w13", "of 63 rows", ValueError, "must have an even number of rows, gate and up in turns, got 63$", normal(E, 63, H)),
          ("w13_bias", "of 63", ValueError, r"must have shape \(E, N\)", torch.zeros(E, 63)),
          ("w13_bias", "a scalar", ValueError, r"must have shape \(E, N\)", torch.tensor(1.0)),
          ("w13_bias", "a list", TypeError, r"must be a torch.Tensor \(E, N\), got list$", [1.0]))),
    made("from_weights: backend of from_weights", ValueError, "^backend: must be one of", backend="cuda"),
    *(space(f"workspace: {name} {value!r}", error, f"^{name}: must be {message}", **{name: value})
      for name in ("max_tokens", "top_k")
      for value, error, message in ((0, ValueError, "at least 1, got 0"), (-3, ValueError, "at least 1, got -3"), (2.0, TypeError, "an int, got float"), (None, TypeError, "an int, got NoneType"), (True, TypeError, "an int, got bool"))),
    space("workspace: more rows than int32 counts", ValueError, r"^max_tokens: M \* top_k, and each expert's padding, must fit int32, got 2147483648$", max_tokens=2**30),
    space("workspace: dtype", TypeError, "^dtype: must be bfloat16 or float16 or float32, got float8_e4m3fn$", dtype=torch.float8_e4m3fn),
    space("workspace: backend", ValueError, "^backend: must be one of", backend="cuda"),
]  # fmt: skip


def _all() -> dict[str, Any]:
    return {**_good(), "w13_bias": torch.zeros(E, 2 * I), "w2_bias": torch.zeros(E, H), "out": normal(M, H)}


READ = ("x", "topk_ids", "topk_weights", "w13_bias", "w2_bias", "w13q.values", "w13q.scales", "w2q.values", "w2q.scales")  # fmt: skip

BAD += [
    *(overlapping(mx.moe_forward, _all, f"out in {read}", rf"^out: must not overlap {read}, got addresses 0x", "out", read, M * H * 2 - 16) for read in READ),
    overlapping(mx.moe_forward, _all, "out a row off x", "^out: must not overlap x, got addresses 0x", "x", "out", 2 * H),
    overlapping(lambda w2_bias, out, x, **rest: mx.moe_forward(out, w2_bias=w2_bias, out=out, **rest), _all, "out that is x, in a bias", "^out: must not overlap w2_bias, got", "w2_bias", "out", 0),
]  # fmt: skip


# ---------------------------------------------------------------- odd ones


def _right(
    what: str, *, in_place: bool = False, shift: int = 0, out: torch.Tensor | None = None, **changes: Any
) -> Odd:
    """Against float64 with dequantized weights: MXFP8 tokens leave 23 dB, garbage leaves none."""

    def prepare(g: Guards) -> Prepared:
        plain = {**_good(), **changes}
        arguments = {key: g.place(value) for key, value in plain.items()}
        arguments["x"] = (g.out if in_place else g)(plain["x"], shift)
        weights = (plain[name].dequantize() for name in ("w13q", "w2q"))
        bias = (plain.get(name) for name in ("w13_bias", "w2_bias"))
        expected = moe_truth.forward(
            moe_truth.Layer(plain["x"], *weights, plain["topk_ids"], plain["topk_weights"], *bias)
        )
        target = torch.empty(plain["x"].shape, dtype=plain["x"].dtype) if out is None else out
        arguments["out"] = arguments["x"] if in_place else g.out(target.fill_(float("nan")), shift)

        def check(result: torch.Tensor) -> None:
            assert result.data_ptr() == arguments["out"].data_ptr()
            if expected.any():
                assert mx.signal_to_noise_db(expected, result.cpu()) > 20
            else:
                assert not result.any()

        return lambda: mx.moe_forward(**arguments), check

    return Odd(what, prepare)


DROPPED = torch.tensor([[0, -1], [E, 1], [2**31, 3], [-(2**63), 2], [2**63 - 1, 0], [2**32, 1], [-1, -1]])

ODD: list[Odd] = [
    _right("out is x", in_place=True),
    _right("ids far outside", topk_ids=DROPPED),
    _right("ids far outside, biases", topk_ids=DROPPED, w13_bias=normal(E, 2 * I), w2_bias=normal(E, H)),
    _right("all choices dropped", topk_ids=torch.full((M, TOP_K), -1)),
    _right("all choose one expert", topk_ids=torch.full((M, TOP_K), 3, dtype=torch.int32)),
    _right("more choices than experts", topk_ids=ids(M, 9), topk_weights=torch.rand(M, 9)),
    _right("20 choices", topk_ids=ids(M, 20), topk_weights=torch.rand(M, 20), w2_bias=normal(E, H)),
    _right("ids and weights with gaps", topk_ids=ids(M, 2 * TOP_K)[:, ::2], topk_weights=torch.rand(M, 2 * TOP_K)[:, ::2]),
    _right("ids transposed", topk_ids=ids(TOP_K, M).T),
    _right("weights of half precision", topk_weights=torch.rand(M, TOP_K).half()),
    _right("weights of zero", topk_weights=torch.zeros(M, TOP_K)),
    _right("x and out start 2 bytes off", shift=2),
    _right("one row for all tokens", x=normal(1, H).expand(M, H)),
    _right("columns of wider rows", x=normal(M, 3 * H)[:, 5 : 5 + H]),
    _right("no tokens", x=normal(0, H), topk_ids=ids(0), topk_weights=torch.ones(0, TOP_K)),
    _right("no choices", topk_ids=ids(M, 0), topk_weights=torch.ones(M, 0)),
    _right("out in wider rows", out=normal(M, H + 32)[:, :H]),
    _right("one row of any stride", x=normal(1, H), topk_ids=ids(1), topk_weights=torch.ones(1, TOP_K), out=normal(H).as_strided((1, H), (1, 1))),
    _right("one token, one expert", x=normal(1, H), w13q=w13(1), w2q=w2(1), topk_ids=ids(1, 1), topk_weights=torch.ones(1, 1)),
]  # fmt: skip
