"""MXFP8 grouped GEMM for mixture-of-experts layers."""

from hybrid_mxfp8._version import __version__ as __version__
