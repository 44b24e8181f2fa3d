"""SGLang's fused MoE: its Triton kernels in bf16, and in FP8 with a scale for 128 elements of a
token and for 128x128 of a weight, each at a few tiles.

They are those of an installed sglang, or of the one file that has them, which is not part of this
repository: ``fused_moe_triton_kernels.py`` of SGLang 0.5.23. What that file imports from sglang is
stood in for; the quantizer of its tokens is a kernel of ours. Its sorting of tokens by expert is
left out of its time, which flatters it by a kernel or two.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING

import torch

from . import work
from .limits import Precision
from .peers import Absent, Contender, Field, find_function, rows_in_rooms
from .shapes import Case

if TYPE_CHECKING:
    from .bench_moe import Inputs, Layer

NAME = "SGLang"
MODULE = "sglang.kernels.ops.moe.fused_moe_triton_kernels"


def _tile(m: int, n: int, k: int, group: int, warps: int, stages: int) -> dict[str, int]:
    sizes = {"BLOCK_SIZE_M": m, "BLOCK_SIZE_N": n, "BLOCK_SIZE_K": k, "GROUP_SIZE_M": group}
    return sizes | {"num_warps": warps, "num_stages": stages}


TILES = (
    (True, _tile(16, 128, 128, 1, 4, 3)),
    (True, _tile(64, 128, 128, 32, 4, 3)),
    (True, _tile(128, 128, 128, 32, 8, 3)),
    (False, _tile(16, 128, 128, 1, 4, 3)),
    (False, _tile(64, 128, 64, 1, 4, 3)),
    (False, _tile(128, 256, 64, 1, 8, 4)),
)
"""(whether in FP8, tile): SGLang's default for FP8 and two more rows; in bf16 those that its own
tuning for Qwen3-30B-A3B on an H100 has for few, for 1024 and for many tokens."""

Blocks = tuple[torch.Tensor, torch.Tensor | None]
"""Weights (E, N, K) and, of e4m3, scales (E, N/128, K/128) fp32."""


def fp8_blocks(w: torch.Tensor) -> Blocks:
    """Quantize w (E, N, K), an expert at a time."""
    experts, n, k = w.shape
    values = torch.empty_like(w, dtype=torch.float8_e4m3fn)
    scales = torch.empty(experts, n // 128, k // 128, device=w.device)
    for e in range(experts):
        blocks = w[e].float().view(n // 128, 128, k // 128, 128)
        scales[e] = blocks.abs().amax((1, 3)).clamp(1e-10) / 448
        values[e] = (blocks / scales[e, :, None, :, None]).view(n, k).to(torch.float8_e4m3fn)
    return values, scales


class _StandIn(MetaPathFinder, Loader):
    """Any module of sglang, with ``names`` in it; every other name is None there."""

    def __init__(self, names: dict[str, object]) -> None:
        self._names = names

    def find_spec(self, name: str, path: object, target: object = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] == "sglang" else None

    def exec_module(self, module: ModuleType) -> None:
        module.__getattr__ = self._names.get


def load(file: Path | None) -> ModuleType | str:
    """The kernels' module, from ``file`` or of an installed sglang, or why there is none.

    Raises:
        OSError, SyntaxError, ImportError, AttributeError, TypeError: the file can't be read or run.
    """
    if file is None:
        found = find_function(MODULE, "invoke_fused_moe_kernel")
        return f"{found}; --sglang-kernel takes its file" if isinstance(found, str) else sys.modules[MODULE]
    from .peer_kernels import quantize_fp8

    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
    no = ("is_hip", "is_cpu", "cpu_has_amx_support", "is_batch_invariant_mode_enabled")
    names = {
        **dict.fromkeys(no, lambda: False),
        **dict.fromkeys(("is_sm90_supported", "is_arch_support_pdl"), lambda: hopper),
        "is_cuda": lambda: True,
        "envs": SimpleNamespace(SGLANG_USE_AITER=SimpleNamespace(get=lambda: False)),
        "get_moe_padding_size": lambda use_aiter: 0,
        "sglang_per_token_group_quant_fp8": quantize_fp8,
    }
    loader = SourceFileLoader("sglang_fused_moe", str(file))
    module = importlib.util.module_from_spec(ModuleSpec(loader.name, loader, origin=str(file)))
    stand_in = _StandIn(names)
    sys.meta_path.insert(0, stand_in)
    try:
        loader.exec_module(module)
    finally:
        sys.meta_path.remove(stand_in)
        for name in [name for name in sys.modules if name.partition(".")[0] == "sglang"]:
            del sys.modules[name]
    return module


def sort_by_expert(ids: torch.Tensor, experts: int, tile: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What ``moe_align_block_size`` makes of ids (M, top_k), as int32: the slots in order of their
    expert, padded to whole tiles with M * top_k; the expert of each tile; the number with padding.
    """
    flat = ids.reshape(-1)
    counts = torch.bincount(flat, minlength=experts)
    tiles = -(-counts // tile)
    _, rows = rows_in_rooms(counts, tiles * tile)
    padded = torch.full((int(tiles.sum()) * tile,), flat.numel(), dtype=torch.int32, device=ids.device)
    padded[rows] = flat.argsort(stable=True).int()
    owners = torch.arange(experts, dtype=torch.int32, device=ids.device).repeat_interleave(tiles)
    return padded, owners, torch.tensor([padded.numel()], dtype=torch.int32, device=ids.device)


def sglang_moe(
    kernels: ModuleType | str, case: Case, layer: Layer, inputs: Inputs, check: Callable[..., Callable[[], str]]
) -> Field:
    """A contender for each precision and each tile that suits the case; absent if ``kernels`` says
    why. ``check`` makes a check of what returns (M, H) of set 0."""
    if isinstance(kernels, str):
        return [Absent(f"{NAME} fused MoE", kernels)]
    slots = case.num_tokens * case.top_k
    average = slots / case.num_experts
    suits = {16: average <= 64, 64: True, 128: average >= 32}
    gate_up, h, y = (
        torch.empty(*shape, dtype=torch.bfloat16, device=layer.w2.device)
        for shape in ((slots, 2 * case.n), (slots, case.n), (case.num_tokens, case.top_k, case.k))
    )
    field: Field = []
    for fp8, tile in TILES:
        if suits[rows := tile["BLOCK_SIZE_M"]]:
            precision: Precision = "fp8" if fp8 else "bf16"
            name = f"{NAME} {precision}, tile of {rows}"
            call = _layer_call(kernels, case, layer, inputs, (gate_up, h, y), fp8, tile)
            job = (work.moe_fp8_blocks if fp8 else work.moe_bf16)(inputs.counts, case.num_tokens, case.k, case.n)
            note = "sorting by expert left out" + ("; not MXFP8: scales of 1x128 and 128x128" if fp8 else "")
            field.append(Contender(name, call, job, precision=precision, note=note, check=check(lambda: inputs.out[0])))
    return field


def _layer_call(
    kernels: ModuleType,
    case: Case,
    layer: Layer,
    inputs: Inputs,
    buffers: tuple[torch.Tensor, ...],
    fp8: bool,
    tile: dict[str, int],
) -> Callable[[int], None]:
    import triton.language as tl

    w13, w2 = layer.blocks if fp8 else ((layer.w13, None), (layer.w2, None))
    routing = [sort_by_expert(ids, case.num_experts, tile["BLOCK_SIZE_M"]) for ids in inputs.ids]
    gate_up, h, y = buffers
    absent = dict.fromkeys(("bias", "A_scale", "B_zp"))
    off = dict.fromkeys(("use_int8_w8a8", "use_int8_w8a16", "use_int4_w4a16", "per_channel_quant"), False)

    def multiply(i: int, x: torch.Tensor, w: Blocks, out: torch.Tensor, top_k: int, weigh: bool) -> None:
        sorted_token_ids, expert_ids, num_tokens_post_padded = routing[i]
        kernels.invoke_fused_moe_kernel(
            A=x,
            B=w[0],
            C=out,
            B_scale=w[1],
            topk_weights=inputs.weights[i],
            topk_ids=inputs.ids[i],
            sorted_token_ids=sorted_token_ids,
            expert_ids=expert_ids,
            num_tokens_post_padded=num_tokens_post_padded,
            mul_routed_weight=weigh,
            top_k=top_k,
            config=tile,
            compute_type=tl.bfloat16,
            use_fp8_w8a8=fp8,
            block_shape=[128, 128] if fp8 else None,
            **absent,
            **off,
        )

    def call(i: int) -> None:
        multiply(i, inputs.x[i], w13, gate_up, case.top_k, weigh=False)
        kernels.act_and_mul_triton(gate_up, h, tile, inputs.ids[i], routing[i][1])
        multiply(i, h, w2, y, 1, weigh=True)
        kernels.moe_sum_reduce_triton(y, inputs.out[i], 1.0)

    return call
