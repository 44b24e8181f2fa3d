"""Programmatic dependent launch: a kernel's programs start while the kernel before still runs.

The C launcher (:mod:`hybrid_mxfp8.dispatch.launcher`) sets the attribute for every kernel that
waits so, except the first launch of a program. The rule, in every kernel: before
:func:`wait_for_predecessor` nothing is written, nothing is read that the kernel before writes, and
the next kernel is not allowed to start. So a kernel starts when all before its predecessor have
ended, and waits for that one: it sees what any of them wrote, and may overwrite what any of them
read. All kernels wait before their first access, except the warp of ``gemm.hopper_fp8`` that loads
weights, whose data is older than the predecessor. It empties L1 instead.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.target_info import cuda_capability_geq

from hybrid_mxfp8.triton_kernels.numerics import INTERPRET


@triton.jit
def wait_for_predecessor():
    """Wait until the kernel before has ended and its writes are visible to this grid; then let the
    next kernel start as soon as all programs of this one have come here.

    For Triton and Gluon. Does nothing below compute capability 9.0 and in the interpreter; a launch
    without the attribute has nothing to wait for.
    """
    if not INTERPRET and cuda_capability_geq(9):
        tl.inline_asm_elementwise(
            "griddepcontrol.wait; griddepcontrol.launch_dependents; mov.b32 $0, 0;",
            "=r,~{memory}",
            [],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def empty_l1():
    """Empty this multiprocessor's L1 cache, for a warp that does not wait: the cache may still hold
    what an earlier call wrote at the same addresses, such as those of one workspace."""
    tl.inline_asm_elementwise(
        "fence.acq_rel.gpu; mov.b32 $0, 0;", "=r,~{memory}", [], dtype=tl.int32, is_pure=False, pack=1
    )
