"""A CTA and a cluster: what their threads share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ptx.barriers import Barrier, Mbarrier
from ptx.errors import Fault
from ptx.memory import SharedMemory
from ptx.tcgen05 import Pipe, TensorMemory
from ptx.warp import Warp

if TYPE_CHECKING:
    from ptx.scheduler import Launch

REGISTER_FILE = 65536


class Cta:
    """One CTA of a cluster."""

    def __init__(self, launch: Launch, cluster: Cluster, index: tuple[int, int, int], rank: int) -> None:
        self.launch, self.cluster, self.index, self.rank = launch, cluster, index, rank
        name = f"of CTA {index}"
        self.shared = SharedMemory(launch.shared_bytes, launch.races, f"shared memory {name}")
        self.tensor = TensorMemory(launch.races, f"tensor memory {name}")
        self.pipe = Pipe(launch.races, f"tcgen05 {name}")
        self.mbarriers: dict[int, Mbarrier] = {}
        self.invalidated: dict[int, int] = {}  # offsets, and the event of each mbarrier.inval
        self.barriers = [Barrier() for _ in range(16)]
        self.acquired_maps: dict[int, list[Any]] = {}
        registers = len(launch.program.kernel.registers)
        self.warps = [Warp(self, i, registers, launch.races) for i in range(launch.threads // 32)]
        # What __launch_bounds__(threads, 1) leaves each thread, in steps of 8.
        allotted = min(REGISTER_FILE // launch.threads // 8 * 8, 255)
        self.free_registers = 0
        for warp in self.warps:
            warp.allotted = allotted

    def check_no_barrier(self, cells: np.ndarray, what: str) -> None:
        """No mbarrier may be overwritten."""
        low, high = int(cells.min()), int(cells.max())
        for offset in self.mbarriers:
            if low - 8 < offset <= high and (np.abs(cells - offset - 3.5) < 4).any():
                raise Fault(f"{what}: overwrites the mbarrier at offset {offset} of CTA {self.index}")

    def check_end(self) -> None:
        """What a CTA must have given back or seen complete when its threads have ended."""
        if self.tensor.allocated:
            raise Fault(
                f"CTA {self.index}: {sum(self.tensor.allocated.values())} columns of tensor memory are not freed"
            )
        for warp in self.warps:
            for lane, groups in warp.bulk.items():
                if groups.open:
                    raise Fault(f"{warp.where()} lane {lane}: a bulk store was never committed")


class Cluster:
    """CTAs that run at the same time and reach one another's shared memory; the rank counts along x
    first."""

    def __init__(self, launch: Launch, first: tuple[int, int], shape: tuple[int, int, int]) -> None:
        self.shape = shape
        self.barrier = Barrier()
        width, height, _ = shape
        places = [(x, y) for y in range(height) for x in range(width)]
        self.ctas = [Cta(launch, self, (first[0] + x, first[1] + y, 0), rank) for rank, (x, y) in enumerate(places)]

    def cta(self, rank: int, what: str) -> Cta:
        """By rank."""
        if not 0 <= rank < len(self.ctas):
            raise Fault(f"{what}: expected a CTA of the cluster's {len(self.ctas)}, got rank {rank}")
        return self.ctas[rank]

    def pair(self, cta: Cta) -> list[Cta]:
        """The two CTAs of a cta_group::2: ranks that differ in the lowest bit."""
        even = cta.rank & ~1
        return [self.cta(even, "cta_group::2"), self.cta(even | 1, "cta_group::2")]
