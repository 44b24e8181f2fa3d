"""MXFP8 grouped GEMM for mixture-of-experts layers.

    import hybrid_mxfp8 as mx

    groups = mx.GroupLayout.from_counts(tokens_per_expert, num_tokens)
    y = mx.grouped_gemm(mx.quantize_grouped(x, groups), mx.quantize_weights(w))

Importing this package touches no GPU, no Triton and no compiler.
"""

from hybrid_mxfp8 import library as _library  # noqa: F401  # its import registers torch.ops.hybrid_mxfp8
from hybrid_mxfp8._version import __version__
from hybrid_mxfp8.activation import SwiGLU
from hybrid_mxfp8.backends import backends, use_backend
from hybrid_mxfp8.errors import BackendUnavailableError
from hybrid_mxfp8.groups import GroupLayout
from hybrid_mxfp8.metrics import calc_diff, signal_to_noise_db
from hybrid_mxfp8.moe import MXFP8Experts, moe_forward
from hybrid_mxfp8.moe_workspace import MoEWorkspace
from hybrid_mxfp8.ops import explain, grouped_gemm, grouped_gemm_workspace_size, quantize_grouped, quantize_weights
from hybrid_mxfp8.reference import swizzle_scales, unswizzle_scales
from hybrid_mxfp8.tensors import ExpertWeights, GroupedMXFP8

__all__ = [
    "BackendUnavailableError",
    "ExpertWeights",
    "GroupLayout",
    "GroupedMXFP8",
    "MXFP8Experts",
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
    "quantize_weights",
    "signal_to_noise_db",
    "swizzle_scales",
    "unswizzle_scales",
    "use_backend",
]
