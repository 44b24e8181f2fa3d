"""What a kernel that Triton compiled takes at a launch, in Triton 3.6 to 3.9.

Triton's own launcher finds this out again at every call, in Python. Here it is found out once: an
:class:`Abi` turns a kernel's arguments into the words that ``dispatch/launcher`` launches from.

A kernel's parameters are its arguments in order, less those that are constants of the compiled
kernel: constexprs, None, and integers specialized to 1. A tensor descriptor is a 128-byte tensor
map for TMA, then its shape as int32 and its strides as int64. Two pointers to scratch memory come
last, null where the kernel uses none. The driver is asked whether that is so (``Launcher.check``).

What is outside of this raises LauncherUnavailableError, and Triton's launcher takes over.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import triton

from hybrid_mxfp8.dispatch.buffers import Buffer, TensorMap
from hybrid_mxfp8.dispatch.launcher import (
    ADDRESS,
    MAX_PARAMS,
    MAX_TENSOR_MAPS,
    SCALAR,
    TENSOR_MAP,
    LauncherUnavailableError,
    launch_words,
    load,
)
from hybrid_mxfp8.dispatch.trace import value_of

Argument = Buffer | TensorMap | int | float | bool | None
"""Of a kernel; what is no constexpr of it."""

OLDEST, NEWEST = (3, 6), (3, 9)
"""The versions of Triton whose launchers were compared with this one, byte by byte."""

TENSOR_MAP_BYTES = 128
MAX_SHARED_BYTES = 228 * 1024
"""More than this takes an attribute of the launch that Triton sets and launcher.c does not."""

_INTEGER_BYTES = {"i1": 1, "u1": 1, "i8": 1, "u8": 1, "i16": 2, "u16": 2, "i32": 4, "u32": 4, "i64": 8}
"""Less u64, which Triton takes for integers from 2**63 on: no word of a program holds them."""
_FLOAT_FORMATS = {"fp32": "<f4x", "fp64": "<d"}
_TMA_DATA_TYPES = {**{i: i for i in range(16)}, 8: 10, 9: 8, 10: 9}
"""The driver's number of an element type, from the one that the compiler gives."""

_RUNTIME: Any = triton.knobs.runtime
_HookChain = triton.knobs.HookChain


def hooks_installed() -> bool:
    """Whether Triton must launch, because a profiler, say, wants to be called at each launch."""
    enter, leave = _RUNTIME.launch_enter_hook, _RUNTIME.launch_exit_hook
    return not (
        (enter is None or (type(enter) is _HookChain and not enter.calls))
        and (leave is None or (type(leave) is _HookChain and not leave.calls))
    )


# ---------------------------------------------------------------- compiling


class _Memory:
    """Stands for a tensor where Triton looks at nothing but its element type and address."""

    __slots__ = ("_address", "dtype")

    def __init__(self, dtype: torch.dtype, address: int) -> None:
        self.dtype = dtype
        self._address = address

    def data_ptr(self) -> int:
        return self._address


def _stand_in(argument: Argument) -> Any:
    """What Triton compiles for."""
    if isinstance(argument, Buffer):
        return _Memory(argument.dtype, 0 if argument.aligned else 1)
    return _descriptor(argument, 0) if isinstance(argument, TensorMap) else value_of(argument)


def triton_argument(argument: Argument, tensors: Sequence[torch.Tensor]) -> Any:
    """What a compiled kernel takes: an address for a pointer, and descriptors of addresses."""
    if isinstance(argument, Buffer):
        return tensors[argument.operand].data_ptr() + argument.offset
    if isinstance(argument, TensorMap):
        return _descriptor(argument, tensors[argument.buffer.operand].data_ptr() + argument.buffer.offset)
    return argument


def _descriptor(argument: TensorMap, address: int) -> Any:
    """A host descriptor of Triton's, or of Gluon's where it has a layout."""
    memory = _Memory(argument.buffer.dtype, address)
    shape = [value_of(size) for size in argument.shape]
    strides, box = list(_strides(shape)), list(argument.box)
    if argument.layout is None:
        from triton.tools.tensor_descriptor import TensorDescriptor

        return TensorDescriptor(memory, shape, strides, box)
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor

    return GluonDescriptor(memory, shape, strides, box, argument.layout)


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Of a contiguous tensor, in elements."""
    strides = [1]
    for size in shape[:0:-1]:
        strides.append(strides[-1] * size)
    return tuple(reversed(strides))


def compile_kernel(
    kernel: Any,
    arguments: Sequence[Argument],
    constants: Sequence[object],
    options: Mapping[str, Any],
    device: torch.device,
) -> Any:
    """Compile ``kernel``, or find it in Triton's cache, just as a launch with such tensors would.

    Args:
        kernel: a jitted function whose constexpr parameters come last.
        arguments: of its other parameters, in order.
        constants: of its constexpr parameters, in order.
        options: for the compiler, such as ``{"num_warps": 4}``.
        device: to compile for.

    Returns:
        What Triton compiled, not loaded yet. Triton unloads a kernel whose object dies.
    """
    with _current(device):
        return kernel.warmup(*map(_stand_in, arguments), *constants, grid=(1,), **options)


def _current(device: torch.device) -> contextlib.AbstractContextManager[object]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


# ---------------------------------------------------------------- launching


_POINTER, _INTEGER, _FLOAT, _MAP, _CONSTANT = range(5)


class _Step(NamedTuple):
    """What to do with one argument at a launch.

    Attributes:
        kind: of the argument.
        slot: of the first word that depends on it.
        detail: _POINTER: whether it must be aligned; _INTEGER: (least, greatest, divisor); _FLOAT:
            its ``struct`` format; _MAP: (box, bytes of an element); _CONSTANT: what it must be.
        name: of the parameter.
    """

    kind: int
    slot: int
    detail: Any
    name: str


class Abi(NamedTuple):
    """How a kernel is launched.

    Attributes:
        compiled: by Triton; held, because Triton unloads a kernel whose object dies.
        template: the words of a launch, with zeros for what arguments decide.
        steps: what each argument decides.
    """

    compiled: Any
    template: list[int]
    steps: tuple[_Step, ...]

    def words(self, grid: int, arguments: Sequence[Argument]) -> list[int]:
        """The words of a launch, for ``launcher.program``.

        Args:
            grid: programs.
            arguments: of the parameters that are no constexprs, in order.

        Raises:
            ValueError: the kernel was compiled for other arguments: a pointer is less aligned, an
                integer is wider, no multiple of 16, or not the constant that it was.
        """
        words = self.template[:]
        words[1] = grid
        argument: Any  # each kind of step knows its own
        for (kind, slot, detail, name), argument in zip(self.steps, arguments, strict=True):
            if kind == _POINTER:
                if detail and not argument.aligned:
                    raise ValueError(f"{name}: compiled for memory that is aligned to 16 bytes, got {argument}")
                words[slot] = argument.operand
                words[slot + 1] = argument.offset
            elif kind == _INTEGER:
                least, greatest, divisor = detail
                if not least <= argument <= greatest or (divisor > 1 and argument % divisor):
                    raise ValueError(
                        f"{name}: compiled for a multiple of {divisor} from {least} to {greatest}, got {argument}"
                    )
                words[slot] = argument
            elif kind == _MAP:
                if not argument.buffer.aligned:
                    raise ValueError(f"{name}: compiled for memory that is aligned to 16 bytes, got {argument}")
                words[slot] = argument.buffer.operand
                words[slot + 1] = argument.buffer.offset
                geometry = _geometry(argument.shape, *detail)
                words[slot + 6 : slot + 6 + len(geometry)] = geometry
            elif kind == _CONSTANT:
                if argument != detail:
                    raise ValueError(f"{name}: compiled for {detail}, got {argument}")
            else:
                words[slot] = int.from_bytes(struct.pack(detail, argument), "little", signed=True)
        return words


def _geometry(shape: tuple[int, ...], box: tuple[int, ...], element_bytes: int) -> list[int]:
    """The words of a tensor map from its dims on, and of the scalars that follow it."""
    if len(shape) != len(box) or any(size >= 2**31 for size in shape):
        raise ValueError(f"tensor map: expected {len(box)} dimensions below 2**31, got {shape}")
    strides = _strides(shape)
    words = [*shape[::-1], *box[::-1], *(stride * element_bytes for stride in strides[-2::-1])]
    for scalar in (*shape, *strides):
        words += SCALAR, scalar
    return words


class _Params:
    """Collects a kernel's parameters: their sizes and words, and what each argument decides."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.params: list[list[int]] = []
        self.steps: list[_Step] = []
        self.slot = len(launch_words(0, 0, 0, 0, False, []))

    def add(self, size: int, words: list[int]) -> int:
        """Another parameter; returns the slot after its kind."""
        slot = self.slot + 1
        self.sizes.append(size)
        self.params.append(words)
        self.slot += len(words)
        return slot

    def add_argument(self, kind: int, size: int, words: list[int], detail: Any, name: str) -> None:
        self.steps.append(_Step(kind, self.add(size, words), detail, name))


def abi_of(compiled: Any, arguments: Sequence[Argument]) -> Abi:
    """How to launch what :func:`compile_kernel` returned; loads it on the current device.

    Args:
        compiled: by Triton.
        arguments: as the kernel was compiled for.

    Raises:
        LauncherUnavailableError: only Triton can launch this kernel; says why.
    """
    launcher = load()
    _check_version()
    metadata = compiled.metadata
    run = compiled.run  # loads it
    if reason := _unsupported(metadata, run):
        raise LauncherUnavailableError(f"{metadata.name}: {reason}")
    ptx = compiled.asm.get("ptx")  # absent where Triton stores binaries only
    waits = ptx is not None and "griddepcontrol.wait" in ptx
    params = _params(compiled, arguments)
    try:
        launcher.check(compiled.function, *params.sizes)
    except RuntimeError as error:
        raise LauncherUnavailableError(f"{metadata.name}: {error}") from error
    template = launch_words(compiled.function, 0, 32 * metadata.num_warps, metadata.shared, waits, params.params)
    return Abi(compiled, template, tuple(params.steps))


def _check_version(version: str = triton.__version__) -> None:
    if not OLDEST <= tuple(map(int, version.split(".")[:2])) <= NEWEST:
        raise LauncherUnavailableError(
            f"Triton {version} is not known: expected {'.'.join(map(str, OLDEST))} to {'.'.join(map(str, NEWEST))}"
        )


def _unsupported(metadata: Any, run: Any) -> str:
    """What of a kernel launcher.c has no way to do; empty if nothing."""
    for kind in ("global", "profile"):
        if size := getattr(metadata, f"{kind}_scratch_size", None):
            return f"needs {size} bytes of {kind} scratch memory"
    if metadata.launch_cooperative_grid:
        return "is launched as a cooperative grid"
    if metadata.num_ctas != 1:
        return f"is launched in clusters of {metadata.num_ctas}"
    if metadata.shared > MAX_SHARED_BYTES:
        return f"needs {metadata.shared} bytes of shared memory, more than {MAX_SHARED_BYTES}"
    if getattr(run, "gsan_enabled", False):
        return "is watched by Triton's sanitizer"
    return ""


def _params(compiled: Any, arguments: Sequence[Argument]) -> _Params:
    source, name = compiled.src, compiled.metadata.name
    maps = iter(getattr(compiled.metadata, "tensordesc_meta", None) or ())
    params = _Params()
    given = iter(arguments)
    for i, (param, type_) in enumerate(zip(source.fn.params, source.signature.values(), strict=True)):
        if param.is_constexpr:
            continue
        argument = next(given)
        divisible = any(attribute == "tt.divisibility" for attribute, _ in source.attrs.get((i,), ()))
        if type_ == "constexpr":
            constant = source.constants[(i,)]
            params.steps.append(_Step(_CONSTANT, 0, constant, param.name))
        elif not isinstance(type_, str):
            raise LauncherUnavailableError(f"{name}: {param.name} is a tuple")
        elif type_.startswith("*"):
            params.add_argument(_POINTER, 8, [ADDRESS, 0, 0], divisible, param.name)
        elif type_.startswith("tensordesc"):
            _add_map(params, next(maps, None), argument, f"{name}: {param.name}")
        elif type_ in _INTEGER_BYTES:
            bits, signed = int(type_[1:]), type_[0] == "i" and type_ != "i1"
            least, greatest = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
            detail = (least, greatest, 16 if divisible else 1)
            params.add_argument(_INTEGER, _INTEGER_BYTES[type_], [SCALAR, 0], detail, param.name)
        elif type_ in _FLOAT_FORMATS:
            size = 8 if type_ == "fp64" else 4
            params.add_argument(_FLOAT, size, [SCALAR, 0], _FLOAT_FORMATS[type_], param.name)
        else:
            raise LauncherUnavailableError(f"{name}: {param.name} is of type {type_}")
    for _ in range(2):
        params.add(8, [SCALAR, 0])  # scratch memory
    num_maps = sum(words[0] == TENSOR_MAP for words in params.params)
    if len(params.params) > MAX_PARAMS or num_maps > MAX_TENSOR_MAPS:
        raise LauncherUnavailableError(
            f"{name}: expected at most {MAX_PARAMS} parameters and {MAX_TENSOR_MAPS} tensor maps, "
            f"got {len(params.params)} and {num_maps}"
        )
    return params


def _add_map(params: _Params, described: Any, argument: Any, name: str) -> None:
    if not described:
        raise LauncherUnavailableError(f"{name}: a tensor descriptor that is no tensor map for TMA")
    if described["fp4_padded"] or described.get("is_im2col"):
        raise LauncherUnavailableError(f"{name}: a tensor map of padded FP4 or of image columns")
    box, element_bytes = described["block_size"], described["elem_size"]
    rank = len(box)
    if not isinstance(argument, TensorMap) or len(argument.shape) != rank:
        raise LauncherUnavailableError(f"{name}: expected a TensorMap of {rank} dimensions, got {argument}")
    data_type = _TMA_DATA_TYPES[described["elem_type"]]
    words = [TENSOR_MAP, 0, 0, data_type, element_bytes, described["swizzle"], rank, *[0] * (3 * rank - 1)]
    params.add_argument(_MAP, TENSOR_MAP_BYTES, words, (tuple(box), element_bytes), name)
    for size in [4] * rank + [8] * rank:
        params.add(size, [SCALAR, 0])
