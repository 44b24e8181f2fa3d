"""What the suite measures, and how its bytes and flops are counted."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from hybrid_mxfp8.commands import bench as bench_command

BENCH = Path(__file__).resolve().parent.parent / "bench"
shapes = bench_command.import_suite("shapes", BENCH)
work = bench_command.import_suite("work", BENCH)


@pytest.mark.parametrize("distribution", shapes.DISTRIBUTIONS)
@pytest.mark.parametrize(("tokens", "experts"), [(0, 1), (1, 1), (8, 128), (256, 256), (16384, 256), (1001, 7)])
def test_counts_sum_to_the_tokens(distribution, tokens, experts):
    counts = shapes.tokens_per_expert(distribution, tokens, experts, seed=3)
    assert len(counts) == experts
    assert min(counts) >= 0
    assert sum(counts) == tokens


@pytest.mark.parametrize("distribution", shapes.DISTRIBUTIONS)
def test_a_seed_moves_tokens_among_experts_and_changes_nothing_else(distribution):
    first = shapes.tokens_per_expert(distribution, 999, 64, seed=1)
    assert first == shapes.tokens_per_expert(distribution, 999, 64, seed=1)
    others = [shapes.tokens_per_expert(distribution, 999, 64, seed=s) for s in range(2, 6)]
    assert any(other != first for other in others)
    assert all(sorted(other) == sorted(first) for other in others)


def test_distributions_are_what_they_are_called():
    def count(name):
        return sorted(shapes.tokens_per_expert(name, 3200, 32, seed=0), reverse=True)

    assert count("uniform") == [100] * 32
    assert count("one_hot") == [3200] + [0] * 31
    assert count("mostly_empty") == [1600, 1600] + [0] * 30
    zipf = count("zipf")
    assert zipf[0] == pytest.approx(2 * zipf[1], abs=2)
    assert zipf[0] == pytest.approx(4 * zipf[3], abs=4)
    assert zipf[-1] > 0


def test_an_unknown_distribution_is_named():
    with pytest.raises(ValueError, match="one of uniform, zipf, one_hot, mostly_empty, got 'normal'"):
        shapes.tokens_per_expert("normal", 1, 1, 0)


def test_model_shapes_are_those_of_the_models():
    deepseek = shapes.MODELS[0]
    assert deepseek.gemms == ((4096, 7168), (7168, 2048))
    assert all(n % 8 == 0 and k % 32 == 0 for model in shapes.MODELS for n, k in model.gemms)


def test_every_case_appears_once_and_targets_come_first():
    full, quick = shapes.cases(), shapes.cases(quick=True)
    for chosen in (full, quick):
        assert max(Counter(case.name for case in chosen).values()) == 1
        sources = [case.source for case in chosen]
        assert sources[: sources.count("target")] == ["target"] * sources.count("target")
    targets = {case.name for case in full if case.source == "target"}
    assert targets == {case.name for case in quick if case.source == "target"}
    assert {case.kind for case in full} == {case.kind for case in quick} == set(shapes.KINDS)
    assert {case.distribution for case in full} == set(shapes.DISTRIBUTIONS)


@pytest.mark.parametrize("kind", shapes.KINDS)
def test_only_keeps_one_kind_in_the_same_order(kind):
    assert shapes.cases(only=kind) == [case for case in shapes.cases() if case.kind == kind]


def test_the_grids_of_others_are_there():
    names = {case.name for case in shapes.cases()}
    assert {f"gemm {t}x4096x4096 E64 uniform" for t in (1024, 2048, 4096)} <= names
    assert {f"gemm {t}x7168x2048 E32 uniform" for t in (32, 512, 8192)} <= names
    assert {f"gemm 131072x7168x2048 E{g} uniform" for g in (1, 2, 4, 8)} <= names
    assert {"quantize 131072x2048 E1 uniform", "quantize 8192x2048 E8 uniform"} <= names


def test_quantize_bytes_by_hand():
    """Counts 1, 0, 129 and K = 256: C = 8, so 128 + 256 scale rows of 8 bytes."""
    counts = [1, 0, 129]
    assert work.quantize(counts, 256).bytes == 130 * 256 * 2 + 130 * 256 + 384 * 8
    assert work.quantize(counts, 256, swiglu=True).bytes == 130 * 256 * 4 + 130 * 256 + 384 * 8
    assert work.quantize(counts, 256, gather=True).bytes == work.quantize(counts, 256).bytes + 130 * 4
    assert work.quantize(counts, 256, itemsize=4).bytes == 130 * 256 * 5 + 384 * 8
    assert work.quantize(counts, 256).flops == 0


def test_quantize_counts_padded_scale_columns():
    """K = 160 has 5 scale columns, stored as 8."""
    assert work.quantize([128], 160).bytes == 128 * 160 * 3 + 128 * 8


def test_gemm_bytes_and_flops_by_hand():
    """N = 136 has 256 scale rows; the expert without tokens reads nothing."""
    job = work.gemm([3, 0, 2], 136, 128)
    assert job.bytes == 2 * (136 * 128 + 256 * 4) + 5 * (128 + 4) + 5 * 136 * 2
    assert job.flops == 2 * 5 * 136 * 128
    assert work.gemm([3, 0, 2], 136, 128, out_itemsize=4).bytes == job.bytes + 5 * 136 * 2
    assert work.gemm_bf16([3, 0, 2], 136, 128).bytes == 2 * (2 * 136 * 128 + 5 * 128 + 5 * 136)
    assert work.gemm_bf16([3, 0, 2], 136, 128).flops == job.flops


def test_mxfp8_streams_a_little_more_than_half_of_bf16():
    """At one token an expert the limit by bytes is near 1.94, not 2: one scale byte for 32 elements."""
    counts = [1] * 32
    ratio = work.gemm_bf16(counts, 4096, 7168).bytes / work.gemm(counts, 4096, 7168).bytes
    assert 1.93 < ratio < 1.95


def test_work_adds():
    assert work.copy(10) + work.silu_mul(2, 3) == work.Work(40 + 36)
