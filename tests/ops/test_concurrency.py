"""Calls beside one another: threads, forked and spawned processes, workers of a DataLoader, streams and devices.

Streams and devices are stand-ins here; tests/gpu/test_gpu_concurrency.py has real ones.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import multiprocessing
import os
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import cases
import moe_truth
import pytest
import torch
from launched import kernels_in_source

import hybrid_mxfp8 as mx
from hybrid_mxfp8.dispatch.registry import BACKENDS
from hybrid_mxfp8.ops import workspace as moe_workspace

THREADS, ROUNDS = 3, 2


def together(threads: int, work: Callable[[int], Any]) -> list[Any]:
    """work(0), work(1), ... each on a thread of its own, all started at once; raises what the first failed one raised."""
    barrier = threading.Barrier(threads)

    def start(i: int) -> Any:
        barrier.wait(timeout=60)
        return work(i)

    with ThreadPoolExecutor(threads) as pool:
        futures: list[Future[Any]] = [pool.submit(start, i) for i in range(threads)]
        return [future.result(timeout=300) for future in futures]


def job(seed: int, backend: str) -> list[torch.Tensor]:
    """All public functions on data of this seed: their bytes."""
    rng = torch.Generator().manual_seed(seed)
    x = cases.random_rows(20 + seed, 160, torch.bfloat16, rng)
    w = torch.randn(2, 40, 160, generator=rng)
    counts = torch.tensor([9, 11 + seed], dtype=torch.int32)
    out = cases.poisoned_output(cases.layout([9, 11 + seed]), 160)
    xq = mx.quantize_grouped(x, counts, out=out, backend=backend)
    wq = mx.quantize_weights(w, backend=backend)
    y = mx.grouped_gemm(xq, wq, out_dtype=torch.float32, backend=backend)
    layer = moe_truth.make_layer(rng, tokens=5 + seed, experts=3)
    w13q, w2q = (mx.quantize_weights(each, backend="reference") for each in (layer.w13, layer.w2))
    z = mx.moe_forward(layer.x, w13q, w2q, layer.ids, layer.weights, backend=backend)
    return [xq.values.view(torch.uint8), xq.scales, wq.values.view(torch.uint8), wq.scales, y, z]


CALLS_OF_A_JOB = 4


def same(got: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


# ---------------------------------------------------------------- threads


def test_threads_get_what_one_thread_gets(backend: str, tally: Any) -> None:
    """Triton's interpreter keeps its place in the grid in a global: without a lock, threads compute each other's tiles."""
    expected = [job(seed, backend) for seed in range(THREADS)]
    results = together(THREADS, lambda seed: [job(seed, backend) for _ in range(ROUNDS)])
    for got, wanted in zip(results, expected, strict=True):
        assert all(same(one, wanted) for one in got)
    tally("concurrent calls", THREADS * ROUNDS * CALLS_OF_A_JOB)


def test_threads_that_come_first_together(interpreter: None, monkeypatch: pytest.MonkeyPatch, tally: Any) -> None:
    """Nothing is cached yet: modules are imported, configurations chosen and backends probed by all at once."""
    from hybrid_mxfp8.dispatch.registry import _interpreted
    from hybrid_mxfp8.triton_kernels import quantize
    from hybrid_mxfp8.triton_kernels.gemm import portable as grouped_gemm

    expected = [job(seed, "triton") for seed in range(THREADS)]
    for cached in (
        _interpreted,
        grouped_gemm.select_gemm_config,
        grouped_gemm.formulation_for,
        grouped_gemm._capability,
        quantize.select_quantize_config,
    ):
        cached.cache_clear()
    results = together(THREADS, lambda seed: job(seed, "triton"))
    assert all(same(got, wanted) for got, wanted in zip(results, expected, strict=True))
    tally("concurrent calls", THREADS * CALLS_OF_A_JOB)


def test_threads_compile_a_kernel_once(interpreter: None, monkeypatch: pytest.MonkeyPatch, tally: Any) -> None:
    """The launch cache with a compiler that takes its time: one compilation a key, every launch done, none lost."""
    from hybrid_mxfp8.triton_kernels import launch as launcher

    compiled: list[tuple[Any, ...]] = []
    launched: list[tuple[Any, ...]] = []

    class Compiled:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *arguments: launched.append((grid, *arguments))

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Compiled]:
            def compile_and_run(*arguments: Any, **options: int) -> Compiled:
                time.sleep(0.02)
                compiled.append(arguments)
                launched.append(((grid[0], 1, 1), *arguments))
                return Compiled()

            return compile_and_run

    monkeypatch.setattr(launcher, "INTERPRETED", False)
    monkeypatch.setattr(launcher, "_loaded", {})
    monkeypatch.setattr(launcher, "_launcher_is_known", lambda: False)
    x = torch.zeros(1)

    def work(i: int) -> None:
        for key in ("a", "b"):
            launcher.launch(Kernel(), 7, (x, i), (key,), (("num_warps", 4),), key)

    together(8, work)
    assert len(compiled) == 2
    assert sorted((grid[0], i, key) for grid, _, i, key in launched) == [(7, i, key) for i in range(8) for key in "ab"]
    tally("concurrent calls", 16)


def test_a_backend_in_force_is_its_threads_own(monkeypatch: pytest.MonkeyPatch, tally: Any) -> None:
    """use_backend() reaches no other thread; the environment reaches all, and is read at each call."""
    from hybrid_mxfp8.dispatch.registry import requested

    names = ["reference", "triton", "cutlass", "auto"]

    def work(i: int) -> list[str]:
        seen = []
        for _ in range(200):
            with mx.use_backend(names[i]):
                time.sleep(0)
                seen.append(requested(None))
            seen.append(requested(None))
        return seen

    monkeypatch.setenv("HYBRID_MXFP8_BACKEND", "triton")
    for name, seen in zip(names, together(4, work), strict=True):
        assert seen == [name, "triton"] * 200
    tally("concurrent calls", 4 * 400)


# ---------------------------------------------------------------- one workspace, several threads or streams


def layer_and_weights(seed: int = 0) -> tuple[moe_truth.Layer, mx.ExpertWeights, mx.ExpertWeights]:
    layer = moe_truth.make_layer(torch.Generator().manual_seed(seed), tokens=6)
    return layer, *(mx.quantize_weights(w, backend="reference") for w in (layer.w13, layer.w2))


def workspace_of(w13q: mx.ExpertWeights, w2q: mx.ExpertWeights) -> mx.MoEWorkspace:
    return mx.MoEWorkspace(w13q, w2q, max_tokens=8, top_k=2, backend="reference")


def test_threads_with_their_own_workspaces(tally: Any) -> None:
    layer, w13q, w2q = layer_and_weights()
    workspaces = [workspace_of(w13q, w2q) for _ in range(THREADS)]

    def call(tokens: int, workspace: mx.MoEWorkspace | None) -> torch.Tensor:
        batch = (layer.ids[:tokens], layer.weights[:tokens])
        return mx.moe_forward(layer.x[:tokens], w13q, w2q, *batch, workspace=workspace, backend="reference")

    expected = [call(tokens, None) for tokens in range(1, 7)]
    for results in together(THREADS, lambda i: [call(1 + (i + step) % 6, workspaces[i]) for step in range(12)]):
        assert all(any(torch.equal(y, e) for e in expected if e.shape == y.shape) for y in results)
    tally("concurrent calls", THREADS * 12)


def test_a_workspace_in_use_is_refused_to_another_thread(monkeypatch: pytest.MonkeyPatch, tally: Any) -> None:
    """The second call comes while the first one is between its launches: it raises, and the first is right."""
    layer, w13q, w2q = layer_and_weights()
    workspace = workspace_of(w13q, w2q)
    call = (layer.x, w13q, w2q, layer.ids, layer.weights)
    expected = mx.moe_forward(*call, backend="reference")
    inside, go_on = threading.Event(), threading.Event()
    quantize = BACKENDS["reference"].quantize_grouped

    def slow(*arguments: Any) -> Any:
        inside.set()
        assert go_on.wait(60)
        return quantize(*arguments)

    monkeypatch.setitem(BACKENDS, "reference", dataclasses.replace(BACKENDS["reference"], quantize_grouped=slow))
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(mx.moe_forward, *call, workspace=workspace, backend="reference")
        assert inside.wait(60)
        with pytest.raises(
            ValueError, match=r"^workspace: must be used by one thread at a time, and thread \d+ is using"
        ):
            mx.moe_forward(*call, workspace=workspace, backend="reference")
        go_on.set()
        assert torch.equal(first.result(60), expected)
    monkeypatch.undo()
    assert torch.equal(mx.moe_forward(*call, workspace=workspace, backend="reference"), expected)
    tally("concurrent calls", 2)


def test_a_call_that_fails_gives_the_workspace_back() -> None:
    layer, w13q, w2q = layer_and_weights()
    workspace = workspace_of(w13q, w2q)
    many = (layer.x.repeat(2, 1), w13q, w2q, layer.ids.repeat(2, 1), layer.weights.repeat(2, 1))
    with pytest.raises(ValueError, match="max_tokens = 8"):
        mx.moe_forward(*many, workspace=workspace, backend="reference")
    with ThreadPoolExecutor(1) as pool:
        call = (layer.x, w13q, w2q, layer.ids, layer.weights)
        pool.submit(mx.moe_forward, *call, workspace=workspace, backend="reference").result(60)


class Streams:
    """Stand-ins for torch.cuda's streams: which is current, which are captured, who waits for whom, and whose memory is whose."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current = self.Stream(self, 0)
        self.capturing: set[int] = set()
        self.waits: list[tuple[int, int]] = []
        self.recorded: list[tuple[int, int]] = []
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: self.current)
        monkeypatch.setattr(
            torch.cuda, "is_current_stream_capturing", lambda: self.current.cuda_stream in self.capturing
        )
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        monkeypatch.setattr(
            torch.Tensor,
            "record_stream",
            lambda tensor, stream: self.recorded.append((tensor.untyped_storage().data_ptr(), stream.cuda_stream)),
        )

    class Stream:
        def __init__(self, streams: Streams, cuda_stream: int) -> None:
            self.streams, self.cuda_stream = streams, cuda_stream

        def __eq__(self, other: object) -> bool:
            return isinstance(other, Streams.Stream) and other.cuda_stream == self.cuda_stream

        __hash__ = None  # type: ignore[assignment]

        def wait_stream(self, other: Streams.Stream) -> None:
            self.streams.waits.append((self.cuda_stream, other.cuda_stream))

    def on(self, cuda_stream: int) -> None:
        self.current = self.Stream(self, cuda_stream)


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> tuple[mx.MoEWorkspace, Streams]:
    """A workspace that thinks it is on a GPU with streams 0, 16, 32."""
    _, w13q, w2q = layer_and_weights()
    workspace = workspace_of(w13q, w2q)
    workspace.shape = workspace.shape._replace(device=torch.device("cuda", 0))
    return workspace, Streams(monkeypatch)


def use(workspace: mx.MoEWorkspace) -> None:
    with workspace.in_use():
        pass


def test_a_workspace_belongs_to_the_stream_of_its_first_call(on_gpu: Any, tally: Any) -> None:
    workspace, streams = on_gpu
    streams.on(16)
    use(workspace)
    use(workspace)
    streams.on(32)
    refused = r"^workspace: must be used on one stream, and its last call was on 0x10 .*move_to_current_stream.* got stream 0x20$"
    for _ in range(2):
        with pytest.raises(ValueError, match=refused):
            use(workspace)
    streams.on(16)
    use(workspace)  # the owner may go on
    assert streams.waits == []
    tally("concurrent calls", 5)


def test_a_stream_takes_a_workspace_over(on_gpu: Any, tally: Any) -> None:
    workspace, streams = on_gpu
    workspace.move_to_current_stream()  # of nobody's: nothing to wait for
    assert streams.waits == []
    streams.on(16)
    workspace.move_to_current_stream()
    assert streams.waits == [(16, 0)]
    use(workspace)
    streams.on(0)
    with pytest.raises(ValueError, match="workspace: must be used on one stream"):
        use(workspace)
    tally("concurrent calls", 2)


def test_capture_uses_a_workspace_on_any_stream(on_gpu: Any, tally: Any) -> None:
    """Eager calls before and after on the stream they always used; waiting for it inside a capture would break that."""
    workspace, streams = on_gpu
    streams.capturing = {48}
    streams.on(48)
    use(workspace)  # captured before any eager call: owned by nobody
    streams.on(16)
    use(workspace)
    streams.on(48)
    use(workspace)
    workspace.move_to_current_stream()
    assert streams.waits == []
    streams.on(16)
    use(workspace)
    tally("concurrent calls", 4)


def test_the_first_call_waits_where_the_memory_came_from(monkeypatch: pytest.MonkeyPatch, tally: Any) -> None:
    """What PyTorch's allocator gave out there may still be in use by what was queued before. A copy's memory is a copy's.

    From then on the workspace is its stream's, also where the two are one.
    """
    streams = Streams(monkeypatch)
    monkeypatch.setattr(moe_workspace, "_current_stream", lambda device: streams.current)
    _, w13q, w2q = layer_and_weights()
    for made_on in (0, 16):
        streams.on(made_on)
        workspace = workspace_of(w13q, w2q)
        streams.on(32)
        copied = copy.deepcopy(workspace)
        for each in (workspace, copied):
            each.shape = each.shape._replace(device=torch.device("cuda", 0))
        streams.on(16)
        use(workspace)
        use(copied)
        use(copied)
        streams.on(48)
        for each in (workspace, copied):
            with pytest.raises(
                ValueError, match="workspace: must be used on one stream, and its last call was on 0x10"
            ):
                use(each)
        assert streams.waits == ([(16, 0)] if made_on == 0 else []) + [(16, 32)]
        streams.waits.clear()
    tally("concurrent calls", 6)


def test_memory_is_freed_after_the_calls_of_every_owner(monkeypatch: pytest.MonkeyPatch, tally: Any) -> None:
    """PyTorch's allocator knows the stream that memory was allocated on: each other owner is recorded, with all there is then."""
    streams = Streams(monkeypatch)
    monkeypatch.setattr(moe_workspace, "_current_stream", lambda device: streams.current)
    monkeypatch.setattr(moe_workspace, "_gemm_bytes", lambda shape, tokens, backends: 100 * tokens)
    _, w13q, w2q = layer_and_weights()
    workspace = workspace_of(w13q, w2q)
    on_cpu = workspace.shape
    workspace.shape = on_cpu._replace(device=torch.device("cuda", 0))

    def recorded() -> set[tuple[int, int]]:
        pairs = list(streams.recorded)
        streams.recorded.clear()
        assert len([pair for pair in pairs if pair[0]]) == len({pair for pair in pairs if pair[0]})
        return set(pairs)

    def of(stream: int) -> set[tuple[int, int]]:
        tensors = [*memory_of(workspace), workspace._largest.gemm, *workspace._outgrown]
        return {(t.untyped_storage().data_ptr(), stream) for t in tensors if t is not None}

    use(workspace)  # where it was made
    assert recorded() == set()
    streams.on(16)
    workspace.move_to_current_stream()
    assert recorded() == of(16)
    use(workspace)
    assert recorded() == set()
    outgrown = workspace._largest.gemm
    workspace.shape = on_cpu
    monkeypatch.setattr(moe_workspace, "_gemm_bytes", lambda shape, tokens, backends: 200 * tokens)
    workspace.buffers(on_cpu, 4, moe_workspace.choose_backends(on_cpu, 4, "reference"))
    workspace.shape = on_cpu._replace(device=torch.device("cuda", 0))
    assert workspace._outgrown == [outgrown]
    streams.capturing = {32}
    streams.on(32)
    use(workspace)
    workspace.move_to_current_stream()
    assert recorded() == set()
    streams.on(0)
    workspace.move_to_current_stream()
    assert recorded() == of(0)
    tally("concurrent calls", 3)


def test_a_workspace_on_a_cpu_records_no_stream() -> None:
    """Without a stand-in PyTorch would raise."""
    layer, w13q, w2q = layer_and_weights()
    workspace = workspace_of(w13q, w2q)
    workspace.move_to_current_stream()
    mx.moe_forward(layer.x, w13q, w2q, layer.ids, layer.weights, workspace=workspace, backend="reference")


def test_a_call_that_is_refused_does_not_take_the_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    """It leaves it to whatever stream it belonged to, or to none."""
    layer, w13q, w2q = layer_and_weights()
    workspace = workspace_of(w13q, w2q)
    used: list[bool] = []
    monkeypatch.setattr(mx.MoEWorkspace, "in_use", lambda self: used.append(True) or contextlib.nullcontext())
    for repeats, top_k, message in ((2, 2, "max_tokens = 8"), (1, 1, "workspace: must be made for")):
        ids, weights = (t[:, :top_k].repeat(repeats, 1) for t in (layer.ids, layer.weights))
        with pytest.raises(ValueError, match=message):
            mx.moe_forward(layer.x.repeat(repeats, 1), w13q, w2q, ids, weights, workspace=workspace)
    assert used == []
    mx.moe_forward(layer.x, w13q, w2q, layer.ids, layer.weights, workspace=workspace)
    assert used


def pickled(original: Any) -> Any:
    return pickle.loads(pickle.dumps(original))


def saved(original: Any, map_location: str | None = None) -> Any:
    file = io.BytesIO()
    torch.save(original, file)
    file.seek(0)
    return torch.load(file, map_location, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {"deepcopy": copy.deepcopy, "pickle": pickled, "torch.save": saved}


def memory_of(workspace: mx.MoEWorkspace) -> list[torch.Tensor]:
    b = workspace._largest
    tensors = [b.sorted_token_ids, b.inverse_permutation, b.layout, b.scratch, b.h, b.y]
    tensors += [t for operand in (b.xq, b.hq) for t in (operand.values, operand.scales)]
    return [t.view(torch.uint8) for t in tensors]


def test_copies_of_a_workspace_belong_to_nobody(on_gpu: Any) -> None:
    workspace, streams = on_gpu
    use(workspace)
    for make_copy in COPIES.values():
        twin = make_copy(workspace)
        twin.shape = workspace.shape
        streams.on(32)
        use(twin)
        streams.on(0)
    use(workspace)


@pytest.mark.parametrize("way", COPIES)
def test_a_copy_of_a_workspace_computes_in_its_own_memory(way: str, backend: str, tally: Any) -> None:
    """Tokens choose other experts than before the copy, so what an earlier call left there would be wrong."""
    layer, w13q, w2q = layer_and_weights()

    def call(ids: torch.Tensor, workspace: mx.MoEWorkspace | None) -> torch.Tensor:
        return mx.moe_forward(layer.x, w13q, w2q, ids, layer.weights, workspace=workspace, backend=backend)

    workspace = workspace_of(w13q, w2q)
    call(layer.ids, workspace)
    twin = COPIES[way](workspace)
    assert (twin.shape, twin.max_tokens, twin.nbytes) == (workspace.shape, workspace.max_tokens, workspace.nbytes)
    held = [t.clone() for t in memory_of(workspace)]
    for ids in (layer.ids.clamp(max=1), layer.ids.clamp(min=2)):
        assert torch.equal(call(ids, twin), call(ids, None))
    assert same(memory_of(workspace), held)
    assert torch.equal(call(layer.ids, workspace), call(layer.ids, None))
    tally("concurrent calls", 3)


def test_a_pickled_workspace_holds_no_memory() -> None:
    _, w13q, w2q = layer_and_weights()
    sizes = [mx.MoEWorkspace(w13q, w2q, max_tokens=tokens, top_k=2, backend="reference") for tokens in (8, 8000)]
    assert len(pickle.dumps(sizes[1])) < len(pickle.dumps(sizes[0])) + 100


def test_a_loaded_workspace_is_where_its_tensors_would_be() -> None:
    """``map_location`` decides on memory and shape alike."""
    _, w13q, w2q = layer_and_weights()
    loaded = saved(workspace_of(w13q, w2q), map_location="meta")
    assert loaded.shape.device.type == "meta"
    assert {t.device.type for t in memory_of(loaded)} == {"meta"}


@pytest.mark.parametrize("way", COPIES)
def test_a_copied_module_computes_the_same(way: str) -> None:
    """Two layers share a workspace, and so do their copies."""
    layer, w13q, w2q = layer_and_weights()
    workspace = workspace_of(w13q, w2q)
    modules = torch.nn.ModuleList(
        mx.MXFP8Experts(w13q, w2q, workspace=workspace, backend="reference") for _ in range(2)
    )
    modules[0](layer.x, layer.ids, layer.weights)
    ids = layer.ids.clamp(max=1)
    copied = COPIES[way](modules)
    assert copied[0].workspace is copied[1].workspace is not workspace
    for original, twin in zip(modules, copied, strict=True):
        assert torch.equal(twin(layer.x, ids, layer.weights), original(layer.x, ids, layer.weights))


# ---------------------------------------------------------------- devices


def test_every_launch_is_on_its_tensors_device(interpreter: None, monkeypatch: pytest.MonkeyPatch, tally: Any) -> None:
    """Triton launches on the current device: each launcher first makes that of its tensors current."""
    from hybrid_mxfp8.triton_kernels import (
        caller_layout,
        combine,
        dequantize_tokens,
        expert_bias,
        group_layout,
        grouped_gemm,
        grouped_gemm_blackwell,
        grouped_gemm_hopper,
        quantize,
        route,
    )
    from hybrid_mxfp8.triton_kernels.gemm.hopper_config import select_hopper_config

    current: list[torch.device] = []
    launched: list[str] = []

    @contextlib.contextmanager
    def on_device_of(tensor: torch.Tensor) -> Iterator[None]:
        current.append(tensor.device)
        yield
        current.pop()

    def launch(kernel: Any, programs: int, arguments: tuple[Any, ...], *rest: Any) -> None:
        assert current, f"{kernel} is launched on whatever device is current"
        assert current[-1] == arguments[0].device
        launched.append(kernel.fn.__name__)

    guarded = (caller_layout, combine, expert_bias, group_layout, grouped_gemm, grouped_gemm_blackwell, quantize, route)
    for module in guarded:
        monkeypatch.setattr(module, "on_device_of", on_device_of)
    for module in (*guarded, dequantize_tokens, grouped_gemm_hopper):
        monkeypatch.setattr(module, "launch", launch)
    x = torch.zeros(9, 64)
    groups = cases.layout([4, 0, 5])
    xq = mx.quantize_grouped(x, groups, backend="triton")
    mx.quantize_grouped(x, groups.tokens_per_expert, backend="triton")
    wq = mx.quantize_weights(torch.zeros(3, 16, 64), backend="triton")
    group_layout.group_offsets(groups.tokens_per_expert, 9, False)
    caller_layout.caller_layout(groups.tokens_per_expert, groups.scale_offsets[:3].contiguous(), 9, groups.scale_rows)
    for tokens in (6, 5000):  # one launch of routing, and three
        layer = moe_truth.make_layer(torch.Generator().manual_seed(0), tokens=tokens, bias=True)
        w13q, w2q = (mx.quantize_weights(w, backend="reference") for w in (layer.w13, layer.w2))
        bias = {"w13_bias": layer.w13_bias, "w2_bias": layer.w2_bias}
        mx.moe_forward(layer.x, w13q, w2q, layer.ids, layer.weights, backend="triton", **bias)
    mx.grouped_gemm(xq, wq, backend="triton")
    monkeypatch.setattr(grouped_gemm, "blackwell_takes", lambda *args: True)
    mx.grouped_gemm(xq, wq, backend="triton")
    monkeypatch.setattr(grouped_gemm, "hopper_config_for", lambda *args: select_hopper_config(9, 3))
    monkeypatch.setattr(grouped_gemm, "_multiprocessors", lambda device: 132)
    mx.grouped_gemm(xq, wq, backend="triton")
    assert set(launched) == kernels_in_source()
    tally("concurrent calls", len(launched))


@pytest.mark.parametrize(("current", "switched"), [(0, []), (1, [torch.device("cuda", 0)])], ids=["same", "other"])
def test_the_device_is_switched_only_where_it_differs(
    interpreter: None, monkeypatch: pytest.MonkeyPatch, current: int, switched: list[torch.device]
) -> None:
    from hybrid_mxfp8.triton_kernels import launch

    class Tensor:
        is_cuda = True
        device = torch.device("cuda", 0)

    asked: list[torch.device] = []
    monkeypatch.setattr(launch, "_several_gpus", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(torch.cuda, "device", lambda device: asked.append(device) or contextlib.nullcontext())
    with launch.on_device_of(Tensor()):  # type: ignore[arg-type]
        pass
    assert asked == switched


# ---------------------------------------------------------------- processes


class Quantized(torch.utils.data.Dataset[mx.GroupedMXFP8]):
    """Batches that are quantized where they are loaded."""

    def __init__(self, backend: str) -> None:
        self.backend = backend

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> mx.GroupedMXFP8:
        rng = torch.Generator().manual_seed(index)
        x = cases.random_rows(20 + index, 96, torch.bfloat16, rng)
        out = cases.poisoned_output(cases.layout([20, index]), 96)
        return mx.quantize_grouped(x, out.groups, out=out, backend=self.backend)


def same_operand(got: mx.GroupedMXFP8, expected: mx.GroupedMXFP8) -> bool:
    pairs = [(got.values.view(torch.uint8), expected.values.view(torch.uint8)), (got.scales, expected.scales)]
    pairs += [(getattr(got.groups, n), getattr(expected.groups, n)) for n in ("expert_offsets", "scale_offsets")]
    return got.groups.num_tokens == expected.groups.num_tokens and all(torch.equal(a, b) for a, b in pairs)


def test_workers_of_a_data_loader(backend: str, tally: Any) -> None:
    """Forked after this process has used the library; operands come back through shared memory, whole."""
    dataset = Quantized(backend)
    expected = [dataset[i] for i in range(len(dataset))]
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=120
    )
    got = list(loader)
    assert len(got) == len(expected)
    assert all(same_operand(g, e) for g, e in zip(got, expected, strict=True))
    tally("concurrent calls", len(got))


def _in_child(seed: int, backend: str, results: Any) -> None:
    torch.set_num_threads(1)
    results.put((seed, [t.view(torch.uint8).numpy().tobytes() for t in job(seed, backend)]))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_children(method: str, backend: str, tally: Any) -> None:
    """Two at once, the spawned ones beside a thread of this process that computes the same."""
    expected = {seed: [t.view(torch.uint8).numpy().tobytes() for t in job(seed, backend)] for seed in range(2)}
    context = multiprocessing.get_context(method)
    results = context.Queue()
    stop = threading.Event()

    def keep_busy() -> int:
        calls = 0
        while not stop.is_set():
            job(0, backend)
            calls += CALLS_OF_A_JOB
        return calls

    with ThreadPoolExecutor(1) as pool:
        busy = pool.submit(keep_busy) if method == "spawn" else None
        children = [context.Process(target=_in_child, args=(seed, backend, results), daemon=True) for seed in range(2)]
        try:
            for child in children:
                child.start()
            got = dict(results.get(timeout=120) for _ in children)
            for child in children:
                child.join(60)
        finally:
            stop.set()
            for child in children:
                child.kill()
    assert got == expected
    assert [child.exitcode for child in children] == [0, 0]
    tally("concurrent calls", 2 * CALLS_OF_A_JOB + (busy.result() if busy else 0))


def _use_in_child(workspace: mx.MoEWorkspace, call: tuple[Any, ...], results: Any) -> None:
    torch.set_num_threads(1)
    y = mx.moe_forward(*call, workspace=workspace, backend="reference")
    results.put(y.view(torch.uint8).numpy().tobytes())


def test_a_spawned_child_gets_a_workspace_of_its_own(tally: Any) -> None:
    """PyTorch passes tensors to a child as shared memory: the child must not write the parent's."""
    layer, w13q, w2q = layer_and_weights()
    workspace = workspace_of(w13q, w2q)
    mx.moe_forward(layer.x, w13q, w2q, layer.ids, layer.weights, workspace=workspace, backend="reference")
    for tensor in memory_of(workspace):
        tensor.fill_(cases.POISON)
    held = [t.clone() for t in memory_of(workspace)]
    call = (layer.x, w13q, w2q, layer.ids.clamp(max=1), layer.weights)
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    child = context.Process(target=_use_in_child, args=(workspace, call, results), daemon=True)
    child.start()
    try:
        got = results.get(timeout=120)
        child.join(60)
    finally:
        child.kill()
    assert got == mx.moe_forward(*call, backend="reference").view(torch.uint8).numpy().tobytes()
    assert same(memory_of(workspace), held)
    tally("concurrent calls", 2)


def test_a_lock_held_at_a_fork_does_not_hang_the_child(interpreter: None, tally: Any) -> None:
    """The thread that held it is not in the child, and would never let go."""
    from hybrid_mxfp8.triton_kernels import launch

    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with launch._one_thread():
            held.set()
            done.wait(120)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(hold)
        assert held.wait(60)
        context = multiprocessing.get_context("fork")
        results = context.Queue()
        child = context.Process(target=_in_child, args=(0, "triton", results), daemon=True)
        try:
            child.start()
            seed, _ = results.get(timeout=120)
        finally:
            done.set()
            child.kill()
    assert seed == 0
    tally("concurrent calls")


def test_a_forked_child_knows_no_loaded_kernel(interpreter: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A handle of the parent's CUDA context is of no use there: launching by Triton's dispatch, the child meets PyTorch's error."""
    from hybrid_mxfp8.triton_kernels import launch

    launch._forget_in_children()
    monkeypatch.setattr(launch, "_loaded", {"key": None})
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    child = context.Process(target=lambda: results.put(len(launch._loaded)), daemon=True)
    child.start()
    assert results.get(timeout=60) == 0
    child.join(60)
    assert launch._loaded == {"key": None}


def test_operands_travel(backend: str) -> None:
    """Pickled, deep-copied and saved: the same bytes, checked again on arrival."""
    xq = Quantized(backend)[3]
    wq = mx.quantize_weights(torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(1)), backend=backend)
    file = io.BytesIO()
    torch.save((xq, wq), file)
    file.seek(0)
    saved = torch.load(file, weights_only=False)
    for x, w in (pickle.loads(pickle.dumps((xq, wq))), copy.deepcopy((xq, wq)), saved):
        assert same_operand(x, xq)
        assert torch.equal(w.values.view(torch.uint8), wq.values.view(torch.uint8))
        assert torch.equal(w.scales, wq.scales)


def test_each_process_has_its_own_lock(interpreter: None) -> None:
    from hybrid_mxfp8.triton_kernels import launch

    assert launch._one_thread() is launch._one_thread()
    assert set(launch._locks) >= {os.getpid()}
