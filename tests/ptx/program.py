"""A kernel as closures, one an instruction."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

import ptx.arithmetic
import ptx.barriers
import ptx.collectives
import ptx.loads
import ptx.tcgen05
import ptx.tensormap
import ptx.tma  # noqa: F401  (each registers its instructions)
from ptx.errors import Fault, UnknownInstruction
from ptx.instructions import Closure, build
from ptx.operands import Operands, Value, whatever
from ptx.parser import Instruction, Kernel, Register, parse


@dataclass
class Step:
    """One instruction, ready to run.

    Attributes:
        left: what its destinations hold where its guard is false and nothing was written before.
    """

    source: Instruction
    run: Closure | None
    guard: int = -1
    negated: bool = False
    target: int = -1
    targets: tuple[int, ...] = ()
    choice: Value | None = None
    left: dict[int, np.ndarray] = field(default_factory=dict)


class Program:
    """One kernel of a module.

    Args:
        text: PTX.
        name: a part of the kernel's name that no other has.

    Raises:
        UnknownInstruction: lists every form that is not implemented.
    """

    def __init__(self, text: str, name: str) -> None:
        kernels = parse(text)
        found = [kernel for key, kernel in kernels.items() if name in key]
        if len(found) != 1:
            raise Fault(f"expected one kernel with {name!r} in its name, got {list(kernels)}")
        self.kernel: Kernel = found[0]
        # Dynamic shared memory begins behind the static, 1024-aligned as the layouts ask for it.
        self.static_bytes = (
            -(-self.kernel.shared_bytes // 1024) * 1024 if self.kernel.dynamic else self.kernel.shared_bytes
        )
        shared = self.kernel.shared | {symbol: self.static_bytes for symbol in self.kernel.dynamic}
        operands = Operands(self.kernel, shared)
        unknown: dict[str, str] = {}
        self.steps: list[Step] = []
        for ins in self.kernel.code:
            try:
                self.steps.append(_step(operands, ins))
            except UnknownInstruction as error:
                unknown.setdefault(ins.name, str(error))
            except Fault as fault:
                raise Fault(f"line {ins.line}: {ins.text[:140]}: {fault}") from None
        if unknown:
            raise UnknownInstruction("\n".join(unknown.values()))


def _step(operands: Operands, ins: Instruction) -> Step:
    guard = ins.guard.index if ins.guard else -1
    if ins.parts[0] == "bra":
        return Step(ins, None, guard, ins.negated, target=ins.target)
    if ins.parts[0] == "brx":
        choice = operands.value(ins.operands[0], "u32")
        return Step(ins, None, guard, ins.negated, targets=ins.targets, choice=choice)
    left = {}
    if ins.guard and ins.operands:
        # Triton's sums over lanes add up what a load behind a false guard left, and drop it.
        given = (o for o in operands.items(ins.operands[0]) if isinstance(o, Register) and o.bits > 1)
        left = {register.index: whatever(register.bits) for register in given}
    return Step(ins, build(operands, ins), guard, ins.negated, left=left)
