"""Integer, floating-point, predicate and conversion instructions, lane by lane, and branches'
ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ptx.formats import bf16_bits, e4m3_bits
from ptx.instructions import EXIT, Closure, instruction, unknown
from ptx.operands import PARAMETERS, UNSIGNED, Operands, Put, Value, dtype
from ptx.parser import BITS, Instruction, Operand, Pair, Register, Vector
from ptx.warp import FULL, Warp, bits, bools

COMPARE: dict[str, Any] = {
    **{"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater},
    **{"ge": np.greater_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal},
}
LOGIC: dict[str, Any] = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


def apply(put: Put, function: Callable[..., np.ndarray], *sources: Value) -> Closure:
    """result = function(sources), in the lanes of the mask."""
    if len(sources) == 1:
        (a,) = sources
        return lambda warp, mask: put(warp, mask, function(a(warp)))
    if len(sources) == 2:
        a, b = sources
        return lambda warp, mask: put(warp, mask, function(a(warp), b(warp)))
    a, b, c = sources
    return lambda warp, mask: put(warp, mask, function(a(warp), b(warp), c(warp)))


def _plain(
    operands: Operands, ins: Instruction, function: Callable[..., np.ndarray], result: str = "", kind: str = ""
) -> Closure:
    """All sources of one type."""
    kind = kind or ins.type
    sources = [operands.value(operand, kind) for operand in ins.operands[1:]]
    return apply(operands.put(ins.operands[0], result or kind), function, *sources)


# ---------------------------------------------------------------- moves


@instruction("mov")
def mov(operands: Operands, ins: Instruction) -> Closure:
    """Also packs and unpacks vectors."""
    kind = ins.type
    to, source = ins.operands[0], ins.operands[-1]
    if kind == "pred":
        put, mask_of = operands.put_mask(to), operands.mask(source)
        return lambda warp, mask: put(warp, mask, mask_of(warp))
    if isinstance(to, Vector):
        return _unpack(operands, to, operands.value(source, kind), BITS[kind])
    if isinstance(source, Vector):
        return _pack(operands, operands.put(to, kind), source, BITS[kind])
    if isinstance(to, Register) and isinstance(source, Register) and to.bits == source.bits == BITS[kind]:
        put, value, into, out_of = operands.put(to, kind), operands.value(source, kind), to.index, source.index

        def move(warp: Warp, mask: int) -> None:
            # Undefined values may be moved: compilers do so where no path uses them.
            if mask == FULL or warp.registers[out_of] is None:
                warp.registers[into] = warp.registers[out_of]
            else:
                put(warp, mask, value(warp))

        return move
    return apply(operands.put(to, kind), lambda a: a, operands.value(source, kind))


def _unpack(operands: Operands, to: Vector, value: Value, width: int) -> Closure:
    part = width // len(to.items)
    puts = [operands.put(item, f"b{part}") for item in to.items]

    def unpack(warp: Warp, mask: int) -> None:
        whole = value(warp)
        for i, put in enumerate(puts):
            put(warp, mask, (whole >> whole.dtype.type(i * part)).astype(UNSIGNED[part]))

    return unpack


def _pack(operands: Operands, put: Put, source: Vector, width: int) -> Closure:
    part, whole = width // len(source.items), UNSIGNED[width]
    values = [operands.value(item, f"b{part}") for item in source.items]

    def pack(warp: Warp, mask: int) -> None:
        result = values[0](warp).astype(whole)
        for i, value in enumerate(values[1:], 1):
            result = result | value(warp).astype(whole) << whole(i * part)
        put(warp, mask, result)

    return pack


@instruction("cvta")
def cvta(operands: Operands, ins: Instruction) -> Closure:
    """Generic addresses of global memory are the addresses themselves, those of parameters lie in a
    window of their own."""
    if "shared" in ins.name or "local" in ins.name:
        raise unknown(ins)
    if "param" in ins.parts:
        return _plain(operands, ins, lambda a: a + np.uint64(PARAMETERS), kind="u64")
    return _plain(operands, ins, lambda a: a, kind="u64")


@instruction("selp")
def selp(operands: Operands, ins: Instruction) -> Closure:
    """a where the predicate holds, else b."""
    kind = ins.type
    put, a, b = operands.put(ins.operands[0], kind), *(operands.value(o, kind) for o in ins.operands[1:3])
    condition = operands.mask(ins.operands[3])

    def select(warp: Warp, mask: int) -> None:
        chosen = condition(warp)
        if chosen & mask == mask:
            put(warp, mask, a(warp))
        elif chosen & mask == 0:
            put(warp, mask, b(warp))
        else:
            put(warp, mask, np.where(bools(chosen), a(warp), b(warp)))

    return select


# ---------------------------------------------------------------- integers and floats

NAN = np.uint32(0x7FFFFFFF).view(np.float32)
"""What fp32 instructions answer for NaN, whatever its payload (PTX ISA, floating-point
instructions)."""


def _canonical(function: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    def apply_it(*values: np.ndarray) -> np.ndarray:
        with np.errstate(all="ignore"):
            result = function(*values)
        nan = np.isnan(result)
        return np.where(nan, NAN, result) if nan.any() else result

    return apply_it


@instruction("add", "sub")
def add(operands: Operands, ins: Instruction) -> Closure:
    """Integers wrap; floats round to nearest. Denormals are kept, with .ftz too: none of the runs
    depends on them."""
    if any(part in ("sat", "cc", "f16x2", "bf16x2", "bf16") for part in ins.parts):
        raise unknown(ins)
    function = np.add if ins.parts[0] == "add" else np.subtract
    return _plain(operands, ins, _canonical(function) if ins.type == "f32" else function)


@instruction("mul")
def mul(operands: Operands, ins: Instruction) -> Closure:
    """lo, hi, wide of integers; floats."""
    kind = ins.type
    if kind in ("f32", "f64", "f16"):
        return _plain(operands, ins, _canonical(np.multiply) if kind == "f32" else np.multiply)
    if ins.parts[1] == "lo":
        return _plain(operands, ins, np.multiply)
    if ins.parts[1] == "hi":
        return _plain(operands, ins, _high_product)
    if ins.parts[1] == "wide":
        wide = f"{kind[0]}{2 * BITS[kind]}"
        to = dtype(wide)
        return _plain(operands, ins, lambda a, b: a.astype(to) * b.astype(to), result=wide)
    raise unknown(ins)


@instruction("mad", "fma")
def mad(operands: Operands, ins: Instruction) -> Closure:
    """a * b + c."""
    kind = ins.type
    if kind == "f32":  # one rounding: a product of two fp32 numbers is exact in double
        put, sources = operands.put(ins.operands[0], kind), [operands.value(o, kind) for o in ins.operands[1:]]
        return apply(put, _canonical(_fused), *sources)
    if ins.parts[1] == "lo":
        return _plain(operands, ins, lambda a, b, c: a * b + c)
    if ins.parts[1] == "wide":
        wide = f"{kind[0]}{2 * BITS[kind]}"
        to = dtype(wide)
        a, b = (operands.value(o, kind) for o in ins.operands[1:3])
        c = operands.value(ins.operands[3], wide)
        return apply(operands.put(ins.operands[0], wide), lambda a, b, c: a.astype(to) * b.astype(to) + c, a, b, c)
    raise unknown(ins)


def _fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        return (a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)).astype(np.float32)


def _high_product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    width = 8 * a.dtype.itemsize
    if width < 64:
        wide = np.int64 if a.dtype.kind == "i" else np.uint64
        return (a.astype(wide) * b.astype(wide) >> wide(width)).astype(a.dtype)
    products = [int(x) * int(y) >> 64 & (1 << 64) - 1 for x, y in zip(a, b, strict=True)]
    return np.array(products, np.uint64).view(a.dtype)


def _quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Towards zero; by zero, all ones, as the hardware gives it."""
    zero = b == 0
    divisor = np.where(zero, b.dtype.type(1), b)
    if a.dtype.kind == "u":
        result = a // divisor
    else:
        result = np.abs(a) // np.abs(divisor)
        result = np.where((a < 0) != (divisor < 0), -result, result)
    return np.where(zero, ~b.dtype.type(0), result).astype(a.dtype)


@instruction("div")
def div(operands: Operands, ins: Instruction) -> Closure:
    """Integers towards zero; fp32 correctly rounded, also where PTX allows an approximation
    (div.full, div.approx)."""
    if ins.type in ("f32", "f64"):
        return _plain(operands, ins, _float_quotient)
    return _plain(operands, ins, _quotient)


def _float_quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        return np.divide(a, b)


@instruction("rem")
def rem(operands: Operands, ins: Instruction) -> Closure:
    """What the division leaves."""
    return _plain(operands, ins, lambda a, b: a - _quotient(a, b) * b)


@instruction("min", "max")
def extremum(operands: Operands, ins: Instruction) -> Closure:
    """Of floats, the number where one is NaN."""
    smaller = ins.parts[0] == "min"
    if ins.type[0] == "f":
        if "NaN" in ins.parts:
            return _plain(operands, ins, np.minimum if smaller else np.maximum)
        return _plain(operands, ins, _canonical(np.fmin if smaller else np.fmax))
    if len(ins.operands) == 4:
        raise unknown(ins)
    return _plain(operands, ins, np.minimum if smaller else np.maximum)


@instruction("neg", "abs", "not", "cnot")
def unary(operands: Operands, ins: Instruction) -> Closure:
    """neg, abs and not; not of predicates too."""
    if ins.type == "pred":
        put, source = operands.put_mask(ins.operands[0]), operands.mask(ins.operands[1])
        return lambda warp, mask: put(warp, mask, ~source(warp) & FULL)
    functions: dict[str, Any] = {"neg": np.negative, "abs": np.abs, "not": np.invert}
    if ins.parts[0] not in functions:
        raise unknown(ins)
    return _plain(operands, ins, functions[ins.parts[0]])


@instruction("and", "or", "xor")
def logic(operands: Operands, ins: Instruction) -> Closure:
    """Bitwise, of predicates too."""
    function = LOGIC[ins.parts[0]]
    if ins.type == "pred":
        put, a, b = operands.put_mask(ins.operands[0]), *(operands.mask(o) for o in ins.operands[1:])
        return lambda warp, mask: put(warp, mask, int(function(a(warp), b(warp))))
    return _plain(operands, ins, function)


@instruction("lop3")
def lop3(operands: Operands, ins: Instruction) -> Closure:
    """Any function of three bits, as a table of eight."""
    table = ins.operands[4].value  # type: ignore[union-attr]

    def function(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        result = np.zeros_like(a)
        for row in range(8):
            if table >> row & 1:
                result |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
        return result

    sources = [operands.value(o, "b32") for o in ins.operands[1:4]]
    return apply(operands.put(ins.operands[0], "b32"), function, *sources)


@instruction("shl", "shr")
def shift(operands: Operands, ins: Instruction) -> Closure:
    """By an unsigned 32-bit amount, which is clamped to the width."""
    kind = ins.type
    width, left, signed = BITS[kind], ins.parts[0] == "shl", kind[0] == "s"

    def function(a: np.ndarray, amount: np.ndarray) -> np.ndarray:
        over = amount >= width
        amount = np.minimum(amount, width - 1).astype(a.dtype)
        if not left and signed:
            return a >> amount
        return np.where(over, a.dtype.type(0), a << amount if left else a >> amount)

    a, amount = operands.value(ins.operands[1], kind), operands.value(ins.operands[2], "u32")
    return apply(operands.put(ins.operands[0], kind), function, a, amount)


@instruction("shf")
def funnel_shift(operands: Operands, ins: Instruction) -> Closure:
    """The 64 bits of two registers, shifted."""
    left, clamp = ins.parts[1] == "l", ins.parts[2] == "clamp"

    def function(low: np.ndarray, high: np.ndarray, amount: np.ndarray) -> np.ndarray:
        by = (np.minimum(amount, 32) if clamp else amount & 31).astype(np.uint64)
        both = high.astype(np.uint64) << np.uint64(32) | low
        return ((both << by) >> np.uint64(32) if left else both >> by).astype(np.uint32)

    return _plain(operands, ins, function, kind="u32")


@instruction("bfe")
def bit_field(operands: Operands, ins: Instruction) -> Closure:
    """``length`` bits from ``position`` on; signed ones extend the field's highest bit."""
    kind = ins.type
    width = BITS[kind]

    def function(a: np.ndarray, position: np.ndarray, length: np.ndarray) -> np.ndarray:
        result = []
        for value, at, count in zip(a.tolist(), (position & 255).tolist(), (length & 255).tolist(), strict=True):
            value &= (1 << width) - 1
            sign = value >> min(at + count - 1, width - 1) & 1 if kind[0] == "s" and count else 0
            field = value >> at & (1 << count) - 1 if at < width else 0
            kept = max(min(count, width - at), 0)
            result.append((field | (-1 << kept if sign else 0)) & (1 << width) - 1)
        return np.array(result, UNSIGNED[width]).view(a.dtype)

    a = operands.value(ins.operands[1], kind)
    position, length = (operands.value(o, "u32") for o in ins.operands[2:])
    return apply(operands.put(ins.operands[0], kind), function, a, position, length)


@instruction("bfi")
def bit_insert(operands: Operands, ins: Instruction) -> Closure:
    """Puts ``length`` low bits of a into b at ``position``."""
    kind = ins.type
    width = BITS[kind]

    def insert(warp: Warp, mask: int) -> None:
        result = []
        for x, y, at, count in zip(*(source(warp).tolist() for source in sources), strict=True):
            field = ((1 << min(count & 255, width)) - 1) << (at & 255) & (1 << width) - 1
            result.append(y & ~field | x << (at & 255) & field)
        put(warp, mask, np.array(result, UNSIGNED[width]))

    sources = [operands.value(o, k) for o, k in zip(ins.operands[1:], (kind, kind, "u32", "u32"), strict=True)]
    put = operands.put(ins.operands[0], kind)
    return insert


@instruction("brev", "popc", "clz", "bfind")
def bit_count(operands: Operands, ins: Instruction) -> Closure:
    """Reversal, population count, leading zeros, highest bit."""
    kind = ins.type
    width = BITS[kind]
    highest: Callable[[int], int] = lambda v: v.bit_length() - 1 if v else -1  # noqa: E731
    functions: dict[str, Callable[[int], int]] = {
        "brev": lambda v: int(f"{v:0{width}b}"[::-1], 2),
        "popc": lambda v: v.bit_count(),
        "clz": lambda v: width - v.bit_length(),
        "bfind": highest,
        "bfind.shiftamt": lambda v: width - 1 - highest(v) if v else -1,
    }
    name = ".".join(part for part in ins.parts if part not in BITS)
    if name not in functions or kind[0] == "s":
        raise unknown(ins)
    one, result = functions[name], kind if name == "brev" else "u32"
    lanes = UNSIGNED[BITS[result]]
    return _plain(
        operands, ins, lambda a: np.array([one(v) & (1 << BITS[result]) - 1 for v in a.tolist()], lanes), result=result
    )


@instruction("prmt")
def permute(operands: Operands, ins: Instruction) -> Closure:
    """Four bytes chosen from eight; the choice's fourth bit replicates the byte's sign."""
    if len(ins.parts) != 2:
        raise unknown(ins)

    def function(a: np.ndarray, b: np.ndarray, choice: np.ndarray) -> np.ndarray:
        both = b.astype(np.uint64) << np.uint64(32) | a
        result = np.zeros(32, np.uint32)
        for i in range(4):
            nibble = choice >> np.uint32(4 * i) & np.uint32(15)
            byte = (both >> (nibble & np.uint32(7)).astype(np.uint64) * np.uint64(8) & np.uint64(255)).astype(np.uint32)
            byte = np.where(nibble & 8, np.where(byte & 128, np.uint32(255), np.uint32(0)), byte)
            result |= byte << np.uint32(8 * i)
        return result

    return _plain(operands, ins, function)


@instruction("setp")
def setp(operands: Operands, ins: Instruction) -> Closure:
    """Comparison, optionally combined with a predicate."""
    kind = ins.type
    name = ins.parts[1]
    unordered = kind[0] == "f" and name.endswith("u") and name != "hu"
    if name in ("num", "nan"):
        compare: Any = lambda a, b: (np.isnan(a) | np.isnan(b)) == (name == "nan")  # noqa: E731
    else:
        plain = COMPARE[name[:-1] if unordered else name]
        if kind[0] == "f" and name == "ne":  # ordered: false where one is NaN
            compare = lambda a, b: (a != b) & ~(np.isnan(a) | np.isnan(b))  # noqa: E731
        elif unordered:
            compare = lambda a, b: plain(a, b) | np.isnan(a) | np.isnan(b)  # noqa: E731
        else:
            compare = plain
    a, b = (operands.value(o, kind) for o in ins.operands[1:3])
    combine = LOGIC.get(ins.parts[2])
    extra = operands.mask(ins.operands[3]) if combine else None
    first, second = _predicates(operands, ins.operands[0])

    def test(warp: Warp, mask: int) -> None:
        result = bits(compare(a(warp), b(warp)))
        other = ~result & FULL
        if combine and extra:
            result, other = int(combine(result, extra(warp))), int(combine(other, extra(warp)))
        first(warp, mask, result)
        if second:
            second(warp, mask, other)

    return test


def _predicates(operands: Operands, operand: Operand) -> tuple[Any, Any]:
    if isinstance(operand, Pair):
        return operands.put_mask(operand.first), operands.put_mask(operand.second)
    return operands.put_mask(operand), None


# ---------------------------------------------------------------- conversions


@instruction("cvt")
def cvt(operands: Operands, ins: Instruction) -> Closure:
    """Between integers, and of fp32 with integers, fp16, bf16 and e4m3."""
    types = [part for part in ins.parts if part in BITS or part.startswith("e4m3")]
    to, source = types
    if to[0] in "us" and source[0] in "us" and "sat" not in ins.parts:
        wanted, value = dtype(to), operands.value(ins.operands[1], source)
        return apply(operands.put(ins.operands[0], to), lambda a: a.astype(wanted), value)
    packed: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {
        "bf16x2": ("b32", bf16_bits),
        "f16x2": ("b32", lambda a: np.where(np.isnan(a), np.uint16(0x7FFF), _half(a).view(np.uint16))),
        "e4m3x2": ("b16", e4m3_bits),
    }
    if to in packed and source == "f32" and ins.parts[1] == "rn":
        kind, function = packed[to]
        wide, half = UNSIGNED[BITS[kind]], BITS[kind] // 2
        high, low = (operands.value(o, "f32") for o in ins.operands[1:])
        return apply(
            operands.put(ins.operands[0], kind),
            lambda top, bottom: function(top).astype(wide) << wide(half) | function(bottom).astype(wide),
            high,
            low,
        )
    simple: dict[tuple[str, str], Callable[[np.ndarray], np.ndarray]] = {
        ("bf16", "f32"): bf16_bits,
        ("f16", "f32"): _half,
        ("f32", "f16"): lambda a: a.astype(np.float32),
        ("f32", "bf16"): lambda a: (a.astype(np.uint32) << np.uint32(16)).view(np.float32),
        ("f32", "s32"): lambda a: a.astype(np.float32),
        ("f32", "u32"): lambda a: a.astype(np.float32),
        ("f64", "f32"): lambda a: a.astype(np.float64),
        ("s32", "f32"): _truncated,
    }
    function_of = simple.get((to, source))
    if function_of is None or "sat" in ins.parts:
        raise unknown(ins)
    return apply(operands.put(ins.operands[0], to), function_of, operands.value(ins.operands[1], source))


def _truncated(a: np.ndarray) -> np.ndarray:
    """Towards zero, saturating; NaN is 0."""
    return np.trunc(np.nan_to_num(a.astype(np.float64))).clip(-(2**31), 2**31 - 1).astype(np.int32)


def _half(a: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return a.astype(np.float16)


@instruction("ex2", "rcp", "lg2", "sqrt", "rsqrt")
def approximation(operands: Operands, ins: Instruction) -> Closure:
    """Correctly rounded where PTX allows an approximation."""
    functions: dict[str, Any] = {
        "ex2": np.exp2, "rcp": lambda a: 1 / a, "lg2": np.log2, "sqrt": np.sqrt, "rsqrt": lambda a: 1 / np.sqrt(a),
    }  # fmt: skip
    function = functions[ins.parts[0]]

    def rounded(a: np.ndarray) -> np.ndarray:
        with np.errstate(all="ignore"):
            return function(a.astype(np.float64)).astype(np.float32)

    return _plain(operands, ins, rounded)


# ---------------------------------------------------------------- control


@instruction("ret", "exit")
def leave(operands: Operands, ins: Instruction) -> Closure:
    """The lanes end."""
    return lambda warp, mask: EXIT


@instruction("nop", "nanosleep", "prefetch", "applypriority", "discard", "prefetchu", "createpolicy")
def nothing(operands: Operands, ins: Instruction) -> Closure:
    """Hints."""
    if ins.parts[0] == "createpolicy":
        put = operands.put(ins.operands[0], "b64")
        return lambda warp, mask: put(warp, mask, np.zeros(32, np.uint64))
    return lambda warp, mask: None
