"""The launcher without a GPU: what is refused and why, how a call is planned, and what it hands to the module."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import layout

import hybrid_mxfp8 as mx
from hybrid_mxfp8.config import MODULES
from hybrid_mxfp8.cutlass_kernels import grouped_gemm as launcher
from hybrid_mxfp8.cutlass_kernels import headers, jit
from hybrid_mxfp8.errors import BackendUnavailableError

GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def fresh_caches() -> Iterator[None]:
    caches = (launcher._plan, launcher._module, launcher._capability, launcher._sm_count)

    def clear() -> None:
        launcher._tools.clear()
        for cache in caches:
            cache.cache_clear()

    clear()
    yield
    clear()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A B200, as far as asking goes."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    properties = SimpleNamespace(multi_processor_count=148)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)


class Module:
    """Stands for a compiled module and keeps what it was called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def workspace_size(self, num_experts: int, n: int, k: int, num_tokens: int, sm_count: int) -> int:
        return 1000 * num_experts + sm_count

    def grouped_gemm(self, *arguments: Any) -> None:
        self.calls.append(arguments)


@pytest.fixture
def module(gpu: None, monkeypatch: pytest.MonkeyPatch) -> Module:
    stand_in = Module()
    monkeypatch.setattr(launcher, "_module", lambda module, out_dtype, capability: stand_in)
    return stand_in


def operands(counts: list[int], n: int = 136, k: int = 96) -> tuple[mx.GroupedMXFP8, mx.ExpertWeights]:
    x = mx.quantize_grouped(torch.ones(sum(counts), k), layout(counts), backend="reference")
    return x, mx.quantize_weights(torch.ones(len(counts), n, k), backend="reference")


@pytest.mark.parametrize(
    ("capability", "reason"),
    [
        ((9, 0), "needs compute capability 10.0 or 10.3, got 9.0: use the triton backend"),
        ((12, 0), "got 12.0, whose tensor cores take other instructions: use the triton backend"),
        ((11, 0), "got 11.0"),
        ((8, 0), "got 8.0"),
    ],
)
def test_other_gpus_are_refused_in_a_line(capability: tuple[int, int], reason: str) -> None:
    ok, said = launcher.availability(capability)
    assert not ok
    assert reason in said
    assert "\n" not in said


def test_needs_a_gpu() -> None:
    assert launcher.availability(None) == (False, "needs a GPU of compute capability 10.0 or 10.3")


def test_available_names_its_tools() -> None:
    try:
        headers.find_cuda()
    except BackendUnavailableError as reason:
        pytest.skip(str(reason))
    ok, said = launcher.availability((10, 0))
    assert ok
    assert "CUTLASS" in said
    assert "not yet run" in said


def test_without_compiler_the_reason_says_what_to_install(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("HYBRID_MXFP8_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setattr(headers, "_nvcc_candidates", lambda: iter(()))
    ok, said = launcher.availability((10, 0))
    assert not ok
    assert "pip install 'hybrid-mxfp8[nvcc]'" in said


def test_without_compiler_built_modules_suffice(monkeypatch) -> None:
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setattr(headers, "_nvcc_candidates", lambda: iter(()))
    monkeypatch.setattr(jit, "find", lambda source: source if "2sm_256x64" in source.name else None)
    ok, said = launcher.availability((10, 0))
    assert ok
    assert "built elsewhere" in said


@pytest.mark.parametrize(
    ("n", "k", "out_dtype", "ok"),
    [
        (136, 96, torch.bfloat16, True),
        (2880, 2880, torch.float16, True),
        (132, 96, torch.bfloat16, False),
        (132, 96, torch.float32, True),
        (130, 96, torch.float32, False),
        (136, 100, torch.bfloat16, False),
        (136, 96, torch.float64, False),
        (1 << 20, 1 << 16, torch.bfloat16, False),
    ],
)
def test_shapes_that_descriptors_take(n: int, k: int, out_dtype: torch.dtype, ok: bool) -> None:
    assert launcher.takes(n, k, out_dtype)[0] is ok


def test_call_hands_over_the_operands(module: Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of the C++ entry; where tensors are does not matter here, so they are on the CPU."""
    x, w = operands([3, 0, 5])
    out = torch.empty(8, 136, dtype=torch.bfloat16)
    monkeypatch.setenv("HYBRID_MXFP8_CONFIG", "2sm_256x128x128_4x1")
    monkeypatch.setenv("HYBRID_MXFP8_PDL", "0")
    workspace = torch.empty(3148, dtype=torch.uint8)
    launcher.grouped_gemm(x, w, out, workspace)
    (call,) = module.calls
    assert [tuple(t.shape) for t in call[:9]] == [
        (8, 96), (x.groups.scale_rows, 4), (3, 136, 96), (3, 256, 4), (3,), (4,), (4,), (8, 136), (3148,),
    ]  # fmt: skip
    assert call[0].dtype == call[2].dtype == torch.uint8
    assert call[7] is out
    assert call[8] is workspace
    assert call[9:] == (4, 1, 148, False)


def test_nothing_to_compute_launches_nothing(module: Module) -> None:
    x, w = operands([0, 0])
    launcher.grouped_gemm(x, w, torch.empty(0, 136, dtype=torch.bfloat16), None)
    assert module.calls == []
    assert launcher.workspace_size(2, 136, 96, 0, torch.bfloat16, GPU) == 0


def test_workspace_size_is_the_modules(module: Module) -> None:
    assert launcher.workspace_size(3, 136, 96, 8, torch.bfloat16, GPU) == 3148


def problem(**changes: Any) -> Any:
    plain = {"num_experts": 32, "n": 4096, "k": 7168, "num_tokens": 64, "out_dtype": torch.bfloat16, "device": GPU}
    return SimpleNamespace(**(plain | changes))


def test_explain_says_which_and_why(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    said = launcher.explain(problem())
    assert any(module in said for module in MODULES)
    assert "waves" in said
    assert "modelled" in said
    monkeypatch.setenv("HYBRID_MXFP8_CONFIG", "1sm_128x256x128")
    assert launcher.explain(problem()).startswith("1sm_128x256x128_1x1")
    assert "forced by HYBRID_MXFP8_CONFIG" in launcher.explain(problem())
    assert "nothing" in launcher.explain(problem(num_tokens=0))


def test_wrong_forced_configuration_lists_the_valid_ones(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYBRID_MXFP8_CONFIG", "fastest")
    with pytest.raises(ValueError, match=r"HYBRID_MXFP8_CONFIG: .*expected one of 1sm_128x64x128"):
        launcher.explain(problem())


def test_plans_are_remembered(module: Module) -> None:
    """A call after the first is a look-up: no choice, no module is asked for again."""
    launcher.workspace_size(3, 136, 96, 8, torch.bfloat16, GPU)
    launcher.workspace_size(3, 136, 96, 8, torch.bfloat16, GPU)
    assert launcher._plan.cache_info().hits == 1


def test_family_build_serves_both_capabilities(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is built for the family is taken before anything is compiled."""
    monkeypatch.setattr(jit, "find", lambda source: source if source.arch == "10.0f" else None)
    monkeypatch.setattr(jit, "load", lambda source: source.arch)
    assert launcher._module("2sm_256x128x128", torch.bfloat16, (10, 0)) == "10.0f"
    assert launcher._module("2sm_256x128x128", torch.bfloat16, (10, 3)) == "10.0f"
    monkeypatch.setattr(jit, "find", lambda source: None)
    assert launcher._module("1sm_128x64x128", torch.bfloat16, (10, 3)) == "10.3a"
