"""The CUTLASS backend in the emulator: its two kernels, with the parameters that its host side
makes for them."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ptx import product
from ptx.build import compile_ptx
from ptx.case import BYTES, Case, Shape
from ptx.program import Program
from ptx.races import Race, Races
from ptx.scheduler import Launch

PREPARE_THREADS = 128
OUT_NUMBERS = {"bf16": 0, "fp16": 1, "fp32": 2}
MAINLOOPS = ("ragged", "pointer_array")
CLUSTERS = ("preferred", "fallback", "mixed")

Edit = Callable[[str], str]


@contextmanager
def headers_of(mainloop: str) -> Iterator[None]:
    """The JIT builds with the headers of a mainloop."""
    before = os.environ.get("HYBRID_MXFP8_CUTLASS_DIR")
    os.environ["HYBRID_MXFP8_CUTLASS_DIR"] = str(product.mainloop_headers(mainloop).include)
    try:
        yield
    finally:
        if before is None:
            del os.environ["HYBRID_MXFP8_CUTLASS_DIR"]
        else:
            os.environ["HYBRID_MXFP8_CUTLASS_DIR"] = before


@functools.cache
def module_text(config: str, mainloop: str, out: str) -> str:
    """PTX of a configuration's module."""
    module = product.GemmConfig.parse(config).module
    source = product.gemm_source(module, product.OUT_DTYPES[out], "10.0a")
    return compile_ptx(source, product.mainloop_headers(mainloop))


whole_host = False
"""Whether to compile the host side of all configurations at once, which pays from five of them
on."""


@functools.cache
def host(mainloop: str, config: str, out: str) -> Any:
    """The host side of a configuration: of all, if that is built or asked for, else of this one."""
    with headers_of(mainloop):
        every = product.host_source()
        if whole_host or product.jit.find(every) is not None:
            return product.jit.load(every)
        return product.jit.load(product.host_source((config, out)))


def is_known(race: Race, program: Program, mainloop: str) -> bool:
    """Whether a race is one that CUTLASS's own source has.

    In kernels of two SMs the barrier for the deallocation of tensor memory is initialised behind
    the last ``fence.mbarrier_init`` (sm100_gemm_array_tma_warpspecialized.hpp,
    tmem_deallocation_result_barrier), and the cluster's barrier that follows is a relaxed one, so
    nothing tells the other CTA of it. It arrives there at the end of the kernel.

    The pointer-array mainloop of 4.2 has one set of tensor maps for the loads of a CTA, and
    rewrites it for the next expert after ``wait_group.read``, which covers stores alone. It relies
    on TMA having read the map of a load by then. The ragged mainloop has a ring of maps.
    """
    code = {ins.line: ins.name for ins in program.kernel.code}
    if race.kind == "use/initialise":
        fences = [line for line, name in code.items() if name.startswith("fence.mbarrier_init")]
        return bool(fences) and race.other.line > fences[-1]
    if mainloop != "pointer_array" or race.where != "workspace":
        return False
    copy, map_writer = sorted((race.mine, race.other), key=lambda event: event.line)
    return copy.who.endswith("(TMA load)") and code.get(map_writer.line, "").startswith("tensormap.cp_fenceproxy")


@functools.lru_cache(maxsize=64)
def _program(text: str, kernel: str) -> Program:
    return Program(text, kernel)


@dataclass
class Result:
    """What a run gave."""

    error: float
    problems: list[str]
    races: list[str]
    instructions: int
    known: list[str] = field(default_factory=list)
    """Races that are CUTLASS's own or Triton's, see each backend's ``is_known``."""

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong."""
        return not self.races and not self.problems and self.error <= 1


@dataclass(frozen=True)
class Options:
    """How a call is run.

    Attributes:
        config: of the product, with its cluster.
        mainloop: ``ragged`` or ``pointer_array``.
        sms: that the persistent grid fills.
        pdl: whether the GEMM starts before prepare has ended.
        clusters: how the hardware places the preferred and the fallback clusters.
        completion: when asynchronous operations land.
        seed: of operands and schedule.
    """

    config: str
    mainloop: str = "ragged"
    sms: int = 4
    pdl: bool = True
    clusters: str = "preferred"
    completion: str = "late"
    seed: int = 0


class Call:
    """A call of the backend, that can be repeated with other counts on the same buffers."""

    def __init__(
        self,
        shape: Shape,
        options: Options,
        *,
        edit: Edit = str,
        edit_params: Callable[[np.ndarray, Any], None] | None = None,
        case: Case | None = None,
    ) -> None:
        self.options = options
        self.config = product.GemmConfig.parse(options.config)
        text = edit(module_text(options.config, options.mainloop, shape.out))
        self.gemm, self.prepare = _program(text, "GemmUniversal"), _program(text, "prepare_kernel")
        self.case = case or Case(shape, options.seed)
        self._describe(shape)
        if edit_params:
            edit_params(self.params, self)
        self.tensor_maps: dict[int, Any] = {}

    def _describe(self, shape: Shape) -> None:
        """Have the host side make both kernels' parameters."""
        config, case = self.config, self.case
        side = host(self.options.mainloop, config.module, shape.out)
        which = (config.cta_group, config.token_tile, OUT_NUMBERS[shape.out])
        launch = (self.options.sms, *config.cluster)
        size = side.workspace_size(*which, shape.experts, shape.n, shape.k, shape.tokens, *launch)
        workspace = case.put("workspace", size, writable=True)
        columns = shape.scale_columns
        tensors = (
            _tensor(case, "x", torch.uint8, shape.tokens, shape.k),
            _tensor(case, "x_scales", torch.uint8, shape.scale_rows, columns),
            _tensor(case, "w", torch.uint8, shape.experts, shape.n, shape.k),
            _tensor(case, "w_scales", torch.uint8, shape.experts, -(-shape.n // 128) * 128, columns),
            _tensor(case, "tokens", torch.int32, shape.experts),
            _tensor(case, "expert_offsets", torch.int32, shape.experts + 1),
            _tensor(case, "scale_offsets", torch.int32, shape.experts + 1),
            _tensor(case, "out", product.OUT_DTYPES[shape.out], shape.tokens, shape.n),
        )
        params, prepare = torch.zeros(8192, dtype=torch.uint8), torch.zeros(1024, dtype=torch.uint8)
        facts = torch.zeros(10, dtype=torch.int64)
        side.describe(*tensors, torch.from_numpy(workspace), *which, *launch, params, prepare, facts)
        size_, gx, gy, gz, threads, cx, cy, shared, prepare_size, _ = facts.tolist()
        self.params = params.numpy()[:size_].copy()
        experts = np.array([shape.experts], np.int32).view(np.uint8)
        self.prepare_params = np.concatenate([prepare.numpy()[:prepare_size], experts])
        self.grid, self.threads, self.shared = (gx, gy, gz), threads, shared
        self.cluster = (cx, cy, 1)

    def run(self, call: int = 0) -> Result:
        """Both launches, and the comparison with the truth."""
        options, case = self.options, self.case
        memory, seed = case.memory, options.seed + 1000 * call
        races = Races()
        memory.begin(races)
        before = memory.snapshot()
        blocks = -(-case.shape.experts // PREPARE_THREADS)
        first = Launch(
            self.prepare, self.prepare_params, memory, (blocks, 1, 1), PREPARE_THREADS, seed=seed, races=races
        )
        first.run()
        found = [str(race) for race in races.found.values()]
        races = Races()
        predecessor = {}
        if options.pdl:
            agent = races.agents()
            memory.withhold(before, races, races.event(agent, 1, "prepare_kernel"))
            predecessor = {agent: 1}
        else:
            memory.begin(races)
        second = Launch(
            self.gemm,
            self.params,
            memory,
            self.grid,
            self.threads,
            self.cluster,
            self.shared,
            clusters=self._clusters(),
            predecessor=predecessor,
            completion=options.completion,
            seed=seed,
            races=races,
            tensor_maps=self.tensor_maps,
        )
        second.run()
        memory.show_hidden()
        error, problems = case.check()
        known = [race for race in races.found.values() if is_known(race, self.gemm, options.mainloop)]
        found += [str(race) for race in races.found.values() if race not in known]
        return Result(error, problems, found, first.instructions + second.instructions, [str(race) for race in known])

    def _clusters(self) -> list[tuple[tuple[int, int], tuple[int, int, int]]]:
        """The clusters that the grid is cut into."""
        width, height, _ = self.cluster
        small = (self.config.cta_group, 1, 1)
        made: list[tuple[tuple[int, int], tuple[int, int, int]]] = []
        number = 0
        for y in range(0, self.grid[1], height):
            for x in range(0, self.grid[0], width):
                split = self.options.clusters == "fallback" or (self.options.clusters == "mixed" and number % 2)
                number += 1
                if not split:
                    made.append(((x, y), self.cluster))
                    continue
                for dy in range(height):
                    made += [((x + dx, y + dy), small) for dx in range(0, width, small[0])]
        return made


def _tensor(case: Case, name: str, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    count = int(np.prod(shape)) * dtype.itemsize
    return torch.from_numpy(case.buffers[name][:count]).view(dtype).view(shape)


def run(shape: Shape, options: Options) -> Result:
    """One call."""
    return Call(shape, options).run()


__all__ = ["BYTES", "CLUSTERS", "MAINLOOPS", "Call", "Options", "Result", "run"]
