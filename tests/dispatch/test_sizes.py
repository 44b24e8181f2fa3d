"""A plan that follows from another's is, word for word, the one that is made from scratch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import cases
import pytest
import torch
from fake_driver import child, in_child  # noqa: F401
from test_triton_abi import loaded, use_gpu

import hybrid_mxfp8 as mx
from hybrid_mxfp8.core import layout
from hybrid_mxfp8.dispatch import device, plan, problem, registry
from hybrid_mxfp8.dispatch.backend import Call
from hybrid_mxfp8.dispatch.plan import PLANS, Plan
from hybrid_mxfp8.dispatch.trace import Trace

E, K, N, TOP_K = 4, 256, 384, 4
SIZES = (4096, 2, 1, 513, 15, 16, 17, 127, 128, 129, 3, 4, 5, 224, 225, 511, 512, 1024, 1025, 4095, 4097, 9000, 0)
FP8, U8, I32 = torch.float8_e4m3fn, torch.uint8, torch.int32


@contextlib.contextmanager
def gpu(arch: int) -> Iterator[None]:
    """CPU tensors pass for ones of a GPU of this architecture, whose driver is the fake one."""
    from hybrid_mxfp8.cutlass_kernels import backend as cutlass
    from hybrid_mxfp8.triton_kernels import abi
    from hybrid_mxfp8.triton_kernels import backend as triton
    from hybrid_mxfp8.triton_kernels.gemm import hopper

    abi_of = abi.abi_of
    use_gpu(arch)
    with pytest.MonkeyPatch.context() as patch:
        for module in (device, problem, triton, cutlass):
            patch.setattr(module, "capability", lambda device: divmod(arch, 10))
        patch.setattr(hopper, "multiprocessors", lambda device: 132)
        patch.setattr(abi, "abi_of", lambda compiled, arguments: abi_of(loaded(compiled), arguments))
        patch.setattr(torch.cuda, "device", contextlib.nullcontext)
        patch.setattr(torch.cuda, "current_device", lambda: 0)
        patch.setattr(plan, "_current_stream", lambda device: 0)
        patch.setattr(plan, "_several_gpus", lambda: False)
        yield
    PLANS.clear()


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


def layout_of(t: int) -> mx.GroupLayout:
    return mx.GroupLayout.unchecked(empty(E, dtype=I32), empty(E + 1, dtype=I32), empty(E + 1, dtype=I32), t)


def tokens(t: int, k: int = K) -> mx.GroupedMXFP8:
    groups = layout_of(t)
    return mx.GroupedMXFP8.unchecked(empty(t, k, dtype=FP8), empty(groups.scale_rows, k // 32, dtype=U8), groups)


def weights(n: int, k: int) -> mx.ExpertWeights:
    return mx.ExpertWeights.unchecked(empty(E, n, k, dtype=FP8), empty(E, -(-n // 128) * 128, k // 32, dtype=U8))


def gemm(t: int, **options: Any) -> None:
    mx.grouped_gemm(tokens(t), weights(N, K), **options)


def gemm_into_buffers(t: int) -> None:
    w = weights(N, K)
    workspace = cases.aligned_bytes(mx.grouped_gemm_workspace_size(w, t) + 16 * t)
    mx.grouped_gemm(tokens(t), w, out=empty(t, N), workspace=workspace)


def layer(t: int, ids: torch.dtype = torch.int64, **options: Any) -> None:
    x = empty(t, 2 * K)[:, :K] if options else empty(t, K)
    mx.moe_forward(x, weights(512, K), weights(K, 256), empty(t, TOP_K, dtype=ids), empty(t, TOP_K), **options)


def layer_in_workspace(t: int) -> None:
    w13, w2 = weights(512, K), weights(K, 256)
    workspace = mx.MoEWorkspace(w13, w2, max_tokens=4096, top_k=TOP_K)
    if t <= 4096:
        layer_of = empty(t, TOP_K, dtype=torch.int64), empty(t, TOP_K)
        mx.moe_forward(empty(t, K), w13, w2, *layer_of, workspace=workspace, out=empty(t, K))


def rows(t: int, **options: Any) -> None:
    mx.quantize_grouped(empty(t, 2 * K) if "activation" in options else empty(t, K), layout_of(t), **options)


CALLS: dict[str, tuple[int, Callable[[int], Any]]] = {
    "layout of counts": (90, lambda t: layout.launch(empty(E, dtype=I32), t, False)),  # type: ignore[misc]
    "quantize": (90, rows),
    "quantize swiglu": (90, lambda t: rows(t, activation="swiglu")),
    "quantize into out": (90, lambda t: rows(t, out=tokens(t))),
    "quantize of counts": (90, lambda t: mx.quantize_grouped(empty(t, K), empty(E, dtype=I32).zero_())),
    "quantize gathered": (
        90,
        lambda t: mx.quantize_grouped(empty(7 * t // 3, K), layout_of(t), row_index=empty(t, dtype=I32)),
    ),
    "gemm": (90, gemm),
    "gemm into buffers": (90, gemm_into_buffers),
    "gemm, portable": (89, lambda t: gemm(t, out_dtype=torch.float32)),
    "gemm, Blackwell": (100, lambda t: gemm(t, backend="triton")),
    "layer": (90, layer),
    "layer in a workspace": (90, layer_in_workspace),
    "layer with biases": (90, lambda t: layer(t, I32, w13_bias=empty(E, 512), w2_bias=empty(E, K))),
}


def plans_of(call: Callable[[int], Any]) -> dict[Any, Plan]:
    PLANS.clear()
    for t in SIZES:
        call(t)
    return dict(PLANS._plans)  # type: ignore[arg-type]


def words_of(made: Plan) -> list[Any]:
    return [made.result, *(list(program.words) for program, _ in made._parts or () if program)]


@pytest.mark.parametrize("name", CALLS)
@in_child
def test_plans_of_other_sizes_are_those_made_from_scratch(name: str) -> None:
    arch, call = CALLS[name]
    with gpu(arch):
        followed = plans_of(call)
        templates = [len(kept or ()) for kept in PLANS._templates.values()]
        with mock.patch.object(plan, "MAX_TEMPLATES", 0):
            scratch = plans_of(call)
        assert followed.keys() == scratch.keys()
        assert all(made._make is None for made in scratch.values())
        whole = [key for key, made in followed.items() if made._make is None and min(key[1]) > 1]
        assert len(whole) == sum(templates) < len(followed) / 2, templates
        for key, made in followed.items():
            assert words_of(made) == words_of(scratch[key]), key


@in_child
def test_plans_with_calls_in_them_are_made_from_scratch() -> None:
    from hybrid_mxfp8.triton_kernels.backend import BACKEND

    mixed = BACKEND._replace(plan=lambda problem, buffers: (Call(lambda *_: None, (problem, *buffers)),))
    with gpu(90), mock.patch.dict(registry._backends, triton=mixed):
        made = plans_of(layer)
    assert len(made) == len(SIZES) - 1
    assert not PLANS._templates
    for (_, [t]), of_size in made.items():
        calls = [step for step in of_size.steps if isinstance(step, Call)]
        assert [call.arguments[0].num_tokens for call in calls] == [t * TOP_K] * 2


@in_child
def test_hooks_see_a_followed_plan_as_any_other() -> None:
    """Its steps are made when they are needed; so are the operands that an overlap names."""
    triton_launches: list[Any] = []
    with gpu(90):
        for t in (16, 17):
            rows(t)
        [followed] = [made for made in PLANS._plans.values() if made._make is not None]
        whole = followed._make()  # type: ignore[misc]
        x = empty(17, K)
        tensors = (x, empty(*followed.result[2:4], dtype=U8), empty(17, K, dtype=FP8), *[empty(E + 1, dtype=I32)] * 3)
        with pytest.raises(ValueError, match=r"^out: must not overlap x, got addresses"):
            followed.run(x, tensors[1], x.view(FP8).flatten()[: 17 * K].view(17, K), *tensors[3:])
        assert (followed.operands, followed.steps) == (whole.operands, whole.steps)
        with (
            mock.patch.object(type(whole.steps[0]), "run", lambda step, *given: triton_launches.append((step, *given))),
            mock.patch.object(followed, "_step_by_step", return_value=True),
        ):
            followed.run(*tensors)
    assert triton_launches == [(whole.steps[0], tensors, torch.device("cpu"))]


def test_what_a_size_can_not_follow_is_refused() -> None:
    """So nothing that depends on one is ever taken for a constant."""
    [size] = Trace((5,)).sizes
    sums: tuple[Callable[[Any], object], ...] = (lambda s: s + "1", lambda s: s & 1, lambda s: s**2, lambda s: f"{s}")
    for use in (hash, int, float, range, chr, str, repr, (0, 1, 2).__getitem__, torch.empty, *sums):
        with pytest.raises(TypeError):
            use(size)


def test_conditions_part_sizes() -> None:
    trace = Trace((5, 7))
    t, s = trace.sizes
    words = [0, max(t, 3) * 2 + (0 - s) // 4, 1 << (10 - t % 4).bit_length(), 12 / t, min(8, s)]
    fill = trace.compiled(words, (t, 9))
    for sizes, expected in {(5, 7): [0, 8, 16, 2.4, 7], (9, 6): [0, 16, 16, 12 / 9, 6]}.items():
        out: list[Any] = [0, 0, 0, 0, 0]
        assert fill(out, *sizes) == (sizes[0], 9)
        assert out[1] == expected[1]
        assert [out[3], out[4]] == expected[3:]
    for other in ((5, 8), (3, 7), (1, 7), (5, 1)):
        assert fill([0] * 5, *other) is None
    with pytest.raises(TypeError, match="must be a number, got str"):
        trace.compiled(words, (t, "9"))
