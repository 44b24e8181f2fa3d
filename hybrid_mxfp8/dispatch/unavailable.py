"""A backend whose package can't be imported: it runs nothing, and says why."""

from __future__ import annotations

from typing import NoReturn

import torch

from hybrid_mxfp8.dispatch.device import TRITON_MIN_CAPABILITY, capability, has_triton
from hybrid_mxfp8.dispatch.problem import GemmBuffers, Problem, Support


class UnavailableBackend:
    """In the place of one that failed to import."""

    about = "its package can't be imported"

    def __init__(self, name: str, error: ImportError) -> None:
        self.name = name
        self._reason = f"{name} can't be imported: {error}"
        if name == "triton" and not has_triton():
            self._reason = "Triton is not installed: pip install triton"

    def made_for(self, device: torch.device) -> bool:
        """Every GPU that the kernels take: there, its absence is worth a warning."""
        found = capability(device)
        return found is not None and found >= TRITON_MIN_CAPABILITY

    def available(self, device: torch.device) -> Support:
        """Never."""
        return False, self._reason

    def can_run(self, problem: Problem) -> Support:
        """Never."""
        return False, self._reason

    def workspace_size(self, problem: Problem) -> int:
        """It is never planned."""
        return 0

    def workspace_bound(self, problem: Problem) -> int:
        """It is never planned."""
        return 0

    def plan(self, problem: Problem, buffers: GemmBuffers) -> NoReturn:
        """It is never chosen."""
        raise AssertionError(self._reason)

    def explain(self, problem: Problem) -> str:
        """Why it can't."""
        return self._reason
