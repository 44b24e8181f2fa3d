"""The SM100 kernel's own arguments, on the CPU: CUTLASS's reference multiplies them and must find
our product, and the TMA descriptors in them are as the kernel needs them."""

from __future__ import annotations

from typing import Any

import cutlass_modules
import pytest
import torch

import hybrid_mxfp8 as mx
from hybrid_mxfp8.cutlass_kernels.jit import build as jit
from hybrid_mxfp8.cutlass_kernels.jit import toolchain
from hybrid_mxfp8.errors import BackendUnavailableError

pytestmark = pytest.mark.slow

# Both sum up to K products of e4m3 in fp32, in different orders, against a float64 sum.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-4}

CASES = {
    "ragged": ([5, 130, 1, 64], 256, 128, 200),
    "empty experts": ([0, 3, 0, 0, 129, 0], 128, 256, 140),
    "all empty": ([0, 0, 0], 128, 128, 7),
    "K % 128 != 0": ([17, 2, 131], 128, 96, 150),
    "N % 128 != 0": ([17, 2, 131], 136, 128, 150),
    "gpt-oss K": ([3, 0, 2], 72, 2880, 5),
    "both odd, full": ([33, 1, 0, 94], 200, 160, 128),
}


@pytest.fixture(scope="module", autouse=True)
def compiler() -> None:
    try:
        toolchain.find_cuda()
    except BackendUnavailableError as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="module", params=cutlass_modules.header_choices(), ids=cutlass_modules.mainloop)
def module(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The reference and its mutants, by each CUTLASS."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HYBRID_MXFP8_CUTLASS_DIR", str(request.param.include))
        source = cutlass_modules.host_reference()
        return jit.load(cutlass_modules.mutants(source, tmp_path_factory.mktemp("mutants")))


@pytest.fixture
def reference(module: Any) -> Any:
    return module["host_reference_0"]  # without a fault


def operands(counts: list[int], n: int, k: int, num_tokens: int) -> tuple[mx.GroupedMXFP8, mx.ExpertWeights]:
    generator = torch.Generator().manual_seed(n * k + num_tokens)

    def spread(*rows: int) -> torch.Tensor:
        """Blocks of differing magnitudes, so that a scale taken from elsewhere shows."""
        blocks = torch.randn(*rows, k // 32, 32, generator=generator)
        return (blocks * torch.exp2(torch.randint(-6, 7, (*rows, k // 32, 1), generator=generator))).flatten(-2)

    groups = mx.GroupLayout.from_counts(torch.tensor(counts, dtype=torch.int32), num_tokens)
    x, w = spread(num_tokens), spread(len(counts), n)
    xq = mx.quantize_grouped(x, groups, backend="reference")
    # Rows that no expert owns hold what was in the memory: NaN there would hide a product of them.
    xq.values.view(torch.uint8)[sum(counts) :] = 0
    return xq, mx.quantize_weights(w, backend="reference")


def product(x: mx.GroupedMXFP8, w: mx.ExpertWeights) -> torch.Tensor:
    """The reference product; rows that no expert owns stay NaN."""
    out = torch.full((x.groups.num_tokens, w.n), torch.nan)
    return mx.grouped_gemm(x, w, out=out, out_dtype=torch.float32, backend="reference")


def agree(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    scale = expected.nan_to_num().abs().amax().clamp(min=1)
    return torch.allclose(actual / scale, expected / scale, equal_nan=True, **TOLERANCE)


@pytest.mark.parametrize("case", CASES)
def test_cutlass_reference_agrees_with_ours(reference, case: str) -> None:
    """Every row that an expert owns is our product, every other row is untouched."""
    x, w = operands(*CASES[case])
    expected = product(x, w)
    actual = torch.full_like(expected, torch.nan)
    cutlass_modules.call(reference, x, w, actual)
    assert torch.equal(actual.isnan(), expected.isnan())
    assert agree(actual, expected)


def test_wild_metadata_stays_inside_the_buffers(reference) -> None:
    """Offsets no GroupLayout writes: an expert that does not fit is cut off, no other is harmed."""
    counts, n, k, num_tokens = [5, 130, 1, 64], 256, 128, 200
    x, w = operands(counts, n, k, num_tokens)
    expected = product(x, w)
    for name, expert, value in (
        ("tokens_per_expert", 0, -3),
        ("expert_offsets", 0, -1),
        ("expert_offsets", 0, num_tokens + 1),
        ("scale_offsets", 0, -128),
        ("scale_offsets", 0, 1),
        ("scale_offsets", 0, 2**31 - 128),
        ("tokens_per_expert", 3, 2**31 - 1),
    ):
        getattr(x.groups, name)[expert], kept = value, int(getattr(x.groups, name)[expert])
        actual = torch.full_like(expected, torch.nan)
        cutlass_modules.call(reference, x, w, actual)
        getattr(x.groups, name)[expert] = kept
        assert agree(actual[5:], expected[5:]), name
        if expert == 0:
            assert actual[:5].isnan().all(), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a | {"out": torch.empty(200, 128)}, r"out: expected shape \(200, 256\), got \(200, 128\)"),
        (lambda a: a | {"out": a["out"].bfloat16()}, "out: its dtype"),
        (lambda a: a | {"x_scales": a["x_scales"].reshape(-1, 8)}, "x scales: expected shape"),
        (lambda a: a | {"w_scales": a["w_scales"][:3]}, "w scales: expected shape"),
        (lambda a: a | {"offsets": a["offsets"][:4]}, r"expert_offsets: expected shape \(5\), got \(4\)"),
        (lambda a: a | {"tokens": a["tokens"].long()}, "tokens_per_expert: expected int32"),
        (lambda a: a | {"x": a["x"].float()}, "x: expected 8-bit elements, got 32-bit ones"),
        (lambda a: a | {"x": a["x"][:, :112].contiguous()}, "x: K must be a positive multiple of 32, got 112"),
        (lambda a: a | {"w": a["w"].mT}, "w: expected a contiguous tensor"),
        (
            lambda a: a | {"w": a["w"][:, :1].expand(-1, 2**24, -1)},
            r"w: N \* K must fit in 32 bits, got N = 16777216, K = 128",
        ),
        (lambda a: a | {"out": torch.empty(200 * 256 + 1)[1:].view(200, 256)}, "out: expected an address"),
    ],
)
def test_entry_refuses_what_does_not_fit(reference, change, message: str) -> None:
    x, w = operands([5, 130, 1, 64], 256, 128, 200)
    arguments = {
        "x": x.values.view(torch.uint8), "x_scales": x.scales, "w": w.values.view(torch.uint8), "w_scales": w.scales,
        "tokens": x.groups.tokens_per_expert, "offsets": x.groups.expert_offsets,
        "scale_offsets": x.groups.scale_offsets, "out": torch.empty(200, 256),
    }  # fmt: skip
    with pytest.raises((ValueError, TypeError), match=message):
        reference(*change(arguments).values())


def test_seeded_faults_are_caught(module: Any) -> None:
    """Each plausible mistake in the shared code makes CUTLASS's product differ from ours."""
    # Spare rows keep a faulty address inside the buffers; K < N keeps a faulty stride there.
    x, w = operands([5, 0, 130, 34], 136, 96, 640)
    expected = product(x, w)
    for number, fault in enumerate(cutlass_modules.OPERAND_FAULTS):
        actual = torch.full_like(expected, torch.nan)
        cutlass_modules.call(module[f"host_reference_{number}"], x, w, actual)
        assert agree(actual, expected) == (fault == cutlass_modules.CONTROL), fault


def test_bit_21_is_clear_in_every_descriptor(module: Any) -> None:
    """Operands and scales for the preferred and the fallback cluster, and D. The encoder sets it in
    all nine; where we do not clear it, it stays in some or all, whatever CUTLASS's version."""
    x, w = operands([5, 130, 1, 64], 256, 128, 200)
    counts = torch.zeros(3, dtype=torch.int32)
    for fault in (cutlass_modules.CONTROL, cutlass_modules.BIT_21):
        function = module[f"descriptors_{list(cutlass_modules.FAULTS).index(fault)}"]
        cutlass_modules.call(function, x, w, torch.empty(200, 256), counts)
        encoded, found, with_bit = counts.tolist()
        assert encoded >= found == 9
        assert (with_bit > 0) == (fault == cutlass_modules.BIT_21)


@pytest.mark.parametrize("tile", [64, 192])
def test_scales_of_tiles_that_fill_no_block(module: Any, tile: int) -> None:
    """Tiles of 64 and 192 tokens begin in the middle of every other block of scales: CUTLASS's own
    loads begin with the block, and its MMA skips 64 columns of the scales of odd tiles."""
    blocks = torch.full((24,), -2, dtype=torch.int32)
    module[f"scale_blocks_{tile}_0"](blocks)
    assert [128 * block + 64 * (t % 2) for t, block in enumerate(blocks.tolist())] == [t * tile for t in range(24)]
