"""How far two results are apart."""

from __future__ import annotations

import math

import torch

from hybrid_mxfp8.core.checks import check_devices, fail


def calc_diff(x: torch.Tensor, y: torch.Tensor) -> float:
    """``1 - 2<x,y> / (<x,x> + <y,y>)`` in float64: 0 for equal tensors, about half the squared
    relative error.

    The measure of DeepGEMM's and SGLang's tests; correct MXFP8 products of normal data are near
    7e-4. Two all-zero tensors differ by 0. Syncs with the device.

    Raises:
        TypeError: not tensors.
        ValueError: the shapes or devices differ.
    """
    _check_pair(x=x, y=y)
    a, b = x.detach().double(), y.detach().double()
    denominator = float((a * a + b * b).sum())
    return 1.0 - 2.0 * float((a * b).sum()) / denominator if denominator else 0.0


def signal_to_noise_db(signal: torch.Tensor, approximation: torch.Tensor) -> float:
    """``10 log10(|signal|^2 / |signal - approximation|^2)`` in dB, in float64; inf for equal
    tensors. Syncs.

    Raises:
        TypeError: not tensors.
        ValueError: the shapes or devices differ.
    """
    _check_pair(signal=signal, approximation=approximation)
    s = signal.detach().double()
    return decibels(float(s.square().sum()), float((s - approximation.detach().double()).square().sum()))


def decibels(power: float, noise: float) -> float:
    """``10 log10(power / noise)``; inf without noise, -inf without power."""
    if noise == 0:
        return math.inf
    # Not of the quotient, which may be 0.
    return 10 * (math.log10(power) - math.log10(noise)) if power else -math.inf


def _check_pair(**tensors: torch.Tensor) -> None:
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name}: must be a torch.Tensor, got {type(tensor).__name__}")
    (first, x), (second, y) = tensors.items()
    if x.shape != y.shape:
        fail(second, f"must have the shape of {first} = {tuple(x.shape)}", tuple(y.shape))
    check_devices(**tensors)
