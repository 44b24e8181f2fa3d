"""Calls beside one another on the CPU: threads, workspaces, copies, forked and spawned processes.

Streams, graphs and devices are in tests/gpu.
"""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import cases
import moe_truth
import pytest
import torch
from cases import memory_of
from forked import Child
from jobs import Quantized, forget_everything, job, together
from torch.utils._python_dispatch import TorchDispatchMode

import hybrid_mxfp8 as mx
from hybrid_mxfp8 import env

THREADS = 3
pytestmark = pytest.mark.skipif(cases.device() == "cuda", reason="of a CPU: set TRITON_INTERPRET=1")


def test_threads_get_what_one_thread_gets(backend: str) -> None:
    """Triton's interpreter keeps its place in the grid in a global: without a lock, threads compute
    each other's tiles. In the first round nothing is cached, and all probe and choose at once."""
    rounds = 1 if backend == "triton" else 5
    expected = [job(seed, backend) for seed in range(THREADS)]
    forget_everything()
    results = together(THREADS, lambda seed: [job(seed, backend) for _ in range(rounds)])
    assert results == [[wanted] * rounds for wanted in expected]


# ---------------------------------------------------------------- workspaces

LAYER = moe_truth.make_layer(torch.Generator().manual_seed(0), tokens=6)
WEIGHTS = [mx.quantize_weights(w, backend="reference") for w in (LAYER.w13, LAYER.w2)]


def new_workspace(max_tokens: int = 8) -> mx.MoEWorkspace:
    return mx.MoEWorkspace(*WEIGHTS, max_tokens=max_tokens, top_k=2, backend="reference")


def contents(workspace: mx.MoEWorkspace) -> list[bytes]:
    return [t.numpy().tobytes() for t in memory_of(workspace)]


def forward(workspace: mx.MoEWorkspace | None = None, ids: torch.Tensor = LAYER.ids) -> torch.Tensor:
    return mx.moe_forward(LAYER.x, *WEIGHTS, ids, LAYER.weights, workspace=workspace, backend="reference")


class Pause(TorchDispatchMode):
    """Stops its thread in the first product, until it may go on."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.go_on = threading.Event(), threading.Event()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "mm" in str(func) and not self.inside.is_set():
            self.inside.set()
            assert self.go_on.wait(60)
        return func(*args, **(kwargs or {}))


def test_a_workspace_in_use_is_refused_to_another_thread() -> None:
    """The second call comes between the first's steps: it raises, and the first is right."""
    workspace, pause, expected = new_workspace(), Pause(), forward()

    def first() -> torch.Tensor:
        with pause:
            return forward(workspace)

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(first)
        assert pause.inside.wait(60)
        message = r"^workspace: must be used by one thread at a time, and thread \d+ is using"
        with pytest.raises(ValueError, match=message):
            forward(workspace)
        pause.go_on.set()
        assert torch.equal(running.result(60), expected)
    assert torch.equal(forward(workspace), expected)


def test_a_call_that_fails_gives_the_workspace_back() -> None:
    workspace = new_workspace()
    x, ids, weights = (t.repeat(2, 1) for t in (LAYER.x, LAYER.ids, LAYER.weights))
    with pytest.raises(ValueError, match="max_tokens = 8"):
        mx.moe_forward(x, *WEIGHTS, ids, weights, workspace=workspace, backend="reference")
    with ThreadPoolExecutor(1) as pool:
        pool.submit(forward, workspace).result(60)


def saved(original: Any, map_location: str | None = None) -> Any:
    file = io.BytesIO()
    torch.save(original, file)
    file.seek(0)
    return torch.load(file, map_location, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda original: pickle.loads(pickle.dumps(original)),
    "torch.save": saved,
}


@pytest.mark.parametrize("way", COPIES)
def test_a_copy_computes_in_its_own_memory(way: str) -> None:
    """Of two modules that share a workspace, as their copies do. Tokens choose other experts than
    before the copy: what an earlier call left there would be wrong."""
    workspace = new_workspace()
    modules = torch.nn.ModuleList(mx.MXFP8Experts(*WEIGHTS, workspace=workspace, backend="reference") for _ in range(2))
    for _ in range(3):
        modules[0](LAYER.x, LAYER.ids, LAYER.weights)
    copied = COPIES[way](modules)
    twin = copied[0].workspace
    assert twin is copied[1].workspace is not workspace
    assert (twin.shape, twin.max_tokens, twin.nbytes) == (workspace.shape, workspace.max_tokens, workspace.nbytes)
    held = contents(workspace)
    for module, ids in itertools.product(copied, (LAYER.ids.clamp(max=1), LAYER.ids.clamp(min=2))):
        assert torch.equal(module(LAYER.x, ids, LAYER.weights), forward(ids=ids))
    assert contents(workspace) == held
    assert torch.equal(forward(workspace), forward())


def test_a_pickled_workspace_holds_no_memory() -> None:
    small, large = (len(pickle.dumps(new_workspace(tokens))) for tokens in (8, 8000))
    assert large < small + 100


def test_a_loaded_workspace_is_where_its_tensors_would_be() -> None:
    """``map_location`` decides on memory and shape alike."""
    loaded = saved(new_workspace(), map_location="meta")
    assert loaded.shape.device.type == "meta"
    assert {t.device.type for t in memory_of(loaded)} == {"meta"}


# ---------------------------------------------------------------- processes


def test_workers_of_a_data_loader(backend: str) -> None:
    """Forked after this process has used the library; operands come back by shared memory."""
    dataset = Quantized(backend)
    expected = [dataset[i] for i in range(len(dataset))]
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=120
    )
    for got, wanted in zip(loader, expected, strict=True):
        cases.same_bytes(got, wanted)
        assert got.groups.expert_offsets.tolist() == wanted.groups.expert_offsets.tolist()


def in_child(seed: int, backend: str) -> list[bytes]:
    torch.set_num_threads(1)
    return job(seed, backend)


def test_forked_children(backend: str) -> None:
    """Two at once, while a thread of this process holds its lock: it is not in the children, and
    would never let go there."""
    expected = [job(seed, backend) for seed in range(2)]
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with env.one_thread():
            held.set()
            done.wait(120)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(hold)
        assert held.wait(60)
        try:
            children = [Child(in_child, seed, backend) for seed in range(2)]
            assert [child.result(120) for child in children] == expected
        finally:
            done.set()


def use_in_child(workspace: mx.MoEWorkspace, call: tuple[Any, ...]) -> list[bytes]:
    torch.set_num_threads(1)
    y = mx.moe_forward(*call, workspace=workspace, backend="reference")
    return [cases.bits(y).numpy().tobytes(), *job(0, "triton")]


def test_a_spawned_child(interpreter: None) -> None:
    """With a workspace of its own: PyTorch passes tensors to a child as shared memory, and the
    child must not write the parent's."""
    workspace = new_workspace()
    forward(workspace)
    for tensor in memory_of(workspace):
        tensor.fill_(cases.POISON)
    held = contents(workspace)
    ids = LAYER.ids.clamp(max=1)
    got = Child(use_in_child, workspace, (LAYER.x, *WEIGHTS, ids, LAYER.weights), spawned=True).result(120)
    assert got == [cases.bits(forward(ids=ids)).numpy().tobytes(), *job(0, "triton")]
    assert contents(workspace) == held
