"""What only a GPU can get wrong: tensors on two devices, and workspaces a byte short."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import sglang_case
import torch
from bad_calls import gemm, moe, operands, quantize, sglang
from bad_calls.row import COUNTS, N, T, grouped, layout, weights
from guards import Guards, check_alive

import hybrid_mxfp8 as mx

pytestmark = pytest.mark.gpu

FUNCTIONS: dict[str, tuple[Callable[..., object], Callable[[], dict[str, Any]], str]] = {
    "quantize_grouped": (mx.quantize_grouped, lambda: {**quantize._of_counts(), "groups": layout()}, "groups"),
    "quantize_grouped of counts": (mx.quantize_grouped, quantize._of_counts, "groups"),
    "grouped_gemm": (mx.grouped_gemm, lambda: {**gemm._good(), "workspace": gemm.u8(1 << 16)}, "w"),
    "explain": (mx.explain, lambda: {"x": grouped(), "w": weights()}, "w"),
    "GroupedMXFP8": (mx.GroupedMXFP8, operands._grouped, "values"),
    "ExpertWeights": (mx.ExpertWeights, operands._weights, "scales"),
    "from_linear_scales of tokens": (mx.GroupedMXFP8.from_linear_scales, operands._linear_tokens, "values"),
    "from_linear_scales": (mx.ExpertWeights.from_linear_scales, operands._linear, "scales"),
    "GroupLayout": (mx.GroupLayout, lambda: dict(vars(layout())), "expert_offsets"),
    "moe_forward": (mx.moe_forward, moe._all, "x"),
    "sglang quantizer": (sglang_case.grouped_quant, sglang._tokens, "quant_output"),
    "sglang product": (sglang_case.moe_grouped_gemm, sglang._product, "sfa"),
}
"""Each function, good arguments, and the argument that is named when the first is the odd one
out."""

MIXED = [
    pytest.param(name, argument, id=f"{name}: {argument} on the CPU")
    for name, (_, good, _) in FUNCTIONS.items()
    for argument, value in good().items()
    if not isinstance(value, int | torch.dtype)
]


@pytest.mark.parametrize(("function", "argument"), MIXED)
def test_two_devices(function: str, argument: str) -> None:
    """One argument on the CPU, the others on the GPU, among guard bytes on both."""
    call, make, other = FUNCTIONS[function]
    here, there = Guards(), Guards("cuda")
    arguments = {name: (here if name == argument else there).place(value) for name, value in make().items()}
    here.ready()
    there.ready()
    with pytest.raises(
        ValueError, match=f"^({argument}|{other}|w2q|x): must be on (cpu|cuda:0), as .*, got "
    ) as caught:
        call(**arguments)
    assert "cpu" in str(caught.value)
    here.check(refused=True)
    there.check(refused=True)
    check_alive("cuda")


@pytest.mark.parametrize("short", [0, 1])
def test_a_workspace_of_exactly_as_much_and_a_byte_less(kernel: str, short: int) -> None:
    plain, w, g = grouped(), weights(), Guards("cuda")
    x, wq, out = g.place(plain), g.place(w), g.out(torch.zeros(T, N, dtype=torch.bfloat16))
    needed = mx.grouped_gemm_workspace_size(wq, T, backend="triton")
    if not needed:
        pytest.skip(f"{kernel} needs no workspace for this problem; Hopper's bf16 kernel does")
    workspace = g.out(torch.zeros(needed - short, dtype=torch.uint8))
    g.ready()
    if short:
        with pytest.raises(ValueError, match=f"^workspace: must have at least {needed} bytes, got {needed - 1}$"):
            mx.grouped_gemm(x, wq, out=out, workspace=workspace, backend="triton")
    else:
        mx.grouped_gemm(x, wq, out=out, workspace=workspace, backend="triton")
        expected = mx.grouped_gemm(plain, w, backend="reference")
        assert mx.calc_diff(out[: sum(COUNTS)].cpu(), expected[: sum(COUNTS)]) < 1e-5
    check_alive("cuda")
    g.check(refused=bool(short))
