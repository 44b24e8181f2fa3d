"""Operands on a GPU that isn't the current one, on two GPUs in turn, and on two at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cases
import cutlass_modules
import moe_truth
import on_gpu
import pages
import pytest
import ranks
import sglang_case
import torch
from jobs import together

import hybrid_mxfp8 as mx
from hybrid_mxfp8.cutlass_kernels.jit import build as jit

pytestmark = pytest.mark.gpu

GPUS = ("cuda:0", "cuda:1")
COUNTS, T, N, K = [10, 0, 131, 30], 180, 136, 160

Results = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def _two_gpus() -> Iterator[None]:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    current = torch.cuda.current_device()
    yield
    assert torch.cuda.current_device() == current


class Operators:
    """The public functions but the layer's, with operands on one GPU."""

    def __init__(self, device: str, backend: str, seed: int = 0) -> None:
        rng = torch.Generator().manual_seed(seed)
        self.backend = backend
        self.groups = cases.layout(COUNTS, T, device=device)
        self.ends = torch.tensor(COUNTS, dtype=torch.int32).cumsum(0).int().to(device)
        self.x = cases.random_rows(T, K, torch.bfloat16, rng).to(device)
        self.w = cases.random_rows(len(COUNTS) * N, K, torch.bfloat16, rng).view(len(COUNTS), N, K).to(device)
        self.row_index = torch.randperm(T, generator=rng).int().to(device)
        self.gate_up = cases.random_rows(T, 2 * K, torch.float16, rng).to(device)

    def results(self) -> Results:
        used, b = sum(COUNTS), self.backend
        device = self.x.device
        from_ends = mx.GroupLayout.from_ends(self.ends, T)
        wq = mx.quantize_weights(self.w, backend=b)
        xq = mx.quantize_grouped(self.x, self.groups, backend=b)
        quantized = {
            "x": xq,
            "gathered": mx.quantize_grouped(self.x, self.groups, row_index=self.row_index, backend=b),
            "floor": mx.quantize_grouped(self.x.float(), from_ends, scale_rounding="floor", backend=b),
            "swiglu": mx.quantize_grouped(self.gate_up, self.groups, activation="swiglu", backend=b),
        }
        found = {"w": wq.values, "w scales": wq.scales}
        scale_rows = int(self.groups.scale_offsets[-1])
        for name, q in quantized.items():
            found |= {name: q.values[:used], f"{name} scales": q.scales[:scale_rows]}
        for dtype in cases.DTYPES:
            found[f"product {dtype}"] = mx.grouped_gemm(xq, wq, out_dtype=dtype, backend=b)[:used]
        assert {t.device for t in found.values()} == {device}
        return {name: cases.bits(t).cpu() for name, t in found.items()}


class Layer(on_gpu.Layer):
    """A layer on one GPU, with a workspace there."""

    def __init__(self, device: str, seed: int = 0) -> None:
        super().__init__(torch.Generator().manual_seed(seed), 40, device)
        self.truth = moe_truth.forward(self.plain)

    def again(self) -> torch.Tensor:
        """With the workspace, from whose third call on the launches are repeated."""
        return self.computed(self.run).cpu()

    def results(self) -> Results:
        """Without and with the workspace."""
        first = self.eager().cpu()
        assert mx.signal_to_noise_db(self.truth, first) > 23.0
        return {"call 0": first, **{f"call {i}": self.again() for i in range(1, 5)}}


def assert_same(a: Results, b: Results) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


JOBS: dict[str, Callable[[str], Operators | Layer]] = {
    "operators": lambda device: Operators(device, "triton"),
    "reference": lambda device: Operators(device, "reference"),
    "layer": Layer,
}


@pytest.mark.parametrize("current", [0, 1])
@pytest.mark.parametrize("name", JOBS)
def test_in_turns_wherever_operands_are(kernel: str, name: str, current: int) -> None:
    """What was compiled and cached for one GPU must not be taken for the other."""
    jobs = [JOBS[name](device) for device in GPUS]
    with torch.cuda.device(current):
        for _ in range(3):
            assert_same(*(job.results() for job in jobs))
            assert torch.cuda.current_device() == current


@pytest.mark.parametrize("name", ["operators", "layer"])
def test_the_stream_is_the_operands_gpus(kernel: str, name: str) -> None:
    """Work goes to the current stream of the operands' GPU: it is after what was put there,
    whatever is current elsewhere."""
    job: Any = JOBS[name]("cuda:1")
    for _ in range(3):
        expected = job.results()
    kept = job.x.clone()
    job.x.zero_()
    stream = torch.cuda.Stream("cuda:1")
    stream.wait_stream(torch.cuda.current_stream("cuda:1"))
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        job.x.copy_(kept)
        with torch.cuda.device(0):
            got = job.results() if name == "operators" else {"call 4": job.again()}
    assert_same(got, {key: expected[key] for key in got})


def test_a_graph_on_the_other_gpu(kernel: str) -> None:
    layer = Layer("cuda:1")
    expected = layer.results()["call 4"]
    # PyTorch keeps one capture stream for the process, on the GPU of the first capture.
    graph, _ = on_gpu.captured(layer.run, stream=torch.cuda.Stream("cuda:1"))
    layer.out.zero_()
    torch.cuda.synchronize(1)
    graph.replay()
    torch.cuda.synchronize(1)
    assert torch.equal(layer.out.cpu(), expected)


def test_a_thread_for_each_gpu(kernel: str) -> None:
    """At once, and neither sets its current device: both start with the first GPU as current."""
    jobs = [(Operators(device, "triton", seed), Layer(device, seed)) for seed, device in enumerate(GPUS)]
    expected = [(operators.results(), layer.results()) for operators, layer in jobs]

    def repeat(index: int) -> None:
        for _ in range(20):
            for job, wanted in zip(jobs[index], expected[index], strict=True):
                assert_same(job.results(), wanted)

    together(len(jobs), repeat)


def test_operands_of_two_gpus_are_refused() -> None:
    """By name, before anything is launched; each argument alone is in test_gpu_bad_calls.py, on a
    CPU."""
    here, there = (Operators(device, "triton") for device in GPUS)
    layer, other = (Layer(device) for device in GPUS)
    xq, wq = mx.quantize_grouped(here.x, here.groups), mx.quantize_weights(there.w)
    refused = {
        "groups": lambda: mx.quantize_grouped(here.x, there.groups),
        "w": lambda: mx.grouped_gemm(xq, wq),
        "w13q": lambda: mx.moe_forward(layer.x, other.w13q, other.w2q, layer.ids, layer.weights),
        "workspace": lambda: layer.eager(workspace=other.workspace),
    }
    for name, call in refused.items():
        with pytest.raises(ValueError, match=f"^{name}: .*cuda"):
            call()


@pytest.mark.slow
def test_experts_of_one_layer_on_both(tmp_path: Path) -> None:
    """docs/expert-parallel.md, through NCCL, eager and replayed from a CUDA graph."""
    parts = ["all gather", "padded", "replayed", "all to all", "all tokens", "tensor parallel"]
    pages.check_expert_parallel(parts, tmp_path)


@pytest.mark.slow
def test_experts_spread_over_both(kernel: str, tmp_path: Path) -> None:
    """Through NCCL: every dispatch against one GPU, uneven tokens, compiled whole by inductor,
    replayed from a CUDA graph with other tokens and other routing."""
    assert ranks.on_ranks(ranks.check_layer, tmp_path, "cuda", "triton", str(tmp_path)) == [True, True]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["dies", "raises"])
def test_a_rank_that_fails_ends_the_other(how: str, tmp_path: Path) -> None:
    """NCCL's watchdog ends its process after the group's timeout, unless an error comes first."""
    timeout = 10
    given = (tmp_path, "cuda", how, {"max_tokens": 4}, timeout)
    first, _ = ranks.on_ranks(ranks.fail_on_rank_1, *given, timeout=timeout)
    assert first is None or first[0] in ("RuntimeError", "DistBackendError")


def test_sglang(kernel: str) -> None:
    def run(device: str) -> Results:
        case = sglang_case.random_case([5, 0, 130, 1], 256, 384, torch.bfloat16, 0, device=device)
        case.quantize()
        workspace = torch.empty(1 << 20, dtype=torch.uint8, device=device)
        found = {"x": case.x_values, "x scales": case.x_scales, "w": case.w_values, "w scales": case.w_scales}
        found["product"] = case.multiply(workspace, torch.bfloat16)
        return {name: cases.bits(t).cpu() for name, t in found.items()}

    assert_same(run("cuda:0"), run("cuda:1"))


@pytest.mark.slow
def test_the_cutlass_backends_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its prepare kernel and a plain kernel over the arguments, on the operands' GPU and not the
    current one."""
    monkeypatch.setenv("HYBRID_MXFP8_CUTLASS_DIR", str(cutlass_modules.header_choices()[0].include))
    module = jit.load(cutlass_modules.argument_walker())

    def run(device: str) -> Results:
        job = Operators(device, "triton")
        xq, wq = mx.quantize_grouped(job.x, job.groups), mx.quantize_weights(job.w)
        out = cases.poisoned_product(T, N, torch.float32, device)
        size = module.walker_workspace_size(len(COUNTS), N, K, T)
        workspace = torch.full((size,), 0xFF, dtype=torch.uint8, device=device)
        cutlass_modules.call(module.argument_walker, xq, wq, out, workspace)
        return {"product": cases.bits(out).cpu()}

    first, second = run("cuda:0"), run("cuda:1")
    assert_same(first, second)
    assert not first["product"].view(torch.float32)[: sum(COUNTS)].isnan().any()
