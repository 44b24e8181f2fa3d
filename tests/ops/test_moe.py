"""The MoE layer: against fp64, as its steps, with a workspace, with choices dropped, as a module.

Errors and overlaps are in test_bad_calls.py, copies and threads in test_concurrency.py.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from typing import Any, NamedTuple

import cases
import moe_truth
import pytest
import torch
from moe_truth import Layer

import hybrid_mxfp8 as mx
from hybrid_mxfp8.ops import workspace as workspaces

ON_GPU = cases.device() == "cuda"
SIZE: dict[str, Any] = (
    {"tokens": 33, "experts": 16, "hidden": 512, "intermediate": 256, "top_k": 4}
    if ON_GPU
    else {"tokens": 24, "hidden": 128, "intermediate": 96}
)
MIN_SNR_DB = 23.0 if ON_GPU else 22.0
"""Of a layer of normal data, which is at 23.6 to 23.8 dB, and in layers as small as those
interpreted at 23.1 to 24.2; ``moe_forward`` says why not more."""


def make(rng: torch.Generator, device: str, **shape: Any) -> Layer:
    return moe_truth.to(moe_truth.make_layer(rng, **shape), device)


def quantized(layer: Layer, group: int = 32) -> tuple[mx.ExpertWeights, mx.ExpertWeights]:
    w13q, w2q = (mx.quantize_weights(w, scale_group=group, backend="reference") for w in (layer.w13, layer.w2))
    return w13q, w2q


def run(layer: Layer, backend: str | None, *, group: int = 32, **options: Any) -> torch.Tensor:
    """With weights in groups of ``group``."""
    bias = {"w13_bias": layer.w13_bias, "w2_bias": layer.w2_bias}
    batch = (layer.ids, layer.weights)
    return mx.moe_forward(layer.x, *quantized(layer, group), *batch, backend=backend, **{**bias, **options})


def snr(layer: Layer, y: torch.Tensor, *activation: Any) -> float:
    return mx.signal_to_noise_db(moe_truth.forward(moe_truth.to(layer, "cpu"), *activation), y.cpu())


def sanitized(rows: Iterable[tuple[Any, ...]], *marked: tuple[Any, ...]) -> list[Any]:
    """Few are: each launch of a Hopper kernel takes racecheck ten seconds."""
    return [pytest.param(*row, marks=pytest.mark.sanitizer if row in marked else ()) for row in rows]


ROWS = itertools.product(cases.DTYPES, (False, True), (False, True))
LAYERS = sanitized(ROWS, (torch.bfloat16, True, True), (torch.float32, False, False))


@pytest.mark.parametrize(("dtype", "bias", "dropped"), LAYERS, ids=str)
def test_signal_to_noise(
    multiplier: str, device: str, rng: torch.Generator, dtype: torch.dtype, bias: bool, dropped: bool
) -> None:
    layer = make(rng, device, **SIZE, dtype=dtype, bias=bias, dropped=dropped)
    for group in (32, 128):
        y = run(layer, multiplier, group=group)
        assert y.dtype == dtype
        assert snr(layer, y) > MIN_SNR_DB


@pytest.mark.parametrize(
    ("tokens", "experts", "hidden", "intermediate", "top_k"),
    [(1, 1, 32, 32, 1), (1, 64, 64, 32, 8), (70, 3, 32, 64, 1), (3, 4, 160, 160, 4)],
)
def test_shapes(
    multiplier: str, device: str, rng: torch.Generator, tokens: int, experts: int, hidden: int, intermediate: int,
    top_k: int,
) -> None:  # fmt: skip
    shape = {"tokens": tokens, "experts": experts, "hidden": hidden, "intermediate": intermediate, "top_k": top_k}
    layer = make(rng, device, **shape, ids_dtype=torch.int32)
    assert snr(layer, run(layer, multiplier)) > 19.0  # few elements


def test_another_activation(multiplier: str, device: str, rng: torch.Generator) -> None:
    """By name, as a SwiGLU, by its spec, as a module's; plain SwiGLU is not taken for it."""
    layer = make(rng, device, **{**SIZE, "tokens": 12}, bias=True)
    w13q, w2q = quantized(layer)
    activation = mx.SwiGLU(alpha=1.702, beta=1.0, limit=7.0)
    results = [run(layer, multiplier, activation=given) for given in ("swigluoai", activation, activation.spec)]
    assert snr(layer, run(layer, multiplier)) > MIN_SNR_DB - 1
    bias = {"w13_bias": layer.w13_bias, "w2_bias": layer.w2_bias}
    module = mx.MXFP8Experts(w13q, w2q, **bias, activation="swigluoai", backend=multiplier)
    assert module.activation == activation
    results.append(module(layer.x, layer.ids, layer.weights))
    assert all(torch.equal(result, results[0]) for result in results)
    assert snr(layer, results[0], moe_truth.swigluoai) > 22.0
    assert snr(layer, results[0]) < 10.0


@pytest.mark.parametrize("dtype", sanitized(zip(cases.DTYPES), (torch.bfloat16,)), ids=str)
def test_tokens_in_mxfp8_have_the_bits_of_those_quantized(
    multiplier: str, device: str, rng: torch.Generator, dtype: torch.dtype
) -> None:
    """As ``quantize_tokens`` leaves them, and in memory of their own: NaN, zeros, a part of a tile,
    dropped choices, a workspace."""
    shape = {**SIZE, "hidden": 160} if ON_GPU else {"tokens": 9, "hidden": 160, "top_k": 3}
    layer = make(rng, device, **shape, dtype=dtype, bias=True, dropped=True)
    layer.x[3], layer.x[4, 7] = 0.0, float("nan")
    expected = run(layer, multiplier)
    tokens = mx.quantize_tokens(layer.x, backend=multiplier)
    assert (tokens.shape, tokens.dtype, tokens.device) == (layer.x.shape, dtype, layer.x.device)
    assert mx.signal_to_noise_db(layer.x[:3].float(), tokens.dequantize()[:3]) > 28.0
    apart = mx.MXFP8Tokens(tokens.values.clone().contiguous(), tokens.scales.contiguous(), dtype)
    space = mx.MoEWorkspace(*quantized(layer), max_tokens=40, top_k=shape["top_k"], dtype=dtype, backend=multiplier)
    for given in (tokens, apart):
        for options in ({}, {"workspace": space}, {"out": torch.empty_like(layer.x)}):
            y = run(dataclasses.replace(layer, x=given), multiplier, **options)
            assert torch.equal(cases.bits(y), cases.bits(expected))


@pytest.mark.parametrize("groups", [(32, 32), (128, 32), (32, 128)], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("tokens", [1, 11, 200, 3000] if ON_GPU else [11])
def test_a_layer_is_its_steps(
    multiplier: str, device: str, rng: torch.Generator, tokens: int, bias: bool, groups: tuple[int, int]
) -> None:
    """The public functions one after the other, with the rounding that saturates nothing, and the
    groups of the weights: the same bits. As a module, too, and with groups of 32 asked for."""
    layer = moe_truth.make_layer(
        rng, tokens=tokens, hidden=160, intermediate=96, bias=bias, dropped=True, dtype=torch.float32
    )
    layer = moe_truth.to(moe_truth.spread_scales(layer, rng), device)
    weights = (quantized(layer, groups[0])[0], quantized(layer, groups[1])[1])
    batch = (layer.x, layer.ids, layer.weights)
    options = {"w13_bias": layer.w13_bias, "w2_bias": layer.w2_bias, "backend": multiplier}
    y = mx.MXFP8Experts(*weights, **options)(*batch)
    assert torch.equal(y, moe_truth.forward_in_steps(layer, *weights, multiplier, scale_groups=groups))
    in_32 = mx.moe_forward(batch[0], *weights, *batch[1:], scale_group=32, **options)
    assert torch.equal(in_32, moe_truth.forward_in_steps(layer, *weights, multiplier))
    assert groups[1] == 32 or not torch.equal(in_32, y)


@pytest.mark.parametrize("tokens", [8, 1100] if ON_GPU else [5])
def test_a_workspace_gives_the_same_bits_for_every_batch_it_holds(
    multiplier: str, device: str, rng: torch.Generator, tokens: int
) -> None:
    """In poisoned memory: what is read was written. Rows of ``out`` behind the batch stay."""
    layer = make(rng, device, tokens=tokens, dropped=True, bias=True)
    workspace = mx.MoEWorkspace(*quantized(layer), max_tokens=tokens, top_k=2, backend=multiplier)
    out = torch.full_like(layer.x, float("nan"))
    for batch in (tokens, 1, 4, tokens):
        part = dataclasses.replace(layer, x=layer.x[:batch], ids=layer.ids[:batch], weights=layer.weights[:batch])
        for memory in cases.memory_of(workspace):
            memory.fill_(cases.POISON)
        out.fill_(float("nan"))
        run(part, multiplier, workspace=workspace, out=out[:batch])
        assert torch.equal(out[:batch], run(part, multiplier))
        assert bool(out[batch:].isnan().all())


def test_workspace_of_a_large_layer() -> None:
    """DeepSeek-V3's, as docs/moe.md has it: 3H + 5I bytes a row and what Hopper's product adds."""
    from hybrid_mxfp8.triton_kernels.gemm.hopper_config import WorkspaceLayout, select_hopper_config

    experts, hidden, intermediate, rows = 256, 7168, 2048, 8192 * 8
    w13q, w2q = (
        mx.quantize_weights(torch.empty(experts, *size, dtype=torch.bfloat16, device="meta"))
        for size in ((2 * intermediate, hidden), (hidden, intermediate))
    )
    workspace = mx.MoEWorkspace(w13q, w2q, max_tokens=8192, top_k=8)
    assert "max_tokens=8192" in repr(workspace)
    nbytes = workspace.nbytes
    assert 1 < nbytes / (rows * (3 * hidden + 5 * intermediate)) < 1.02
    assert round(nbytes / 1e9, 1) == 2.1
    config = select_hopper_config(rows, experts)
    widened = max(WorkspaceLayout.of(rows, experts, k, config).size for k in (hidden, intermediate))
    assert 1 <= widened / (rows * 2 * hidden) < 1.01
    assert round(widened / 1e9, 2) == 0.94


def test_a_workspace_on_a_second_stream_waits_for_the_first(
    rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in PyTorch's recipe for CUDA graphs, which warms up on a side stream. Streams are
    stand-ins: tests/gpu has real ones."""
    waits: list[tuple[int, int]] = []

    class Stream(NamedTuple):
        cuda_stream: int

        def wait_stream(self, other: Stream) -> None:
            waits.append((self.cuda_stream, other.cuda_stream))

    layer = make(rng, "cpu")
    workspace = mx.MoEWorkspace(*quantized(layer), max_tokens=9, top_k=2, backend="reference")
    workspace._stream = Stream(0)  # type: ignore[assignment]
    monkeypatch.setattr(workspaces, "is_capturing", lambda device: False)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
    expected = run(layer, "reference")
    for current in (0, 7, 7, 0):
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device, now=current: Stream(now))
        monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index, now=current: now, raising=False)
        assert torch.equal(run(layer, "reference", workspace=workspace), expected)
    assert waits == [(7, 0), (0, 7)]


# ---------------------------------------------------------------- the module


def test_module_is_the_function(backend: str, device: str, rng: torch.Generator) -> None:
    """Biases lose their grad; a change of dtype changes no weight."""
    layer = moe_truth.make_layer(rng, intermediate=64, bias=True)  # of one block any scales have groups of 128
    assert layer.w13_bias is not None
    assert layer.w2_bias is not None
    biases = {"w13_bias": layer.w13_bias.requires_grad_(), "w2_bias": layer.w2_bias.requires_grad_()}
    experts = mx.MXFP8Experts.from_weights(layer.w13, layer.w2, **biases, backend="reference").to(device)
    assert not any(buffer.requires_grad for buffer in experts.buffers())
    assert not list(experts.parameters())
    assert "experts=5, hidden=64, intermediate=64, bias=True, scale_group=32, squares=False" in repr(experts)
    there = moe_truth.to(layer, device)
    experts.backend = backend
    with torch.no_grad():
        y = run(there, backend)
    for module in (experts, experts.to(torch.float16)):  # whose bytes that leaves alone
        assert torch.equal(module(there.x, there.ids, there.weights), y)
    w13q, w2q = quantized(there)
    other = mx.MXFP8Experts(w13q, w2q, backend=backend)
    assert not torch.equal(other(there.x, there.ids, there.weights), y)
    assert other.w13q.values.data_ptr() == w13q.values.data_ptr()


def module_of(layer: Layer, **options: Any) -> mx.MXFP8Experts:
    return mx.MXFP8Experts.from_weights(layer.w13, layer.w2, backend="reference", **options)


DTYPES = {"values": (torch.uint8, torch.float8_e4m3fn), "scales": (torch.uint8, torch.float8_e8m0fnu)}


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
@pytest.mark.parametrize("handed_out", [0, 1], ids=["bytes", "float8"])
def test_module_loads_bytes_of_every_dtype_they_come_in(assign: bool, handed_out: int, rng: torch.Generator) -> None:
    """Those of ExpertWeights and of files; inside another module, too. Copied by value, float8 in
    uint8 is another number."""
    layer = make(rng, "cpu")
    other = dataclasses.replace(layer, w13=layer.w13.flip(0), w2=layer.w2.flip(0))
    one, two = (torch.nn.ModuleList([module_of(each)]) for each in (layer, other))
    state = {name: t.view(DTYPES[name.rpartition("_")[2]][handed_out]) for name, t in one.state_dict().items()}
    assert str(two.load_state_dict(state, assign=assign)) == "<All keys matched successfully>"
    for name, loaded in two.state_dict().items():
        assert loaded.dtype == torch.uint8
        assert torch.equal(loaded, one.state_dict()[name])


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
@pytest.mark.parametrize("name", ["w13_values", "w2_scales"])
def test_module_refuses_other_dtypes(name: str, assign: bool, rng: torch.Generator) -> None:
    layer = make(rng, "cpu")
    module = module_of(layer)
    before = {key: t.clone() for key, t in module.state_dict().items()}
    expected = {"w13_values": "uint8 or float8_e4m3fn", "w2_scales": "uint8 or float8_e8m0fnu"}[name]
    with pytest.raises(RuntimeError, match=f"{name}: dtype must be {expected}, got bfloat16"):
        module.load_state_dict(before | {name: before[name].bfloat16()}, assign=assign, strict=False)
    assert all(torch.equal(t, before[key]) for key, t in module.state_dict().items())


@pytest.mark.parametrize("name", ["w13_values", "w13_scales", "w2_values", "w2_scales"])
def test_module_reads_no_strided_views(name: str, multiplier: str, device: str, rng: torch.Generator) -> None:
    """Assigned by load_state_dict they are copied; set as an attribute they are refused, though a
    plan of these shapes is there. So are others that are no weights."""
    layer = make(rng, device)
    module = module_of(layer)
    module.backend = multiplier
    y = module(layer.x, layer.ids, layer.weights)
    state = module.state_dict()
    wide = torch.full((*state[name].shape, 2), 127, dtype=torch.uint8, device=device)
    wide[..., 0] = state[name]
    module.load_state_dict(dict(state) | {name: wide[..., 0]}, assign=True)
    assert torch.equal(module(layer.x, layer.ids, layer.weights), y)
    buffer = getattr(module, name)
    buffer.data = buffer.data.mT  # the same memory
    with pytest.raises(ValueError, match=f"^{name}: must"):
        module(layer.x, layer.ids, layer.weights)
    for wrong in (wide[..., 0], None, state[name].float(), state[name][0]):
        setattr(module, name, wrong)
        with pytest.raises((TypeError, ValueError), match=f"^{name}: (must|dtype must) be|^{name}: must have shape"):
            module(layer.x, layer.ids, layer.weights)


def test_module_from_transposed_and_interleaved_weights(rng: torch.Generator) -> None:
    """As gpt-oss keeps them: (E, K, N), gate and up in turns, in the bias, too."""
    layer = make(rng, "cpu", bias=True)
    expected = module_of(layer, w13_bias=layer.w13_bias, w2_bias=layer.w2_bias).state_dict()
    in_turns = [t.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2) for t in (layer.w13, layer.w13_bias)]
    for transposed, interleaved in itertools.product((False, True), repeat=2):
        w13, bias = in_turns if interleaved else (layer.w13, layer.w13_bias)
        w13, w2 = (w.transpose(1, 2).contiguous() if transposed else w for w in (w13, layer.w2))
        options = {"w13_bias": bias, "w2_bias": layer.w2_bias, "transposed": transposed, "interleaved": interleaved}
        given = mx.MXFP8Experts.from_weights(w13, w2, **options, backend="reference").state_dict()
        assert all(torch.equal(given[name], t) for name, t in expected.items())


def test_module_asks_its_backend_to_quantize(rng: torch.Generator) -> None:
    """Which raises where it can't run, also for no tokens."""
    layer = make(rng, "cpu")
    with mx.use_backend("reference"), pytest.raises(mx.BackendUnavailableError, match=r"^backend cutlass"):
        mx.MXFP8Experts.from_weights(layer.w13, layer.w2, backend="cutlass")(layer.x, layer.ids, layer.weights)
    with pytest.raises(mx.BackendUnavailableError, match=r"^backend cutlass"):
        run(dataclasses.replace(layer, x=layer.x[:0], ids=layer.ids[:0], weights=layer.weights[:0]), "cutlass")
