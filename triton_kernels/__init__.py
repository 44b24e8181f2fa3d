"""Triton kernels, each above its launch. May import: ``errors`` to ``dispatch``."""
