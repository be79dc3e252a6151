"""Rounding that is the same, bit by bit, on every target and in the interpreter."""

import triton
import triton.language as tl

INT8 = tl.constexpr(1)
FP8_FN = tl.constexpr(2)  # e4m3 with NaN only: largest 448, smallest normal 2^-6
FP8_FNUZ = tl.constexpr(3)  # e4m3 with one NaN and no negative zero: largest 240, smallest normal 2^-7


@triton.jit
def round_even(x):
    """The nearest integer, halves to the even one, of float32 below 2^22: adding 1.5 * 2^23 leaves no fraction."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def largest(KIND: tl.constexpr):
    """The largest number of a kind of 8 bits, as float32."""
    if KIND == INT8:
        return 127.0
    elif KIND == FP8_FN:
        return 448.0
    else:
        return 240.0


@triton.jit
def to_8_bits(x, KIND: tl.constexpr):
    """float32 within ±largest(KIND) to that kind. Floats are rounded here, as targets differ in how they would."""
    if KIND == INT8:
        return round_even(x).to(tl.int8)
    else:
        bits = x.to(tl.int32, bitcast=True)
        # Three bits of fraction stay of 23: half of the last one that stays is added, one less if it is even.
        kept = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000
        normal = kept.to(tl.float32, bitcast=True)
        if KIND == FP8_FN:
            small = (x + 24576.0) - 24576.0  # 1.5 * 2^23 steps of 2^-9
            return tl.where(tl.abs(x) < 0.015625, small, normal).to(tl.float8e4nv)
        else:
            small = (x + 12288.0) - 12288.0  # 1.5 * 2^23 steps of 2^-10
            return tl.where(tl.abs(x) < 0.0078125, small, normal).to(tl.float8e4b8)
