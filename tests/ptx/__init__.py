"""A functional emulator of PTX for sm_90 to sm_103, and the runs of this project's kernels in it.

What a compiler emits is executed on the CPU, instruction by instruction, with the memory model's
ordering checked: see docs/emulator.md.
"""
