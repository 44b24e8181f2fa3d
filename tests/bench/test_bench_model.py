"""The model of the card that is not at hand."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from hybrid_mxfp8.commands import bench as bench_command

BENCH = Path(__file__).resolve().parent.parent / "bench"
model = bench_command.import_suite("model", BENCH)
Tile = model.Tile

CARD = model.Card("card", 8, 1.0, 8192, 1e9, 1.0, 0.0, 0.0)
"""8 SMs at 1 GHz, MMA-bound: 128 x 64 x 128 takes 128 cycles; memory 1 TB/s."""


def test_waves_and_mma_time_by_hand():
    """N = 512 is 4 tiles, 100 and 1 tokens are 2 and 1: 12 tiles on 8 SMs are 2 waves of 4 steps of 128 cycles."""
    p = model.predict(CARD, Tile(1, 64, (1, 1)), [100, 0, 1], 512, 512)
    assert (p.tiles, p.waves) == (12, 2)
    assert p.mma_us == pytest.approx(2 * 4 * 128 / 1000)
    assert p.flops == 2 * 101 * 512 * 512


def test_a_cluster_rounds_tiles_up():
    """3 tiles along N in clusters of 2 are 4; 8 SMs hold 4 clusters."""
    p = model.predict(CARD, Tile(2, 64, (2, 1)), [64] * 4, 384, 128)
    assert (p.tiles, p.waves) == (16, 2)
    p = model.predict(CARD, Tile(2, 64, (2, 2)), [64] * 4, 384, 128)
    assert (p.tiles, p.waves) == (32, 4)


def test_time_is_the_slower_of_memory_and_compute_plus_launch():
    slow_memory = dataclasses.replace(CARD, streaming_tb_s=1e-6, launch_us=3.0)
    p = model.predict(slow_memory, Tile(1, 64, (1, 1)), [64], 128, 128)
    assert p.bound == "memory"
    assert p.us == pytest.approx(p.bytes + 3.0)
    fast_memory = dataclasses.replace(CARD, streaming_tb_s=1e9)
    p = model.predict(fast_memory, Tile(1, 64, (1, 1)), [64], 128, 128)
    assert p.bound == "MMA"
    assert p.us == p.compute_us
    slow_l2 = dataclasses.replace(fast_memory, l2_bytes_per_cycle=1)
    p = model.predict(slow_l2, Tile(1, 64, (1, 1)), [64], 128, 128)
    assert p.bound == "L2"
    assert p.l2_us == pytest.approx(128 * (128 + 64) / 1000)


def test_more_tokens_never_take_less_time():
    times = [model.predict(model.B200, Tile(2, 128, (2, 1)), [t] * 32, 4096, 7168).us for t in (1, 16, 128, 1024, 4096)]
    assert times == sorted(times)


def test_experts_without_tokens_cost_nothing():
    one = model.predict(model.B200, Tile(1, 64, (1, 1)), [64], 4096, 4096)
    assert model.predict(model.B200, Tile(1, 64, (1, 1)), [0, 64, 0, 0], 4096, 4096) == one


def test_published_points_are_within_a_seventh():
    """Constants that come from other figures than these; a worse fit means that the model lost its meaning."""
    for published, prediction in model.against_published():
        assert abs(prediction.us / published.us - 1) < 1 / 7, published.who


def test_bytes_of_the_published_points():
    """SGLang's 156.7 µs at T 32 is 6 TB/s of weights: 32 x 4096 x 7168 bytes and their scales."""
    prediction = model.against_published()[1][1]
    assert prediction.bytes == 32 * 4096 * 7168 * 33 // 32 + 32 * (7168 + 224) + 32 * 4096 * 2
    assert prediction.bound == "memory"


def test_random_counts_are_seeded_and_sum():
    counts = model.random_counts(1000, 64, seed=5)
    assert sum(counts) == 1000
    assert counts == model.random_counts(1000, 64, seed=5)
    assert len(set(counts)) > 1


def test_the_best_is_no_slower_than_any():
    configs = [Tile(1, t, (1, 1)) for t in (64, 128, 192, 256)]
    counts = model.random_counts(4096, 32)
    _, least = model.best(model.B200, configs, counts, 4096, 7168)
    assert least.us == min(model.predict(model.B200, c, counts, 4096, 7168).us for c in configs)


def test_every_part_of_the_report_says_modelled():
    text = model.report()
    assert "not measured" in text or "Nothing below was measured" in text
    headings = [line for line in text.splitlines() if line.startswith("#")]
    assert len(headings) == 3
    assert all("odelled" in heading for heading in headings)
    assert "180.1" in text
    assert "156.7" in text


class _Selector:
    """Stands for hybrid_mxfp8.cutlass_kernels.config: always one configuration."""

    CONFIGS = (Tile(1, 64, (1, 1)), Tile(2, 128, (2, 1)))

    @staticmethod
    def select_config(num_experts, n, k, num_tokens, sm_count):
        return _Selector.CONFIGS[0]


def test_choices_are_explained_with_what_they_lose(monkeypatch):
    monkeypatch.setattr(model, "_selector", lambda: _Selector)
    explained = model.explain()
    assert len(explained) == 2 * len(model.MODELS) * len(model.EXPLAINED_TOKENS)
    assert all(e.loss_percent >= 0 for e in explained)
    assert any(e.loss_percent > 5 for e in explained)
    assert explained[0].chosen in model.report()


def test_without_a_selector_the_report_says_so(monkeypatch):
    monkeypatch.setattr(model, "_selector", lambda: None)
    assert "nothing chooses a configuration yet" in model.report()
