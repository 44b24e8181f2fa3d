"""The MoE layer as part of a GPU program: no sync, no allocation, CUDA graphs, torch.compile,
streams."""

from __future__ import annotations

from collections.abc import Callable

import cases
import pytest
import torch
from on_gpu import Layer, allocations, captured

import hybrid_mxfp8 as mx

pytestmark = pytest.mark.gpu


def make(rng: torch.Generator, tokens: int, scale_group: int = 32) -> Layer:
    return Layer(rng, tokens, hidden=512, intermediate=256, scale_group=scale_group)


def test_a_warm_call_neither_syncs_nor_allocates(kernel: str, rng: torch.Generator, no_sync: None) -> None:
    torch.cuda.set_sync_debug_mode("default")
    layer = make(rng, 33)
    module = mx.MXFP8Experts(layer.w13q, layer.w2q, workspace=layer.workspace, backend="triton")
    arguments = (layer.x, layer.ids, layer.weights)
    for _ in range(4):
        layer.run()
        module(*arguments)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    assert allocations(layer.run) == 0
    assert allocations(lambda: module(*arguments)) == 1  # its output
    layer.eager()  # without a workspace it allocates, but does not sync either


@pytest.mark.parametrize("tokens", [1, 40, 1200])
def test_a_graph_replays_with_other_counts(kernel: str, rng: torch.Generator, tokens: int) -> None:
    """Other tokens, routed elsewhere, to one expert, or nowhere at all: eager's bits each time.
    The capture is the workspace's first call, and eager ones with it come in between."""
    layer = make(rng, tokens)
    layer.run()
    layer.workspace = layer.new_workspace()
    graph, _ = captured(layer.run)
    for spread in (16, 1, 3, 0, 16):
        layer.refill(rng, spread)
        y = layer.computed(graph.replay)
        assert torch.equal(y, layer.eager()), spread
        assert torch.equal(y, layer.computed(layer.run))
        assert bool(y.any()) == (spread != 0)


@pytest.mark.parametrize("scale_group", [32, 128])
@pytest.mark.parametrize("tokens", [1, 16, 300])
def test_kernels_that_start_early_read_and_write_nothing_early(
    kernel: str, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch, tokens: int, scale_group: int
) -> None:
    """Of other routing each time and over poison, eagerly and from a graph: the bits of launches
    that wait for each other as a whole."""
    layer = make(rng, tokens, scale_group)
    layer.run()
    graph, _ = captured(layer.run)

    def computed(run: Callable[[], object], poison: int) -> torch.Tensor:
        layer.workspace._arena.fill_(poison)
        return cases.bits(layer.computed(run))

    for step in range(24):
        layer.refill(rng, (16, 1, 3, 16, 8)[step % 5])
        with monkeypatch.context() as patch:
            patch.setenv("HYBRID_MXFP8_PDL", "0")
            expected = computed(layer.run, 0)
        for run in (layer.run, graph.replay):
            for poison in (0xFF, 0x7F):
                assert torch.equal(computed(run, poison), expected)


def test_a_graph_keeps_its_memory_when_the_workspace_grows(
    rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made and captured with the portable kernel, then used with the Hopper one, which needs
    more."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")
    monkeypatch.setenv("HYBRID_MXFP8_HOPPER_GEMM", "0")
    layer = make(rng, 40)
    layer.run()
    graph, _ = captured(layer.run)
    portable = layer.computed(graph.replay)
    monkeypatch.setenv("HYBRID_MXFP8_HOPPER_GEMM", "1")
    hopper = layer.computed(layer.run)
    filler = [torch.full((size,), 0xFF, dtype=torch.uint8, device="cuda") for size in (2**16, 2**20, 2**22)]
    assert mx.signal_to_noise_db(portable, hopper) > 40.0
    assert torch.equal(layer.computed(graph.replay), portable)
    assert torch.equal(layer.computed(layer.run), hopper)
    assert all(bool((t == 0xFF).all()) for t in filler)


def test_compiled_by_inductor(fresh_dynamo: None, rng: torch.Generator) -> None:
    """fullgraph, one compilation for routings and batch sizes, eager's bits."""
    layer = make(rng, 80)
    compiled = torch.compile(layer.forward, fullgraph=True)
    for step, tokens in enumerate((80, 7, 33)):
        batch = (layer.x[:tokens].clone(), (layer.ids[:tokens] + step) % 16, layer.weights[:tokens].clone())
        for tensor in batch:
            torch._dynamo.mark_dynamic(tensor, 0)
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            assert torch.equal(compiled(*batch), layer.forward(*batch))


def test_compiled_with_cuda_graphs(fresh_dynamo: None, rng: torch.Generator) -> None:
    layer = make(rng, 24)

    def block(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return layer.forward(x + 1, ids, weights) * 2

    compiled = torch.compile(block, mode="reduce-overhead", fullgraph=True)
    for shift in range(5):
        batch = (layer.x, (layer.ids + shift) % 16, layer.weights)
        assert torch.equal(compiled(*batch).clone(), block(*batch))


def test_functions_compiled_by_inductor(fresh_dynamo: None, rng: torch.Generator) -> None:
    """quantize and GEMM as operators of their own, the layout built in the graph."""
    wq = mx.quantize_weights(torch.randn(4, 64, 128, generator=rng).to("cuda"))

    def product(x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        return mx.grouped_gemm(mx.quantize_grouped(x * 2, counts), wq).float() + 1

    compiled = torch.compile(product, fullgraph=True)
    x = torch.randn(40, 128, generator=rng).to("cuda")
    for counts in ([40, 0, 0, 0], [3, 17, 0, 20]):
        given = torch.tensor(counts, dtype=torch.int32, device="cuda")
        assert torch.equal(compiled(x, given), product(x, given))
