"""Tensors that wrap others: what a collective returns is waited for, others are named."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import cases
import moe_truth
import pytest
import torch
import torch.distributed as dist

import hybrid_mxfp8 as mx


@pytest.fixture(autouse=True)
def _one_rank() -> Iterator[None]:
    if not dist.is_available():
        pytest.skip("this PyTorch is built without torch.distributed")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def gathered(x: torch.Tensor) -> torch.Tensor:
    """What all_gather_tensor returns: x, in a tensor that must be waited for."""
    from torch.distributed._functional_collectives import AsyncCollectiveTensor, all_gather_tensor

    result = all_gather_tensor(x, 0, dist.group.WORLD)
    assert type(result) is AsyncCollectiveTensor
    return result


class Wrapper(torch.Tensor):
    """Has a shape and a dtype, and no memory."""

    @staticmethod
    def __new__(cls, x: torch.Tensor) -> Wrapper:
        return torch.Tensor._make_wrapper_subclass(cls, x.shape, strides=x.stride(), dtype=x.dtype)  # type: ignore[attr-defined,no-any-return]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} was called")


def distributed(x: torch.Tensor) -> torch.Tensor:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    return distribute_tensor(x, init_device_mesh("cpu", (1,)), [Replicate()])


Wrap = Callable[[torch.Tensor], torch.Tensor]
COUNTS = torch.tensor([3, 0, 4], dtype=torch.int32)
X = torch.randn(7, 64, generator=torch.Generator().manual_seed(0))
LAYER = moe_truth.make_layer(torch.Generator().manual_seed(0))


def weights() -> list[mx.ExpertWeights]:
    return [mx.quantize_weights(w) for w in (LAYER.w13, LAYER.w2)]


def _bits(xq: mx.GroupedMXFP8) -> list[torch.Tensor]:
    """Without the scale rows that nobody writes."""
    return [cases.bits(xq.values), xq.linear_scales()]


CALLS: dict[str, tuple[str, Callable[[Wrap], list[torch.Tensor]]]] = {
    "quantize_grouped": ("groups", lambda f: _bits(mx.quantize_grouped(f(X), f(COUNTS)))),
    "row_index": (
        "row_index",
        lambda f: _bits(mx.quantize_grouped(X, COUNTS, row_index=f(torch.arange(7, dtype=torch.int32)))),
    ),
    "from_counts": ("tokens_per_expert", lambda f: [mx.GroupLayout.from_counts(f(COUNTS), 7).scale_offsets]),
    "from_linear_scales": (
        "values",
        lambda f: _bits(
            mx.GroupedMXFP8.from_linear_scales(
                *(f(t.to(torch.uint8)) for t in (X.abs() * 20, X[:, :2].abs() * 20)),
                mx.GroupLayout.from_counts(COUNTS, 7),
            )
        ),
    ),
    "quantize_weights": ("w", lambda f: [cases.bits(mx.quantize_weights(f(LAYER.w2)).values)]),
    "moe_forward": ("x", lambda f: [mx.moe_forward(f(LAYER.x), *weights(), f(LAYER.ids), f(LAYER.weights))]),
}


@pytest.mark.filterwarnings("ignore:.*all_gather_tensor.*:FutureWarning")
@pytest.mark.parametrize("name", CALLS)
def test_what_a_collective_returns_is_waited_for(name: str, cpu_backend: str) -> None:
    _, call = CALLS[name]
    with mx.use_backend(cpu_backend):
        assert all(map(torch.equal, call(gathered), call(lambda x: x)))


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(("wrap", "kind"), [(Wrapper, "Wrapper"), (distributed, r"DTensor, of which .to_local\(\)")])
def test_other_wrappers_are_named(wrap: Wrap, kind: str, name: str) -> None:
    argument, call = CALLS[name]
    with pytest.raises(TypeError, match=f"^{argument}: must be a tensor with memory of its own, got {kind}"):
        call(wrap)


def test_weights_that_are_wrapped_are_named() -> None:
    module = mx.MXFP8Experts(*weights())
    module.w2_scales = distributed(module.w2_scales)
    with pytest.raises(TypeError, match=r"^w2_scales: must be a tensor with memory of its own, got DTensor"):
        module(LAYER.x, LAYER.ids, LAYER.weights)
