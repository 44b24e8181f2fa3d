"""launcher.c against a driver that records launches; how its module is built, kept and refused."""

from __future__ import annotations

import functools
import os
import struct
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from fake_driver import build, child, fake, in_child, launches, new_function, program_of  # noqa: F401
from forked import Child
from jobs import together

from hybrid_mxfp8.dispatch import launcher, module_cache
from hybrid_mxfp8.dispatch.launcher import ADDRESS, MAX_PARAMS, MAX_TENSOR_MAPS, SCALAR, TENSOR_MAP

STREAM = 0x5EAF00D


def launch(function: int, *params: list[int], grid: int = 3, pdl: bool = False) -> list[int]:
    return launcher.launch_words(function, grid, 128, 4096, pdl, params)


def tensor_map(index: int, shape: tuple[int, ...], element_bytes: int = 2, offset: int = 0) -> list[int]:
    """A contiguous one; ``shape`` innermost first, with boxes of 1."""
    strides = [element_bytes]
    for size in shape:
        strides.append(strides[-1] * size)
    head = [TENSOR_MAP, index, offset, 9, element_bytes, 3, len(shape)]
    return [*head, *shape, *[1] * len(shape), *strides[1:-1]]


def run(program: launcher.Program, *addresses: int, stream: int = STREAM) -> int:
    return launcher.load().run(program.address, stream, *addresses)


# ---------------------------------------------------------------- what is launched


@in_child
def test_launch_reaches_the_driver_as_the_words_say() -> None:
    first, second = new_function(8, 4, 8, 1), new_function(8)
    words = launch(first, [ADDRESS, 1, 48], [SCALAR, -5], [ADDRESS, 0, 0], [SCALAR, 1], grid=7)
    program = program_of(0, [0, 0], [], [words, launch(second, [SCALAR, 2**40 + 1], pdl=True)])
    assert run(program, 0x1000, 0x2000) == 0
    one, two = launches()
    assert (one.function, one.grid, one.block, one.shared_bytes) == (first, (7, 1, 1), (128, 1, 1), 4096)
    assert one.params == struct.pack("<QiQb", 0x2030, -5, 0x1000, 1)
    assert (one.stream, one.attributes) == (STREAM, ())
    programmatic_stream_serialization = 6
    assert (two.attributes, two.params) == (((programmatic_stream_serialization, 1),), struct.pack("<Q", 2**40 + 1))


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5])
@in_child
def test_tensor_map_of_any_rank(rank: int) -> None:
    shape = (16, 3, 5, 2, 4)[:rank]
    program = program_of(0, [0], [], [launch(new_function(128), tensor_map(0, shape, offset=64))])
    assert run(program, 0x10000) == 0
    [made] = launches()
    words = struct.unpack("<16Q", made.params)
    strides = [32, 96, 480, 960][: rank - 1]
    assert words[0] == 0x10040
    assert words[1] == 0  # aligned to 128 bytes, and bit 21 cleared
    assert made.params[16:24] == bytes([9, rank, 0, 3, 2, 0, 0, 0])  # type, rank, no interleave, swizzle, L2 128 B
    assert words[3 : 3 + rank] == shape
    assert list(words[8 : 8 + rank - 1]) == strides
    assert struct.unpack_from(f"<{rank}I", made.params, 96) == (1,) * rank
    assert words[15] == int.from_bytes(b"\1" * rank, "big")


@pytest.mark.parametrize(
    ("element_bytes", "rows", "kept"),
    [(2, 1, False), (2, 1024, False), (2, 1025, True), (1, 1023, False), (1, 1024, True)],
)
@in_child
def test_bit_21_is_cleared_where_the_tensor_has_less_than_128_kib(element_bytes: int, rows: int, kept: bool) -> None:
    """As in CUTLASS and Triton 3.7: its last element starts a byte before that, at least."""
    words = tensor_map(0, (128 // element_bytes, rows), element_bytes)
    assert run(program_of(0, [0], [], [launch(new_function(128), words)]), 0x10000) == 0
    [made] = launches()
    assert struct.unpack_from("<Q", made.params, 8)[0] == (1 << 21 if kept else 0)


@in_child
def test_as_many_parameters_and_tensor_maps_as_fit() -> None:
    maps = [tensor_map(i, (16, 2)) for i in range(MAX_TENSOR_MAPS)]
    scalars = [[SCALAR, i] for i in range(MAX_PARAMS - MAX_TENSOR_MAPS)]
    sizes = [128] * len(maps) + [8] * len(scalars)
    program = program_of(0, [0] * len(maps), [], [launch(new_function(*sizes), *maps, *scalars)])
    assert run(program, *(0x10000 * (1 + i) for i in range(len(maps)))) == 0
    [made] = launches()
    assert [struct.unpack_from("<Q", made.params, 128 * i)[0] >> 16 for i in range(len(maps))] == list(range(1, 17))
    assert struct.unpack_from(f"<{len(scalars)}Q", made.params, 128 * len(maps)) == tuple(range(len(scalars)))


# ---------------------------------------------------------------- overlap

AT = 0x10000


@pytest.mark.parametrize(
    ("extents", "written", "addresses", "overlaps"),
    [
        ([64, 64], [(0, -1)], [AT, AT + 64], False),
        ([64, 64], [(0, -1)], [AT, AT + 63], True),
        ([64, 64], [(0, -1)], [AT + 63, AT], True),
        ([64, 16], [(1, -1)], [AT, AT + 32], True),  # inside
        ([16, 64], [(1, -1)], [AT + 32, AT], True),
        ([64, 64], [(0, -1)], [AT, AT], True),
        ([64, 64], [], [AT, AT], False),  # nothing is written
        ([64, 64, 64], [(1, -1)], [AT, AT + 64, AT], False),  # what is only read may overlap
        ([64, 64, 64], [(0, -1), (2, -1)], [AT, AT + 64, AT + 100], True),
        ([64, 64], [(0, 1)], [AT, AT], False),  # allowed to be the same
        ([64, 64], [(0, 1)], [AT, AT + 8], True),  # but not to be shifted
        ([64, 64, 64], [(0, 1)], [AT, AT + 64, AT], True),  # nor another one
        ([0, 64], [(0, -1)], [AT + 8, AT], False),  # nothing is there
        ([0, 64], [(1, -1)], [AT + 8, AT], False),
    ],
)
@in_child
def test_overlap(extents: list[int], written: list[tuple[int, int]], addresses: list[int], overlaps: bool) -> None:
    program = program_of(0, extents, written, [launch(new_function())])
    assert run(program, *addresses) == overlaps
    assert len(launches()) == (not overlaps)


# ---------------------------------------------------------------- what is refused


def good_launch() -> list[int]:
    return launch(1, [ADDRESS, 0, 0], tensor_map(1, (16, 2)), [SCALAR, 3])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (launch(1, *[[SCALAR, 0]] * (MAX_PARAMS + 1)), "num_params: expected 0 to 128, got 129"),
        (launch(1, *[tensor_map(0, (16,))] * (MAX_TENSOR_MAPS + 1)), "tensor maps: expected at most 16 a launch"),
        (launch(0), "function: expected 1 to"),
        (launch(1, grid=-1), "grid: expected 1 to 2147483647, got -1"),
        (launch(1, grid=0), "grid: expected 1 to 2147483647, got 0"),
        (launch(1, grid=2**31), "grid: expected"),
        ([1, 1, 1025, 0, 0, 0], "block_threads: expected 1 to 1024, got 1025"),
        ([1, 1, 32, -1, 0, 0], "shared_bytes: expected 0 to 233472, got -1"),
        ([1, 1, 32, 0, 2, 0], "pdl: expected 0 to 1, got 2"),
        (launch(1, [3, 0]), "kind of parameter: expected 0 to 2, got 3"),
        (launch(1, [ADDRESS, 2, 0]), "index of a buffer: expected 0 to 1, got 2"),
        (launch(1, [ADDRESS, -1, 0]), "index of a buffer: expected 0 to 1, got -1"),
        (launch(1, [ADDRESS, 0, -8]), "offset: expected"),
        (launch(1, tensor_map(0, ())), "rank: expected 1 to 5, got 0"),
        (launch(1, tensor_map(0, (16,) * 6)), "rank: expected 1 to 5, got 6"),
        (launch(1, tensor_map(0, (16, 0))), "dimension: expected"),
        (good_launch()[:-1], "expected value, got the end of the words"),
        ([*good_launch(), 0], r"expected the end after \d+ words, got \d+"),
    ],
)
@in_child
def test_program_that_run_could_not_read_is_refused(words: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        program_of(0, [8, 8], [], [good_launch(), words])


@in_child
def test_program_heads_that_are_refused() -> None:
    for device, extents, written, message in [
        (-1, [], [], "device: expected"),
        (0, [-1], [], "bytes of a buffer: expected"),
        (0, [8], [(1, -1)], "index of a written buffer: expected 0 to 0, got 1"),
        (0, [8], [(0, 1)], "index of the buffer that it may be: expected -1 to 0, got 1"),
        (0, [8], [(0, -1)] * 2, "num_written: expected 0 to 1, got 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            program_of(device, extents, written, [])


@in_child
def test_run_refuses_other_arguments() -> None:
    program = program_of(0, [8, 8], [], [good_launch()])
    with pytest.raises(TypeError, match="run: expected 2 addresses, got 1"):
        run(program, AT)
    with pytest.raises(TypeError, match="run: argument 3 must be an int of 64 bits"):
        launcher.load().run(program.address, STREAM, AT, 1.5)
    with pytest.raises(TypeError, match="run: expected at least 2 arguments, got 1"):
        launcher.load().run(program.address)
    assert not launches()


@in_child
def test_check_compares_each_size_and_their_number() -> None:
    check, function = launcher.load().check, new_function(8, 128, 4)
    assert check(function, 8, 128, 4) == 0
    with pytest.raises(RuntimeError, match="the kernel's parameter 2: expected 8 bytes, found 4"):
        check(function, 8, 128, 8)
    with pytest.raises(RuntimeError, match="the kernel's parameters: expected 2, found 3"):
        check(function, 8, 128)
    with pytest.raises(RuntimeError, match="the kernel's parameters: expected 4, found 3"):
        check(function, 8, 128, 4, 8)


@pytest.mark.parametrize("call", ["cuLaunchKernelEx", "cuTensorMapEncodeTiled"])
@in_child
def test_errors_of_the_driver_name_the_call(call: str) -> None:
    program = program_of(0, [0], [], [launch(new_function(128), tensor_map(0, (16,)))])
    for code, text in [(1, "invalid argument"), (999, "unknown error")]:
        fake().fake_fail(call.encode(), code)
        with pytest.raises(RuntimeError, match=rf"{call}: {text} \(CUDA error {code}\)"):
            run(program, AT)
    fake().fake_fail(b"", 0)
    assert run(program, AT) == 0


# ---------------------------------------------------------------- contexts, threads, forks


@pytest.mark.parametrize("current", [-1, 0, 1])
@pytest.mark.parametrize("device", [0, 1])
@in_child
def test_launches_in_the_context_of_the_programs_device(device: int, current: int) -> None:
    """Also on a thread that has no context, or another GPU's, which then has it back."""
    fake().fake_set_current(current)
    retained = fake().fake_retained(device)
    assert run(program_of(device, [], [], [launch(new_function())])) == 0
    assert [made.context_device for made in launches()] == [device]
    assert fake().fake_current() == current
    assert fake().fake_retained(device) == retained


@pytest.mark.parametrize("call", ["cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxPushCurrent", "cuLaunchKernelEx"])
@in_child
def test_failure_without_a_context_leaves_nothing_behind(call: str) -> None:
    fake().fake_set_current(-1)
    retained = fake().fake_retained(0)
    program = program_of(0, [], [], [launch(new_function())])
    fake().fake_fail(call.encode(), 3)
    with pytest.raises(RuntimeError, match=call):
        run(program)
    assert fake().fake_current() == -1
    assert fake().fake_retained(0) == retained


@in_child
def test_threads_run_one_program_with_addresses_of_their_own() -> None:
    function, num_threads, times = new_function(8, 128, 8), 8, 200
    words = launch(function, [ADDRESS, 0, 0], tensor_map(1, (16, 4)), [ADDRESS, 2, 0])
    program = program_of(0, [64] * 3, [(0, -1)], [words])

    def work(thread: int) -> list[int]:
        base = (thread + 1) << 32
        return [run(program, base, base + 0x1000, base + 0x2000, stream=thread) for _ in range(times)]

    assert together(num_threads, work) == [[0] * times] * num_threads
    made = launches()
    assert len(made) == num_threads * times
    for each in made:
        base = (each.stream + 1) << 32
        first, map_base, last = (struct.unpack_from("<Q", each.params, at)[0] for at in (0, 8, 136))
        assert (first, map_base, last) == (base, base + 0x1000, base + 0x2000)


@in_child
def test_runs_in_a_forked_child() -> None:
    program = program_of(0, [], [], [launch(new_function())])
    assert run(program) == 0

    def again() -> bool:
        # What the driver itself answers in a child of a process that used it.
        fake().fake_fail(b"cuCtxGetDevice", 3)
        assert run(program) == 0
        fake().fake_set_current(-1)
        fake().fake_fail(b"cuDeviceGet", 3)
        with pytest.raises(RuntimeError, match="cuDeviceGet"):
            run(program)
        return True

    assert Child(again).result() is True


def test_driver_before_cuda_12_4_is_named(tmp_path: Path) -> None:
    build(tmp_path, "-DBEFORE_CUDA_12_4")
    code = (
        "from hybrid_mxfp8.dispatch import launcher\n"
        "try: launcher.load().check(1)\n"
        "except RuntimeError as error: print('error:', error)"
    )
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path), "HYBRID_MXFP8_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "error: the CUDA driver lacks cuFuncGetParamInfo: expected one for CUDA 12.4 or later\n"


# ---------------------------------------------------------------- build and cache
# The rules of the cache are module_cache's: cutlass/jit/test_hostile_cache.py has the rest.


def refused(message: str) -> AbstractContextManager[object]:
    return pytest.raises(launcher.LauncherUnavailableError, match=message)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for modules, of a process that has loaded none."""
    monkeypatch.setenv("HYBRID_MXFP8_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(launcher, "_load_once", functools.cache(launcher._load_once.__wrapped__))
    module_cache._load.cache_clear()
    return tmp_path / "cache" / "launcher"


def load() -> launcher.Launcher:
    """As a new process finds it."""
    launcher._load_once.cache_clear()
    return launcher.load()


def modules(cache: Path) -> list[module_cache.Module]:
    return [module_cache.Module(path) for path in sorted(cache.iterdir()) if path.is_dir()]


def test_built_once_for_each_source_and_then_no_compiler_is_needed(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load()
    [module] = modules(cache)
    before = module.library.stat().st_mtime_ns
    changed = tmp_path / "launcher.c"
    changed.write_text(launcher.SOURCE.read_text() + "\n")
    with monkeypatch.context() as patch:
        patch.setattr(launcher, "SOURCE", changed)
        load()
    assert len(modules(cache)) == 2
    monkeypatch.setenv("CC", "/no/such/compiler")
    module_cache._load.cache_clear()
    load()
    assert len(modules(cache)) == 2
    assert module.library.stat().st_mtime_ns == before


def test_cache_that_others_can_write_is_refused(cache: Path) -> None:
    cache.mkdir(parents=True)
    cache.parent.chmod(0o755)
    cache.chmod(0o757)
    with refused(rf"{cache} can be written by everyone \(mode 0757\)"):
        load()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"CC": "/no/such/compiler"}, "^CC: must be a C compiler, but /no/such/compiler does not run"),
        ({"CC": "false"}, r"false can't compile launcher\.c: exit code 1"),
        ({"PATH": "/nowhere"}, "no C compiler: install gcc or clang, or set CC"),
    ],
)
def test_without_a_compiler(
    cache: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str
) -> None:
    monkeypatch.delenv("CC", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with refused(message):
        load()
    assert not cache.exists() or not modules(cache)


@pytest.mark.parametrize(
    ("package", "wheel", "header"), [("tvm_ffi", "apache-tvm-ffi", "c_api.h"), ("triton", "triton", "cuda.h")]
)
def test_without_a_package_or_its_headers(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, wheel: str, header: str
) -> None:
    for folder, message in (
        (None, f"{wheel} is not installed: pip install {wheel}"),
        (tmp_path, rf"{header} is missing: pip install --force-reinstall {wheel}"),
    ):
        found = {"triton": module_cache.package_folder("triton"), "tvm_ffi": module_cache.package_folder("tvm_ffi")}
        monkeypatch.setattr(launcher, "package_folder", {**found, package: folder}.get)
        with refused(message):
            load()


def test_reason_is_remembered(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "/no/such/compiler")
    said = "CC: must be a C compiler, but /no/such/compiler does not run"
    assert launcher.status() == f"not available, Triton makes the launches, slower: {said}"
    with refused(said):
        launcher.load()
    monkeypatch.delenv("CC")
    assert launcher.status().startswith("not built yet; the first call on a GPU builds it, with ")
    assert not cache.exists()
    with refused("does not run"):
        launcher.load()
