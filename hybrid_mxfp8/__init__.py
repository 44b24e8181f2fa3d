"""MXFP8 grouped GEMM for mixture-of-experts layers.

    import hybrid_mxfp8 as mx

    groups = mx.GroupLayout.from_counts(tokens_per_expert, num_tokens)
    y = mx.grouped_gemm(mx.quantize_grouped(x, groups), mx.quantize_weights(w))

Importing this package touches no GPU, no Triton and no compiler.
"""

from pathlib import Path as _Path

_root = _Path(__file__).parent.parent
if not (_Path(__file__).parent / "triton_kernels").is_dir() and (_root / "triton_kernels" / "backend.py").is_file():
    # A checkout, where the kernel packages stand beside this one; installed, they lie inside it.
    __path__.append(str(_root))

from hybrid_mxfp8._version import __version__  # noqa: E402
from hybrid_mxfp8.core.activation import SwiGLU  # noqa: E402
from hybrid_mxfp8.core.layout import GroupLayout  # noqa: E402
from hybrid_mxfp8.core.metrics import calc_diff, signal_to_noise_db  # noqa: E402
from hybrid_mxfp8.core.operands import ExpertWeights, GroupedMXFP8, MXFP8Tokens  # noqa: E402
from hybrid_mxfp8.core.scales import swizzle_scales, unswizzle_scales  # noqa: E402
from hybrid_mxfp8.dispatch.registry import backends, use_backend  # noqa: E402
from hybrid_mxfp8.errors import BackendUnavailableError  # noqa: E402
from hybrid_mxfp8.ops import group_layout, torch_library  # noqa: E402, F401  # these register what they define
from hybrid_mxfp8.ops.experts import MXFP8Experts  # noqa: E402
from hybrid_mxfp8.ops.grouped_gemm import explain, grouped_gemm, grouped_gemm_workspace_size  # noqa: E402
from hybrid_mxfp8.ops.moe import moe_forward  # noqa: E402
from hybrid_mxfp8.ops.quantize import quantize_grouped, quantize_weights  # noqa: E402
from hybrid_mxfp8.ops.tokens import quantize_tokens  # noqa: E402
from hybrid_mxfp8.ops.workspace import MoEWorkspace  # noqa: E402

__all__ = [
    "BackendUnavailableError",
    "ExpertWeights",
    "GroupLayout",
    "GroupedMXFP8",
    "MXFP8Experts",
    "MXFP8Tokens",
    "MoEWorkspace",
    "SwiGLU",
    "__version__",
    "backends",
    "calc_diff",
    "explain",
    "grouped_gemm",
    "grouped_gemm_workspace_size",
    "moe_forward",
    "quantize_grouped",
    "quantize_tokens",
    "quantize_weights",
    "signal_to_noise_db",
    "swizzle_scales",
    "unswizzle_scales",
    "use_backend",
]
