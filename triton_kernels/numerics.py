"""Device functions for bf16, e4m3 and E8M0 that give the same bits compiled and interpreted.

Triton's interpreter computes with numpy, which has neither bf16 nor e4m3: bf16 arithmetic would
work on raw bit patterns, and its casts to both truncate. Where that matters, ``INTERPRET`` picks
integer arithmetic with the same result as the hardware's conversion.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRET = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def to_fp32(x):
    """bf16, fp16 or fp32 to fp32, exactly."""
    if x.dtype == tl.bfloat16:
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def from_fp32(x, dtype: tl.constexpr):
    """fp32 to bf16, fp16 or fp32, rounding to nearest even; NaN stays NaN."""
    if INTERPRET and dtype == tl.bfloat16:
        u = x.to(tl.int32, bitcast=True)
        rounded = ((u + 0x7FFF + ((u >> 16) & 1)) >> 16).to(tl.int16)
        nan = (u & 0x7FFFFFFF) > 0x7F800000
        return tl.where(nan, 0x7FC0, rounded).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def to_e4m3_codes(x):
    """fp32 to bytes of e4m3, to nearest even, saturating to +-448; NaN is 0x7F or 0xFF."""
    if not INTERPRET:
        return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    u = x.to(tl.int32, bitcast=True)
    a = u & 0x7FFFFFFF
    # Normal results: round the mantissa to 3 bits in place, carries included, and rebias the
    # exponent by -120.
    normal = ((a + 0x7FFFF + ((a >> 20) & 1)) >> 20) - 960
    # Below 2**-6, e4m3's codes are multiples of 2**-9: adding 2**14 makes the fp32 adder round to
    # them.
    small = a < 0x3C800000
    shifted = tl.where(small, a, 0).to(tl.float32, bitcast=True) + 16384.0
    q = tl.where(small, shifted.to(tl.int32, bitcast=True) - 0x46800000, normal)
    q = tl.where(a >= 0x43E80000, 0x7E, q)  # 464 and above, the midpoint past 448: saturate
    q = tl.where(a > 0x7F800000, 0x7F, q)
    return (q | ((u >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def e4m3_codes_to_fp32(codes):
    """The bytes of e4m3 to fp32, exactly; for where no conversion exists."""
    c = codes.to(tl.int32)
    # Sign, exponent and mantissa moved to fp32's places are the value times 2**-120, subnormals
    # included.
    x = (((c & 0x80) << 24) | ((c & 0x7F) << 20)).to(tl.float32, bitcast=True) * 1.329227995784916e36
    return tl.where((c & 0x7F) == 0x7F, float("nan"), x)


@triton.jit
def loop_bound(n):
    """A scalar as the bound of a loop.

    Interpreters before 3.8 ask numpy to convert its array of one element to an integer, which numpy
    2.4 refuses.
    """
    if INTERPRET:
        return n.handle.data.item()
    return n


@triton.jit
def e8m0_to_fp32(scale):
    """E8M0 bytes to fp32: 2**(b - 127), subnormal for 0, NaN for 255."""
    b = scale.to(tl.int32)
    bits = tl.where(b == 0, 0x00400000, b << 23)
    return tl.where(b == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)


@triton.jit
def e8m0_to_bf16(scale):
    """E8M0 bytes to bf16: 2**(b - 127), subnormal for 0, NaN for 255."""
    b = scale.to(tl.int16)
    bits = tl.where(b == 0, 0x0040, b << 7)
    return tl.where(b == 255, 0x7FC0, bits).to(tl.int16).to(tl.bfloat16, bitcast=True)
