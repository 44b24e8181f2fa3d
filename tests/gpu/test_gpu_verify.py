"""A module is verified on this GPU by a process of its own: with the triton backend's product in
its place, right, wrong, and with an error that ends a CUDA context."""

from __future__ import annotations

import re
import sys

import pytest
import torch
from fake_toolkit import open_fake_toolkit

from hybrid_mxfp8 import env
from hybrid_mxfp8.commands import doctor
from hybrid_mxfp8.cutlass_kernels import verify
from hybrid_mxfp8.cutlass_kernels.jit import build as jit

pytestmark = pytest.mark.gpu

CHILD = """
import sys
import torch
import hybrid_mxfp8 as mx
from hybrid_mxfp8.cutlass_kernels import verify
from hybrid_mxfp8.cutlass_kernels.config import GemmConfig

class Product:
    def workspace_size(self, *shape):
        return 64

    def grouped_gemm(self, x, x_scales, w, w_scales, counts, offsets, scale_offsets, out, workspace, *how):
        groups = mx.GroupLayout.from_counts(counts, x.shape[0])
        assert torch.equal(groups.scale_offsets, scale_offsets)
        x, w = (t.view(torch.float8_e4m3fn) for t in (x, w))
        operands = mx.GroupedMXFP8(x, x_scales, groups), mx.ExpertWeights(w, w_scales)
        mx.grouped_gemm(*operands, out_dtype=out.dtype, out=out, backend="triton")
        if kind == "wrong numbers":
            out[2, 5] *= 1.03
        if kind == "assertion":
            torch.zeros(1, device=out.device)[counts + 10**6]

kind, out_dtype, _, device = sys.argv[1:]  # the third is the module's folder
print(verify.largest_error(Product(), GemmConfig(1, 64, (1, 1)), getattr(torch, out_dtype), torch.device(device)))
"""


@pytest.mark.parametrize("out_dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("kind", ["right", "wrong numbers", "assertion"])
def test_verified_on_this_gpu(kind: str, out_dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    with open_fake_toolkit(monkeypatch) as toolkit:
        verify._run.cache_clear()
        record = verify.verified(jit.build(toolkit.source), device, (sys.executable, "-c", CHILD, kind, out_dtype))
        assert record["gpu"] == torch.cuda.get_device_name()
        assert "verification" in [entry["kind"] for entry in doctor.cached(env.cache_dir())["cached"]]
    assert record["ok"] == (kind == "right"), record["reason"]
    if kind == "right":
        assert not record["reason"].startswith("largest error 0 ")
    elif kind == "wrong numbers":
        assert "times the bound" in record["reason"]
    else:
        assert "CUDA error" in record["reason"]
    assert re.fullmatch(r"\d+\.\d+(\.\d+)?", record["driver"])
    assert int(torch.ones(3, device=device).sum()) == 3  # this process's context is as it was
