"""Triton kernels, each above what describes its launch. May import: ``errors``, ``env``, ``core``,
``reference``, ``dispatch``."""
