"""Triton's grouped GEMM for compute capability 10 in the emulator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ptx import product
from ptx.case import Case, Shape
from ptx.cutlass_backend import Result
from ptx.races import Races
from ptx.triton_launch import capture

BLOCKS_T = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Options:
    """How a call is run: compute capability ``10.0`` or ``10.3``, completion and seed as in the scheduler.

    ``block_t`` chooses the tile of tokens; None leaves that to the product.
    """

    arch: str = "10.0"
    completion: str = "late"
    seed: int = 0
    block_t: int | None = None


class Call:
    """A call of the backend, captured and compiled."""

    def __init__(
        self, shape: Shape, options: Options, *, edit: Callable[[str], str] = str, case: Case | None = None
    ) -> None:
        self.options, self.edit = options, edit
        self.case = case or Case(shape, options.seed)
        module = product.grouped_gemm_blackwell
        tile = options.block_t or max(sum(shape.counts) // shape.experts, 1)
        config = module.select_blackwell_config(tile * shape.experts, shape.experts)
        fp8 = torch.float8_e4m3fn
        tokens, offsets, scale_offsets = (
            self.tensor(name, torch.int32, shape.experts + more)
            for name, more in (("tokens", 0), ("expert_offsets", 1), ("scale_offsets", 1))
        )

        def call() -> None:
            module.grouped_gemm_blackwell(
                self.tensor("x", fp8, shape.tokens, shape.k),
                self.tensor("x_scales", torch.uint8, shape.scale_rows, shape.scale_columns),
                product.GroupLayout(tokens, offsets, scale_offsets, shape.tokens),
                self.tensor("w", fp8, shape.experts, shape.n, shape.k),
                self.tensor("w_scales", torch.uint8, shape.experts, -(-shape.n // 128) * 128, shape.scale_columns),
                self.tensor("out", product.OUT_DTYPES[shape.out], shape.tokens, shape.n),
                config,
            )

        (self.captured,) = capture(int(options.arch.replace(".", "")), module, (KERNEL,), call)
        self.block_t = config.block_t

    def tensor(self, name: str, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        """A buffer of the case as a tensor."""
        count = int(torch.Size(shape).numel()) * dtype.itemsize
        return torch.from_numpy(self.case.buffers[name][:count]).view(dtype).view(shape)

    def run(self) -> Result:
        """The launch, and the comparison with the truth."""
        races = Races()
        self.case.memory.begin(races)
        launch = self.captured.launch(
            self.case.memory,
            edit=self.edit,
            completion=self.options.completion,
            seed=self.options.seed,
            races=races,
        )
        launch.run()
        error, problems = self.case.check()
        return Result(error, problems, [str(race) for race in races.found.values()], launch.instructions)


KERNEL = "grouped_gemm_blackwell_kernel"
