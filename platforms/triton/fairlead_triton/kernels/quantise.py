"""Rows rounded to 8 bits. See fairlead_triton.quantise."""

import triton
import triton.language as tl

from fairlead_triton.interpreted import bound
from fairlead_triton.kernels.rounding import largest, to_8_bits


@triton.jit
def quantise_rows_kernel(x, out, scales, width, inner, x_outer, x_inner, BLOCK: tl.constexpr, QUANT: tl.constexpr):
    """A program reads its row twice, the second time from cache: rows of any width fit."""
    row = tl.program_id(0)
    start = x + (row // inner).to(tl.int64) * x_outer + (row % inner).to(tl.int64) * x_inner
    most_B = tl.zeros([BLOCK], dtype=tl.float32)
    for first in range(0, bound(width), BLOCK):
        columns = first + tl.arange(0, BLOCK)
        values = tl.load(start + columns, mask=columns < width, other=0.0).to(tl.float32)
        most_B = tl.maximum(most_B, tl.abs(values))
    limit = largest(QUANT)
    scale = tl.maximum(tl.max(most_B, axis=0), 1.1754943508222875e-38) / limit
    tl.store(scales + row, scale)
    for first in range(0, bound(width), BLOCK):
        columns = first + tl.arange(0, BLOCK)
        values = tl.load(start + columns, mask=columns < width, other=0.0).to(tl.float32)
        scaled = tl.minimum(tl.maximum(values / scale, -limit), limit)
        tl.store(out + row.to(tl.int64) * width + columns, to_8_bits(scaled, QUANT), mask=columns < width)
