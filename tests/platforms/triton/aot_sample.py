"""A kernel to try the compile harness on."""

import triton
import triton.language as tl


@triton.jit
def sum_kernel(x, o, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    values = tl.load(x + i)
    doubled = tl.cumsum(values, 0)
    tl.store(o + i, values * tl.sum(values, 0) + doubled)
