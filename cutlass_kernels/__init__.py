"""The CUTLASS SM100 backend: headers, JIT build, launcher, and the CUDA sources beside them."""
