"""What the emulator says when a program does something wrong."""

from __future__ import annotations


class Fault(Exception):
    """A program broke a rule of PTX, or reached what the emulator does not know; names what was
    expected and what came."""


class Diverged(Fault):
    """A warp's instruction was reached by some of the lanes that must execute it together; the
    others may still come."""


class UnknownInstruction(Fault):
    """Instructions that the emulator does not implement, by name."""


class Hang(Fault):
    """No warp can go on and nothing is in flight; one line for each warp says where it waits."""
