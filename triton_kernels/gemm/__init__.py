"""Grouped GEMM kernels: portable, Hopper, Blackwell."""
