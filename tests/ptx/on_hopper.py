"""What a Hopper GPU has, checked on one: the emulator and the GPU run the same PTX, and every byte
must agree.

    python tests/ptx/on_hopper.py [--emulate]

Needs a GPU of compute capability 9.0 and torch; the driver compiles the PTX. With --emulate only
the emulator runs, on any machine, which shows that the programs themselves break no rule. Exits 1
if anything differs.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # this folder is the package ptx

import numpy as np

from ptx import tensormap
from ptx.errors import Fault
from ptx.hopper_programs import Hopper, Map, programs
from ptx.memory import GlobalMemory, aligned
from ptx.program import Program
from ptx.races import Races
from ptx.scheduler import Launch

# ---------------------------------------------------------------- in the emulator


def emulated(program: Hopper) -> np.ndarray:
    """The output after the program's launches; zeros where nothing was written.

    Raises:
        Fault: the program breaks a rule, or races.
    """
    memory = GlobalMemory()
    out, data = aligned(program.output), aligned(program.input)
    out[:], data[:] = 0, program.data()
    memory.add("out", out, written=True, writable=True)
    memory.add("in", data, written=True, writable=False)
    addresses = {"out": out.ctypes.data, "in": data.ctypes.data}
    maps = [tensormap.encode(addresses[m.of], m.type, m.dims, m.strides, m.box, m.swizzle) for m in program.maps]
    params = np.concatenate([np.array([addresses["out"], addresses["in"]], np.uint64).view(np.uint8)])
    if maps:
        params = np.concatenate([params.view(np.uint8), np.zeros(48, np.uint8), *maps])
    races = Races()
    memory.begin(races)
    before = memory.snapshot()
    predecessor: dict[int, int] = {}
    for text in filter(None, (program.text, program.second)):
        launch = Launch(
            Program(text, "program"), params, memory, (program.grid, 1, 1), program.threads,
            (program.cluster, 1, 1), program.shared, predecessor=predecessor, races=races, seed=3,
        )  # fmt: skip
        launch.run()
        if races.found:
            raise Fault(str(next(iter(races.found.values()))))
        if program.second and text is program.text:
            races = Races()
            agent = races.agents()
            memory.withhold(before, races, races.event(agent, 1, "the first kernel"))
            predecessor = {agent: 1}
    memory.show_hidden()
    return out.copy()


# ---------------------------------------------------------------- on the GPU


class LaunchAttribute(ctypes.Structure):
    """CUlaunchAttribute (cuda.h)."""

    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", ctypes.c_uint * 16))


class LaunchConfig(ctypes.Structure):
    """CUlaunchConfig (cuda.h)."""

    _fields_ = (
        *((name, ctypes.c_uint) for name in ("gx", "gy", "gz", "bx", "by", "bz", "shared")),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(LaunchAttribute)),
        ("count", ctypes.c_uint),
    )


CLUSTER_DIMENSION, PROGRAMMATIC = 4, 6
"""CUlaunchAttributeID."""

MAX_DYNAMIC_SHARED = 8
"""CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES."""


class Gpu:
    """The driver's functions, on device 0."""

    def __init__(self) -> None:
        self.driver = ctypes.CDLL("libcuda.so.1")
        device, context = ctypes.c_int(), ctypes.c_void_p()
        self.call("cuInit", 0)
        self.call("cuDeviceGet", ctypes.byref(device), 0)
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self.call("cuCtxSetCurrent", context)

    def call(self, name: str, *arguments: Any) -> None:
        """A function of the driver, which must succeed."""
        code = getattr(self.driver, name)(*arguments)
        if code:
            text = ctypes.c_char_p()
            self.driver.cuGetErrorString(code, ctypes.byref(text))
            raise RuntimeError(f"{name}: {(text.value or b'').decode()} ({code})")

    def function(self, text: str) -> Any:
        """The kernel ``program`` of a module."""
        log = ctypes.create_string_buffer(8192)
        options = (ctypes.c_int * 2)(5, 6)  # CU_JIT_ERROR_LOG_BUFFER and its size
        values = (ctypes.c_void_p * 2)(ctypes.cast(log, ctypes.c_void_p), 8192)
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        try:
            self.call("cuModuleLoadDataEx", ctypes.byref(module), text.encode(), 2, options, values)
        except RuntimeError as error:
            raise RuntimeError(f"{error}: {log.value.decode()}") from None
        self.call("cuModuleGetFunction", ctypes.byref(function), module, b"program")
        return function

    def buffer(self, data: np.ndarray) -> ctypes.c_uint64:
        """Device memory with these bytes."""
        address = ctypes.c_uint64()
        self.call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(data.size))
        self.call("cuMemcpyHtoD_v2", address, data.ctypes.data_as(ctypes.c_void_p), ctypes.c_size_t(data.size))
        return address

    def tensor_map(self, made: Map, address: int) -> np.ndarray:
        """What the driver encodes; 64-byte aligned."""
        raw = aligned(128)
        rank = len(made.dims)
        self.call(
            "cuTensorMapEncodeTiled",
            ctypes.c_void_p(raw.ctypes.data),
            made.type,
            rank,
            ctypes.c_void_p(address),
            (ctypes.c_uint64 * rank)(*made.dims),
            (ctypes.c_uint64 * max(rank - 1, 1))(*made.strides),
            (ctypes.c_uint32 * rank)(*made.box),
            (ctypes.c_uint32 * rank)(*(1,) * rank),
            *(0, made.swizzle, 0, 0),
        )
        return raw

    def run(self, program: Hopper) -> np.ndarray:
        """The output after the program's launches."""
        out, data = self.buffer(np.zeros(program.output, np.uint8)), self.buffer(program.data())
        addresses = {"out": out, "in": data}
        maps = [self.tensor_map(m, int(addresses[m.of].value)) for m in program.maps]
        pointers = [ctypes.addressof(out), ctypes.addressof(data), *(m.ctypes.data for m in maps)]
        parameters = (ctypes.c_void_p * len(pointers))(*pointers)
        for text in filter(None, (program.text, program.second)):
            function = self.function(text)
            self.call("cuFuncSetAttribute", function, MAX_DYNAMIC_SHARED, program.shared)
            attributes = (LaunchAttribute * 2)()
            attributes[0].id = CLUSTER_DIMENSION
            attributes[0].value[0], attributes[0].value[1], attributes[0].value[2] = program.cluster, 1, 1
            attributes[1].id, attributes[1].value[0] = PROGRAMMATIC, 1
            config = LaunchConfig(
                program.grid,
                1,
                1,
                program.threads,
                1,
                1,
                program.shared,
                None,
                attributes,
                2 if text is program.second else 1,
            )
            self.call("cuLaunchKernelEx", ctypes.byref(config), function, parameters, None)
        self.call("cuCtxSynchronize")
        result = np.zeros(program.output, np.uint8)
        self.call("cuMemcpyDtoH_v2", result.ctypes.data_as(ctypes.c_void_p), out, ctypes.c_size_t(result.size))
        for address in (out, data):
            self.call("cuMemFree_v2", address)
        return result


def product_on_gpu() -> list[tuple[str, list[str]]]:
    """The quantizer and the router on the GPU, against the emulator's outputs and the
    reference's."""
    import torch

    from ptx import sm90_kernels

    found = []
    for name, make in sm90_kernels.CASES.items():
        kernels = make()
        outputs, races, _ = sm90_kernels.emulated(kernels)
        device = {key: value.cuda() for key, value in (kernels.inputs | kernels.outputs).items()}
        kernels.call(device)
        torch.cuda.synchronize()
        on_gpu = {key: device[key].cpu() for key in kernels.expected}
        compared = {key: outputs[key].reshape(-1)[: truth.numel()] for key, truth in kernels.expected.items()}
        found.append((name, races + sm90_kernels.differences(on_gpu, compared)))
    return found


def main() -> int:
    """Run all; 0 if all agree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--emulate", action="store_true", help="no GPU: the emulator alone")
    given = parser.parse_args()
    gpu = None if given.emulate else Gpu()
    failed = 0
    for program in programs():
        said = ""
        try:
            mine = emulated(program)
            theirs = gpu.run(program) if gpu else mine
            until = program.extra.get("ignore", program.output)
            wrong = np.flatnonzero(mine[:until] != theirs[:until])
            if wrong.size:
                said = f"{wrong.size} of {until} bytes differ, the first at {wrong[0]}: emulator {mine[wrong[0]]}, GPU {theirs[wrong[0]]}"
        except (Fault, RuntimeError) as error:
            said = str(error)
        failed += bool(said)
        print(f"{'FAIL' if said else 'ok  '} {program.name} {said}", flush=True)
    if gpu:
        for name, problems in product_on_gpu():
            failed += bool(problems)
            print(f"{'FAIL' if problems else 'ok  '} {name} {'; '.join(problems)}", flush=True)
    print(f"{failed} failed" if failed else "all agree" if gpu else "all run in the emulator")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
