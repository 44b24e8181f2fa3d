"""Streams, threads, CUDA graphs and processes beside one another on a GPU."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import cases
import pytest
import torch
from forked import Child
from jobs import Quantized, forget_everything, together
from on_gpu import Layer, LayerAndProduct, captured

import hybrid_mxfp8 as mx

pytestmark = pytest.mark.gpu


class Job(LayerAndProduct):
    """Its results are always the same."""

    def __init__(self, seed: int) -> None:
        super().__init__(torch.Generator().manual_seed(seed), [10, 0, 20, 4, 0, 1, 9, 20])
        self.run()
        torch.cuda.synchronize()
        self.expected = self.state()
        self.workspace = self.new_workspace()  # the next call may come on any stream
        torch.cuda.synchronize()

    def run(self) -> None:
        super().run()
        self.quantize()
        self.multiply()

    def spoil(self) -> None:
        self.out.fill_(float("nan"))
        self.y.fill_(float("nan"))
        self.xq.values.view(torch.uint8).fill_(cases.POISON)

    def state(self) -> list[torch.Tensor]:
        return [cases.bits(t).clone() for t in (self.out, self.xq.values, self.xq.scales, self.y)]

    def check(self) -> None:
        assert all(map(torch.equal, self.state(), self.expected))


def test_two_streams_with_their_own_workspaces() -> None:
    """Interleaved from one thread, nothing waits: both streams' kernels run beside one another."""
    jobs, streams = [Job(1), Job(2)], [torch.cuda.Stream(), torch.cuda.Stream()]
    for _ in range(3):
        for job, stream in zip(jobs, streams, strict=True):
            with torch.cuda.stream(stream):
                job.spoil()
                torch.cuda._sleep(2_000_000)  # so that calls pile up behind it
        for _ in range(20):
            for job, stream in zip(jobs, streams, strict=True):
                with torch.cuda.stream(stream):
                    job.run()
        torch.cuda.synchronize()
        for job in jobs:
            job.check()


def test_threads_with_streams_of_their_own() -> None:
    """All come to every kernel at once, with nothing known of earlier calls."""
    jobs = [Job(seed) for seed in range(4)]
    streams = [torch.cuda.Stream() for _ in jobs]
    forget_everything()

    def work(i: int) -> None:
        with torch.cuda.stream(streams[i]):
            jobs[i].spoil()
            for _ in range(25):
                jobs[i].run()
            streams[i].synchronize()

    together(len(jobs), work)
    for job in jobs:
        job.check()


def test_a_thread_whose_first_act_is_a_launch() -> None:
    """It has no CUDA context yet, and nothing that it calls allocates: the launcher must find
    one."""
    job = Job(9)
    job.spoil()
    torch.cuda.synchronize()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(job.run).result(60)
    torch.cuda.synchronize()
    job.check()


def test_capture_while_another_stream_runs() -> None:
    """A graph is captured while a thread launches on another stream; then both run at once."""
    job, other = Job(3), Job(4)
    stream, stop, started = torch.cuda.Stream(), threading.Event(), threading.Event()

    def keep_busy() -> None:
        with torch.cuda.stream(stream):
            for _ in range(7000):
                if stop.is_set():
                    break
                other.run()
                started.set()

    with ThreadPoolExecutor(1) as pool:
        busy = pool.submit(keep_busy)
        try:
            assert started.wait(60)
            graph, _ = captured(job.run, capture_error_mode="thread_local")
            for _ in range(20):
                job.spoil()
                graph.replay()
        finally:
            stop.set()
        busy.result(120)
    torch.cuda.synchronize()
    job.check()
    other.check()


def test_a_workspace_on_another_stream_waits_for_its_last_call() -> None:
    """Without a sync of the host: streams take turns with one workspace, each behind a pile of
    work."""
    job, streams = Job(5), [torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.Stream()]
    outs = [torch.full_like(job.out, float("nan")) for _ in range(6)]
    layers = [Layer(torch.Generator().manual_seed(i), len(job.x), experts=8, top_k=2) for i in range(6)]
    torch.cuda.synchronize()
    for i, (out, layer) in enumerate(zip(outs, layers, strict=True)):
        with torch.cuda.stream(streams[i % 3]):
            torch.cuda._sleep(100_000_000)
            job.forward(layer.x, layer.ids, layer.weights, workspace=job.workspace, out=out)
    assert not streams[2].query(), "the host waited, or the last call did not"
    torch.cuda.synchronize()
    for out, layer in zip(outs, layers, strict=True):
        assert torch.equal(cases.bits(out), cases.bits(job.forward(layer.x, layer.ids, layer.weights)))


def test_a_workspace_is_dropped_while_another_stream_uses_it() -> None:
    """Its memory is given out again where it was made only once the other stream's call is done
    with it."""
    job, stream = Job(10), torch.cuda.Stream()
    for move in (False, True):
        workspace = job.new_workspace()
        if move:
            job.eager(workspace=workspace, out=job.out)
        sizes = [t.nbytes for t in cases.memory_of(workspace)]
        job.spoil()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(500_000_000)
            job.eager(workspace=workspace, out=job.out)
        del workspace
        filled = [torch.full((size,), 0xA5, dtype=torch.uint8, device="cuda") for size in sizes]
        assert not stream.query()
        torch.cuda.synchronize()
        assert all(bool((t == 0xA5).all()) for t in filled)  # else the call has written memory of somebody else
        assert torch.equal(cases.bits(job.out), job.expected[0])


def test_workers_quantize_for_the_gpu() -> None:
    """A DataLoader's workers, forked after CUDA was initialized here, quantize on the CPU; the
    product is the GPU's."""
    torch.zeros(1, device="cuda")
    dataset = Quantized("reference")
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60
    )
    wq = mx.quantize_weights(torch.randn(2, 40, 96, generator=torch.Generator().manual_seed(9)).to("cuda"))
    batches = (dataset[i] for i in range(len(dataset)))
    for pair in zip(loader, batches, strict=True):
        got, wanted = (mx.grouped_gemm(cases.to_device(xq, "cuda"), wq, backend="triton") for xq in pair)
        assert torch.equal(got, wanted)


def test_a_child_forked_after_cuda_was_initialized_is_told_so() -> None:
    """PyTorch's own error, also where every buffer is given and every kernel known; the parent goes
    on."""
    job = Job(8)
    calls = (job.quantize, job.multiply, lambda: mx.GroupLayout.from_counts(job.groups.tokens_per_expert, 64))
    for call in calls * 3:
        call()
    torch.cuda.synchronize()

    def refused() -> bool:
        for call in calls:
            with pytest.raises(RuntimeError, match="Cannot re-initialize CUDA in forked subprocess"):
                call()
        return True

    assert Child(refused).result() is True
    job.spoil()
    job.run()
    job.check()
