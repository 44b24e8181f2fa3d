"""Plans and launches without a GPU: what is refused and why, and what the module is handed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from cases import layout
from jobs import forget_everything

import hybrid_mxfp8 as mx
from hybrid_mxfp8.cutlass_kernels import grouped_gemm as cutlass
from hybrid_mxfp8.cutlass_kernels.config import MODULES
from hybrid_mxfp8.cutlass_kernels.jit import build as jit
from hybrid_mxfp8.cutlass_kernels.jit import toolchain
from hybrid_mxfp8.dispatch import device as devices
from hybrid_mxfp8.dispatch.module_cache import LIBRARY, Module, write_manifest
from hybrid_mxfp8.dispatch.registry import Problem, choose
from hybrid_mxfp8.errors import BackendUnavailableError

GPU = torch.device("cuda", 0)
B200, B300 = (10, 0), (10, 3)
CUDA_12_8 = toolchain.CudaCompiler(Path("/n"), (12, 8, 93), "a test")


@pytest.fixture(autouse=True)
def b200(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A GPU, as far as asking goes, an empty cache, and nothing remembered."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: B200)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=148))
    monkeypatch.setattr(jit, "build", lambda source: Module(tmp_path / source.name))
    for name in ("find", "verified"):
        monkeypatch.setattr(cutlass.verify, name, lambda module, device: {"ok": True})
    monkeypatch.setenv("HYBRID_MXFP8_CACHE_DIR", str(tmp_path))
    for remembered in ("_modules", "_failures", "_verified"):
        monkeypatch.setattr(cutlass, remembered, type(getattr(cutlass, remembered))())
    forget_everything()
    yield
    forget_everything()


def problem(**changes: Any) -> Any:
    plain = {"num_experts": 32, "n": 4096, "k": 7168, "num_tokens": 64, "out_dtype": torch.bfloat16, "device": GPU}
    return Problem(**(plain | changes))


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("capability", "reason"),
    [
        ((9, 0), "needs compute capability 10.0 or 10.3, got 9.0: use the triton backend"),
        ((12, 0), "got 12.0, whose tensor cores take other instructions: use the triton backend"),
        (None, "needs a GPU of compute capability 10.0 or 10.3"),
    ],
)
def test_other_devices_are_refused_in_a_line(capability: tuple[int, int] | None, reason: str) -> None:
    ok, said = cutlass.availability(capability)
    assert not ok
    assert reason in said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("n", "k", "out_dtype", "reason"),
    [
        (136, 96, torch.bfloat16, ""),
        (132, 96, torch.float32, ""),
        (132, 96, torch.bfloat16, "w: N must be a positive multiple of 8 for torch.bfloat16, got 132"),
        (130, 96, torch.float32, "w: N must be a positive multiple of 4 for torch.float32, got 130"),
        (136, 100, torch.bfloat16, "x: K must be a positive multiple of 32, got 100"),
        (136, 96, torch.float64, "out_dtype: expected bf16, fp16 or fp32, got torch.float64"),
        # CUTLASS computes the stride between experts as an int: N * K = 2^31 would be negative.
        (2**26 - 8, 32, torch.float32, ""),
        (2**26, 32, torch.float32, "w: the weights of one expert must be below 2 GiB, got N = 67108864, K = 32"),
        (4, 2**29 - 32, torch.float32, "w: the scales of one expert must be below 2 GiB, got N = 4, K = 536870880"),
    ],
)
def test_shapes_that_it_takes(tools: None, n: int, k: int, out_dtype: torch.dtype, reason: str) -> None:
    """What it does not take is left to the other backends, and refused with the reason by name."""
    assert cutlass.takes(n, k, out_dtype) == (not reason, reason or cutlass.NOT_RUN)
    shape = problem(num_experts=2, n=n, k=k, num_tokens=8, out_dtype=out_dtype)
    assert (choose(shape, "auto").name == "cutlass") == (not reason)
    if reason:
        with pytest.raises(BackendUnavailableError, match=f"^backend cutlass: {re.escape(reason)}$"):
            choose(shape, "cutlass")


# ---------------------------------------------------------------- headers, compiler, built modules


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> None:
    """Headers and a compiler of CUDA 12.8, as far as finding goes."""
    monkeypatch.setattr(toolchain, "find_cutlass", lambda: toolchain.CutlassHeaders(Path("/c"), (4, 8, 1), "a test"))
    monkeypatch.setattr(toolchain, "cuda_candidates", lambda: iter([CUDA_12_8]))


def copy_from_elsewhere(source: jit.Source) -> None:
    """Put a module that other versions built into the cache, and look again."""
    folder = jit.cache() / f"{source.name}-{source.key()}-cutlass4.4.0-nvcc13.0.88"
    folder.mkdir(parents=True)
    (folder / LIBRARY).write_bytes(b"a library")
    write_manifest(folder)
    cutlass._find_tools.cache_clear()


def test_tools_are_named(tools: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the backend runs, in a line; of old headers with what newer ones bring."""
    said = f"CUTLASS 4.8.1 (ragged mainloop), nvcc 12.8.93, {cutlass.NOT_RUN}"
    assert cutlass.availability(B200) == (True, said)
    old = toolchain.CutlassHeaders(Path("/c"), (4, 2, 0), "a test")
    monkeypatch.setattr(toolchain, "find_cutlass", lambda: old)
    cutlass._find_tools.cache_clear()
    for said in (cutlass.availability(B200)[1], cutlass.explain(problem())):
        assert said.endswith(f"; {old.hint}")


@pytest.mark.parametrize(
    ("compilers", "reason"),
    [
        ([], "pip install 'hybrid-mxfp8[nvcc]'"),
        ([CUDA_12_8], "target 10.3a needs CUDA 12.9 or later, /n/bin/nvcc is 12.8.93"),
    ],
    ids=["no compiler", "a compiler for 10.0 alone"],
)
def test_where_nothing_compiles_built_modules_suffice(
    tools: None, monkeypatch: pytest.MonkeyPatch, compilers: list[toolchain.CudaCompiler], reason: str
) -> None:
    """Of this source, for the GPU or its family; without any the reason says what to install."""
    monkeypatch.setattr(toolchain, "cuda_candidates", lambda: iter(compilers))
    assert cutlass.availability(B200)[0] == bool(compilers)
    ok, said = cutlass.availability(B300)
    assert not ok
    assert reason in said
    built = [cutlass.source("2sm_256x64x128", torch.bfloat16, arch) for arch in ("10.0a", "10.3a", "10.0f")]
    copy_from_elsewhere(built[0])
    copy_from_elsewhere(replace(built[1], flags=("-G",)))
    assert not cutlass.availability(B300)[0]
    copy_from_elsewhere(built[2])
    assert "built elsewhere" in cutlass.availability(B300)[1]
    assert jit.find(built[2]) is not None
    assert cutlass.availability(B200)[0]


def test_tools_are_looked_for_once_in_an_environment(tools: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each variable that says where to look, or what may be loaded, asks again."""
    where_to_look = ("CUDA_PATH", "CUDA_HOME", "HYBRID_MXFP8_TRUST_CACHE", "HYBRID_MXFP8_CUTLASS_DIR")
    for variable in where_to_look:
        monkeypatch.delenv(variable, raising=False)
    for variable in ("", *where_to_look, "HYBRID_MXFP8_CACHE_DIR", "PATH"):
        if variable:
            monkeypatch.setenv(variable, "1")
        before = cutlass._find_tools.cache_info().misses
        assert cutlass.availability(B200) == cutlass.availability(B200)
        assert cutlass._find_tools.cache_info().misses == before + 1, variable


def test_family_build_serves_both_capabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is built for the family is taken before anything is compiled."""
    monkeypatch.setattr(jit, "load", lambda source: source.arch)
    monkeypatch.setattr(jit, "find", lambda source: source if source.arch == "10.0f" else None)
    assert {cutlass._module("2sm_256x128x128", torch.bfloat16, c) for c in (B200, B300)} == {"10.0f"}
    monkeypatch.setattr(jit, "find", lambda source: None)
    assert cutlass._module("1sm_128x64x128", torch.bfloat16, B300) == "10.3a"


# ---------------------------------------------------------------- modules that fail


@pytest.fixture
def builds(tools: None, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The modules that were tried to build; those with 256-wide token tiles work."""
    names: list[str] = []

    def load(source: jit.Source) -> object:
        names.append(source.name)
        if "x256x128" not in source.name:
            raise BackendUnavailableError(f"compiling {source.name} failed: out of memory")
        return SimpleNamespace(workspace_size=lambda e, n, k, t, sm_count: 1000 * e + sm_count)

    monkeypatch.setattr(jit, "load", load)
    return names


@pytest.fixture
def verified(builds: list[str], monkeypatch: pytest.MonkeyPatch) -> Mock:
    """In verifying's place, where there is no record."""
    verify = Mock(return_value={"ok": True, "reason": "because of a test"})
    monkeypatch.setattr(cutlass.verify, "find", lambda module, device: None)
    monkeypatch.setattr(cutlass.verify, "verified", verify)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return verify


WORKS, FAILS = "2sm_256x256x128", "2sm_256x128x128"


def ask(monkeypatch: pytest.MonkeyPatch, config: str) -> int:
    """What a call begins with: the plan."""
    monkeypatch.setenv("HYBRID_MXFP8_CONFIG", config)
    return cutlass.workspace_size(problem(num_experts=3, n=136, k=96, num_tokens=8))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (FAILS, f"compiling grouped_gemm_{FAILS}_bf16_sm100a failed: out of memory"),
        (WORKS, f"{WORKS} failed its verification on cuda:0: because of a test"),
    ],
    ids=["does not build", "computes wrong"],
)
def test_a_module_that_failed_is_not_tried_again(
    builds: list[str], verified: Mock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    config: str, reason: str,
) -> None:  # fmt: skip
    """The call that finds out raises; from then on auto goes on with a warning, and a backend asked
    for by name raises it. In another environment it is tried anew. A build that fails where no
    module was loaded takes the whole backend away."""
    verified.return_value["ok"] = False
    assert choose(problem(), "auto").name == "cutlass"
    next_call = "this process will not try again.*the next call without a named backend"
    with pytest.raises(BackendUnavailableError, match=f"^{reason}; {next_call}"):
        ask(monkeypatch, config)
    assert cutlass.can_run(problem()) == (False, reason)
    assert cutlass.availability(B200)[0] == (config == WORKS)
    assert choose(problem(), "auto").name != "cutlass"
    assert f"(cutlass: {reason})" in caplog.text
    for again in (lambda: ask(monkeypatch, config), lambda: choose(problem(), "cutlass")):
        with pytest.raises(BackendUnavailableError, match=f"{reason}$"):
            again()
    assert (len(builds), verified.call_count) == (1, config == WORKS)
    monkeypatch.setenv("HYBRID_MXFP8_CACHE_DIR", "/other")
    assert cutlass.availability(B200)[0]
    with pytest.raises(BackendUnavailableError):
        ask(monkeypatch, config)
    assert (len(builds), verified.call_count) == ((1, 2) if config == WORKS else (2, 0))


def test_failed_build_leaves_the_modules_that_work(builds: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert ask(monkeypatch, WORKS) == ask(monkeypatch, WORKS) == 3148
    assert len(builds) == 1
    with pytest.raises(BackendUnavailableError):
        ask(monkeypatch, FAILS)
    assert cutlass.availability(B200)[0]
    assert not cutlass.can_run(problem())[0]
    assert cutlass.can_run(problem(num_experts=0))[0], "nothing to compute needs no module"
    assert cutlass.can_run(problem(num_tokens=0))[0]
    monkeypatch.setenv("HYBRID_MXFP8_CONFIG", WORKS)
    assert cutlass.can_run(problem())[0]


def test_first_use_verifies(verified: Mock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not while a stream is captured, and that is not remembered."""
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        with pytest.raises(BackendUnavailableError, match="was not verified on this GPU yet, and while a stream"):
            ask(monkeypatch, WORKS)
    assert not verified.called
    assert ask(monkeypatch, WORKS) == ask(monkeypatch, WORKS) == 3148
    assert verified.call_count == 1


# ---------------------------------------------------------------- calls


def test_call_hands_over_the_operands(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of the C++ entry; tensors are on the CPU, which does not matter here."""
    module = Mock()
    monkeypatch.setattr(cutlass, "_module", lambda *key: module)
    monkeypatch.setattr(devices, "capability", lambda device: B200)
    monkeypatch.setenv("HYBRID_MXFP8_CONFIG", "2sm_256x128x128_4x1")
    monkeypatch.setenv("HYBRID_MXFP8_PDL", "0")
    x = mx.quantize_grouped(torch.ones(8, 96), layout([3, 0, 5]), backend="reference")
    w = mx.quantize_weights(torch.ones(3, 136, 96), backend="reference")
    offsets = x.groups.tokens_per_expert, x.groups.expert_offsets, x.groups.scale_offsets
    out, workspace = torch.empty(8, 136, dtype=torch.bfloat16), torch.empty(3148, dtype=torch.uint8)
    same = problem(num_experts=3, n=136, k=96, num_tokens=8)
    cutlass.launch(same, x.values, x.scales, *offsets, w.values, w.scales, out, workspace)
    call = module.grouped_gemm.call_args.args
    tensors = call[:9]
    assert tensors[0].dtype == tensors[2].dtype == torch.uint8
    handed = (x.values, x.scales, w.values, w.scales, *offsets, out, workspace)
    assert [(t.data_ptr(), t.shape) for t in tensors] == [(t.data_ptr(), t.shape) for t in handed]
    assert call[9:] == (4, 1, 148, False)


def test_workspace_bound_asks_no_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which would be compiled for it. Nothing to compute needs nothing."""
    monkeypatch.delattr(cutlass, "_module")
    for num_tokens in (8, 1 << 20):
        assert cutlass.workspace_bound(problem(num_experts=3, num_tokens=num_tokens)) == 148 * 8192 + 3 * 512
    for nothing in (problem(num_experts=0), problem(num_tokens=0)):
        assert cutlass.workspace_bound(nothing) == cutlass.workspace_size(nothing) == 0
        assert "nothing" in cutlass.explain(nothing)


def test_explain_says_which_and_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of a module that was built elsewhere, too, where there are no headers."""
    said = cutlass.explain(problem())
    assert any(module in said for module in MODULES)
    assert "waves" in said
    assert "modelled" in said
    monkeypatch.setenv("HYBRID_MXFP8_CUTLASS_DIR", str(tmp_path / "absent"))
    assert cutlass.explain(problem()).endswith(f"({cutlass.NOT_RUN})")
    monkeypatch.setenv("HYBRID_MXFP8_CONFIG", "1sm_128x256x128")
    assert cutlass.explain(problem()).startswith("1sm_128x256x128_1x1")
    assert "forced by HYBRID_MXFP8_CONFIG" in cutlass.explain(problem())
    monkeypatch.setenv("HYBRID_MXFP8_CONFIG", "fastest")
    with pytest.raises(ValueError, match=r"HYBRID_MXFP8_CONFIG: .*expected one of 1sm_128x64x128"):
        cutlass.explain(problem())
