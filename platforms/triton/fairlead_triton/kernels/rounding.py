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
    """float32 within ±largest(KIND) to that kind: int8 as such, floats as their bits in uint8.

    Floats are rounded and encoded here: targets differ in how they would, and some know no such type at all.
    """
    if KIND == INT8:
        return round_even(x).to(tl.int8)
    else:
        bias: tl.constexpr = 7 if KIND == FP8_FN else 8
        bits = x.to(tl.int32, bitcast=True)
        size = bits & 0x7FFFFFFF
        # Three bits of fraction stay of 23: half of the last one that stays is added, one less if it is even.
        normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - ((127 - bias) << 3)
        # Below the smallest normal number, 2^(1 - bias), steps are 2^(-2 - bias): their number is the code.
        small = round_even(tl.minimum(tl.abs(x), 1.0) * (1 << (2 + bias))).to(tl.int32)
        code = tl.where(size < ((128 - bias) << 23), small, normal)
        # What would be negative zero is FNUZ's NaN.
        negative = bits < 0 if KIND == FP8_FN else (bits < 0) & (code != 0)
        return (code + negative.to(tl.int32) * 128).to(tl.uint8)
