"""Experts are quantized by the reference, but where a test says by what."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import hybrid_mxfp8 as mx


@pytest.fixture(autouse=True)
def _reference() -> Iterator[None]:
    with mx.use_backend("reference"):
        yield
