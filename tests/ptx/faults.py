"""Faults that a programmer, a compiler or a wrong layout could bring into the kernels: the emulator
must report each.

A fault is an edit of a kernel's PTX or of its parameters. Places are found by what stands there,
not by the numbers of lines or registers, which change with every compiler; an edit that finds no
place fails.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ptx import cutlass_backend, tensormap, triton_backend
from ptx.case import Shape
from ptx.errors import Fault, Hang

WAIT = r"mbarrier\.try_wait\.parity\.shared::cta\.b64 P1, \[%r\d+\], %r\d+, %r\d+;"
"""The waits that block; peeks have no time limit."""

PASSES = "setp.eq.s32 P1, 0, 0;"


Edit = Callable[[str], str]
Replacement = str | Callable[[re.Match[str]], str]
EditParams = Callable[[np.ndarray, Any], None]


class Text:
    """The lines of a module, to be edited."""

    def __init__(self, text: str) -> None:
        self.lines = text.split("\n")

    def __str__(self) -> str:
        return "\n".join(self.lines)

    def find(self, pattern: str, number: int = 1, after: int = -1) -> int:
        """The line of the pattern's nth match behind a line."""
        for at in range(after + 1, len(self.lines)):
            if re.search(pattern, self.lines[at]):
                number -= 1
                if number == 0:
                    return at
        raise LookupError(f"the fault no longer applies: no {pattern!r}")

    def before(self, pattern: str, line: int) -> int:
        """The last match before a line."""
        for at in range(line - 1, -1, -1):
            if re.search(pattern, self.lines[at]):
                return at
        raise LookupError(f"the fault no longer applies: no {pattern!r} before line {line + 1}")

    def put(self, line: int, pattern: str, replacement: Replacement) -> None:
        """Replace in a line."""
        changed = re.sub(pattern, replacement, self.lines[line])
        if changed == self.lines[line]:
            raise LookupError(f"the fault no longer applies to: {self.lines[line]}")
        self.lines[line] = changed

    def definition(self, register: str, line: int) -> int:
        """Where a register got its value."""
        name = re.escape(register)
        return self.before(rf"^\s*(?:@\S+\s+)?[a-z][\w.:]*\s+(?:{name}|\{{[^}}]*{name}\b[^}}]*\}}),", line)


def edit(change: Callable[[Text], None]) -> Edit:
    """An edit of text from one of lines."""

    def apply(text: str) -> str:
        lines = Text(text)
        change(lines)
        return str(lines)

    return apply


def every(pattern: str, replacement: str = "") -> Edit:
    """All matches."""

    def apply(text: str) -> str:
        changed, count = re.subn(pattern, replacement, text)
        if not count:
            raise LookupError(f"the fault no longer applies: no {pattern!r}")
        return changed

    return apply


def nth(pattern: str, number: int) -> Edit:
    """One match, removed."""
    return edit(lambda text: text.put(text.find(pattern, number), pattern, ""))


def removed_wait(anchor: str, number: int = 1, back: int = 1) -> Edit:
    """The blocking wait before the nth line that matches ``anchor``; with ``back`` 2, the one
    before that."""

    def change(text: Text) -> None:
        at = text.find(anchor, number)
        for _ in range(back):
            at = text.before(WAIT, at)
        text.put(at, WAIT, PASSES)

    return edit(change)


def operand(line: str, number: int) -> str:
    """The nth register of an instruction."""
    return re.findall(r"%r\w*\d+", line)[number]


def changed_definition(anchor: str, register: int, pattern: str, replacement: Replacement, number: int = 1) -> Edit:
    """Change where a register that the anchor uses got its value."""

    def change(text: Text) -> None:
        at = text.find(anchor, number)
        text.put(text.definition(operand(text.lines[at], register), at), pattern, replacement)

    return edit(change)


def added(amount: int) -> Replacement:
    """A literal, changed."""
    return lambda match: str(int(match[0]) + amount)


def changed_literal(anchor: str, registers: Sequence[int], by: int, numbers: Sequence[int] = (1,)) -> Edit:
    """Add to the last literal where registers of the anchor's matches got their values."""

    def apply(text: str) -> str:
        for number in numbers:
            for register in registers:
                text = changed_definition(anchor, register, r"-?\d+(?=;)", added(by), number)(text)
        return text

    return apply


# ---------------------------------------------------------------- parameters


def pointer(array: int) -> EditParams:
    """The kernel's pointer to one of prepare's arrays (each 128 bytes in a workspace of up to 16
    experts), an expert further."""

    def apply(params: np.ndarray, call: Any) -> None:
        wanted = call.case.buffers["workspace"].ctypes.data + 128 * array
        words = params[: params.size // 8 * 8].view(np.uint64)
        (places,) = np.nonzero(words == wanted)
        if len(places) != 1:
            raise LookupError(f"the fault no longer applies: {len(places)} pointers to array {array}")
        words[places[0]] += np.uint64(8)

    return apply


def swizzle_of_tokens(params: np.ndarray, call: Any) -> None:
    """The tensor maps of B, two-dimensional ones of bytes, lose a bit of their swizzle."""
    found = 0
    for at in range(0, params.size - tensormap.SIZE, 64):
        if int.from_bytes(params[at + 8 : at + 12].tobytes(), "little") == tensormap.MAGIC:
            made = tensormap.decode(params[at : at + tensormap.SIZE].tobytes())
            if made.rank == 2 and made.swizzle == 3 and made.type == 0:
                params[at + 14] ^= 1
                found += 1
    if not found:
        raise LookupError("the fault no longer applies: no tensor map of the tokens")


SHAPE = Shape((3, 0, 130, 64), 136, 1056)
"""More steps along K than the rings of operands are deep, and more tiles than there are
accumulators."""


@dataclass(frozen=True)
class Seeded:
    """A fault, and the run that it is seeded in."""

    name: str
    edit: Edit = str
    edit_params: EditParams | None = None
    backend: str = "cutlass"
    options: dict[str, Any] = field(default_factory=dict)


ONE = {"config": "1sm_128x128x128_1x1", "sms": 1}
TWO = {"config": "2sm_256x256x128_2x1", "sms": 2}
WIDE = {"config": "2sm_256x256x128_4x1", "sms": 4}


def _cutlass(name: str, change: Edit = str, params: EditParams | None = None, **options: Any) -> Seeded:
    return Seeded(name, change, params, options=options or ONE)


def _triton(name: str, change: Edit, block_t: int) -> Seeded:
    return Seeded(name, change, backend="triton", options={"block_t": block_t})


ACQUIRE = r"fence\.proxy\.tensormap::generic\.acquire\.gpu [^;]*;"
CP = r"tcgen05\.cp\."
MMA = r"tcgen05\.mma\."
LD = r"tcgen05\.ld\."
EXPECT = r"mbarrier\.arrive\.expect_tx"
COMMIT_STAGE = r"tcgen05\.commit\.\S*multicast"
COMMIT_DONE = r"tcgen05\.commit\.(?!\S*multicast)"


def _first_bar_warp_before_fenceproxy(text: Text) -> None:
    at = text.before(r"bar\.warp\.sync", text.find(r"tensormap\.cp_fenceproxy"))
    text.put(at, r"bar\.warp\.sync\s+-1;", "")


def _stride_of_d(text: Text) -> None:
    """D's tensor map is the last that is replaced."""
    ends = [i for i, line in enumerate(text.lines) if "tensormap.cp_fenceproxy" in line]
    for end in ends:
        at = text.before(r"tensormap\.replace\.tile\.global_stride\S* \[%rd\d+\], 0, ", end)
        register = re.findall(r"%rd\d+", text.lines[at])[1]
        where = text.definition(register, at)
        if "and.b64" in text.lines[where]:
            where = text.definition(re.findall(r"%rd\d+", text.lines[where])[1], where)
        if "shl.b64" in text.lines[where]:
            text.put(where, r", 1;", ", 2;")
            return
    raise LookupError("the fault no longer applies: no stride of D")


def _accumulates_at_once(text: Text) -> None:
    text.put(text.before(r"setp\.ne\.b32", text.find(MMA)), r"%r\d+, 0;", "1, 0;")


def _mma_descriptor(text: Text) -> None:
    """The first literal with layout 2 (SWIZZLE_128B) in bits 61 to 63 and version 1 in bit 46."""
    for at, line in enumerate(text.lines):
        for literal in re.findall(r"\b46\d{17}\b", line):
            if int(literal) >> 61 == 2 and int(literal) >> 46 & 3 == 1:
                text.put(at, literal, str(int(literal) ^ 1 << 61))
                return
    raise LookupError("the fault no longer applies: no shared memory descriptor")


def _named_barrier(text: Text) -> None:
    """The epilogue's second barrier: behind wait_group.read, before the buffer is written again."""
    at = text.find(r"bar\.sync\s+%r\d+, %r\d+;", after=text.find(r"wait_group\.read 1"))
    text.put(at, r"bar\.sync[^;]*;", "")


def _count_of_named_barrier(text: Text) -> None:
    at = text.find(r"bar\.sync\s+%r\d+, %r\d+;", after=text.find(LD))
    where = text.definition(operand(text.lines[at], 1), at)
    text.put(where, r"128", "96")


def _multicast_mask(text: Text) -> None:
    """The commit that frees a stage tells the own CTA alone."""
    at = text.find(COMMIT_STAGE)
    register = re.findall(r"%rs\d+", text.lines[at])[0]
    text.put(at, register, "1")


def _peer_bit(text: Text) -> None:
    """Barriers' addresses keep the CTA's rank (bit 24): completions of the odd CTA's loads do not
    go to the even one."""
    masks = [at for at, line in enumerate(text.lines) if re.search(r"and\.b32\s+%r\d+, %r\d+, -16777\d{3};", line)]
    if not masks:
        raise LookupError("the fault no longer applies: no mask of the peer bit")
    for at in masks:
        text.lines[at] = re.sub(r"-16777\d{3}", added(1 << 24), text.lines[at])


def _unwaited(text: Text, anchor: str) -> None:
    """The last wait before an instruction answers at once."""
    pattern = r"mbarrier\.try_wait\.parity\S* complete, [^;]*;"
    text.put(text.before(pattern, text.find(anchor)), pattern, "setp.eq.s32 complete, 0, 0;")


def _same_tile(text: Text) -> None:
    """All CTAs take the first one's tiles."""
    for at in [i for i, line in enumerate(text.lines) if re.search(r"mov\.u32\s+%r\d+, %ctaid\.x", line)]:
        text.put(at, r"%ctaid\.x", "0")


def _dealloc_early(text: Text) -> None:
    """What the allocating warp waits for before it frees."""
    at = text.find(r"tcgen05\.dealloc")
    first = text.find(r"tcgen05\.relinquish")
    waits = [i for i in range(first, at) if re.search(WAIT, text.lines[i])]
    if not waits:
        raise LookupError("the fault no longer applies: no wait before dealloc")
    for i in waits:
        text.put(i, WAIT, PASSES)


FAULTS: tuple[Seeded, ...] = (
    _cutlass("first griddepcontrol.wait removed", nth(r"griddepcontrol\.wait;", 1)),
    _cutlass("all griddepcontrol.wait removed", every(r"griddepcontrol\.wait;")),
    _cutlass("tensormap acquire removed: loads of B", nth(ACQUIRE, 1)),
    _cutlass("tensormap acquire removed: the next maps", nth(ACQUIRE, 3)),
    _cutlass("cp_fenceproxy removed", nth(r"tensormap\.cp_fenceproxy[^;]*;", 1)),
    _cutlass("swizzle of B's tensor map", params=swizzle_of_tokens),
    _cutlass("swizzle in A's shared memory descriptor", edit(_mma_descriptor)),
    _cutlass("scale byte of the second MMA, A", changed_literal(MMA, [4], 1 << 30, [2])),
    _cutlass("scale byte of the second MMA, A and B", changed_literal(MMA, [4, 5], 1 << 30, [2])),
    _cutlass("scales of B: the next expert's", params=pointer(2)),
    _cutlass("MMA does not wait for its operands", removed_wait(CP)),
    _cutlass("MMA does not wait for a free accumulator", removed_wait(CP, back=2)),
    _cutlass("epilogue does not wait for the accumulator", removed_wait(LD)),
    _cutlass("transaction count too small", changed_literal(EXPECT, [1], -128, [1, 2])),
    _cutlass("transaction count too large", changed_literal(EXPECT, [1], 128, [1, 2])),
    _cutlass("commit frees the next stage", changed_definition(COMMIT_STAGE, 0, r"\d+(?=;)", "56")),
    _cutlass("commit of the accumulator to the wrong barrier", changed_definition(COMMIT_DONE, 0, r"-16;", "-8;")),
    _cutlass("wait_group.read of the epilogue removed", every(r"cp\.async\.bulk\.wait_group\.read 1;")),
    _cutlass("the epilogue's second bar.sync removed", edit(_named_barrier)),
    _cutlass("stride of D", edit(_stride_of_d)),
    _cutlass("accumulator not reset", edit(_accumulates_at_once)),
    _cutlass("tcgen05.wait::ld removed", every(r"tcgen05\.wait::ld\.sync\.aligned;")),
    _cutlass("fence.proxy.async removed", every(r"fence\.proxy\.async\.shared::cta;")),
    _cutlass("column of B's scales", changed_literal(CP, [0], 1, [2])),
    _cutlass("dealloc removed", every(r"tcgen05\.dealloc[^;]*;")),
    _cutlass("D of the next expert", params=pointer(3)),
    _cutlass("producer does not wait for a free stage", removed_wait(EXPECT, 2)),
    _cutlass("fence.mbarrier_init removed, two CTAs", every(r"fence\.mbarrier_init[^;]*;"), **TWO),
    # Beyond the first list.
    _cutlass("peer bit kept, two CTAs", edit(_peer_bit), **TWO),
    _cutlass("the cluster's barrier is not waited for", every(r"barrier\.cluster\.wait\.aligned;"), **TWO),
    _cutlass("commit frees the stage in one CTA alone", edit(_multicast_mask), **WIDE),
    _cutlass("tensor map copied without bar.warp.sync", edit(_first_bar_warp_before_fenceproxy)),
    _cutlass("threads of a named barrier", edit(_count_of_named_barrier)),
    _cutlass("arrivals of an mbarrier", changed_literal(r"mbarrier\.init\.", [1], 1)),
    _cutlass("tensor memory freed before the epilogue has read it", edit(_dealloc_early)),
    _cutlass("setmaxnreg.dec removed", every(r"setmaxnreg\.dec[^;]*;")),
    _cutlass("two CTAs store the same tiles", edit(_same_tile), config="1sm_128x128x128_1x1", sms=2),
    _cutlass("4.2's pointer arrays with PDL", config="1sm_128x128x128_1x1", sms=1, mainloop="pointer_array", pdl=True),
    _triton("Triton, 16 tokens: tcgen05.wait::st removed", every(r"tcgen05\.wait::st\.sync\.aligned;"), 16),
    _triton("Triton, 16 tokens: cp.async.wait_group removed", every(r"cp\.async\.wait_group\s+\d+;"), 16),
    _triton("Triton, 128 tokens: MMA does not wait for its operands", edit(lambda text: _unwaited(text, CP)), 128),
    _triton("Triton, 128 tokens: the result is not waited for", edit(lambda text: _unwaited(text, LD)), 128),
    _triton("Triton, 128 tokens: transaction count", every(r"(expect_tx\S+ _, \[%r\d+\]), 33792;", r"\1, 33664;"), 128),
)  # fmt: skip


def report(fault: Seeded) -> str:
    """What one default run says of a fault; empty if nothing."""
    try:
        if fault.backend == "cutlass":
            options = cutlass_backend.Options(**{"seed": 3, **fault.options})
            call: Any = cutlass_backend.Call(SHAPE, options, edit=fault.edit, edit_params=fault.edit_params)
        else:
            call = triton_backend.Call(SHAPE, triton_backend.Options(**{"seed": 3, **fault.options}), edit=fault.edit)
        result = call.run()
    except Hang as hang:
        return f"hang of {str(hang).count(chr(10))} warps"
    except Fault as found:
        return re.sub(r"^ *CTA .*?: ", "", str(found).split("\n")[-1])
    if result.races:
        return result.races[0]
    if result.problems:
        return result.problems[0]
    return f"wrong numbers: {result.error:.3g} times the bound" if not result.error <= 1 else ""
