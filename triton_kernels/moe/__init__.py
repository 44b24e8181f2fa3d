"""Kernels of the MoE layer around its products: routing, bias, combine."""
