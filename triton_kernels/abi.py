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

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from hybrid_mxfp8 import env
from hybrid_mxfp8.core.formats import ceil_div
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
"""An argument of a kernel that is no constexpr."""

OLDEST, NEWEST = (3, 6), (3, 9)
"""The versions of Triton whose launchers were compared with this one, byte by byte."""

TENSOR_MAP_BYTES = 128
MAX_SHARED_BYTES = 228 * 1024
"""More than this takes an attribute of the launch that Triton sets and launcher.c does not."""

SCRATCH_POINTERS = 2

_INTEGER_TYPES = ("i1", "u1", "i8", "u8", "i16", "u16", "i32", "u32", "i64")
"""Without u64, Triton's type for integers from 2**63 on: no word of a program holds those."""
_TMA_DATA_TYPES = {**{i: i for i in range(16)}, 8: 10, 9: 8, 10: 9}
"""The driver's number of an element type, from the one that the compiler gives."""

_RUNTIME: Any = triton.knobs.runtime
_HookChain = triton.knobs.HookChain


def hooks_installed() -> bool:
    """Whether Triton must launch, because a hook, such as a profiler's, wants each launch."""
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
    kernel: Any, arguments: Sequence[Argument], constants: Sequence[object], options: Mapping[str, Any]
) -> Any:
    """Compile a jitted function for the current device, or find it in Triton's cache, as a launch
    with such tensors would; it is not loaded yet. Its constexprs, ``constants``, come last."""
    return kernel.warmup(*map(_stand_in, arguments), *constants, grid=(1,), **options)


# ---------------------------------------------------------------- launching


class _Argument(NamedTuple):
    """How one argument reaches the kernel."""

    sizes: tuple[int, ...]  # bytes of each of the kernel's parameters that it becomes
    encode: Callable[[Any], list[list[int]]]  # the words of each of them, its kind first


class Abi(NamedTuple):
    """How a kernel is launched."""

    compiled: Any  # by Triton; held, because Triton unloads a kernel whose object dies
    arguments: tuple[_Argument, ...]
    waits: bool  # whether the kernel itself waits for its predecessor, so that it may start early

    def words(self, grid: int, arguments: Sequence[Argument]) -> list[int]:
        """The words of a launch of ``grid`` programs, for ``launcher.program_words``; ValueError
        where the kernel was compiled for other arguments: a pointer is less aligned, an integer is
        wider, no multiple of 16, or not the constant that it was. With HYBRID_MXFP8_PDL=0 it does
        not start before the launch before it has ended."""
        params = [words for own, given in zip(self.arguments, arguments, strict=True) for words in own.encode(given)]
        params += [[SCALAR, 0]] * SCRATCH_POINTERS
        function, metadata = self.compiled.function, self.compiled.metadata
        early = self.waits and env.pdl()
        return launch_words(function, grid, 32 * metadata.num_warps, metadata.shared, early, params)


def _constant(name: str, constant: Any) -> _Argument:
    def encode(argument: Any) -> list[list[int]]:
        if argument != constant:
            raise ValueError(f"{name}: compiled for {constant}, got {argument}")
        return []

    return _Argument((), encode)


def _pointer(name: str, aligned: bool) -> _Argument:
    def encode(buffer: Buffer) -> list[list[int]]:
        if aligned:
            _check_aligned(name, buffer.aligned, buffer)
        return [[ADDRESS, buffer.operand, buffer.offset]]

    return _Argument((8,), encode)


def _check_aligned(name: str, aligned: bool, argument: Buffer | TensorMap) -> None:
    if not aligned:
        raise ValueError(f"{name}: compiled for memory that is aligned to 16 bytes, got {argument}")


def _integer(name: str, type_: str, divisor: int) -> _Argument:
    bits, signed = int(type_[1:]), type_[0] == "i" and type_ != "i1"
    least, greatest = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)

    def encode(number: int) -> list[list[int]]:
        if not least <= number <= greatest or (divisor > 1 and number % divisor):
            raise ValueError(f"{name}: compiled for a multiple of {divisor} from {least} to {greatest}, got {number}")
        return [[SCALAR, number]]

    return _Argument((ceil_div(bits, 8),), encode)


def _tensor_map(name: str, described: Mapping[str, Any], argument: Argument) -> _Argument:
    """A tensor map, then its shape and strides as scalars; ``described`` is of the compiler."""
    if described["fp4_padded"] or described.get("is_im2col"):
        raise LauncherUnavailableError(f"{name}: a tensor map of padded FP4 or of image columns")
    box, element_bytes = tuple(described["block_size"]), described["elem_size"]
    rank = len(box)
    if not isinstance(argument, TensorMap) or len(argument.shape) != rank:
        raise LauncherUnavailableError(f"{name}: expected a TensorMap of {rank} dimensions, got {argument}")
    element = [_TMA_DATA_TYPES[described["elem_type"]], element_bytes, described["swizzle"], rank]

    def encode(tensor_map: TensorMap) -> list[list[int]]:
        buffer, shape = tensor_map.buffer, tensor_map.shape
        _check_aligned(name, buffer.aligned, tensor_map)
        if len(shape) != rank or any(size >= 2**31 for size in shape):
            raise ValueError(f"tensor map: expected {rank} dimensions below 2**31, got {shape}")
        strides = _strides(shape)
        byte_strides = [stride * element_bytes for stride in strides[-2::-1]]
        words = [TENSOR_MAP, buffer.operand, buffer.offset, *element, *shape[::-1], *box[::-1], *byte_strides]
        return [words, *([SCALAR, scalar] for scalar in (*shape, *strides))]

    return _Argument((TENSOR_MAP_BYTES, *[4] * rank, *[8] * rank), encode)


def abi_of(compiled: Any, arguments: Sequence[Argument]) -> Abi:
    """How to launch what :func:`compile_kernel` returned for ``arguments``; loads it on the current
    device. LauncherUnavailableError says why only Triton can launch it."""
    launcher = load()
    _check_version()
    metadata = compiled.metadata
    run = compiled.run  # loads it
    if reason := _unsupported(metadata, run):
        raise LauncherUnavailableError(f"{metadata.name}: {reason}")
    own = _arguments(compiled, arguments)
    sizes = [size for argument in own for size in argument.sizes] + [8] * SCRATCH_POINTERS
    num_maps = sizes.count(TENSOR_MAP_BYTES)
    if len(sizes) > MAX_PARAMS or num_maps > MAX_TENSOR_MAPS:
        raise LauncherUnavailableError(
            f"{metadata.name}: expected at most {MAX_PARAMS} parameters and {MAX_TENSOR_MAPS} tensor maps, "
            f"got {len(sizes)} and {num_maps}"
        )
    try:
        launcher.check(compiled.function, *sizes)
    except RuntimeError as error:
        raise LauncherUnavailableError(f"{metadata.name}: {error}") from error
    ptx = compiled.asm.get("ptx", "")  # absent where Triton stores binaries only
    return Abi(compiled, tuple(own), "griddepcontrol.wait" in ptx)


def _check_version(version: str = triton.__version__) -> None:
    if not OLDEST <= tuple(map(int, version.split(".")[:2])) <= NEWEST:
        raise LauncherUnavailableError(
            f"Triton {version} is not known: expected {'.'.join(map(str, OLDEST))} to {'.'.join(map(str, NEWEST))}"
        )


def _unsupported(metadata: Any, run: Any) -> str:
    """What a kernel needs that launcher.c can't do; empty if nothing."""
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


def _arguments(compiled: Any, arguments: Sequence[Argument]) -> list[_Argument]:
    source = compiled.src
    maps = iter(getattr(compiled.metadata, "tensordesc_meta", None) or ())
    given = iter(arguments)
    found = []
    for i, (param, type_) in enumerate(zip(source.fn.params, source.signature.values(), strict=True)):
        if param.is_constexpr:
            continue
        argument, name = next(given), param.name
        kernel_and_name = f"{compiled.metadata.name}: {name}"
        divisible = any(attribute == "tt.divisibility" for attribute, _ in source.attrs.get((i,), ()))
        if type_ == "constexpr":
            found.append(_constant(name, source.constants[(i,)]))
        elif not isinstance(type_, str):
            raise LauncherUnavailableError(f"{kernel_and_name} is a tuple")
        elif type_.startswith("*"):
            found.append(_pointer(name, divisible))
        elif type_.startswith("tensordesc"):
            described = next(maps, None)
            if not described:
                raise LauncherUnavailableError(f"{kernel_and_name}: a tensor descriptor that is no tensor map for TMA")
            found.append(_tensor_map(kernel_and_name, described, argument))
        elif type_ in _INTEGER_TYPES:
            found.append(_integer(name, type_, 16 if divisible else 1))
        else:
            raise LauncherUnavailableError(f"{kernel_and_name} is of type {type_}")
    return found
