"""What an eager call asks PyTorch for."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

ALLOCATIONS = tuple(
    f"aten.{name}" for name in ("empty", "zeros", "ones", "full", "clone", "_to_copy", "new_", "arange")
)


class Recorder(TorchDispatchMode):
    """The names of the operators that PyTorch dispatches."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))

    @property
    def allocations(self) -> list[str]:
        return [name for name in self.names if name.startswith(ALLOCATIONS)]
