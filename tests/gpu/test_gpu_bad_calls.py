"""Wrong and odd calls on a GPU: refused, or right, among guard bytes; after each the GPU still works.

The rows are those of tests/bad_calls whose outcome depends on the device: hostile counts and layouts, addresses, sizes.
Tensors on two devices and short workspaces are tried here alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import sglang_case
import torch
from bad_calls import gemm, layouts, moe, operators, quantize, sglang
from bad_calls.row import COUNTS, E4M3, E, K, N, Odd, T, grouped, ints, normal, poison, weights
from guards import Guards
from tally import Tally

import hybrid_mxfp8 as mx
from hybrid_mxfp8.dispatch.registry import Problem, choose

GPU = "cuda"

pytestmark = pytest.mark.gpu


@pytest.fixture
def alive() -> Callable[[], None]:
    """A small call with a known result: fails if an earlier one left the device in an error."""

    def call() -> None:
        torch.cuda.synchronize()
        x = torch.ones(4, 32, device=GPU)
        xq = mx.quantize_grouped(x, torch.tensor([4], dtype=torch.int32, device=GPU))
        y = mx.grouped_gemm(xq, mx.quantize_weights(torch.ones(1, 8, 32, device=GPU)))
        assert y.tolist() == [[32.0] * 8] * 4

    call()
    return call


def run(row: Odd, alive: Callable[[], None], tally: Tally) -> None:
    guards = Guards(GPU)
    call, check = row.prepare(guards)
    guards.ready()
    result = call()
    torch.cuda.synchronize()
    tally("guarded buffers", guards.check())
    check(result)
    alive()
    tally("odd calls")


def chosen(rows: list[Odd], *starts: str) -> list[Any]:
    """Rows by how their names begin; each beginning must name one at least."""
    for start in starts:
        assert any(row.what.startswith(start) for row in rows), start
    return [pytest.param(row, id=row.what) for row in rows if row.what.startswith(starts)]


@pytest.mark.parametrize("row", chosen(layouts.ODD, "counts: ", "ends: "))
def test_layout(row: Odd, alive: Callable[[], None], tally: Tally) -> None:
    run(row, alive, tally)


QUANTIZED = chosen(
    quantize.ODD,
    "counts: ",
    "int64 counts: ",
    "layout of ",
    "x starts 2 ",
    "out's values start a byte off",
    "rows that overlap",
    "E = 4096",
    "E = 0",
    "T = 0",
    "index ",
    "w starts 2 bytes off",
    "300 experts",
    "no experts",
)


@pytest.mark.parametrize("row", QUANTIZED)
def test_quantize(row: Odd, alive: Callable[[], None], tally: Tally) -> None:
    run(row, alive, tally)


MULTIPLIED = chosen(gemm.ODD, "counts: ", "operands start 4", "E = 4096", "E = 0", "T = 0", "all experts", "rows that")


@pytest.mark.parametrize("hopper", ["1", "0"], ids=["", "portable"])
@pytest.mark.parametrize("row", MULTIPLIED)
def test_product(
    row: Odd, hopper: str, alive: Callable[[], None], tally: Tally, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HYBRID_MXFP8_HOPPER_GEMM", hopper)
    run(row, alive, tally)


@pytest.mark.parametrize("way", ["", "portable", "reference"])
@pytest.mark.parametrize("row", [pytest.param(row, id=row.what) for row in gemm.GARBAGE_ROWS])
def test_garbage_stays_inside(
    row: Odd, way: str, alive: Callable[[], None], tally: Tally, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layouts of any numbers, which nobody can look at without a sync."""
    monkeypatch.setenv("HYBRID_MXFP8_HOPPER_GEMM", "0" if way == "portable" else "1")
    guards = Guards(GPU)
    call, _ = row.prepare(guards)
    guards.ready()
    with mx.use_backend("reference" if way == "reference" else None):
        call()
    torch.cuda.synchronize()
    tally("guarded buffers", guards.check())
    alive()


LAYERS = chosen(moe.ODD, "out is x", "ids far outside", "all choices dropped", "20 choices", "x and out start 2", "no ")


@pytest.mark.parametrize("row", LAYERS)
def test_moe(row: Odd, alive: Callable[[], None], tally: Tally) -> None:
    run(row, alive, tally)


@pytest.mark.parametrize("row", [*chosen(sglang.ODD, ""), *chosen(operators.ODD, "")])
def test_sglang_and_operators(row: Odd, alive: Callable[[], None], tally: Tally) -> None:
    run(row, alive, tally)


WRONG_METADATA = {
    "negative counts": {"tokens_per_expert": (-3, -(2**31), 130)},
    "counts beyond T": {"tokens_per_expert": (2**31 - 1, 2**31 - 1, 130)},
    "scale offsets off a tile": {"blockscale_offsets": (1, 100, 129)},
    "scale offsets outside": {"blockscale_offsets": (-128, 2**31 - 128, 2**31 - 1)},
    "scale offsets that overlap": {"blockscale_offsets": (0, 0, 0)},
    "offsets that fall": {"expert_offsets": (9, -7, 2**31 - 1)},
}


@pytest.mark.parametrize("what", WRONG_METADATA)
def test_sglang_metadata_stays_inside(what: str, alive: Callable[[], None], tally: Tally) -> None:
    """A CPU's are refused. A GPU's can't be looked at: numbers are wrong, and nothing outside is written."""
    g = Guards(GPU)
    given = {name: g.place(value) for name, value in sglang._tokens().items()}
    given |= {name: g(ints(*values)) for name, values in WRONG_METADATA[what].items()}
    plain = sglang._tokens()
    given |= {name: g.out(plain[name]) for name in ("quant_output", "scale_factor")}
    w = g.weights(mx.quantize_weights(normal(sglang.E, sglang.N, sglang.K), backend="reference"))
    g.ready()
    sglang_case.grouped_quant(**given)
    sglang_case.moe_grouped_gemm(
        w.values,
        given["quant_output"],
        w.scales,
        given["scale_factor"],
        given["expert_offsets"],
        given["blockscale_offsets"],
        given["tokens_per_expert"],
        torch.empty(1 << 20, dtype=torch.uint8, device=GPU),
        torch.bfloat16,
    )
    torch.cuda.synchronize()
    tally("guarded buffers", g.check())
    alive()


# ---------------------------------------------------------------- refused


def _counts() -> torch.Tensor:
    return ints(*COUNTS)


def _index() -> torch.Tensor:
    return torch.zeros(T, dtype=torch.int32)


def _bytes() -> torch.Tensor:
    return torch.zeros(1 << 16, dtype=torch.uint8)


def _bf16() -> torch.Tensor:
    return torch.zeros(T, N, dtype=torch.bfloat16)


def _poison() -> mx.GroupedMXFP8:
    return poison(T, K, E, mx.GroupLayout.from_counts(_counts(), T))


def _layout() -> mx.GroupLayout:
    return mx.GroupLayout.from_counts(_counts(), T)


FUNCTIONS: dict[str, tuple[Callable[..., object], Callable[[], dict[str, Any]], str]] = {
    "quantize_grouped": (
        mx.quantize_grouped,
        lambda: {"x": normal(T, K), "groups": _layout(), "row_index": _index(), "out": _poison()},
        "x",
    ),
    "quantize_grouped of counts": (mx.quantize_grouped, lambda: {"x": normal(T, K), "groups": _counts()}, "x"),
    "grouped_gemm": (
        mx.grouped_gemm,
        lambda: {"x": grouped(), "w": weights(), "out": _bf16(), "workspace": _bytes()},
        "w",
    ),
    "explain": (mx.explain, lambda: {"x": grouped(), "w": weights()}, "w"),
    "GroupedMXFP8": (
        mx.GroupedMXFP8,
        lambda: {"values": grouped().values, "scales": grouped().scales, "groups": _layout()},
        "values",
    ),
    "ExpertWeights": (mx.ExpertWeights, lambda: {"values": weights().values, "scales": weights().scales}, "scales"),
    "from_linear_scales of tokens": (
        mx.GroupedMXFP8.from_linear_scales,
        lambda: {"values": grouped().values, "scales": grouped().linear_scales(), "groups": _layout()},
        "values",
    ),
    "from_linear_scales": (
        mx.ExpertWeights.from_linear_scales,
        lambda: {"values": weights().values, "scales": weights().linear_scales()},
        "scales",
    ),
    "GroupLayout": (
        mx.GroupLayout,
        lambda: {name: value for name, value in vars(_layout()).items()},
        "expert_offsets",
    ),
    "moe_forward": (
        mx.moe_forward,
        lambda: {
            **moe._good(),
            "w13_bias": torch.zeros(moe.E, 2 * moe.I),
            "w2_bias": torch.zeros(moe.E, moe.H),
            "out": normal(moe.M, moe.H),
        },
        "topk_ids",
    ),
    "sglang quantizer": (sglang_case.grouped_quant, sglang._tokens, "quant_output"),
    "sglang product": (sglang_case.moe_grouped_gemm, sglang._product, "sfa"),
}
"""Each function, good arguments, and the argument that is named when the first one is the odd one out."""

MIXED = [
    pytest.param(name, argument, id=f"{name}: {argument} on the CPU")
    for name, (_, good, _) in FUNCTIONS.items()
    for argument, value in good().items()
    if not isinstance(value, int | torch.dtype)
]


@pytest.mark.parametrize(("function", "argument"), MIXED)
def test_two_devices(function: str, argument: str, alive: Callable[[], None], tally: Tally) -> None:
    """One argument on the CPU, the others on the GPU, among guard bytes on both."""
    call, make, other = FUNCTIONS[function]
    here, there = Guards(), Guards(GPU)
    good = make()
    arguments = {name: (here if name == argument else there).place(value) for name, value in good.items()}
    here.ready()
    there.ready()
    with pytest.raises(
        ValueError, match=f"^({argument}|{other}|w2q|x): must be on (cpu|cuda:0), as .*, got "
    ) as caught:
        call(**arguments)
    assert re.search("cpu", str(caught.value))
    tally("guarded buffers", here.check(refused=True) + there.check(refused=True))
    alive()
    tally("bad calls")


def test_workspace_of_exactly_as_much_and_a_byte_less(alive: Callable[[], None], tally: Tally) -> None:
    plain, w = grouped(), weights()
    for size_change, refused in ((0, False), (-1, True)):
        g = Guards(GPU)
        x, wq = g.grouped(plain), g.weights(w)
        problem = Problem(wq.num_experts, wq.n, wq.k, T, torch.bfloat16, wq.device)
        needed = choose(problem).workspace_size(problem)
        if not needed:
            pytest.skip("no kernel that needs a workspace takes this problem here")
        workspace = g.out(torch.zeros(needed + size_change, dtype=torch.uint8))
        out = g.out(_bf16())
        g.ready()
        if refused:
            with pytest.raises(ValueError, match=f"^workspace: must have at least {needed} bytes, got {needed - 1}$"):
                mx.grouped_gemm(x, wq, out=out, workspace=workspace)
            tally("bad calls")
        else:
            mx.grouped_gemm(x, wq, out=out, workspace=workspace)
            expected = mx.grouped_gemm(plain, w, backend="reference")
            assert mx.calc_diff(out[: sum(COUNTS)].cpu(), expected[: sum(COUNTS)]) < 1e-5
            tally("odd calls")
        torch.cuda.synchronize()
        tally("guarded buffers", g.check(refused=refused))
        alive()


OFF_ALIGNMENT = {
    "out": (r"^out: must start at a 16-byte boundary", 8),
    "workspace": (r"^workspace: must start at a 256-byte boundary", 16),
}


@pytest.mark.parametrize("name", OFF_ALIGNMENT)
def test_alignment(name: str, alive: Callable[[], None], tally: Tally) -> None:
    message, shift = OFF_ALIGNMENT[name]
    g = Guards(GPU)
    arguments = {"x": g.grouped(grouped()), "w": g.weights(weights()), "out": g.out(_bf16())}
    arguments[name] = g.out(_bf16() if name == "out" else _bytes(), shift)
    g.ready()
    with pytest.raises(ValueError, match=message):
        mx.grouped_gemm(**arguments)
    tally("guarded buffers", g.check(refused=True))
    alive()
    tally("bad calls")


def test_overlap(alive: Callable[[], None], tally: Tally) -> None:
    g = Guards(GPU)
    memory, x = g.raw(T * K + T * N * 2), g.grouped(grouped())
    values = memory[: T * K].view(E4M3).view(T, K)
    out = memory[T * K - 16 : T * K - 16 + T * N * 2].view(torch.bfloat16).view(T, N)
    operand = mx.GroupedMXFP8(values, x.scales, x.groups)
    w = g.weights(weights())
    g.ready()
    with pytest.raises(ValueError, match=r"^out: must not overlap x\.values, got addresses 0x"):
        mx.grouped_gemm(operand, w, out=out)
    tally("guarded buffers", g.check(refused=True))
    alive()
    tally("bad calls")
