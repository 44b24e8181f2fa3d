"""A short life of the state machine with compiled kernels; ``make fuzz`` is a long one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

pytestmark = pytest.mark.gpu


def test_random_calls(tally: Callable[..., None]) -> None:
    """Every kernel is compiled when it is first drawn, which is where the time goes."""
    import fuzz_machine  # not before: it asks the GPU what it is, after which a test can't fork

    before = Counter(fuzz_machine.COUNTS)
    limits = settings(
        max_examples=3, stateful_step_count=12, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck)
    )
    run_state_machine_as_test(fuzz_machine.Machine, settings=limits)
    done = fuzz_machine.COUNTS - before
    assert done["steps"] >= 3 * 12
    tally("fuzz steps", done["steps"])
