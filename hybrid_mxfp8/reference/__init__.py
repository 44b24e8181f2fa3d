"""The PyTorch counterpart of every kernel: the truth that kernels are compared with.

Every function works on CPU and CUDA tensors and gives the same bytes on both. Clarity over speed:
nothing here is meant for a hot path, and ``grouped_matmul`` syncs with the device. May import:
``core``.
"""

from hybrid_mxfp8.core.dequantize import dequantize, dequantize_grouped, scale_values
from hybrid_mxfp8.core.layout import group_offsets
from hybrid_mxfp8.core.scale_layout import scale_rows_of_tokens, swizzled_offsets
from hybrid_mxfp8.reference.product import grouped_matmul
from hybrid_mxfp8.reference.quantization import (
    gather_rows,
    pack_tokens,
    quantize,
    quantize_rows,
    quantize_weights,
    swiglu,
)

__all__ = [
    "dequantize",
    "dequantize_grouped",
    "gather_rows",
    "group_offsets",
    "grouped_matmul",
    "pack_tokens",
    "quantize",
    "quantize_rows",
    "quantize_weights",
    "scale_rows_of_tokens",
    "scale_values",
    "swiglu",
    "swizzled_offsets",
]
