"""The table of instructions: a name's first part, and the function that turns an instruction into a
closure.

A closure takes a warp and the mask of the lanes that execute, and answers None when the instruction
is done, a ``Wait`` when it cannot complete yet, ``YIELD`` when it is done but others should run
first, or ``EXIT``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ptx.errors import UnknownInstruction
from ptx.operands import Operands
from ptx.parser import Instruction
from ptx.warp import Wait, Warp

__all__ = ["BUILDERS", "EXIT", "YIELD", "Closure", "Wait", "build", "instruction", "unknown"]

Closure = Callable[[Warp, int], Any]
Builder = Callable[[Operands, Instruction], Closure]

YIELD = "yield"
EXIT = "exit"

BUILDERS: dict[str, Builder] = {}


def instruction(*names: str) -> Callable[[Builder], Builder]:
    """Register a builder for names, each the first parts of an instruction's name, joined by
    dots."""

    def register(builder: Builder) -> Builder:
        for name in names:
            BUILDERS[name] = builder
        return builder

    return register


def build(operands: Operands, ins: Instruction) -> Closure:
    """The closure of an instruction.

    Raises:
        UnknownInstruction: no builder takes it.
    """
    for parts in range(len(ins.parts), 0, -1):
        builder = BUILDERS.get(".".join(ins.parts[:parts]))
        if builder is not None:
            return builder(operands, ins)
    raise UnknownInstruction(f"line {ins.line}: {ins.name} is not implemented")


def unknown(ins: Instruction, what: str = "") -> UnknownInstruction:
    """For a form of a known instruction that is not implemented."""
    return UnknownInstruction(f"line {ins.line}: {ins.name} is not implemented{': ' + what if what else ''}")
