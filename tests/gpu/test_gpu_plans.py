"""Plans on a GPU: what a call launches and allocates, hooks, streams, and Triton's launches in the
launcher's place."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import triton
from forked import Child
from on_gpu import Layer, LayerAndProduct, allocations, captured

import hybrid_mxfp8 as mx
from hybrid_mxfp8.dispatch import launcher, plan
from hybrid_mxfp8.dispatch.plan import PLANS
from hybrid_mxfp8.triton_kernels import launch

pytestmark = [pytest.mark.gpu, pytest.mark.sanitizer]


@pytest.fixture
def layer(rng: torch.Generator) -> LayerAndProduct:
    made = LayerAndProduct(rng, [3, 0, 5, 1, 1, 2, 4, 0])
    made.quantize()
    return made


@contextmanager
def hooked() -> Iterator[list[str]]:
    """Names of the kernels that Triton's hooks see meanwhile."""
    names: list[str] = []

    def note(metadata: Any) -> None:
        names.append(metadata.get()["name"])

    triton.knobs.runtime.launch_enter_hook.add(note)
    try:
        yield names
    finally:
        triton.knobs.runtime.launch_enter_hook.remove(note)


hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
PRODUCT = ["dequantize_tokens_kernel", "hopper_gemm_kernel"] if hopper else ["grouped_gemm_kernel"]


def test_what_is_launched_and_allocated(layer: LayerAndProduct) -> None:
    """Nothing but the outputs, and one arena where the call needs memory of its own."""
    if torch.cuda.get_device_capability()[0] >= 10:
        pytest.skip("compute capability 10 has other kernels")
    product_allocations = 2 if hopper else 1
    counts = layer.groups.tokens_per_expert
    layered = ["rank_kernel", "quantize_kernel", *PRODUCT, "quantize_kernel", *PRODUCT, "combine_kernel"]
    calls: list[tuple[Callable[[], object], list[str], int]] = [
        (lambda: mx.quantize_grouped(layer.x, layer.groups), ["quantize_kernel"], 2),
        (layer.quantize, ["quantize_kernel"], 0),
        (lambda: mx.quantize_grouped(layer.x, counts), ["quantize_kernel"], 3),
        (lambda: mx.grouped_gemm(layer.xq, layer.w13q), PRODUCT, product_allocations),
        (layer.multiply, PRODUCT, 0),
        (layer.eager, layered, 2),
        (layer.run, layered, 0),
    ]
    for call, names, allocated in calls:
        call()
        with hooked() as seen:
            call()
        assert seen == names
        # Where tests/support/sanitize.py makes each tensor an allocation, PyTorch counts none.
        if "PYTORCH_NO_CUDA_MEMORY_CACHING" not in os.environ:
            assert allocations(call) == allocated


def test_hooks_see_every_launch_and_then_none(layer: LayerAndProduct) -> None:
    expected = layer.eager().clone()
    with hooked() as seen:
        assert torch.equal(layer.eager(), expected)
        first = len(seen)
        PLANS.clear()
        assert torch.equal(layer.eager(), expected)
    assert len(seen) == 2 * first > 0
    assert torch.equal(layer.eager(), expected)
    assert len(seen) == 2 * first


def test_without_a_launcher_triton_launches_the_same(layer: LayerAndProduct, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [layer.eager(), mx.grouped_gemm(layer.xq, layer.w13q)]

    def refuse() -> None:
        raise launcher.LauncherUnavailableError("no compiler")

    from hybrid_mxfp8.triton_kernels import abi

    monkeypatch.setattr(abi, "load", refuse)
    monkeypatch.setattr(launch, "_compiled", {})
    PLANS.clear()
    for _ in range(2):
        got = [layer.eager(), mx.grouped_gemm(layer.xq, layer.w13q)]
        assert all(map(torch.equal, got, expected))
    PLANS.clear()


def test_sizes_never_seen_give_what_plans_from_scratch_give(
    rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = Layer(rng, 700, experts=8, top_k=2, bias=False)
    sizes = (512, 16, 2, 3, 17, 100, 1, 127, 128, 129, 511, 513, 700)

    def results() -> list[torch.Tensor]:
        PLANS.clear()
        return [layer.forward(layer.x[:m], layer.ids[:m], layer.weights[:m]) for m in sizes]

    followed = results()
    assert 0 < sum(map(len, PLANS._templates.values())) < len(sizes) - 1
    monkeypatch.setattr(plan, "MAX_TEMPLATES", 0)
    assert all(map(torch.equal, followed, results()))
    assert not PLANS._templates


def test_launches_follow_the_current_stream(layer: LayerAndProduct) -> None:
    """That of the call, not of the plan's first call: behind what was queued there."""
    expected = layer.eager().clone()
    for stream in (torch.cuda.Stream(), torch.cuda.Stream()):
        x = layer.x.clone()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            layer.x.zero_()
            torch.cuda._sleep(20_000_000)
            layer.x.copy_(x)
            got = layer.eager()
        stream.synchronize()
        assert torch.equal(got, expected)


def test_the_recipe_of_cuda_graphs(layer: LayerAndProduct, rng: torch.Generator) -> None:
    """Warm-up on the default stream, then on a side stream, then capture: one workspace for all."""
    layer.eager(workspace=layer.workspace)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            layer.run()
    torch.cuda.current_stream().wait_stream(side)
    graph, _ = captured(layer.run)
    for _ in range(3):
        layer.refill(rng, 8)
        graph.replay()
        replayed = layer.out.clone()
        assert torch.equal(replayed, layer.eager(workspace=layer.workspace))


def test_a_forked_child_has_no_plans(layer: LayerAndProduct) -> None:
    layer.eager()
    assert Child(lambda: (len(PLANS._plans), len(launch._compiled))).result() == (0, 0)
    assert torch.equal(layer.eager(), layer.eager())
