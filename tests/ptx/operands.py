"""Operands as functions of a warp: what an instruction reads and where its result goes.

Values are arrays of 32 lanes in the numpy type of the instruction; registers hold the unsigned type
of their width. A wider or narrower register than the instruction's type is allowed for loads,
stores, mov and cvt, as PTX allows it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from ptx.errors import Fault
from ptx.memory import RANK_SHIFT, SHARED_BASE
from ptx.parser import BITS, Address, Immediate, Kernel, Not, Operand, Register, Special, Symbol, Vector
from ptx.warp import FULL, LANES, Warp, bools

if TYPE_CHECKING:
    from ptx.cta import Cta

Value = Callable[[Warp], np.ndarray]
Mask = Callable[[Warp], int]
Put = Callable[[Warp, int, np.ndarray], None]
PutMask = Callable[[Warp, int, int], None]

UNSIGNED: dict[int, Any] = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED: dict[int, Any] = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
FLOAT: dict[int, Any] = {16: np.float16, 32: np.float32, 64: np.float64}

PARAMETERS = 0x7F00_0000_0000
"""What a generic address of a kernel parameter has above its offset in the param space; far from
any buffer of the host."""


def dtype(kind: str) -> Any:
    """The numpy type of a PTX type."""
    width = BITS[kind]
    if kind[0] == "s":
        return SIGNED[width]
    return FLOAT[width] if kind in ("f16", "f32", "f64") else UNSIGNED[width]


def numbers(kind: str, value: int) -> np.ndarray:
    """32 lanes of a literal."""
    width = BITS[kind]
    return np.full(32, value & ((1 << width) - 1), UNSIGNED[width]).view(dtype(kind))


def whatever(width: int) -> np.ndarray:
    """What a register holds of this many bits whose lanes a guard kept from being written."""
    return np.full(32, 0xA5A5A5A5A5A5A5A5 & ((1 << width) - 1), UNSIGNED[width])


class Operands:
    """Turns one kernel's operands into functions."""

    def __init__(self, kernel: Kernel, shared_base: dict[str, int]) -> None:
        self.kernel = kernel
        self.parameters = {parameter.name: parameter.offset for parameter in kernel.parameters}
        self.shared = shared_base

    # ---------------------------------------------------------------- sources

    def value(self, operand: Operand, kind: str) -> Value:
        """32 lanes of a type."""
        if isinstance(operand, Register):
            return self._register(operand, kind)
        if isinstance(operand, Immediate):
            constant = numbers(kind, operand.value)
            return lambda warp: constant
        if isinstance(operand, Special):
            return self._special(operand.name, kind)
        if isinstance(operand, Symbol):
            return self._symbol(operand.name, 0, kind)
        if isinstance(operand, Address) and isinstance(operand.base, Symbol):
            return self._symbol(operand.base.name, operand.offset, kind)
        raise Fault(f"operand: expected a value, got {operand}")

    def mask(self, operand: Operand) -> Mask:
        """A predicate, a bit a lane."""
        if isinstance(operand, Register):
            index, name = operand.index, operand.name

            def read(warp: Warp) -> int:
                found: int | None = warp.registers[index]
                if found is None:
                    raise Fault(f"predicate {name} is read before anything is written to it")
                return found

            return read
        if isinstance(operand, Not):
            inner = self.mask(operand.operand)
            return lambda warp: ~inner(warp) & FULL
        if isinstance(operand, Immediate):
            constant = FULL if operand.value else 0
            return lambda warp: constant
        raise Fault(f"operand: expected a predicate, got {operand}")

    def address(self, operand: Operand) -> Value:
        """32 addresses as int64."""
        if not isinstance(operand, Address):
            raise Fault(f"operand: expected an address, got {operand}")
        offset = operand.offset
        if isinstance(operand.base, Register):
            base = self._register(operand.base, f"u{operand.base.bits}")
        else:
            base = self.value(operand.base, "u64")
        return lambda warp: base(warp).astype(np.int64) + offset

    def items(self, operand: Operand) -> tuple[Operand, ...]:
        """Of a vector; a scalar is a vector of one."""
        return operand.items if isinstance(operand, Vector) else (operand,)

    def _register(self, register: Register, kind: str) -> Value:
        index, name, wanted = register.index, register.name, dtype(kind)
        if register.bits == 1:
            raise Fault(f"operand: expected a value, got predicate {name}")
        same = register.bits == BITS[kind]
        narrow = UNSIGNED[BITS[kind]]

        def read(warp: Warp) -> np.ndarray:
            found = warp.registers[index]
            if found is None:
                raise Fault(f"register {name} is read before anything is written to it")
            return found.view(wanted) if same else found.astype(narrow).view(wanted)

        return read

    def _symbol(self, name: str, offset: int, kind: str) -> Value:
        if name in self.parameters:
            constant = numbers(kind, self.parameters[name] + offset)
            return lambda warp: constant
        if name in self.shared:
            local = SHARED_BASE + self.shared[name] + offset
            return lambda warp: numbers(kind, local + (warp.cta.rank << RANK_SHIFT))
        raise Fault(f"symbol {name} is neither a parameter nor shared memory")

    def _special(self, name: str, kind: str) -> Value:
        if name == "%tid.x":
            return lambda warp: warp.thread.astype(dtype(kind))
        if name == "%laneid":
            return lambda warp: LANES.astype(dtype(kind))
        if name == "%warpid":
            return lambda warp: numbers(kind, warp.index)
        read = _special(name)
        return lambda warp: numbers(kind, read(warp.cta))

    # ---------------------------------------------------------------- results

    def put(self, operand: Operand, kind: str) -> Put:
        """Where lanes of a type go; sign- or zero-extended to a wider register."""
        if isinstance(operand, Symbol) and operand.name == "_":
            return lambda warp, mask, value: None
        if not isinstance(operand, Register):
            raise Fault(f"operand: expected a register, got {operand}")
        index, register = operand.index, UNSIGNED[operand.bits]
        wider = SIGNED[operand.bits] if kind[0] == "s" else register
        same, anything = operand.bits == BITS[kind], whatever(operand.bits)[0]

        def write(warp: Warp, mask: int, value: np.ndarray) -> None:
            value = value.view(register) if same else value.astype(wider).view(register)
            if mask != FULL:
                old = warp.registers[index]
                value = np.where(bools(mask), value, anything if old is None else old)
            warp.registers[index] = value

        return write

    def put_mask(self, operand: Operand) -> PutMask:
        """Where a predicate goes."""
        if isinstance(operand, Symbol) and operand.name == "_":
            return lambda warp, mask, value: None
        if not isinstance(operand, Register) or operand.bits != 1:
            raise Fault(f"operand: expected a predicate, got {operand}")
        index = operand.index

        def write(warp: Warp, mask: int, value: int) -> None:
            old = warp.registers[index] or 0
            warp.registers[index] = (old & ~mask) | (value & mask)

        return write


def _special(name: str) -> Callable[[Cta], int]:
    """A register that is the same for all threads of a CTA."""
    match = re.fullmatch(r"%(\w+?)(?:\.([xyz]))?", name)
    assert match
    axis = "xyz".index(match[2]) if match[2] else 0
    table: dict[str, Callable[[Cta], int]] = {
        "tid": lambda cta: 0,
        "ntid": lambda cta: (cta.launch.threads, 1, 1)[axis],
        "ctaid": lambda cta: cta.index[axis],
        "nctaid": lambda cta: cta.launch.grid[axis],
        "cluster_ctaid": lambda cta: cta.index[axis] % cta.cluster.shape[axis],
        "cluster_nctaid": lambda cta: cta.cluster.shape[axis],
        "cluster_ctarank": lambda cta: cta.rank,
        "cluster_nctarank": lambda cta: len(cta.cluster.ctas),
        "clusterid": lambda cta: cta.index[axis] // cta.cluster.shape[axis],
        "nclusterid": lambda cta: cta.launch.grid[axis] // cta.cluster.shape[axis],
        "smid": lambda cta: cta.index[0],
    }
    if match[1] not in table:
        raise Fault(f"special register {name} is not known")
    return table[match[1]]


def same(values: np.ndarray, mask: int, what: str) -> int:
    """The value that all lanes of a mask must agree on."""
    chosen = values[bools(mask)]
    if (chosen != chosen[0]).any():
        raise Fault(f"{what}: expected one value in all lanes, got {sorted(set(chosen.tolist()))[:4]}")
    return int(chosen[0])
