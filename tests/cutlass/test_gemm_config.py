"""The tile configurations and the model that chooses among them: pure functions of shapes."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid_mxfp8.cutlass_kernels.config import (
    CONFIGS,
    MODULES,
    TOKEN_TILES,
    GemmConfig,
    estimate,
    select_estimate,
    token_bucket,
)


def test_names_parse_back() -> None:
    for config in CONFIGS:
        assert GemmConfig.parse(str(config)) == config
        assert GemmConfig.parse(config.module).module == config.module
    assert GemmConfig.parse("2sm_256x128x128").cluster == (2, 1)
    assert len(MODULES) == 2 * len(TOKEN_TILES)


@pytest.mark.parametrize(
    "name", ["", "3sm_384x128x128", "2sm_256x96x128", "2sm_256x128x128_1x1", "1sm_128x64x64", "1sm_128x64x128_3x1"]
)
def test_unknown_name_lists_the_valid_ones(name: str) -> None:
    with pytest.raises(ValueError, match=f"config: expected one of 1sm_128x64x128, .*got {re.escape(repr(name))}"):
        GemmConfig.parse(name)


def test_few_tokens_take_the_smallest_tile_and_many_a_pair_of_sms() -> None:
    """One token an expert computes 64 columns, not 256: the weights' bytes set the time. A large
    prefill is bound by tensor cores, which a pair of SMs feeds best."""
    few, many = select_estimate(32, 4096, 7168, 32), select_estimate(8, 4096, 7168, 131072)
    assert few.config.token_tile == 64
    assert few.memory_cycles >= few.compute_cycles
    assert many.config.cta_group == 2
    assert many.config.token_tile >= 192
    assert many.memory_cycles < many.compute_cycles


def test_bytes_and_waves_by_hand() -> None:
    """Active weights and tokens with their scales, and the output, of one expert; 4 tiles of weight
    rows by 2 of tokens and half a ragged one, so 12, on 8 SMs."""
    e = estimate(CONFIGS[0], 1, 256, 512, 64, 148, 2)
    assert e.memory_cycles * 3800 == pytest.approx((256 * 512 + 64 * 512) * 33 / 32 + 64 * 256 * 2)
    assert estimate(GemmConfig(1, 64, (1, 1)), 1, 512, 512, 128, 8, 2).waves == 2


@given(
    num_experts=st.integers(1, 512),
    n=st.integers(1, 4096).map(lambda i: 8 * i),
    k=st.integers(1, 512).map(lambda i: 32 * i),
    num_tokens=st.integers(1, 1 << 20),
    sm_count=st.sampled_from([1, 8, 132, 148, 160]),
)
def test_some_configuration_is_always_chosen(num_experts: int, n: int, k: int, num_tokens: int, sm_count: int) -> None:
    config = select_estimate(num_experts, n, k, num_tokens, sm_count).config
    assert config in CONFIGS
    assert config.cluster[0] * config.cluster[1] <= sm_count


@given(st.integers(1, 1 << 24))
def test_token_buckets_are_close_and_few(num_tokens: int) -> None:
    bucket = token_bucket(num_tokens)
    assert num_tokens <= bucket <= num_tokens * 17 / 16 + 1
    assert token_bucket(bucket) == bucket
