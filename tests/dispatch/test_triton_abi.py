"""A launch made from an Abi is, to the driver, the one that Triton's own launcher makes: byte by byte."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
from fake_driver import child, in_child, launches, set_sizes, sizes_in_ptx  # noqa: F401
from kernel_cases import CASES, Case
from triton.backends.compiler import GPUTarget

from hybrid_mxfp8.dispatch import launcher
from hybrid_mxfp8.dispatch.buffers import Buffer, TensorMap
from hybrid_mxfp8.triton_kernels import abi

CPU = torch.device("cpu")
STREAM = 7
NEVER_CLEARS_BIT_21 = triton.__version__.startswith("3.6.")


def use_gpu(arch: int) -> None:
    """Let Triton's own driver, over the fake libcuda, have a GPU of this architecture."""
    from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils

    class Driver(CudaDriver):  # type: ignore[misc]
        def __init__(self) -> None:
            self.utils = CudaUtils()
            self.launcher_cls = CudaLauncher
            self.get_current_device = lambda: arch  # Triton's caches of kernels are keyed by device
            self.get_current_stream = lambda device: STREAM
            self.get_device_capability = lambda device: (arch // 10, arch % 10)

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", arch, 32)

    triton.runtime.driver.set_active(Driver())


def compiled_of(case: Case) -> Any:
    use_gpu(case.arch)
    compiled = abi.compile_kernel(case.load(), case.arguments, case.constants, case.options, CPU)
    compiled.run  # noqa: B018 - loads it
    set_sizes(compiled.function, sizes_in_ptx(compiled.asm["ptx"]))
    return compiled


def buffers_of(case: Case) -> dict[int, Buffer]:
    found = [a.buffer if isinstance(a, TensorMap) else a for a in case.arguments]
    return {buffer.index: buffer for buffer in found if isinstance(buffer, Buffer)}


class Memory:
    """A tensor by its address."""

    def __init__(self, address: int, dtype: torch.dtype) -> None:
        self.address, self.dtype = address, dtype

    def data_ptr(self) -> int:
        return self.address


def as_triton_takes_it(argument: abi.Argument, addresses: list[int]) -> Any:
    if isinstance(argument, Buffer):
        return addresses[argument.index] + argument.offset
    if isinstance(argument, TensorMap):
        buffer = argument.buffer
        descriptor = abi._stand_in(argument)
        descriptor.base = Memory(addresses[buffer.index] + buffer.offset, buffer.dtype)
        return descriptor
    return argument


def without_bit_21(params: bytes, sizes: list[int]) -> bytes:
    """Parameters as they are with that bit cleared in word 1 of each tensor map."""
    changed, at = bytearray(params), 0
    for size in sizes:
        if size == abi.TENSOR_MAP_BYTES:
            changed[at + 8 + 2] &= ~(1 << 5)
        at += size
    return bytes(changed)


@pytest.mark.parametrize("name", CASES)
@in_child
def test_same_launch_as_tritons(name: str) -> None:
    case = CASES[name]()
    compiled = compiled_of(case)
    addresses = [0x7F00_0000_0000 + i * 2**32 for i in range(len(buffers_of(case)))]

    compiled[(case.grid, 1, 1)](*(as_triton_takes_it(a, addresses) for a in case.arguments), *case.constants)
    [tritons] = launches()

    found = abi.abi_of(compiled, case.arguments)
    program = launcher.program(0, [0] * len(addresses), [], [found.words(case.grid, case.arguments)])
    assert launcher.load().run(program.address, STREAM, *addresses) == 0
    [ours] = launches()
    if NEVER_CLEARS_BIT_21:
        sizes = sizes_in_ptx(compiled.asm["ptx"])
        has_small_maps = "gemm" in name and "portable" not in name
        assert (ours.params != tritons.params) == has_small_maps
        ours, tritons = (each._replace(params=without_bit_21(each.params, sizes)) for each in (ours, tritons))
    assert ours == tritons
    assert ours.grid == (case.grid, 1, 1)
    assert len(ours.params) == sum(sizes_in_ptx(compiled.asm["ptx"]))
