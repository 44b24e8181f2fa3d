"""The MoE layer: against fp64, with a workspace, with choices dropped, with biases, and its errors."""

from __future__ import annotations

import dataclasses
import gc
import re
import weakref
from typing import Any

import cases
import moe_truth
import pytest
import torch
from test_thin_host import Recorder

import hybrid_mxfp8 as mx
from hybrid_mxfp8.dispatch.registry import BACKENDS
from hybrid_mxfp8.ops import workspace as moe_workspace
from hybrid_mxfp8.reference import routing as moe_reference

MIN_SNR_DB = 22.0
"""Of a layer of normal data, which is at 23.1 to 24.2 dB in layers as small as these; ``moe_forward`` says why not more."""


def run(layer: moe_truth.Layer, backend: str, **options: Any) -> torch.Tensor:
    w13q, w2q = (mx.quantize_weights(w, backend=backend) for w in (layer.w13, layer.w2))
    return mx.moe_forward(
        layer.x,
        w13q,
        w2q,
        layer.ids,
        layer.weights,
        w13_bias=layer.w13_bias,
        w2_bias=layer.w2_bias,
        backend=backend,
        **options,
    )


def quantized(layer: moe_truth.Layer) -> tuple[mx.ExpertWeights, mx.ExpertWeights]:
    return mx.quantize_weights(layer.w13, backend="reference"), mx.quantize_weights(layer.w2, backend="reference")


@pytest.mark.parametrize("dropped", [False, True], ids=["", "dropped"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_signal_to_noise(backend: str, rng: torch.Generator, dtype: torch.dtype, bias: bool, dropped: bool) -> None:
    layer = moe_truth.make_layer(rng, tokens=24, hidden=128, intermediate=96, dtype=dtype, bias=bias, dropped=dropped)
    y = run(layer, backend)
    assert y.dtype == dtype
    assert mx.signal_to_noise_db(moe_truth.forward(layer), y) > MIN_SNR_DB


@pytest.mark.parametrize(
    ("tokens", "experts", "hidden", "intermediate", "top_k"),
    [(1, 1, 32, 32, 1), (1, 64, 64, 32, 8), (70, 3, 32, 64, 1), (3, 4, 160, 160, 4)],
)
def test_shapes(
    backend: str, rng: torch.Generator, tokens: int, experts: int, hidden: int, intermediate: int, top_k: int
) -> None:
    layer = moe_truth.make_layer(
        rng,
        tokens=tokens,
        experts=experts,
        hidden=hidden,
        intermediate=intermediate,
        top_k=top_k,
        ids_dtype=torch.int32,
    )
    assert mx.signal_to_noise_db(moe_truth.forward(layer), run(layer, backend)) > MIN_SNR_DB - 3  # few elements


def test_only_quantization_separates_it_from_the_truth(rng: torch.Generator) -> None:
    """On operands that MXFP8 holds exactly the result is the truth but for the activation's quantization."""
    layer = moe_truth.make_layer(rng, tokens=8, hidden=64, intermediate=32, dtype=torch.float32)
    exact = {}
    for name in ("w13", "w2"):
        exact[name] = mx.quantize_weights(getattr(layer, name), backend="reference").dequantize()
    groups = cases.layout([8])
    exact["x"] = mx.quantize_grouped(layer.x, groups, backend="reference").dequantize()
    layer = dataclasses.replace(layer, **exact)
    assert mx.signal_to_noise_db(moe_truth.forward(layer), run(layer, "reference")) > 30.0


def test_another_activation(backend: str, rng: torch.Generator) -> None:
    """By name, as a SwiGLU, by its spec, and as a module's; plain SwiGLU would be far off."""
    layer = moe_truth.make_layer(rng, tokens=40, hidden=128, intermediate=96, bias=True)
    w13q, w2q = (mx.quantize_weights(w, backend="reference") for w in (layer.w13, layer.w2))
    bias = {"w13_bias": layer.w13_bias, "w2_bias": layer.w2_bias}
    activation = mx.SwiGLU(alpha=1.702, beta=1.0, limit=7.0)
    results = [
        mx.moe_forward(layer.x, w13q, w2q, layer.ids, layer.weights, **bias, activation=given, backend=backend)
        for given in ("swigluoai", activation, activation.spec)
    ]
    module = mx.MXFP8Experts(w13q, w2q, **bias, activation="swigluoai", backend=backend)
    assert module.activation == activation
    results.append(module(layer.x, layer.ids, layer.weights))
    for result in results[1:]:
        assert torch.equal(result, results[0])
    assert mx.signal_to_noise_db(moe_truth.forward(layer, moe_truth.swigluoai), results[0]) > 22.0
    assert mx.signal_to_noise_db(moe_truth.forward(layer), results[0]) < 10.0


def test_gate_comes_first(rng: torch.Generator) -> None:
    """w13's first I rows are the gate: with gate 0, silu is 0; with up 0, so is the product; swapped they differ."""
    layer = moe_truth.make_layer(rng, tokens=6)
    half = layer.w2.shape[2]
    gate, up = layer.w13[:, :half], layer.w13[:, half:]
    y = run(layer, "reference")
    swapped = run(dataclasses.replace(layer, w13=torch.cat([up, gate], dim=1)), "reference")
    assert mx.signal_to_noise_db(y, swapped) < 10.0
    large = dataclasses.replace(layer, w13=torch.cat([torch.full_like(gate, -50.0), up], dim=1), x=layer.x.abs())
    assert run(large, "reference").abs().max() == 0  # silu of a large negative gate


def test_equal_inputs_give_equal_bits(backend: str, rng: torch.Generator) -> None:
    layer = moe_truth.make_layer(rng, dropped=True, bias=True)
    assert torch.equal(run(layer, backend), run(layer, backend))


def test_a_dropped_choice_is_one_of_weight_zero(backend: str, rng: torch.Generator) -> None:
    """An id outside 0 .. E-1 leaves the token's other experts as they are: bits as with that choice at weight 0."""
    layer = moe_truth.make_layer(rng, tokens=12, dropped=True, dtype=torch.float32)
    dropped = (layer.ids < 0) | (layer.ids >= 5)
    assert dropped.any()
    assert not dropped.all()
    spared = dataclasses.replace(
        layer, ids=torch.where(dropped, 0, layer.ids), weights=torch.where(dropped, 0.0, layer.weights)
    )
    torch.testing.assert_close(run(layer, backend), run(spared, backend), rtol=1e-5, atol=1e-6)
    one = dataclasses.replace(layer, ids=torch.full_like(layer.ids, -1))
    assert torch.equal(run(one, backend), torch.zeros_like(layer.x))


def test_backends_agree(interpreter: None, rng: torch.Generator) -> None:
    """The same routing and bytes; products differ in the order of fp32 additions, and h where that flips its rounding."""
    layer = moe_truth.make_layer(rng, tokens=17, bias=True, dropped=True)
    assert mx.signal_to_noise_db(run(layer, "reference"), run(layer, "triton")) > 45.0


@pytest.mark.parametrize("tokens", [0, 4])
def test_nothing_to_do(backend: str, rng: torch.Generator, tokens: int) -> None:
    """No token, or no choice of any token."""
    layer = moe_truth.make_layer(rng, tokens=4)
    top_k = 2 if tokens == 0 else 0
    small = dataclasses.replace(
        layer, x=layer.x[:tokens], ids=layer.ids[:tokens, :top_k], weights=layer.weights[:tokens, :top_k]
    )
    y = run(small, backend)
    assert y.shape == (tokens, 64)
    assert not y.any()


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_a_layer_is_its_steps(backend: str, rng: torch.Generator, bias: bool) -> None:
    """The public functions one after the other, with the rounding that saturates nothing: the same bits."""
    layer = moe_truth.make_layer(rng, tokens=11, hidden=96, bias=bias, dropped=True)
    w13q, w2q = quantized(layer)
    slots, experts = layer.ids.numel(), layer.w2.shape[0]
    sorted_token_ids, inverse_permutation = (
        torch.empty(slots, dtype=torch.int32),
        torch.empty(layer.ids.shape, dtype=torch.int32),
    )
    layout = torch.empty(3 * experts + 2, dtype=torch.int32)
    moe_reference.route(layer.ids, experts, sorted_token_ids, inverse_permutation, layout)
    groups = mx.GroupLayout.from_counts(layout[:experts].clone(), slots)
    with mx.use_backend(backend):
        xq = mx.quantize_grouped(layer.x, groups, row_index=sorted_token_ids, scale_rounding="rceil")
        h = mx.grouped_gemm(xq, w13q)
        if layer.w13_bias is not None:
            moe_reference.add_expert_bias(h, inverse_permutation, layer.ids, layer.w13_bias)
        hq = mx.quantize_grouped(h, groups, activation="swiglu", scale_rounding="rceil")
        y = mx.grouped_gemm(hq, w2q)
    expected = torch.empty_like(layer.x)
    moe_reference.combine(y, inverse_permutation, layer.ids, layer.weights, layer.w2_bias, expected)
    assert torch.equal(run(layer, backend), expected)


def test_rows_and_weights_with_strides(backend: str, rng: torch.Generator) -> None:
    layer = moe_truth.make_layer(rng, tokens=6)
    strided = dataclasses.replace(
        layer,
        x=torch.cat([layer.x, layer.x], dim=1)[:, :64],
        ids=layer.ids.T.contiguous().T,
        weights=layer.weights.T.contiguous().T,
    )
    assert torch.equal(run(strided, backend), run(layer, backend))


def test_out(backend: str, rng: torch.Generator) -> None:
    layer = moe_truth.make_layer(rng)
    whole = torch.full((9, 96), 3.0, dtype=torch.bfloat16)
    y = run(layer, backend, out=whole[:, :64])
    assert y.data_ptr() == whole.data_ptr()
    assert torch.equal(y, run(layer, backend))
    assert torch.equal(whole[:, 64:], torch.full((9, 32), 3.0, dtype=torch.bfloat16))


def test_one_row_of_out_may_have_any_stride(rng: torch.Generator) -> None:
    layer = moe_truth.make_layer(rng, tokens=1)
    out = torch.zeros(64, dtype=torch.bfloat16).as_strided((1, 64), (1, 1))
    assert torch.equal(run(layer, "reference", out=out), run(layer, "reference"))


def poison(workspace: mx.MoEWorkspace) -> None:
    """NaN in every intermediate: a byte that is read and was not written shows."""
    b = workspace._largest
    for tensor in (b.xq.values, b.xq.scales, b.hq.values, b.hq.scales):
        tensor.view(torch.uint8).fill_(cases.POISON)
    for tensor in (b.h, b.y):
        tensor.fill_(float("nan"))
    for tensor in (b.sorted_token_ids, b.inverse_permutation, b.layout, b.scratch):
        tensor.fill_(-9)


def test_workspace_gives_the_same_bits_for_every_batch_it_holds(backend: str, rng: torch.Generator) -> None:
    layer = moe_truth.make_layer(rng, tokens=40, dropped=True, bias=True)
    workspace = mx.MoEWorkspace(*quantized(layer), max_tokens=40, top_k=2, backend=backend)
    for tokens in (40, 1, 7, 40, 7):
        part = dataclasses.replace(layer, x=layer.x[:tokens], ids=layer.ids[:tokens], weights=layer.weights[:tokens])
        poison(workspace)
        assert torch.equal(run(part, backend, workspace=workspace), run(part, backend))


def test_warm_call_with_workspace_allocates_only_its_output(
    interpreter: None, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hybrid_mxfp8.triton_kernels import quantize
    from hybrid_mxfp8.triton_kernels.gemm import portable as grouped_gemm
    from hybrid_mxfp8.triton_kernels.moe import combine, expert_bias, route

    launches: list[Any] = []
    layer = moe_truth.make_layer(rng, tokens=4, bias=True)
    w13q, w2q = quantized(layer)
    workspace = mx.MoEWorkspace(w13q, w2q, max_tokens=8, top_k=2, backend="triton")
    for module in (combine, expert_bias, grouped_gemm, quantize, route):
        monkeypatch.setattr(module, "launch", lambda kernel, *rest: launches.append(kernel))
    options = {"workspace": workspace, "backend": "triton", "w2_bias": layer.w2_bias}
    call = (layer.x, w13q, w2q, layer.ids, layer.weights)
    mx.moe_forward(*call, **options)
    launches.clear()
    with Recorder() as recorder:
        mx.moe_forward(*call, **options)
    assert len(recorder.allocations) == 1, recorder.names  # out
    assert len(launches) == 6
    with Recorder() as recorder:
        mx.moe_forward(*call, **options, out=torch.empty_like(layer.x), w13_bias=layer.w13_bias)
    assert recorder.allocations == ["aten.empty_like.default"], recorder.names  # ours, here
    assert len(launches) == 6 + 7


def test_workspace_says_its_size(rng: torch.Generator) -> None:
    layer = moe_truth.make_layer(rng)
    workspace = mx.MoEWorkspace(*quantized(layer), max_tokens=16, top_k=2, backend="reference")
    # 32 rows: indices, layout of 5 experts, x and the activation in MXFP8, h and y in bf16.
    scale_rows = (32 + 127 * 5) // 128 * 128
    expected = 32 * 4 * 2 + 17 * 4 + 32 * (64 + 32) + scale_rows * 4 * 2 + 32 * 2 * (64 + 64)
    assert workspace.nbytes == expected
    assert "max_tokens=16" in repr(workspace)


def test_workspace_of_a_large_layer() -> None:
    """The numbers of docs/moe.md, from DeepSeek-V3's shape: 3H + 5I bytes a row and what Hopper's product adds."""
    from hybrid_mxfp8.triton_kernels.gemm.hopper_config import WorkspaceLayout, select_hopper_config

    experts, hidden, intermediate, rows = 256, 7168, 2048, 8192 * 8

    def weights_on_meta(n: int, k: int) -> mx.ExpertWeights:
        return mx.quantize_weights(torch.empty(experts, n, k, dtype=torch.bfloat16, device="meta"))

    w13q, w2q = weights_on_meta(2 * intermediate, hidden), weights_on_meta(hidden, intermediate)
    nbytes = mx.MoEWorkspace(w13q, w2q, max_tokens=8192, top_k=8).nbytes
    assert 1 < nbytes / (rows * (3 * hidden + 5 * intermediate)) < 1.02
    assert round(nbytes / 1e9, 1) == 2.1
    config = select_hopper_config(rows, experts)
    widened = max(WorkspaceLayout.size_of(rows, experts, k, config) for k in (hidden, intermediate))
    assert 1 <= widened / (rows * 2 * hidden) < 1.01
    assert round(widened / 1e9, 2) == 0.94


def test_workspace_keeps_only_so_many_batch_sizes(rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moe_workspace, "KEPT_BATCH_SIZES", 3)
    workspace = mx.MoEWorkspace(*quantized(moe_truth.make_layer(rng)), max_tokens=9, top_k=2, backend="reference")
    shape = workspace.shape
    chosen = moe_workspace.choose_backends(shape, 1, "reference")
    for tokens in range(1, 9):
        workspace.buffers(shape, tokens, chosen)
    assert len(workspace._views) == 3
    assert workspace.buffers(shape, 8, chosen) is workspace.buffers(shape, 8, chosen)


def test_workspace_serves_a_backend_that_needs_more(
    interpreter: None, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made for one backend, used with another: what that needs beyond it comes once for all batch sizes, and stays."""
    given: list[torch.Tensor | None] = []
    triton = BACKENDS["triton"]

    def product(x: Any, w: Any, out: torch.Tensor, workspace: torch.Tensor | None) -> None:
        given.append(workspace)
        triton.grouped_gemm(x, w, out, None)

    greedy = dataclasses.replace(triton, workspace_size=lambda problem: problem.num_tokens * 50, grouped_gemm=product)
    monkeypatch.setitem(BACKENDS, "triton", greedy)
    layer = moe_truth.make_layer(rng, hidden=96)
    workspace = mx.MoEWorkspace(*quantized(layer), max_tokens=9, top_k=2, backend="reference")
    assert workspace._largest.gemm is None
    for tokens in (4, 9, 4):
        part = dataclasses.replace(layer, x=layer.x[:tokens], ids=layer.ids[:tokens], weights=layer.weights[:tokens])
        run(part, "triton", workspace=workspace)
    assert all(w is not None and w.numel() == 900 for w in given)
    assert len({w.data_ptr() for w in given if w is not None}) == 1


@pytest.mark.parametrize("needed", ["n", "k"])
def test_workspace_holds_what_either_product_needs(
    needed: str, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """N and K are 64 and 96 of the first, 96 and 32 of the second."""
    needy = dataclasses.replace(BACKENDS["reference"], workspace_size=lambda problem: getattr(problem, needed))
    monkeypatch.setitem(BACKENDS, "reference", needy)
    layer = moe_truth.make_layer(rng, hidden=96, intermediate=32)
    workspace = mx.MoEWorkspace(*quantized(layer), max_tokens=4, top_k=2, backend="reference")
    assert workspace._largest.gemm is not None
    assert workspace._largest.gemm.numel() == 96


def test_workspace_keeps_what_it_outgrew(rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA graphs write it: what a batch size was given stays, however many other sizes come. Fewer rows may need more."""
    monkeypatch.setattr(moe_workspace, "KEPT_BATCH_SIZES", 1)
    monkeypatch.setattr(moe_workspace, "_gemm_bytes", lambda shape, tokens, backends: {3: 300, 4: 500}.get(tokens, 200))
    monkeypatch.setattr(moe_workspace, "_scratch_elements", lambda shape, tokens, backends: {4: 70}.get(tokens, 50))
    workspace = mx.MoEWorkspace(*quantized(moe_truth.make_layer(rng)), max_tokens=9, top_k=2, backend="reference")
    before, shape = workspace.nbytes, workspace.shape
    chosen = moe_workspace.choose_backends(shape, 1, "reference")
    captured = []
    for tokens, gemm, scratch in ((9, 200, 50), (3, 300, 50), (4, 500, 70), (3, 500, 70), (9, 500, 70)):
        views = workspace.buffers(shape, tokens, chosen)
        assert views.gemm is not None
        assert (views.gemm.numel(), views.scratch.numel()) == (gemm, scratch)
        captured += [weakref.ref(views.gemm), weakref.ref(views.scratch)]
    del views
    gc.collect()
    assert all(reference() is not None for reference in captured)
    assert workspace.nbytes == before + 300 + 500 + 70 * 4


def test_module_is_the_function(backend: str, rng: torch.Generator) -> None:
    layer = moe_truth.make_layer(rng, bias=True)
    experts = mx.MXFP8Experts.from_weights(
        layer.w13, layer.w2, w13_bias=layer.w13_bias, w2_bias=layer.w2_bias, backend=backend
    )
    y = experts(layer.x, layer.ids, layer.weights)
    assert torch.equal(y, run(layer, backend))
    assert not list(experts.parameters())
    assert "experts=5, hidden=64, intermediate=32, bias=True" in repr(experts)

    w13q, w2q = quantized(layer)
    other = mx.MXFP8Experts(w13q, w2q, backend=backend)
    assert not torch.equal(other(layer.x, layer.ids, layer.weights), y)
    assert other.w13q.values.data_ptr() == w13q.values.data_ptr()


def test_module_survives_a_state_dict_and_a_change_of_dtype(rng: torch.Generator) -> None:
    layer = moe_truth.make_layer(rng)
    first, second = (
        mx.MXFP8Experts.from_weights(w13, layer.w2, backend="reference") for w13 in (layer.w13, layer.w13.flip(0))
    )
    y = first(layer.x, layer.ids, layer.weights)
    assert not torch.equal(second(layer.x, layer.ids, layer.weights), y)
    second.load_state_dict(first.state_dict())
    assert torch.equal(second(layer.x, layer.ids, layer.weights), y)
    assert torch.equal(first.to(torch.float16)(layer.x, layer.ids, layer.weights), y)
    assert first.w13_values.dtype == torch.uint8


def test_module_asks_its_backend_to_quantize(rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = moe_truth.make_layer(rng)
    absent = dataclasses.replace(BACKENDS["triton"], available=lambda device: (False, "not here"))
    monkeypatch.setitem(BACKENDS, "triton", absent)
    with pytest.raises(mx.BackendUnavailableError, match=r"^backend triton: not here$"):
        mx.MXFP8Experts.from_weights(layer.w13, layer.w2, backend="triton")


def test_biases_of_a_module_need_no_grad(rng: torch.Generator) -> None:
    layer = moe_truth.make_layer(rng, bias=True)
    assert layer.w13_bias is not None
    assert layer.w2_bias is not None
    biases = {"w13_bias": layer.w13_bias.requires_grad_(), "w2_bias": layer.w2_bias.requires_grad_()}
    experts = mx.MXFP8Experts.from_weights(layer.w13, layer.w2, **biases, backend="reference")
    assert not any(buffer.requires_grad for buffer in experts.buffers())
    experts(layer.x, layer.ids, layer.weights)


@pytest.fixture
def good(rng: torch.Generator) -> dict[str, Any]:
    """Arguments that fit together; M 9, E 5, H 64, I 32, top_k 2."""
    layer = moe_truth.make_layer(rng)
    w13q, w2q = quantized(layer)
    return {
        "x": layer.x,
        "w13q": w13q,
        "w2q": w2q,
        "topk_ids": layer.ids,
        "topk_weights": layer.weights,
        "backend": "reference",
    }


def weights(experts: int, n: int, k: int) -> mx.ExpertWeights:
    return mx.quantize_weights(torch.zeros(experts, n, k), backend="reference")


ERRORS: list[tuple[str, Any, type[Exception], str]] = [
    (
        "x",
        torch.zeros(9, 64, dtype=torch.int32),
        TypeError,
        "x: dtype must be bfloat16 or float16 or float32, got int32",
    ),
    ("x", torch.zeros(9, 2, 32), ValueError, "x: must have shape (M, H), got (9, 2, 32)"),
    (
        "x",
        torch.zeros(9, 32),
        ValueError,
        "x: must have shape (M, H) with topk_ids' M and w13q's H = (9, 64), got (9, 32)",
    ),
    ("x", torch.zeros(64, 9).T, ValueError, "x: must have unit stride along its columns, got strides (1, 9)"),
    ("x", torch.zeros(9, 64, requires_grad=True), ValueError, "x: must not require grad"),
    ("w13q", torch.zeros(5, 64, 64), TypeError, "w13q: must be an ExpertWeights (from quantize_weights), got Tensor"),
    (
        "w13q",
        weights(5, 96, 64),
        ValueError,
        "w13q: must be (E, 2I, H) = (5, 64, 64), as w2q is (E, H, I), got (5, 96, 64)",
    ),
    (
        "w2q",
        weights(4, 64, 32),
        ValueError,
        "w13q: must be (E, 2I, H) = (4, 64, 64), as w2q is (E, H, I), got (5, 64, 64)",
    ),
    ("topk_ids", torch.zeros(9, 2), TypeError, "topk_ids: dtype must be int32 or int64, got float32"),
    ("topk_ids", torch.zeros(9, dtype=torch.int64), ValueError, "topk_ids: must have shape (M, top_k), got (9,)"),
    ("topk_weights", torch.zeros(9, 3), ValueError, "topk_weights: must have shape (M, top_k) = (9, 2), got (9, 3)"),
    ("topk_weights", torch.zeros(9, 2, requires_grad=True), ValueError, "topk_weights: must not require grad"),
    (
        "activation",
        "gelu",
        ValueError,
        "activation: must be 'swiglu' (silu(gate) * up, elsewhere called 'silu'), 'swigluoai' or a SwiGLU, got 'gelu'",
    ),
    ("w13_bias", torch.zeros(5, 32), ValueError, "w13_bias: must have shape (E, N) = (5, 64), got (5, 32)"),
    ("w2_bias", torch.zeros(64, 5).T, ValueError, "w2_bias: must be contiguous, got shape (5, 64) with strides (1, 5)"),
    ("out", torch.zeros(9, 64), TypeError, "out: dtype must be bfloat16, got float32"),
    ("out", torch.zeros(8, 64, dtype=torch.bfloat16), ValueError, "out: must have shape (M, H) = (9, 64), got (8, 64)"),
    ("out", torch.zeros(64, 9, dtype=torch.bfloat16).T, ValueError, "out: must have unit stride along its columns"),
    ("workspace", torch.zeros(9), TypeError, "workspace: must be a MoEWorkspace, got Tensor"),
    ("backend", "cuda", ValueError, "backend: must be one of auto, cutlass, triton, reference, got 'cuda'"),
]


@pytest.mark.parametrize(("name", "value", "kind", "message"), ERRORS, ids=[f"{e[0]}: {e[3]}"[:60] for e in ERRORS])
def test_errors(good: dict[str, Any], name: str, value: Any, kind: type[Exception], message: str) -> None:
    mx.moe_forward(**good)
    with pytest.raises(kind, match=re.escape(message)):
        mx.moe_forward(**{**good, name: value})


def test_workspace_errors(good: dict[str, Any]) -> None:
    w13q, w2q = good["w13q"], good["w2q"]
    for options, kind, message in (
        ({"max_tokens": 0, "top_k": 2}, ValueError, "max_tokens: must be at least 1, got 0"),
        ({"max_tokens": 4, "top_k": 2.0}, TypeError, "top_k: must be an int, got float"),
        (  # with the experts' padding
            {"max_tokens": 2**30 - 1, "top_k": 2},
            ValueError,
            "max_tokens: M * top_k, and each expert's padding, must fit int32, got 2147483646",
        ),
        (
            {"max_tokens": 4, "top_k": 2, "dtype": torch.int8},
            TypeError,
            "dtype: must be bfloat16 or float16 or float32",
        ),
    ):
        with pytest.raises(kind, match=re.escape(message)):
            mx.MoEWorkspace(w13q, w2q, **options)
    small = mx.MoEWorkspace(w13q, w2q, max_tokens=8, top_k=2, backend="reference")
    with pytest.raises(ValueError, match=r"x: must have at most the workspace's max_tokens = 8 rows, got 9"):
        mx.moe_forward(**good, workspace=small)
    other = mx.MoEWorkspace(w13q, w2q, max_tokens=9, top_k=3, backend="reference")
    with pytest.raises(ValueError, match=r"^workspace: must be made for top_k = 2, got 3$"):
        mx.moe_forward(**good, workspace=other)
    other = mx.MoEWorkspace(
        *(w.to("meta") for w in (w13q, w2q)), max_tokens=9, top_k=3, dtype=torch.float16, backend="reference"
    )
    message = r"^workspace: must be made for top_k = 2, dtype = bfloat16, device = cpu, got 3, float16, meta$"
    with pytest.raises(ValueError, match=message):
        mx.moe_forward(**good, workspace=other)


def test_memory_of_one_call_must_fit_int32(good: dict[str, Any]) -> None:
    shape = moe_workspace.shape_of(good["w13q"], good["w2q"], 2, torch.bfloat16)
    chosen = moe_workspace.choose_backends(shape, 1, "reference")
    with pytest.raises(ValueError, match=r"^x: M \* top_k, and each expert's padding, must fit int32, got 2147483646$"):
        moe_workspace.allocate(shape, 2**30 - 1, chosen)


READ = (
    "x",
    "topk_ids",
    "topk_weights",
    "w13_bias",
    "w2_bias",
    "w13q.values",
    "w13q.scales",
    "w2q.values",
    "w2q.scales",
)


@pytest.mark.parametrize("name", READ)
def test_out_lies_apart_from_all_that_is_read(good: dict[str, Any], name: str) -> None:
    """It begins 16 bytes before the end of one of them."""
    good |= {"w13_bias": torch.zeros(5, 64), "w2_bias": torch.zeros(5, 64)}
    owner, _, part = name.partition(".")
    tensor = getattr(good[owner], part) if part else good[owner]
    size = tensor.numel() * tensor.itemsize
    memory = torch.zeros(size + 9 * 64 * 2, dtype=torch.uint8)
    there = memory[:size].view(tensor.dtype).view(tensor.shape).copy_(tensor)
    good[owner] = dataclasses.replace(good[owner], **{part: there}) if part else there
    out = memory[size - 16 :][: 9 * 64 * 2].view(torch.bfloat16).view(9, 64)
    with pytest.raises(ValueError, match=f"^out: must not overlap {name}, got"):
        mx.moe_forward(**good, out=out)


def test_out_over_x_has_its_rows(good: dict[str, Any]) -> None:
    """At the same place, but a row of it over two of x."""
    memory = torch.zeros(18, 64, dtype=torch.bfloat16)
    good["x"] = memory[:9].copy_(good["x"])
    mx.moe_forward(**good, out=good["x"])
    with pytest.raises(ValueError, match=r"^out: must not overlap x, got"):
        mx.moe_forward(**good, out=memory[::2])


def test_inputs_that_require_grad_pass_without_grad(good: dict[str, Any]) -> None:
    with torch.no_grad():
        mx.moe_forward(**{**good, "x": good["x"].clone().requires_grad_()})
