"""A kernel launch as a step of a plan: compiled once for what Triton specializes on, then launched
by C or by Triton.

``KernelLaunch`` says which kernel runs on which grid with which arguments. Compiling takes seconds
or a look into Triton's cache, so it is done once for each specialization: dtypes, 16-byte alignment
of pointers, integers that the kernel is specialized on, constants and compile options. A new number
of tokens changes none of these.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from hybrid_mxfp8 import env
from hybrid_mxfp8.dispatch import launcher
from hybrid_mxfp8.dispatch.buffers import Buffer, TensorMap
from hybrid_mxfp8.triton_kernels import abi
from hybrid_mxfp8.triton_kernels.numerics import INTERPRET

INTERPRETED: bool = INTERPRET.value
"""Whether this process's kernels run in Triton's interpreter, on the CPU."""

VARYING = [
    *("num_tokens", "num_rows", "num_scale_rows", "num_source_rows", "num_slots", "num_blocks", "num_records"),
    *("num_experts", "top_k", "row_programs", "max_tiles", "tokens_at"),
    *("layout_ptr", "expert_offsets_ptr", "scale_offsets_ptr", "counts_ptr", "given_ptr", "row_index_ptr"),
    *("tokens_ptr", "scale_starts_ptr", "out_tokens_ptr", "out_offsets_ptr", "out_scale_offsets_ptr"),
    *("ids_ptr", "weights_ptr", "rows_ptr", "inverse_permutation_ptr"),
]
"""Parameters of kernels that change from batch to batch, by name: no kernel is specialized on them,
so that a new number of tokens compiles none anew."""


class KernelLaunch(NamedTuple):
    """One kernel on a grid of ``programs``."""

    kernel: Any  # a jitted function whose constexpr parameters come last
    programs: int  # at least 1
    arguments: tuple[abi.Argument, ...]  # the other parameters, in order
    constants: tuple[Hashable, ...]  # the constexpr parameters, in order
    options: tuple[tuple[str, int], ...]  # for the compiler, such as ``(("num_warps", 4),)``

    @classmethod
    def of(cls, kernel: Any, programs: int, **named: Any) -> KernelLaunch:
        """From the kernel's parameters by name; what is none of them is an option for the compiler,
        as where Triton launches a kernel."""
        constexprs = kernel.fn.__annotations__  # which no other parameter of a kernel here has
        arguments = tuple(named.pop(name) for name in kernel.arg_names if name not in constexprs)
        constants = tuple(named.pop(name) for name in kernel.arg_names if name in constexprs)
        return cls(kernel, programs, arguments, constants, tuple(named.items()))

    def encode(self, device: torch.device) -> Sequence[int] | None:
        """The words of this launch for ``dispatch.launcher``; None where :meth:`run` must be
        called."""
        if INTERPRETED:
            return None
        _, found = self.compile(device)
        return None if found is None else found.words(self.programs, self.arguments)

    def run(self, tensors: Sequence[torch.Tensor], device: torch.device) -> None:
        """Launch through Triton, or interpret."""
        if INTERPRETED:
            arguments = [_interpreted(argument, tensors) for argument in self.arguments]
            # The interpreter keeps the place in the grid, and the functions that it patches, in
            # globals: two threads in it at once would compute each other's tiles.
            with env.one_thread():
                self.kernel[(self.programs,)](*arguments, *self.constants, **dict(self.options))
            return
        arguments = [abi.triton_argument(a, tensors) for a in self.arguments]
        with torch.cuda.device(device):
            kernel, _ = self.compile(device)
            kernel[(self.programs, 1, 1)](*arguments, *self.constants)

    def hooked(self) -> bool:
        """Whether hooks are installed that Triton's own launch calls."""
        return abi.hooks_installed()

    def compile(self, device: torch.device) -> tuple[Any, abi.Abi | None]:
        """The compiled kernel, new or of a launch before with such types, and how the C launcher
        passes its arguments; None where Triton must launch it."""
        # By the kernel's identity: Triton hashes a kernel by its source.
        key = (id(self.kernel), self.constants, self.options, device, self._specialization())
        found = _compiled.get(key)
        if found is None:
            with env.one_thread():
                found = _compiled.get(key)
                if found is None:
                    found = _compiled[key] = self._compile(device)
        return found

    def _specialization(self) -> Hashable:
        """What Triton distinguishes of the arguments, or finer."""
        key: list[Hashable] = []
        argument: Any
        parameters = (parameter for parameter in self.kernel.params if not parameter.is_constexpr)
        for argument, parameter in zip(self.arguments, parameters, strict=True):
            specialized = not parameter.do_not_specialize
            kind = type(argument)
            if kind is Buffer:
                key.append(argument.dtype)
                key.append(argument.aligned or not specialized)
            elif kind is TensorMap:
                key.append((argument.buffer.dtype, argument.box, argument.layout))
            elif specialized or argument is None:
                key.append(argument)
            else:
                key.append(-(2**31) <= argument <= 2**31 - 1)
        return tuple(key)

    def _compile(self, device: torch.device) -> tuple[Any, abi.Abi | None]:
        with torch.cuda.device(device):
            kernel = abi.compile_kernel(self.kernel, self.arguments, self.constants, dict(self.options))
            try:
                return kernel, abi.abi_of(kernel, self.arguments)
            except launcher.LauncherUnavailableError:
                return kernel, None


_compiled: dict[Hashable, tuple[Any, abi.Abi | None]] = {}
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_compiled.clear)


def _interpreted(argument: abi.Argument, tensors: Sequence[torch.Tensor]) -> Any:
    """As the interpreter takes it, which knows an e4m3 tensor by its bytes alone."""
    if isinstance(argument, Buffer):
        tensor = argument.view(tensors)
        return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor
    if isinstance(argument, TensorMap):
        base = _interpreted(argument.buffer, tensors).view(argument.shape)
        return TensorDescriptor.from_tensor(base, list(argument.box))
    return argument


def triton_version() -> tuple[int, int]:
    """Major and minor."""
    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)
