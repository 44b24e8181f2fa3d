"""Compile a CUDA source once, keep it, load it."""
