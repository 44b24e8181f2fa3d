"""Triton's C launch function, found in CudaLaunchers of each version and in that of the Triton installed."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from fake_hopper import LAUNCHERS
from fake_triton import STREAM, CFunction, Compiled, Device, Flat, Map
from triton.backends.nvidia import driver

from hybrid_mxfp8.triton_kernels.c_launcher import CLauncher, find_c_launcher


class Descriptor(SimpleNamespace):
    """As Triton's TensorDescriptor."""

    @classmethod
    def of(cls, base: torch.Tensor) -> Descriptor:
        shape, strides = list(base.shape), list(base.stride())
        return cls(base=base, shape=shape, strides=strides, block_shape=[1, 2], padding="zero", round_f32_to_tf32=False)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    device = Device()
    utils = SimpleNamespace()
    for name in ("fill_tma_descriptor", "fill_tma_descriptor_tiled"):  # its name in 3.6, and since
        setattr(
            utils,
            name,
            lambda address, swizzle, size, kind, block, shape, *rest: Map(address, tuple(shape), tuple(block)),
        )
    fake = SimpleNamespace(utils=utils, get_current_stream=lambda index: device.stream)
    monkeypatch.setattr(triton.runtime.driver, "_active", fake)
    return device


def check(c_launcher: CLauncher | None, device: Device, arguments: tuple[Any, ...], expected: tuple[Any, ...]) -> None:
    """With tensors and without, the C function is handed the same; without, it is handed no tensor."""
    assert c_launcher is not None
    assert c_launcher.stream_of(0) == STREAM
    after_stream = c_launcher.after_stream(arguments)
    numbers = c_launcher.without_tensors(after_stream)
    for given in (after_stream, numbers):
        c_launcher.launch(5, 1, 1, STREAM, *given)
    assert device.launches == [("k", (5, 1, 1), STREAM, expected)] * 2
    assert device.with_tensors == [True, False]


@pytest.mark.parametrize("version", LAUNCHERS)
def test_arguments_of_each_version(version: str, device: Device) -> None:
    x, y = torch.zeros(4), torch.zeros(3)
    arguments = (x, 12, None, y, 2.5, True, "offsets", 64)
    c_launcher = find_c_launcher(Compiled("k", device, LAUNCHERS[version]("k", device)), len(arguments))
    assert device.launches == []
    check(c_launcher, device, arguments, (x.data_ptr(), 12, None, y.data_ptr(), 2.5, True, "offsets", 64))


@pytest.mark.parametrize("version", LAUNCHERS)
def test_descriptors_of_each_version(version: str, device: Device) -> None:
    x, w = torch.zeros(4), torch.zeros(6, 8)
    arguments = (x, Descriptor.of(w), 12, Descriptor.of(w[2:]))
    compiled = Compiled("k", device, LAUNCHERS[version]("k", device, True))
    first = (Map(w.data_ptr(), (6, 8), (1, 2)), 6, 8, 8, 1)
    second = (Map(w[2:].data_ptr(), (4, 8), (1, 2)), 4, 8, 8, 1)
    check(find_c_launcher(compiled, 4), device, arguments, (x.data_ptr(), *first, 12, *second))


@pytest.mark.parametrize("descriptors", [False, True], ids=["", "descriptors"])
def test_the_launcher_of_the_triton_installed(descriptors: bool, device: Device) -> None:
    """Its own ``__call__`` and its own encoding; what is faked are the C functions below them."""
    tile = "tensordesc<fp32[1,2]>"
    signature = {0: "*fp32", 1: tile, 2: "i32", 3: tile, 4: "constexpr"}
    if not descriptors:
        signature = {i: "*fp32" if ty == tile else ty for i, ty in signature.items()}
    meta = {"swizzle": 0, "elem_size": 4, "elem_type": 7, "block_size": [1, 2], "fp4_padded": False}
    flat = triton.__version__.startswith("3.6.")
    c_function = CFunction("k", device, not flat, 13 if flat else 15)
    run = object.__new__(driver.CudaLauncher)
    attributes = {
        "launch": driver.wrap_handle_tensordesc(c_function, signature, [meta, meta] if descriptors else None),
        "num_ctas": 1,
        "arg_annotations": ["annotation"],
        "kernel_signature": b"signature",
        "gsan_enabled": False,
        "launch_cooperative_grid": False,
        "launch_pdl": False,
    }
    for kind in ("global", "profile"):
        attributes |= {f"{kind}_scratch_size": 0, f"{kind}_scratch_align": 1}
    vars(run).update(attributes)
    assert (run.launch is c_function) != descriptors
    x, w, v = torch.zeros(4), torch.zeros(6, 8), torch.zeros(5)
    compiled = Compiled("k", device, run)
    if descriptors:
        arguments: tuple[Any, ...] = (x, Descriptor.of(w), 12, Descriptor.of(w[2:]), 64)
        first = (Map(w.data_ptr(), (6, 8), (1, 2)), 6, 8, 8, 1)
        second = (Map(w[2:].data_ptr(), (4, 8), (1, 2)), 4, 8, 8, 1)
        expected: tuple[Any, ...] = (x.data_ptr(), *first, 12, *second, 64)
    else:
        arguments = (x, w, 12, v, 64)
        expected = (x.data_ptr(), w.data_ptr(), 12, v.data_ptr(), 64)
    check(find_c_launcher(compiled, 5), device, arguments, expected)
    device.take()
    run(5, 1, 1, STREAM, "function", (4, 1, 0), None, None, None, *arguments)
    assert device.launches == [("k", (5, 1, 1), STREAM, expected)], "finding the C function changed the launcher"


def _change(name: str, value: Any) -> Callable[[Compiled], object]:
    def change(compiled: Compiled) -> None:
        owner, attribute = (compiled.metadata, name) if name.endswith("_size") else (compiled.run, name)
        setattr(owner, attribute, value)

    return change


def _order(change: Callable[..., tuple[Any, ...]]) -> Callable[[Compiled], object]:
    """A launcher that hands on its arguments in another form."""

    def replace(compiled: Compiled) -> None:
        class Launcher:
            launch = compiled.run.launch

            def __call__(self, *args: Any) -> None:
                for handed in change(*args):
                    self.launch(*handed)

        compiled.run = Launcher()

    return replace


def python_function(*args: Any) -> None:
    raise AssertionError("launched")


def _closure() -> Any:
    launcher = python_function
    return lambda *args: launcher(*args)


UNEXPECTED: dict[str, Callable[[Compiled], object]] = {
    "no launcher": lambda compiled: setattr(compiled, "run", None),
    "no C function": _change("launch", None),
    "a Python function": _change("launch", python_function),
    "a closure over a Python function": _change("launch", _closure()),
    "scratch memory": _change("global_scratch_size", 64),
    "scratch memory for a profile": _change("profile_scratch_size", 64),
    "a sanitizer": _change("gsan_enabled", True),
    "metadata without sizes": lambda compiled: setattr(compiled, "metadata", SimpleNamespace()),
    "the stream first": _order(lambda x, y, z, stream, *rest: [(stream, x, y, z, *rest)]),
    "an argument more": _order(lambda *args: [(*args, 0)]),
    "arguments the other way round": _order(lambda *args: [(*args[:9], *args[:8:-1])]),
    "two launches": _order(lambda *args: [args, args]),
    "no launch": _order(lambda *args: []),
}


@pytest.mark.parametrize("name", UNEXPECTED)
def test_what_is_not_known_is_left_to_triton(name: str, device: Device) -> None:
    compiled = Compiled("k", device, Flat("k", device))
    assert find_c_launcher(compiled, 3) is not None
    UNEXPECTED[name](compiled)
    assert find_c_launcher(compiled, 3) is None
    assert device.launches == []
    assert find_c_launcher(None, 3) is None
