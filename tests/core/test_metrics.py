"""Measures of a difference."""

from __future__ import annotations

import pytest
import torch

import hybrid_mxfp8 as mx


def test_calc_diff() -> None:
    a = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    assert mx.calc_diff(a, a) == pytest.approx(0, abs=1e-15)
    assert mx.calc_diff(a, -a) == pytest.approx(2)
    assert mx.calc_diff(torch.zeros(3), torch.zeros(3)) == mx.calc_diff(torch.zeros(0), torch.zeros(0)) == 0
    assert mx.calc_diff(a.clone().requires_grad_(), a) == pytest.approx(0, abs=1e-15)
    assert mx.calc_diff(a, 1.01 * a) == pytest.approx(0.01**2 / (1 + 1.01**2), rel=1e-6)


def test_signal_to_noise() -> None:
    a = torch.tensor([3.0, 4.0])
    assert mx.signal_to_noise_db(a, a) == float("inf")
    assert mx.signal_to_noise_db(a, a * 0.9) == pytest.approx(20, rel=1e-5)
    assert mx.signal_to_noise_db(torch.zeros(2), a) == mx.signal_to_noise_db(a, a / 0) == float("-inf")
