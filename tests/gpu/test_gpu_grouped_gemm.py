"""The compiled grouped GEMM against float64, and as part of a GPU program: streams, graphs, no syncs, no stray writes."""

from __future__ import annotations

from collections.abc import Sequence

import cases
import pytest
import torch
import truth
from gpu_truth import GPU, check_product, same_bytes
from hypothesis import given, settings
from hypothesis import strategies as st

import hybrid_mxfp8 as mx

pytestmark = pytest.mark.gpu
DTYPE_IDS = ["bf16", "fp16", "fp32"]


@pytest.fixture(autouse=True, params=["chosen", "portable"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The kernel that the backend chooses on this GPU, and the portable one where that is another."""
    if request.param == "portable":
        if torch.cuda.get_device_capability() != (9, 0):
            pytest.skip("the portable kernel is the chosen one")
        monkeypatch.setenv("HYBRID_MXFP8_HOPPER_GEMM", "0")
    return str(request.param)


def operands(
    counts: Sequence[int], num_tokens: int, n: int, k: int, rng: torch.Generator
) -> tuple[mx.GroupedMXFP8, mx.ExpertWeights]:
    """Quantized normal data; whatever is not to be read is poison."""
    groups = cases.layout(counts, num_tokens, GPU)
    x = cases.random_rows(num_tokens, k, torch.bfloat16, rng, GPU)
    w = cases.random_rows(len(counts) * n, k, torch.bfloat16, rng, GPU).reshape(len(counts), n, k) * 0.05
    xq = mx.quantize_grouped(x, groups, out=cases.poisoned_output(groups, k), backend="reference")
    return xq, mx.quantize_weights(w, backend="reference")


def check(
    xq: mx.GroupedMXFP8, wq: mx.ExpertWeights, counts: Sequence[int], dtype: torch.dtype, backend: str = "triton"
) -> torch.Tensor:
    out = cases.poisoned_product(xq.groups.num_tokens, wq.n, dtype, GPU)
    y = mx.grouped_gemm(xq, wq, out_dtype=dtype, out=out, backend=backend)
    check_product(y, xq, wq, counts)
    return y


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("name", cases.RAGGED)
def test_ragged(name: str, dtype: torch.dtype, rng: torch.Generator) -> None:
    counts, num_tokens = cases.RAGGED[name]
    check(*operands(counts, num_tokens, 136, 160, rng), counts, dtype)


@pytest.mark.sanitizer
@pytest.mark.parametrize("name", ["empty experts", "at tile edges", "a token each"])
def test_the_kernel_of_any_gpu(name: str, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that runs where no other does, also where another would."""
    monkeypatch.setenv("HYBRID_MXFP8_HOPPER_GEMM", "0")
    counts, num_tokens = cases.RAGGED[name]
    check(*operands(counts, num_tokens, 136, 160, rng), counts, torch.bfloat16)


@pytest.mark.parametrize("name", cases.RAGGED)
def test_reference_on_the_gpu(name: str, rng: torch.Generator) -> None:
    counts, num_tokens = cases.RAGGED[name]
    check(*operands(counts, num_tokens, 136, 160, rng), counts, torch.float32, "reference")


@pytest.mark.parametrize("tokens_per_expert", [1, 16, 17, 32, 64, 65, 128, 300])
@pytest.mark.parametrize(("n", "k"), [(8, 32), (64, 96), (264, 1056), (2880, 2880), (4096, 7168)])
def test_every_configuration(n: int, k: int, tokens_per_expert: int, rng: torch.Generator) -> None:
    counts = [tokens_per_expert, 0, 2 * tokens_per_expert, tokens_per_expert]
    check(*operands(counts, sum(counts) + 2, n, k, rng), counts, torch.bfloat16)


@settings(max_examples=40)
@given(
    shape=cases.ragged(max_experts=20, max_tokens=1500),
    n=st.sampled_from([8, 72, 136, 520]),
    k=st.sampled_from([32, 96, 128, 224, 1056]),
    dtype=st.sampled_from(cases.DTYPES),
    seed=st.integers(0, 2**31),
)
def test_any_layout(shape: cases.Ragged, n: int, k: int, dtype: torch.dtype, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    check(*operands(shape.counts, shape.num_tokens, n, k, rng), shape.counts, dtype)


@pytest.mark.parametrize("num_experts", [1, 128, 257, 1024])
def test_number_of_experts(num_experts: int, rng: torch.Generator) -> None:
    counts = torch.bincount(torch.randint(0, num_experts, (500,), generator=rng), minlength=num_experts).tolist()
    check(*operands(counts, 500, 72, 160, rng), counts, torch.float32)


@pytest.mark.parametrize(
    "counts", [[8192] + [0] * 31, [256] * 32, [0, 1, 4000, 7, 88] * 6], ids=["one hot", "even", "skewed"]
)
def test_large(counts: list[int], rng: torch.Generator) -> None:
    check(*operands(counts, sum(counts), 2048, 4096, rng), counts, torch.bfloat16)


def from_bytes(
    codes: torch.Tensor, scales: torch.Tensor, w_codes: torch.Tensor, w_scales: torch.Tensor, counts: Sequence[int]
) -> tuple[mx.GroupedMXFP8, mx.ExpertWeights]:
    """Operands of these codes and row-major scales, which no quantizer need be able to make."""
    groups = cases.layout(counts, device=GPU)
    values, stored = truth.grouped_bytes(codes.numpy(), scales.numpy(), counts, groups.scale_rows, cases.POISON)
    swizzled = torch.from_numpy(stored).reshape(groups.scale_rows, -1).to(GPU)
    xq = mx.GroupedMXFP8(torch.from_numpy(values).to(GPU).view(torch.float8_e4m3fn), swizzled, groups)
    return xq, mx.ExpertWeights.from_linear_scales(w_codes.to(GPU), w_scales.to(GPU))


@pytest.mark.sanitizer
@pytest.mark.parametrize(
    ("x_scale", "w_scale"), [(0, 127), (1, 127), (2, 127), (0, 254), (254, 0), (254, 2), (127, 1), (240, 13), (0, 0)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_extreme_scales(x_scale: int, w_scale: int, dtype: torch.dtype, rng: torch.Generator) -> None:
    """Scale bytes at both ends; below 2 in magnitude, because 2 times scale 254 leaves bf16 and fp32."""
    counts = [5, 0, 12]
    codes = torch.randint(0, 0x40, (17, 96), generator=rng, dtype=torch.uint8)
    codes |= torch.randint(0, 2, codes.shape, generator=rng, dtype=torch.uint8) << 7
    w_codes = torch.randint(0, 0x40, (3, 40, 96), generator=rng, dtype=torch.uint8)
    w_codes |= torch.randint(0, 2, w_codes.shape, generator=rng, dtype=torch.uint8) << 7
    scales = torch.full((17, 3), x_scale, dtype=torch.uint8)
    w_scales = torch.full((3, 40, 3), w_scale, dtype=torch.uint8)
    check(*from_bytes(codes, scales, w_codes, w_scales, counts), counts, dtype)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=DTYPE_IDS)
def test_every_code_times_one(dtype: torch.dtype) -> None:
    """Each e4m3 code alone in its row: exact products."""
    finite = torch.tensor([c for c in range(256) if c & 0x7F != 0x7F], dtype=torch.uint8)
    codes = torch.zeros(254, 32, dtype=torch.uint8)
    codes[:, 7] = finite
    w_codes = torch.zeros(1, 8, 32, dtype=torch.uint8)
    w_codes[0, 3, 7] = 0x38  # 1.0
    one = torch.full((254, 1), 127, dtype=torch.uint8)
    y = mx.grouped_gemm(*from_bytes(codes, one, w_codes, one[:8].view(1, 8, 1), [254]), out_dtype=dtype).cpu()
    assert torch.equal(y[:, 3].double(), finite.view(torch.float8_e4m3fn).double())
    assert bool((y[:, [0, 1, 2, 4, 5, 6, 7]] == 0).all())


@pytest.mark.sanitizer
def test_nan_reaches_only_its_row_or_its_column(rng: torch.Generator) -> None:
    counts = [3, 4, 20]
    x = cases.random_rows(27, 160, torch.bfloat16, rng, GPU)
    x[5, 33], x[26, 0] = float("nan"), float("inf")
    w = cases.random_rows(3 * 40, 160, torch.bfloat16, rng, GPU).reshape(3, 40, 160)
    w[0, 11, 159] = float("nan")
    xq = mx.quantize_grouped(x, cases.layout(counts, device=GPU), backend="triton")
    y = check(xq, mx.quantize_weights(w, backend="triton"), counts, torch.bfloat16)
    expected = torch.zeros(27, 40, dtype=torch.bool, device=GPU)
    expected[5] = expected[26] = True
    expected[:3, 11] = True
    assert torch.equal(torch.isnan(y), expected)


@pytest.mark.sanitizer
@pytest.mark.parametrize("name", {**cases.HOSTILE, **cases.HUGE})
def test_hostile_counts_stay_in_their_buffers(name: str, rng: torch.Generator) -> None:
    given_counts, num_tokens = {**cases.HOSTILE, **cases.HUGE}[name]
    tokens = truth.layout(given_counts, num_tokens)[0]
    groups = mx.GroupLayout.from_counts(torch.tensor(given_counts, device=GPU), num_tokens)
    x = cases.random_rows(num_tokens, 96, torch.bfloat16, rng, GPU)
    xq = mx.quantize_grouped(x, groups, out=cases.poisoned_output(groups, 96), backend="triton")
    w = cases.random_rows(len(tokens) * 40, 96, torch.bfloat16, rng, GPU).reshape(len(tokens), 40, 96)
    wq = mx.quantize_weights(w, backend="triton")
    guard = 1 << 18
    around = torch.full((num_tokens * 40 + 2 * guard,), float("nan"), device=GPU)
    out = around[guard : guard + num_tokens * 40].view(num_tokens, 40)
    mx.grouped_gemm(xq, wq, out=out, out_dtype=torch.float32, backend="triton")
    check_product(out, xq, wq, tokens)
    assert bool(torch.isnan(around[:guard]).all())
    assert bool(torch.isnan(around[-guard:]).all())


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=DTYPE_IDS)
def test_backends_agree(dtype: torch.dtype, rng: torch.Generator) -> None:
    """A/B: the whole path of each backend. The operands are equal, bit for bit; the products within rounding."""
    counts = [3, 0, 700, 17]
    x = cases.random_rows(720, 2048, torch.bfloat16, rng, GPU)
    w = cases.random_rows(4 * 520, 2048, torch.bfloat16, rng, GPU).reshape(4, 520, 2048) * 0.01
    quantized, products = [], []
    for name in ("triton", "reference"):
        with mx.use_backend(name):
            groups = cases.layout(counts, device=GPU)
            xq = mx.quantize_grouped(x, groups, out=cases.poisoned_output(groups, 2048))
            wq = mx.quantize_weights(w)
            quantized.append((xq, wq))
            products.append(mx.grouped_gemm(xq, wq, out_dtype=dtype))
    same_bytes(quantized[0][0], quantized[1][0])
    same_bytes(quantized[0][1], quantized[1][1])
    assert mx.calc_diff(*products) < 1e-5


@pytest.mark.parametrize("gigabytes", [40], indirect=True)
def test_more_than_2_31_outputs(gigabytes: None, rng: torch.Generator) -> None:
    """Offsets beyond int32 in the output: rows that repeat, checked in every row."""
    n, k, pattern = 7168, 32, 1024
    num_tokens = 2**31 // n // pattern * pattern + 2 * pattern
    base = cases.random_rows(pattern, k, torch.bfloat16, rng, GPU)
    w = cases.random_rows(n, k, torch.bfloat16, rng, GPU).reshape(1, n, k)
    wq = mx.quantize_weights(w)
    xq = mx.quantize_grouped(base.repeat(num_tokens // pattern, 1), cases.layout([num_tokens], device=GPU))
    y = mx.grouped_gemm(xq, wq, backend="triton")
    assert y.numel() > 2**31
    one = mx.quantize_grouped(base, cases.layout([pattern], device=GPU))
    expected = cases.poisoned_product(pattern, n, torch.bfloat16, GPU)
    mx.grouped_gemm(one, wq, out=expected, backend="triton")
    check_product(expected, one, wq, [pattern])
    for start in range(0, num_tokens, pattern):
        assert torch.equal(y[start : start + pattern], expected)


@pytest.mark.parametrize("gigabytes", [20], indirect=True)
def test_more_than_2_31_weights(gigabytes: None, rng: torch.Generator) -> None:
    """Offsets beyond int32 in the weights: the last expert against a product of it alone."""
    e, n, k = 67, 4480, 7168
    assert e * n * k > 2**31
    values = torch.randint(0, 0x7F, (e, n, k), dtype=torch.uint8, device=GPU)
    scales = torch.randint(118, 123, (e, n, k // 32), dtype=torch.uint8, device=GPU)
    wq = mx.ExpertWeights(values.view(torch.float8_e4m3fn), mx.swizzle_scales(scales))
    x = cases.random_rows(2 * e, k, torch.bfloat16, rng, GPU)
    xq = mx.quantize_grouped(x, cases.layout([2] * e, device=GPU))
    y = check(xq, wq, [2] * e, torch.bfloat16)
    last = mx.ExpertWeights(wq.values[-1:], wq.scales[-1:])
    alone = mx.grouped_gemm(mx.quantize_grouped(x[-2:], cases.layout([2], device=GPU)), last)
    assert torch.equal(y[-2:], alone)


def test_no_sync(no_sync: None) -> None:
    x = torch.empty(64, 256, dtype=torch.bfloat16, device=GPU).normal_()
    counts = torch.full((4,), 16, dtype=torch.int32, device=GPU)
    wq = mx.quantize_weights(x.view(4, 16, 256), backend="triton")
    xq = mx.quantize_grouped(x, mx.GroupLayout.from_counts(counts, 64), backend="triton")
    mx.grouped_gemm(xq, wq, backend="triton")
    mx.explain(xq, wq)


def test_two_runs_give_equal_bytes(rng: torch.Generator) -> None:
    xq, wq = operands([100, 0, 28, 400], 528, 264, 1056, rng)
    first = mx.grouped_gemm(xq, wq, out_dtype=torch.float32, backend="triton")
    assert torch.equal(first, mx.grouped_gemm(xq, wq, out_dtype=torch.float32, backend="triton"))


class Step:
    """The main job on static buffers: counts in, product out."""

    def __init__(self, rng: torch.Generator, form: str) -> None:
        self.num_tokens, self.e, self.n, self.k = 200, 5, 136, 288
        self.form = form
        self.x = cases.random_rows(self.num_tokens, self.k, torch.bfloat16, rng, GPU)
        w = cases.random_rows(self.e * self.n, self.k, torch.bfloat16, rng, GPU).reshape(self.e, self.n, self.k)
        self.wq = mx.quantize_weights(w, backend="triton")
        self.counts = torch.zeros(self.e, dtype=torch.int32, device=GPU)
        self.operand = cases.poisoned_output(cases.layout([0] * self.e, self.num_tokens, GPU), self.k)
        self.out = cases.poisoned_product(self.num_tokens, self.n, torch.bfloat16, GPU)

    def poison(self) -> None:
        self.operand.values.view(torch.uint8).fill_(cases.POISON)
        self.operand.scales.fill_(cases.POISON)
        self.out.fill_(float("nan"))

    def run(self) -> None:
        groups = self.counts if self.form == "counts" else mx.GroupLayout.from_counts(self.counts, self.num_tokens)
        xq = mx.quantize_grouped(self.x, groups, out=self.operand, backend="triton")
        mx.grouped_gemm(xq, self.wq, out=self.out, backend="triton")

    def state(self) -> list[torch.Tensor]:
        buffers = (self.operand.values, self.operand.scales, self.out)
        return [buffer.view(torch.uint8).clone() for buffer in buffers]


@pytest.mark.parametrize("form", ["layout", "counts"])
def test_graph_replay_follows_the_counts(form: str, rng: torch.Generator) -> None:
    """Captured once and replayed with other counts, padded batches and hostile ones among them: equal to eager, bit for bit."""
    step = Step(rng, form)
    step.run()  # compiles outside the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step.run()
    for counts in ([40] * 5, [0, 200, 0, 0, 0], [0] * 5, [1, 2, 3, 4, 5], [199, 0, 0, 0, 1], [90, -4, 90, 90, 90]):
        step.counts.copy_(torch.tensor(counts))
        step.poison()
        graph.replay()
        replayed = step.state()
        step.poison()
        step.run()
        for ours, eager in zip(replayed, step.state(), strict=True):
            assert torch.equal(ours, eager)


def test_runs_on_the_current_stream(rng: torch.Generator) -> None:
    """On a side stream, behind work that its input waits for: nothing runs early on another stream."""
    step = Step(rng, "layout")
    step.counts.copy_(torch.tensor([10, 100, 0, 40, 50]))
    step.poison()
    step.run()
    expected = step.state()
    x = step.x.clone()
    step.x.zero_()
    step.poison()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        step.x.copy_(x)
        step.run()
    stream.synchronize()
    for ours, eager in zip(step.state(), expected, strict=True):
        assert torch.equal(ours, eager)


def test_operands_on_another_gpu_than_the_current_one(rng: torch.Generator) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    xq, wq = operands([10, 0, 30], 40, 136, 160, rng)
    expected = mx.grouped_gemm(xq, wq, backend="triton").cpu()
    x = xq.dequantize().bfloat16().to("cuda:1")
    w = wq.dequantize().bfloat16().to("cuda:1")
    with mx.use_backend("triton"):
        groups = cases.layout([10, 0, 30], device="cuda:1")
        got = mx.grouped_gemm(mx.quantize_grouped(x, groups), mx.quantize_weights(w))
    assert torch.cuda.current_device() == 0
    assert got.device == torch.device("cuda", 1)
    assert torch.equal(got.cpu(), expected)


def test_cutlass_row_says_why_it_does_not_run(rng: torch.Generator) -> None:
    """By name it runs or raises; on other hardware than its own it raises, and names the hardware."""
    available, reason = mx.backends()["cutlass"]
    xq, wq = operands([3], 3, 8, 32, rng)
    if available:
        check(xq, wq, [3], torch.bfloat16, "cutlass")
    else:
        with pytest.raises(mx.BackendUnavailableError) as caught:
            mx.grouped_gemm(xq, wq, backend="cutlass")
        assert reason in str(caught.value)


def test_auto_uses_triton_where_cutlass_does_not_run(rng: torch.Generator) -> None:
    xq, wq = operands([3], 3, 8, 32, rng)
    if not mx.backends()["cutlass"][0]:
        assert mx.explain(xq, wq).startswith("triton, chosen automatically")
