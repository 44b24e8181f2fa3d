"""A launch made from an Abi is, byte by byte, the one that Triton's own launcher makes."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any
from unittest import mock

import cases
import pytest
import torch
import triton
from fake_driver import Launch, child, in_child, launches, program_of, set_sizes, sizes_in_ptx  # noqa: F401
from kernel_cases import CASES
from triton.backends.compiler import GPUTarget

from hybrid_mxfp8.dispatch import launcher
from hybrid_mxfp8.dispatch.buffers import Buffer, TensorMap
from hybrid_mxfp8.triton_kernels import abi
from hybrid_mxfp8.triton_kernels.launch import KernelLaunch

STREAM = 7
NEVER_CLEARS_BIT_21 = triton.__version__.startswith("3.6.")


def use_gpu(arch: int) -> None:
    """Let Triton's own driver, over the fake libcuda, have a GPU of this architecture."""
    from triton.backends.nvidia.driver import CudaLauncher, CudaUtils

    driver = SimpleNamespace(utils=CudaUtils(), launcher_cls=CudaLauncher)
    driver.get_current_target = lambda: GPUTarget("cuda", arch, 32)
    driver.get_current_device = lambda: arch  # Triton's caches of kernels are keyed by device
    driver.get_current_stream = lambda device: STREAM
    driver.get_device_capability = lambda device: divmod(arch, 10)
    triton.runtime.driver.set_active(driver)


def loaded(compiled: Any) -> Any:
    """A kernel of which the fake driver knows the parameters."""
    compiled.run  # noqa: B018 - loads it
    set_sizes(compiled.function, sizes_in_ptx(compiled.asm["ptx"]))
    return compiled


def compiled_of(launch: KernelLaunch) -> Any:
    """The kernel compiled for a launch, and loaded."""
    use_gpu(100 if "blackwell" in launch.kernel.__name__ else 90)
    return loaded(abi.compile_kernel(launch.kernel, launch.arguments, launch.constants, dict(launch.options)))


def both_launches(compiled: Any, launch: KernelLaunch) -> tuple[Launch, Launch]:
    """Triton's, which finds the kernel that was compiled without tensors, and the launcher's."""
    memory: dict[int, torch.Tensor] = {}

    def tensor(buffer: Buffer) -> torch.Tensor:
        whole = memory.setdefault(buffer.operand, cases.aligned_bytes(2**22))
        return whole[buffer.offset : buffer.offset + 2**21].view(buffer.dtype)

    def as_triton_takes_it(argument: abi.Argument) -> Any:
        if isinstance(argument, TensorMap):
            descriptor = abi._stand_in(argument)
            descriptor.base = tensor(argument.buffer)
            return descriptor
        return tensor(argument) if isinstance(argument, Buffer) else argument

    arguments = [as_triton_takes_it(argument) for argument in launch.arguments]
    kernel = launch.kernel[(launch.programs,)](*arguments, *launch.constants, **dict(launch.options))
    assert kernel is compiled
    addresses = [memory[i].data_ptr() if i in memory else 0 for i in range(1 + max(memory))]
    words = abi.abi_of(compiled, launch.arguments).words(launch.programs, launch.arguments)
    program = program_of(0, [0] * len(addresses), [], [words])
    assert launcher.load().run(program.address, STREAM, *addresses) == 0
    tritons, ours = launches()
    return tritons, ours


def without_bit_21(params: bytes, sizes: list[int]) -> bytes:
    """Parameters as they are with that bit cleared in word 1 of each tensor map."""
    changed, at = bytearray(params), 0
    for size in sizes:
        if size == abi.TENSOR_MAP_BYTES:
            changed[at + 8 + 2] &= ~(1 << 5)
        at += size
    return bytes(changed)


@pytest.mark.parametrize("name", CASES)
@in_child
def test_same_launch_as_tritons(name: str) -> None:
    case = CASES[name]()
    compiled = compiled_of(case)
    tritons, ours = both_launches(compiled, case)
    if NEVER_CLEARS_BIT_21:
        sizes = sizes_in_ptx(compiled.asm["ptx"])
        has_small_maps = "gemm" in name and "portable" not in name
        assert (ours.params != tritons.params) == has_small_maps
        ours, tritons = (each._replace(params=without_bit_21(each.params, sizes)) for each in (ours, tritons))
    assert ours == tritons
    assert ours.grid == (case.programs, 1, 1)
    assert len(ours.params) == sum(sizes_in_ptx(compiled.asm["ptx"]))


@triton.jit(do_not_specialize=["count"])
def takes_everything(pointer, other, none, one, sixteen, count, flag, BLOCK: triton.language.constexpr):  # type: ignore[no-untyped-def]
    value = triton.language.load(pointer).to(triton.language.float32)
    if flag:
        value += one + sixteen
    if none is None and count > BLOCK:
        triton.language.store(other, value.to(other.dtype.element_ty))


DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.uint8, torch.int32, torch.int64)


def everything(dtype: torch.dtype = torch.bfloat16, count: int = 5) -> KernelLaunch:
    memory, unaligned = Buffer(0, 0, dtype, (8,)), Buffer(1, 4, torch.float32, (8,), aligned=False)
    arguments = (memory, unaligned, None, 1, 32, count, True)
    return KernelLaunch(takes_everything, 2, arguments, (16,), (("num_warps", 1),))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@in_child
def test_arguments_of_every_kind(dtype: torch.dtype) -> None:
    for count in (5, 2**31):  # int32, then int64, though it is not specialized
        case = everything(dtype, count)
        tritons, ours = both_launches(compiled_of(case), case)
        assert ours == tritons


# ---------------------------------------------------------------- what is refused


@in_child
def test_integers_of_unsigned_64_bits_are_left_to_triton() -> None:
    case = everything(count=2**63)
    with pytest.raises(launcher.LauncherUnavailableError, match="takes_everything: count is of type u64"):
        abi.abi_of(compiled_of(case), case.arguments)


def changed(arguments: tuple[abi.Argument, ...], i: int, argument: abi.Argument) -> tuple[abi.Argument, ...]:
    return (*arguments[:i], argument, *arguments[i + 1 :])


@in_child
def test_words_refuse_what_the_kernel_was_not_compiled_for() -> None:
    given = everything().arguments
    found = abi.abi_of(compiled_of(everything()), given)
    for i, argument, message in [
        (0, Buffer(0, 2, torch.bfloat16, (8,), aligned=False), "pointer: compiled for memory that is aligned"),
        (2, Buffer(0, 0, torch.bfloat16, (8,)), "none: compiled for None, got Buffer"),
        (3, 2, "one: compiled for 1, got 2"),
        (4, 33, "sixteen: compiled for a multiple of 16 from -2147483648 to 2147483647, got 33"),
        (5, 2**31, "count: compiled for a multiple of 1 from -2147483648 to 2147483647, got 2147483648"),
        (6, 2, "flag: compiled for a multiple of 1 from 0 to 1, got 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            found.words(1, changed(given, i, argument))
    with pytest.raises(ValueError, match="zip"):
        found.words(1, given[:-1])
    for i, argument in [(0, given[0]._replace(offset=16)), (4, 48), (5, 6), (5, -1), (6, False)]:  # type: ignore[union-attr]
        assert found.words(1, changed(given, i, argument)) != found.words(1, given)


@in_child
def test_tensor_maps_of_other_memory_are_refused() -> None:
    case = CASES["hopper_gemm"]()
    found = abi.abi_of(compiled_of(case), case.arguments)
    given = case.arguments[2]
    assert isinstance(given, TensorMap)
    for other, message in [
        (given._replace(buffer=given.buffer._replace(aligned=False)), "w_desc: compiled for memory that is aligned"),
        (given._replace(shape=(1, *given.shape)), "expected 2 dimensions below"),
        (given._replace(shape=(2**31, 64)), "expected 2 dimensions below"),
    ]:
        with pytest.raises(ValueError, match=message):
            found.words(1, changed(case.arguments, 2, other))


class Changed:
    """A compiled kernel, or its metadata, with some attributes replaced."""

    def __init__(self, original: Any, **changes: Any) -> None:
        self.__dict__.update(changes, _original=original)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"global_scratch_size": 8}, "needs 8 bytes of global scratch memory"),
        ({"profile_scratch_size": 16}, "needs 16 bytes of profile scratch memory"),
        ({"launch_cooperative_grid": True}, "is launched as a cooperative grid"),
        ({"num_ctas": 2}, "is launched in clusters of 2"),
        ({"shared": 229 * 1024}, "needs 234496 bytes of shared memory, more than 233472"),
        ({"run": SimpleNamespace(gsan_enabled=True)}, "is watched by Triton's sanitizer"),
        ({"tensordesc_meta": []}, "w_desc: a tensor descriptor that is no tensor map for TMA"),
        ({"tensordesc_meta": [{"fp4_padded": True}]}, "a tensor map of padded FP4"),
        ({"tensordesc_meta": [{"fp4_padded": False, "is_im2col": True}]}, "or of image columns"),
        ({"tensordesc_meta": [{"fp4_padded": False, "block_size": [1, 1, 1], "elem_size": 1}]}, "3 dimensions"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
@in_child
def test_kernels_that_only_triton_can_launch(changes: dict[str, Any], message: str) -> None:
    case = CASES["hopper_gemm"]()
    compiled = compiled_of(case)
    other = changes if "run" in changes else {"metadata": Changed(compiled.metadata, **changes)}
    with pytest.raises(launcher.LauncherUnavailableError, match=message):
        abi.abi_of(Changed(compiled, **other), case.arguments)


@in_child
def test_kernel_with_other_parameters_is_left_to_triton() -> None:
    case = CASES["rank"]()
    compiled = compiled_of(case)
    sizes = sizes_in_ptx(compiled.asm["ptx"])
    for wrong in (sizes[:-1], [*sizes, 8], [4, *sizes[1:]]):
        set_sizes(compiled.function, wrong)
        with pytest.raises(launcher.LauncherUnavailableError, match="rank_kernel: the kernel's parameter"):
            abi.abi_of(compiled, case.arguments)


@in_child
def test_more_parameters_than_fit_are_left_to_triton() -> None:
    case = CASES["quantize"]()
    compiled = compiled_of(case)
    with (
        mock.patch.object(abi, "MAX_PARAMS", 8),
        pytest.raises(launcher.LauncherUnavailableError, match="expected at most 8 parameters and 16 tensor maps"),
    ):
        abi.abi_of(compiled, case.arguments)


@in_child
def test_a_kernel_that_waits_is_launched_behind_another_as_triton_launches_dependents() -> None:
    case = CASES["group_offsets"]()
    case = case._replace(options=(*case.options, ("launch_pdl", True)))
    compiled = compiled_of(case)
    tritons, _ = both_launches(compiled, case)
    assert len(tritons.attributes) == 1
    without = Changed(compiled, asm={"ptx": compiled.asm["ptx"].replace("griddepcontrol.wait", "")})
    for pdl in ("1", "0"):
        os.environ["HYBRID_MXFP8_PDL"] = pdl
        first, never_waits = (
            abi.abi_of(each, case.arguments).words(case.programs, case.arguments) for each in (compiled, without)
        )
        program = program_of(0, [0, 0], [], [first, first, never_waits, first])
        launcher.load().run(program.address, STREAM, 0x10000, 0x20000)
        plain = tritons._replace(attributes=(), params=b"")
        dependent = plain._replace(attributes=tritons.attributes) if pdl == "1" else plain
        assert [made._replace(params=b"") for made in launches()] == [plain, dependent, plain, dependent]


@pytest.mark.parametrize("version", ["3.5.1", "3.10.0", "4.0.0"])
def test_other_versions_of_triton_are_left_to_triton(version: str) -> None:
    with pytest.raises(launcher.LauncherUnavailableError, match=f"Triton {version} is not known: expected 3.6 to 3.9"):
        abi._check_version(version)
    for known in ("3.6.0", "3.9.0+git1234", "3.8.0a0"):
        abi._check_version(known)


@pytest.mark.parametrize("name", ["launch_enter_hook", "launch_exit_hook"])
def test_hooks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime, chain = triton.knobs.runtime, triton.knobs.HookChain()
    assert not abi.hooks_installed()
    monkeypatch.setattr(runtime, name, chain)
    assert not abi.hooks_installed()
    chain.add(print)
    assert abi.hooks_installed()
    chain.remove(print)
    assert not abi.hooks_installed()
    monkeypatch.setattr(runtime, name, print)
    assert abi.hooks_installed()
    monkeypatch.setattr(runtime, name, None)
    assert not abi.hooks_installed()
