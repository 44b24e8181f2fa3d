"""The CUTLASS SM100 kernel and its JIT build. May import: ``errors`` to ``dispatch``."""
