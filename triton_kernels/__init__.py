"""Triton kernels; each file holds a kernel above its launcher."""
