"""Operands by hand, scale layouts, metrics, and the choice of a backend."""

from __future__ import annotations

from typing import Any

import torch

import hybrid_mxfp8 as mx

from .row import E4M3, META, Bad, E, K, N, T, grouped, layout, normal, of_tensor, refused, weights

U8 = torch.uint8


def _grouped() -> dict[str, Any]:
    x = grouped()
    return {"values": x.values, "scales": x.scales, "groups": x.groups}


def _weights() -> dict[str, Any]:
    w = weights()
    return {"values": w.values, "scales": w.scales}


def _linear_tokens() -> dict[str, Any]:
    return {"values": grouped().values, "scales": grouped().linear_scales(), "groups": layout()}


def _linear() -> dict[str, Any]:
    return {"values": weights().values, "scales": weights().linear_scales()}


def zeros(*shape: int, dtype: torch.dtype = U8) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def _before_routing() -> dict[str, Any]:
    x = mx.quantize_tokens(normal(T, K), backend="reference")
    return {"values": x.values, "scales": x.scales}


unsorted = refused(mx.MXFP8Tokens, _before_routing)
tokens, experts = refused(mx.GroupedMXFP8, _grouped), refused(mx.ExpertWeights, _weights)
linear = refused(mx.ExpertWeights.from_linear_scales, _linear)
arrived = refused(mx.GroupedMXFP8.from_linear_scales, _linear_tokens)
swizzle = refused(mx.swizzle_scales, lambda: {"linear": zeros(5, 3)})
unswizzle = refused(mx.unswizzle_scales, lambda: {"swizzled": zeros(128, 4), "rows": 5, "cols": 3})
diff = refused(mx.calc_diff, lambda: {"x": normal(4, 4), "y": normal(4, 4)})
noise = refused(mx.signal_to_noise_db, lambda: {"signal": normal(4), "approximation": normal(4)})
regrouped = refused(mx.ExpertWeights.regrouped, lambda: {"self": weights(), "scale_group": 128})
devices = refused(mx.backends, dict)


def _within(name: Any) -> None:
    with mx.use_backend(name):
        pass


within = refused(_within, lambda: {"name": "auto"})

BAD: list[Bad] = [
    *of_tensor(unsorted, "MXFP8Tokens", "values", lambda: _before_routing()["values"], "(M, H)", "float8_e4m3fn", (U8, torch.float32), "must have unit stride along its columns", "^scales: must be on meta", more="grad"),
    *of_tensor(unsorted, "MXFP8Tokens", "scales", lambda: _before_routing()["scales"], "(M, H/32)", "uint8", (torch.int8, torch.float8_e8m0fnu), "must have unit stride along its columns", more=""),
    unsorted("MXFP8Tokens: scales of fewer rows", ValueError, r"^scales: must have shape \(M, H/32\) = \(40, 3\), got \(39, 3\)$", scales=zeros(T - 1, 3)),
    unsorted("MXFP8Tokens: H of 40", ValueError, "^values: K must be a positive multiple of 32, got 40$", values=zeros(T, 40).view(E4M3)),
    *(unsorted(f"MXFP8Tokens: dtype {d}", TypeError, "^dtype: must be bfloat16 or float16 or float32, got", dtype=d) for d in (torch.float64, E4M3, "bf16", None)),
    *of_tensor(tokens, "tokens", "values", lambda: grouped().values, "(T, K)", "float8_e4m3fn", (U8, torch.float32, torch.float8_e5m2), more="grad"),
    *of_tensor(tokens, "tokens", "scales", lambda: grouped().scales, "(S, C)", "uint8", (torch.int8, torch.float32), more=""),
    *of_tensor(experts, "weights", "values", lambda: weights().values, "(E, N, K)", "float8_e4m3fn", (U8, torch.float16, torch.float8_e5m2), place="^scales: must be on meta", more="grad"),
    *of_tensor(experts, "weights", "scales", lambda: weights().scales, "(E, roundup(N, 128), C)", "uint8", (torch.int8,), more=""),
    *of_tensor(linear, "linear", "values", lambda: weights().values, "(E, N, K)", "float8_e4m3fn or uint8", (torch.float32, torch.float8_e5m2), "", "^scales: must be on meta", more="grad"),
    *of_tensor(linear, "linear", "scales", lambda: weights().linear_scales(), "(E, N, K/32)", "uint8 or float8_e8m0fnu", (torch.float32,), "", more=""),
    *of_tensor(arrived, "arrived", "values", lambda: grouped().values, "(T, K)", "float8_e4m3fn or uint8", (torch.bfloat16,), "", more="grad"),
    *of_tensor(arrived, "arrived", "scales", lambda: grouped().linear_scales(), "(T, K/32)", "uint8 or float8_e8m0fnu", (torch.float32,), "", more=""),
    tokens("tokens: a row too few", ValueError, "^values: must have T = groups.num_tokens = 40 rows, got 39$", values=zeros(T - 1, K, dtype=E4M3)),
    *(tokens(f"tokens: K = {k}", ValueError, f"^values: K must be a positive multiple of 32, got {k}$", values=zeros(T, k, dtype=E4M3)) for k in (0, 16)),
    tokens("tokens: linear scales", ValueError, r"^scales: must have shape \(S, C\) = \(384, 4\), got \(40, 3\)$", scales=zeros(T, 3)),
    *(row(f"{word}: groups are counts", TypeError, "^groups: must be a GroupLayout, got Tensor$", groups=torch.ones(3)) for word, row in (("tokens", tokens), ("arrived", arrived))),
    tokens("tokens: groups of another T", ValueError, "^values: must have T = groups.num_tokens = 41 rows, got 40$", groups=layout(num_tokens=41)),
    *(row(f"{word}: scale_group 96", ValueError, "^scale_group: must be 32 or 128, got 96$", scale_group=96)
      for word, row in (("tokens", tokens), ("arrived", arrived), ("weights", experts))),
    *(row(f"{word}: squares None", TypeError, "^squares: must be a bool, got NoneType$", scale_group=128, squares=None)
      for word, row in (("regrouped", regrouped), ("weights", experts))),
    regrouped("regrouped: 64", ValueError, "^scale_group: must be 32 or 128, got 64$", scale_group=64),
    experts("weights: K = 33", ValueError, "^values: K must be a positive multiple of 32, got 33$", values=zeros(E, N, 33, dtype=E4M3)),
    experts("weights: linear scales", ValueError, r"^scales: must have shape \(E, roundup\(N, 128\), C\) = \(3, 128, 4\), got \(3, 24, 3\)$", scales=zeros(E, N, 3)),
    linear("linear: swizzled scales", ValueError, r"^scales: must have shape \(E, N, K/32\) = \(3, 24, 3\), got \(3, 128, 4\)$", scales=zeros(E, 128, 4)),
    *(row(f"{word}: K = 100", ValueError, "^values: K must be a positive multiple of 32, got 100$", values=zeros(*rows, 100)) for word, row, rows in (("linear", linear, (E, N)), ("arrived", arrived, (T,)))),
    arrived("arrived: swizzled scales", ValueError, r"^scales: must have shape \(T, K/32\) = \(40, 3\), got \(384, 4\)$", scales=zeros(384, 4)),
    arrived("arrived: a row too few", ValueError, "^values: must have T = groups.num_tokens = 40 rows, got 39$", values=zeros(T - 1, K), scales=zeros(T - 1, 3)),
    swizzle("swizzle: float", TypeError, "^linear: dtype must be uint8 or float8_e8m0fnu, got float32$", linear=torch.zeros(5, 3)),
    swizzle("swizzle: a vector", ValueError, r"^linear: must have shape \(\.\.\., rows, cols\), got \(5,\)$", linear=zeros(5)),
    unswizzle("unswizzle: int64", TypeError, "^swizzled: dtype must be uint8 or float8_e8m0fnu, got int64$", swizzled=zeros(128, 4, dtype=torch.int64)),
    *(unswizzle(f"unswizzle: of shape {x.shape}", ValueError, "^swizzled: must", swizzled=x) for x in (zeros(1)[0], zeros(5, 3))),
    unswizzle("unswizzle: too many rows", ValueError, r"^swizzled: must end in dimensions \(256, 4\) for 129 rows and 3 columns, got \(128, 4\)$", rows=129),
    unswizzle("unswizzle: too many columns", ValueError, r"^swizzled: must end in dimensions \(128, 8\)", cols=5),
    *(unswizzle(f"unswizzle: {name} {value!r}", error, f"^{name}: must be {message}$", **{name: value})
      for name, value, error, message in (("rows", -1, ValueError, "at least 0, got -1"), ("cols", -4, ValueError, "at least 0, got -4"), ("rows", "5", TypeError, "an int, got str"), ("cols", 3.0, TypeError, "an int, got float"), ("rows", True, TypeError, "an int, got bool"))),
    diff("calc_diff: a number", TypeError, r"^x: must be a torch\.Tensor, got float$", x=1.0),
    diff("calc_diff: other shape", ValueError, r"^y: must have the shape of x = \(4, 4\), got \(16,\)$", y=normal(16)),
    diff("calc_diff: other device", ValueError, "^y: must be on cpu, as x, got meta$", y=normal(4, 4).to(META)),
    noise("noise: a list", TypeError, r"^approximation: must be a torch\.Tensor, got list$", approximation=[1.0]),
    noise("noise: other shape", ValueError, "^approximation: must have the shape of signal", approximation=normal(5)),
    devices("backends of nothing", ValueError, "^device: must be a torch.device or the name of one, got 'bogus'$", device="bogus"),
    devices("backends of a number", ValueError, "^device: must be a torch.device or the name of one, got 3.5$", device=3.5),
    devices("backends of an absent GPU", ValueError, "^device: there are .* got 'cuda:63'$", device="cuda:63"),
    *(
        within(f"use_backend {name!r}", ValueError, "^name: must be one of auto, cutlass, triton, reference, got", name=name)
        for name in ("cuda", "", "tri ton", 3, b"triton", ["triton"])
    ),
]  # fmt: skip
