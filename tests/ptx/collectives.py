"""What the lanes of a warp do together: elect, shuffles, votes, reductions and bar.warp.sync.

A ``.sync`` instruction names its lanes, and exactly those must execute it. Only bar.warp.sync
orders memory.
"""

from __future__ import annotations

import numpy as np

from ptx.errors import Diverged, Fault
from ptx.instructions import Closure, instruction, unknown
from ptx.operands import Mask, Operands, Value, same
from ptx.parser import Instruction, Pair
from ptx.warp import FULL, LANES, Warp, bits, bools, lanes_of


def _check_members(members: Value, warp: Warp, mask: int, what: str) -> None:
    named = same(members(warp), mask, what)
    if named != mask:
        raise Diverged(f"{what}: expected the lanes {named:#010x} that it names, got {mask:#010x}")


@instruction("elect")
def elect(operands: Operands, ins: Instruction) -> Closure:
    """One lane of the mask. Which one PTX leaves open; a mask always elects the same, so it is
    drawn from the seed."""
    pair = ins.operands[0]
    if not isinstance(pair, Pair):
        raise unknown(ins)
    leader_to, chosen_to = operands.put(pair.first, "b32"), operands.put_mask(pair.second)
    members = operands.value(ins.operands[1], "u32")

    def execute(warp: Warp, mask: int) -> None:
        _check_members(members, warp, mask, "elect.sync")
        leader = warp.cta.launch.leader(mask)
        leader_to(warp, mask, np.full(32, leader, np.uint32))
        chosen_to(warp, mask, 1 << leader)

    return execute


@instruction("shfl")
def shuffle(operands: Operands, ins: Instruction) -> Closure:
    """PTX ISA, shfl.sync: the source lane by mode, within the segment that c's mask gives."""
    to = ins.operands[0]
    first, second = (to.first, to.second) if isinstance(to, Pair) else (to, None)
    put, inside_to = operands.put(first, "b32"), operands.put_mask(second) if second else None
    value, b, c, members = (operands.value(o, "u32") for o in ins.operands[1:5])
    mode = ins.parts[2]

    def execute(warp: Warp, mask: int) -> None:
        _check_members(members, warp, mask, "shfl.sync")
        distance = (b(warp) & 31).astype(np.int64)
        clamp, segment = (c(warp) & 31).astype(np.int64), (c(warp) >> 8 & 31).astype(np.int64)
        last = LANES & segment | clamp & ~segment & 31
        if mode == "up":
            source = LANES - distance
            inside = source >= last
        else:
            source = {
                "down": LANES + distance,
                "bfly": LANES ^ distance,
                "idx": LANES & segment | distance & ~segment & 31,
            }[mode]
            inside = source <= last
        source = np.where(inside, source, LANES)
        if not bools(mask)[source[bools(mask)]].all():
            raise Fault("shfl.sync: a lane reads from one that does not take part")
        put(warp, mask, value(warp)[source])
        if inside_to:
            inside_to(warp, mask, bits(inside))

    return execute


@instruction("vote", "activemask")
def vote(operands: Operands, ins: Instruction) -> Closure:
    """ballot, any, all."""
    if ins.parts[0] == "activemask":
        put = operands.put(ins.operands[0], "b32")
        return lambda warp, mask: put(warp, mask, np.full(32, mask, np.uint32))
    mode = ins.parts[2]
    source: Mask = operands.mask(ins.operands[1])
    members = operands.value(ins.operands[2], "u32")
    if mode == "ballot":
        put = operands.put(ins.operands[0], "b32")
    elif mode in ("any", "all"):
        put_mask = operands.put_mask(ins.operands[0])
    else:
        raise unknown(ins)

    def execute(warp: Warp, mask: int) -> None:
        _check_members(members, warp, mask, "vote.sync")
        votes = source(warp) & mask
        if mode == "ballot":
            put(warp, mask, np.full(32, votes, np.uint32))
        else:
            put_mask(warp, mask, FULL if (votes != 0 if mode == "any" else votes == mask) else 0)

    return execute


@instruction("redux")
def reduce(operands: Operands, ins: Instruction) -> Closure:
    """An integer sum, minimum, maximum or bitwise reduction over the mask's lanes."""
    functions = {
        "add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
        "xor": np.bitwise_xor,
    }  # fmt: skip
    function = functions.get(ins.parts[2])
    kind = ins.type
    if function is None or kind[0] == "f":
        raise unknown(ins)
    put, value, members = operands.put(ins.operands[0], kind), operands.value(ins.operands[1], kind), None
    members = operands.value(ins.operands[2], "u32")

    def execute(warp: Warp, mask: int) -> None:
        _check_members(members, warp, mask, "redux.sync")
        values = value(warp)[lanes_of(mask)]
        put(warp, mask, np.full(32, function.reduce(values), values.dtype))

    return execute


@instruction("bar.warp")
def warp_barrier(operands: Operands, ins: Instruction) -> Closure:
    """The named lanes wait for one another and see one another's accesses."""
    members = operands.value(ins.operands[0], "u32")

    def execute(warp: Warp, mask: int) -> None:
        _check_members(members, warp, mask, "bar.warp.sync")
        warp.meet(mask)

    return execute
