"""PTX text to kernels: instructions with typed operands, registers, parameters and shared symbols.

Inline assembly comes in braces with registers and labels of its own, so scopes nest and names
shadow: every register is resolved to an index when it is read, every label once its kernel is
complete. Source lines are kept for messages.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from ptx.errors import Fault

BITS = {
    **{"pred": 1, "b8": 8, "u8": 8, "s8": 8, "b16": 16, "u16": 16, "s16": 16, "f16": 16, "bf16": 16},
    **{"b32": 32, "u32": 32, "s32": 32, "f32": 32, "f16x2": 32, "bf16x2": 32},
    **{"b64": 64, "u64": 64, "s64": 64, "f64": 64},
}


@dataclass(frozen=True)
class Register:
    """A register, ``bits`` wide; 1 for a predicate."""

    index: int
    bits: int
    name: str


@dataclass(frozen=True)
class Special:
    """``%tid.x`` and the like."""

    name: str


@dataclass(frozen=True)
class Immediate:
    """A literal: its bits as an integer, negative ones as written."""

    value: int


@dataclass(frozen=True)
class Symbol:
    """A parameter, a shared array or a label."""

    name: str


@dataclass(frozen=True)
class Vector:
    """``{a, b}``."""

    items: tuple[Operand, ...]


@dataclass(frozen=True)
class Address:
    """``[base + offset]``, and ``[base, {coordinates}]`` of a tensor."""

    base: Operand
    offset: int = 0
    coordinates: tuple[Operand, ...] = ()


@dataclass(frozen=True)
class Pair:
    """``d|p``: a result and the predicate beside it."""

    first: Operand
    second: Operand


@dataclass(frozen=True)
class Not:
    """``!p``."""

    operand: Operand


Operand = Register | Special | Immediate | Symbol | Vector | Address | Pair | Not


@dataclass
class Instruction:
    """One instruction; ``parts`` are its name's, split at dots."""

    line: int
    text: str
    parts: tuple[str, ...]
    operands: list[Operand]
    guard: Register | None = None
    negated: bool = False
    target: int = -1
    targets: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """The whole name."""
        return ".".join(self.parts)

    @property
    def type(self) -> str:
        """The last part that names a type."""
        return next(part for part in reversed(self.parts) if part in BITS)


@dataclass(frozen=True)
class Parameter:
    """A kernel parameter and where it lies."""

    name: str
    offset: int
    size: int


@dataclass
class Kernel:
    """One ``.entry``."""

    name: str
    parameters: list[Parameter] = field(default_factory=list)
    registers: list[Register] = field(default_factory=list)
    shared: dict[str, int] = field(default_factory=dict)
    shared_bytes: int = 0
    dynamic: list[str] = field(default_factory=list)
    code: list[Instruction] = field(default_factory=list)
    threads: int = 0

    @property
    def parameter_bytes(self) -> int:
        """Of all parameters together."""
        return self.parameters[-1].offset + self.parameters[-1].size if self.parameters else 0


@dataclass
class Scope:
    """What a pair of braces declares."""

    parent: Scope | None
    registers: dict[str, Register] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)

    def register(self, name: str) -> Register | None:
        """The innermost register of this name."""
        scope: Scope | None = self
        while scope is not None:
            if name in scope.registers:
                return scope.registers[name]
            scope = scope.parent
        return None

    def label(self, name: str) -> int:
        """The instruction that the innermost label of this name stands before."""
        scope: Scope | None = self
        while scope is not None:
            if name in scope.labels:
                return scope.labels[name]
            scope = scope.parent
        raise Fault(f"label {name} is not defined")


STATEMENT = re.compile(r"\s*(?:(?P<open>\{)|(?P<close>\})|(?P<label>[\w$%]+)\s*:(?!:)|(?P<text>[^;{][^;]*);)")
ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)([^{]*)\{", re.DOTALL)
PARAMETER = re.compile(r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr\b[^,]*?\s)?([\w$]+)(?:\[(\d+)\])?\s*$")
GUARD = re.compile(r"@(!?)\s*([%\w$]+)\s+(.*)", re.DOTALL)
SPECIAL = re.compile(
    r"%(tid|ntid|ctaid|nctaid|laneid|warpid|cluster_ctaid|cluster_nctaid|cluster_ctarank|cluster_nctarank|clusterid|"
    r"nclusterid|is_explicit_cluster|globaltimer|clock64|clock|smid|lanemask_\w+|dynamic_smem_size)(\.[xyz])?"
)


def parse(text: str) -> dict[str, Kernel]:
    """The kernels of a module by name."""
    text = re.sub(r"//[^\n]*", "", text)
    text = re.sub(r"/\*.*?\*/", lambda m: "\n" * m[0].count("\n"), text, flags=re.DOTALL)
    text = re.sub(r"^[ \t]*\.(loc|file)[ \t][^\n]*", "", text, flags=re.MULTILINE)  # ends without a semicolon
    dynamic = re.findall(r"\.extern\s+\.shared[^;]*?([\w$]+)\s*\[\s*\]\s*;", text)
    kernels = {}
    for match in ENTRY.finditer(text):
        kernel = Kernel(match[1], _parameters(match[2]), dynamic=list(dynamic))
        threads = re.search(r"\.(?:max|req)ntid\s+(\d+)", match[3])
        kernel.threads = int(threads[1]) if threads else 0
        _Body(kernel, text, match.end()).read()
        kernels[kernel.name] = kernel
    return kernels


def _parameters(text: str) -> list[Parameter]:
    parameters: list[Parameter] = []
    offset = 0
    for part in filter(None, (p.strip() for p in text.split(","))):
        match = PARAMETER.match(part)
        if match is None:
            raise Fault(f"parameter: expected .param, got {part!r}")
        size = BITS[match[2]] // 8
        align = int(match[1] or size)
        offset = -(-offset // align) * align
        parameters.append(Parameter(match[3], offset, size * int(match[4] or 1)))
        offset += parameters[-1].size
    return parameters


def split(text: str) -> list[str]:
    """At the commas outside all brackets."""
    parts, depth, start = [], 0, 0
    for i, character in enumerate(text):
        if character in "{[(":
            depth += 1
        elif character in "}])":
            depth -= 1
        elif character == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    last = text[start:].strip()
    return [*parts, last] if last else parts


class _Body:
    """Reads one kernel's body."""

    def __init__(self, kernel: Kernel, text: str, position: int) -> None:
        self.kernel, self.text, self.position = kernel, text, position
        self.line = text.count("\n", 0, position) + 1
        self.scope = Scope(None)
        self.branches: list[tuple[Instruction, Scope]] = []
        self.tables: dict[str, list[str]] = {}

    def read(self) -> None:
        label = ""
        while True:
            match = STATEMENT.match(self.text, self.position)
            if match is None:
                raise Fault(f"line {self.line}: expected a statement, got {self.text[self.position :][:60]!r}")
            start = match.start(match.lastgroup or 0)
            self.line += self.text.count("\n", self.position, start)
            self.position = match.end()
            if match["open"]:
                self.scope = Scope(self.scope)
            elif match["close"]:
                if self.scope.parent is None:
                    break
                self.scope = self.scope.parent
            elif match["label"]:
                label = match["label"]
                self.scope.labels[label] = len(self.kernel.code)
            else:
                self._statement(match["text"].strip(), label)
                self.line += match["text"].count("\n")
        for instruction, scope in self.branches:
            name = instruction.operands[-1]
            assert isinstance(name, Symbol)
            if instruction.parts[0] == "brx":
                instruction.targets = tuple(scope.label(target) for target in self.tables[name.name])
            else:
                instruction.target = scope.label(name.name)

    def _statement(self, text: str, label: str) -> None:
        if text.startswith(".reg"):
            self._registers(text)
        elif text.startswith(".shared"):
            self._shared(text)
        elif text.startswith(".branchtargets"):
            self.tables[label] = [name.strip() for name in text.removeprefix(".branchtargets").split(",")]
        elif not text.startswith("."):
            self._instruction(text)
        elif not text.startswith((".pragma", ".noreturn")):
            raise Fault(f"line {self.line}: unknown directive {text[:60]!r}")

    def _registers(self, text: str) -> None:
        _, kind, names = text.split(None, 2)
        for name in (n.strip() for n in names.split(",")):
            numbered = re.fullmatch(r"(.*)<(\d+)>", name)
            for one in [f"{numbered[1]}{i}" for i in range(int(numbered[2]))] if numbered else [name]:
                register = Register(len(self.kernel.registers), BITS[kind.removeprefix(".")], one)
                self.kernel.registers.append(register)
                self.scope.registers[one] = register

    def _shared(self, text: str) -> None:
        match = re.match(r"\.shared\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)(?:\[(\d+)\])?", text)
        if match is None:
            raise Fault(f"line {self.line}: expected .shared, got {text!r}")
        align, size = int(match[1] or 1), BITS[match[2]] // 8 * int(match[4] or 1)
        offset = -(-self.kernel.shared_bytes // align) * align
        self.kernel.shared[match[3]] = offset
        self.kernel.shared_bytes = offset + size

    def _instruction(self, text: str) -> None:
        guarded = GUARD.match(text)
        body = guarded[3] if guarded else text
        match = re.match(r"([a-z][\w:.]*)\s*(.*)", body, re.DOTALL)
        if match is None:
            raise Fault(f"line {self.line}: expected an instruction, got {text!r}")
        operands = [self._operand(part) for part in split(match[2])]
        parts = tuple(match[1].strip(".").split("."))
        instruction = Instruction(self.line, " ".join(text.split()), parts, operands)
        if guarded:
            instruction.guard, instruction.negated = self.scope.register(guarded[2]), guarded[1] == "!"
            if instruction.guard is None:
                raise Fault(f"line {self.line}: predicate {guarded[2]} is not declared")
        if parts[0] in ("bra", "brx"):
            self.branches.append((instruction, self.scope))
        self.kernel.code.append(instruction)

    def _operand(self, text: str) -> Operand:
        register = self.scope.register(text)
        if register is not None:
            return register
        if text[0] == "{":
            return Vector(tuple(self._operand(part) for part in split(text[1:-1])))
        if text[0] == "[":
            return self._address(text[1:-1].strip())
        if text[0] == "!":
            return Not(self._operand(text[1:].strip()))
        if "|" in text:
            first, second = (self._operand(part.strip()) for part in text.split("|"))
            return Pair(first, second)
        if text[:2] in ("0f", "0F", "0d", "0D") and len(text) in (10, 18):
            return Immediate(int(text[2:], 16))
        if re.fullmatch(r"-?\s*(0[xX][0-9a-fA-F]+|\d+)U?", text):
            return Immediate(int(text.rstrip("U").replace(" ", ""), 0))
        if SPECIAL.fullmatch(text):
            return Special(text)
        if re.fullmatch(r"[\w$]+", text):
            return Symbol(text)
        summed = re.fullmatch(r"([\w$]+)\s*\+\s*(\d+)", text)  # the address of a symbol, moved
        if summed:
            return Address(Symbol(summed[1]), int(summed[2]))
        raise Fault(f"line {self.line}: unknown operand {text!r}")

    def _address(self, text: str) -> Address:
        base, *rest = split(text)
        coordinates: tuple[Operand, ...] = ()
        if rest:
            vector = self._operand(rest[0])
            coordinates = vector.items if isinstance(vector, Vector) else (vector,)
        match = re.fullmatch(r"(.*?)\s*\+\s*(-?\d+)", base)
        name, offset = (match[1], int(match[2])) if match else (base, 0)
        return Address(self._operand(name), offset, coordinates)
