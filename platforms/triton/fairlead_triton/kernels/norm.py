"""Norms over the last dimension: a program holds ROWS whole rows, of BLOCK (a power of two) places each.

Row r of an input of two leading dimensions starts at (r // inner) * outer_stride + (r % inner) * inner_stride.
"""

import triton
import triton.language as tl

from fairlead_triton.kernels.rounding import largest, to_8_bits


@triton.jit
def _offsets(rows, inner, outer_stride, inner_stride):
    return ((rows // inner).to(tl.int64) * outer_stride + (rows % inner).to(tl.int64) * inner_stride)[:, None]


@triton.jit
def _store(y, out, scales, places, rows, num_rows, columns, width, QUANT: tl.constexpr):
    """Stores float32 y, already rounded to the model's dtype, as it is or in 8 bits with a scale a row."""
    mask = (rows < num_rows)[:, None] & (columns < width)[None, :]
    if QUANT == 0:
        tl.store(out + places, y.to(out.dtype.element_ty), mask=mask)
    else:
        y = tl.where(mask, y, 0.0)
        most = tl.max(tl.abs(y), axis=1)
        scale = tl.maximum(most, 1.1754943508222875e-38) / largest(QUANT)
        tl.store(scales + rows, scale, mask=rows < num_rows)
        limit = largest(QUANT)
        scaled = tl.minimum(tl.maximum(y / scale[:, None], -limit), limit)
        tl.store(out + places, to_8_bits(scaled, QUANT), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def rms_norm_kernel(
    x,
    residual,
    weight,
    out,
    total,
    scales,
    num_rows,
    width,
    inner,
    x_outer,
    x_inner,
    residual_outer,
    residual_inner,
    eps,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    GEMMA: tl.constexpr,
    QUANT: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    mask = (rows < num_rows)[:, None] & (columns < width)[None, :]
    places = rows.to(tl.int64)[:, None] * width + columns[None, :]
    values = tl.load(x + _offsets(rows, inner, x_outer, x_inner) + columns[None, :], mask=mask, other=0.0)
    if HAS_RESIDUAL:
        other_places = _offsets(rows, inner, residual_outer, residual_inner) + columns[None, :]
        other = tl.load(residual + other_places, mask=mask, other=0.0)
        values = (values.to(tl.float32) + other.to(tl.float32)).to(total.dtype.element_ty)
        tl.store(total + places, values, mask=mask)
    x32 = values.to(tl.float32)
    mean = tl.sum(x32 * x32, axis=1) / width
    normed = x32 * (1.0 / tl.sqrt_rn(mean + eps))[:, None]
    w32 = tl.load(weight + columns, mask=columns < width, other=0.0).to(tl.float32)[None, :]
    y = normed * (1.0 + w32) if GEMMA else normed.to(x.dtype.element_ty).to(tl.float32) * w32
    if QUANT != 0:
        y = y.to(x.dtype.element_ty).to(tl.float32)
    _store(y, out, scales, places, rows, num_rows, columns, width, QUANT)


@triton.jit(do_not_specialize=["num_rows"])
def layer_norm_kernel(
    x,
    weight,
    bias,
    out,
    scales,
    num_rows,
    width,
    inner,
    x_outer,
    x_inner,
    eps,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    QUANT: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    mask = (rows < num_rows)[:, None] & (columns < width)[None, :]
    places = rows.to(tl.int64)[:, None] * width + columns[None, :]
    x32 = tl.load(x + _offsets(rows, inner, x_outer, x_inner) + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(x32, axis=1) / width
    centred = tl.where(mask, x32 - mean[:, None], 0.0)
    variance = tl.sum(centred * centred, axis=1) / width
    w32 = tl.load(weight + columns, mask=columns < width, other=0.0).to(tl.float32)[None, :]
    y = centred * (1.0 / tl.sqrt_rn(variance + eps))[:, None] * w32
    if HAS_BIAS:
        y += tl.load(bias + columns, mask=columns < width, other=0.0).to(tl.float32)[None, :]
    if QUANT != 0:
        y = y.to(x.dtype.element_ty).to(tl.float32)
    _store(y, out, scales, places, rows, num_rows, columns, width, QUANT)
