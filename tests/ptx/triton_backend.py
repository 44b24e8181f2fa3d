"""Triton's grouped GEMM for compute capability 10 in the emulator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ptx import product
from ptx.case import Case, Shape
from ptx.cutlass_backend import Result
from ptx.races import Race, Races
from ptx.triton_launch import capture

BLOCKS_T = (16, 128, 256)


@dataclass(frozen=True)
class Options:
    """How a call is run: compute capability ``10.0`` or ``10.3``, completion and seed as in the
    scheduler.

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
        module = product.blackwell
        tokens = options.block_t * shape.experts if options.block_t else shape.tokens
        config = module.select_blackwell_config(tokens, shape.experts)
        # A tile of 256 tokens loads two rows of scale tiles, the second maybe behind the last
        # expert's: it must not matter.
        self.case = case or Case(shape, options.seed, beyond=255 if config.block_t > 128 else None)
        fp8 = torch.float8_e4m3fn
        offsets = (
            self.tensor(name, torch.int32, shape.experts + more)
            for name, more in (("tokens", 0), ("expert_offsets", 1), ("scale_offsets", 1))
        )
        x = product.mx.GroupedMXFP8(
            self.tensor("x", fp8, shape.tokens, shape.k),
            self.tensor("x_scales", torch.uint8, shape.scale_rows, shape.scale_columns),
            product.GroupLayout(*offsets, shape.tokens),
        )
        w = product.mx.ExpertWeights(
            self.tensor("w", fp8, shape.experts, shape.n, shape.k),
            self.tensor("w_scales", torch.uint8, shape.experts, -(-shape.n // 128) * 128, shape.scale_columns),
        )
        out = self.tensor("out", product.OUT_DTYPES[shape.out], shape.tokens, shape.n)
        steps = product.launches.product_steps(module.plan, x, w, out, config)
        (self.captured,) = capture(int(options.arch.replace(".", "")), *steps)
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
        known = [str(race) for race in races.found.values() if is_known(race)]
        found = [str(race) for race in races.found.values() if not is_known(race)]
        return Result(error, problems, found, launch.instructions, known)


def is_known(race: Race) -> bool:
    """Whether a race is one that Triton's own code has.

    Before 3.9 the warps that wait for a specialized loop's end invalidate its barriers at once,
    while a commit to one may be under way, and wait for the last commit, which comes after all
    others, only then. Nothing else is written there in between.
    """
    return race.kind == "arrive/invalidate" and product.launch.triton_version() < (3, 9)
