"""Products of rows with weights (outputs, inputs), plain and quantised.

A program makes a tile of BLOCK_M rows and BLOCK_N outputs, and goes through the inputs in one order, BLOCK_K at a time:
a row's result depends on the batch only through the tile's size. Offsets of outputs are of 64 bits: vocabularies are
large.
"""

import triton
import triton.language as tl

from fairlead_triton.interpreted import bound, dot


@triton.jit
def _tile(num_rows, num_outputs, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Rows and outputs of this program: GROUP_M tiles of rows share a weight while it is in cache."""
    program = tl.program_id(0)
    row_tiles = tl.cdiv(num_rows, BLOCK_M)
    output_tiles = tl.cdiv(num_outputs, BLOCK_N)
    group = program // (GROUP_M * output_tiles)
    group_rows = tl.minimum(row_tiles - group * GROUP_M, GROUP_M)
    within = program % (GROUP_M * output_tiles)
    row_M = (group * GROUP_M + within % group_rows) * BLOCK_M + tl.arange(0, BLOCK_M)
    output_N = (within // group_rows) * BLOCK_N + tl.arange(0, BLOCK_N)
    return row_M, output_N


@triton.jit
def _store(out_MN, bias, out, row_M, output_N, num_rows, num_outputs, HAS_BIAS: tl.constexpr):
    """Adds the bias to float32 results and stores them in out's dtype."""
    if HAS_BIAS:
        bias_N = tl.load(bias + output_N, mask=output_N < num_outputs, other=0.0).to(tl.float32)
        out_MN += bias_N[None, :]
    mask = (row_M < num_rows)[:, None] & (output_N < num_outputs)[None, :]
    places = row_M.to(tl.int64)[:, None] * num_outputs + output_N[None, :]
    tl.store(out + places, out_MN.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def skinny_kernel(
    x,
    weight,
    bias,
    out,
    num_rows,
    num_outputs,
    num_inputs,
    x_row,
    weight_output,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Few rows: what counts is how the weight comes from memory, once, with several loads under way."""
    row_M, output_N = _tile(num_rows, num_outputs, BLOCK_M, BLOCK_N, 1)
    input_K = tl.arange(0, BLOCK_K)
    is_row_M1 = (row_M < num_rows)[:, None]
    is_output_1N = (output_N < num_outputs)[None, :]
    x_MK = x + row_M.to(tl.int64)[:, None] * x_row + input_K[None, :]
    weight_KN = weight + output_N.to(tl.int64)[None, :] * weight_output + input_K[:, None]
    acc_MN = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for first in range(0, bound(num_inputs), BLOCK_K):
        is_input_K = first + input_K < num_inputs
        w_KN = tl.load(weight_KN, mask=is_output_1N & is_input_K[:, None], other=0.0, eviction_policy="evict_first")
        rows_MK = tl.load(x_MK, mask=is_row_M1 & is_input_K[None, :], other=0.0)
        acc_MN = dot(rows_MK, w_KN, acc_MN)
        x_MK += BLOCK_K
        weight_KN += BLOCK_K
    _store(acc_MN, bias, out, row_M, output_N, num_rows, num_outputs, HAS_BIAS)


@triton.jit(do_not_specialize=["num_rows"])
def eight_bit_kernel(
    x,
    x_scales,
    weight,
    weight_scales,
    bias,
    out,
    num_rows,
    num_outputs,
    num_inputs,
    weight_output,
    HAS_BIAS: tl.constexpr,
    IS_INT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Rows (num_rows, num_inputs) and weight of 8 bits, with a scale each row and each output. Of integers the sum is
    exact, so that no tile's size matters."""
    row_M, output_N = _tile(num_rows, num_outputs, BLOCK_M, BLOCK_N, GROUP_M)
    input_K = tl.arange(0, BLOCK_K)
    is_row_M1 = (row_M < num_rows)[:, None]
    is_output_1N = (output_N < num_outputs)[None, :]
    x_MK = x + row_M.to(tl.int64)[:, None] * num_inputs + input_K[None, :]
    weight_KN = weight + output_N.to(tl.int64)[None, :] * weight_output + input_K[:, None]
    ZERO: tl.constexpr = 0 if IS_INT else 0.0
    acc_MN = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.int32 if IS_INT else tl.float32)
    for first in range(0, bound(num_inputs), BLOCK_K):
        is_input_K = first + input_K < num_inputs
        rows_MK = tl.load(x_MK, mask=is_row_M1 & is_input_K[None, :], other=ZERO)
        w_KN = tl.load(weight_KN, mask=is_output_1N & is_input_K[:, None], other=ZERO)
        if IS_INT:
            acc_MN = tl.dot(rows_MK, w_KN, acc_MN, out_dtype=tl.int32)
        else:
            # Hopper's own sum has but 14 bits: it is added to a float32 after each block.
            acc_MN = tl.dot(rows_MK, w_KN, acc_MN, max_num_imprecise_acc=BLOCK_K)
        x_MK += BLOCK_K
        weight_KN += BLOCK_K
    x_scale_M = tl.load(x_scales + row_M, mask=row_M < num_rows, other=0.0)
    weight_scale_N = tl.load(weight_scales + output_N, mask=output_N < num_outputs, other=0.0)
    out_MN = acc_MN.to(tl.float32) * x_scale_M[:, None] * weight_scale_N[None, :]
    _store(out_MN, bias, out, row_M, output_N, num_rows, num_outputs, HAS_BIAS)


@triton.jit(do_not_specialize=["num_rows"])
def int4_kernel(
    x,
    weight,
    scales,
    bias,
    out,
    num_rows,
    num_outputs,
    num_inputs,
    x_row,
    num_groups,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HALF: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Rows in the model's dtype; the weight in groups of 2 HALF inputs of one scale, HALF bytes each.

    Byte b of a group holds its input b in the low four bits and its input b + HALF in the high ones, each plus 8: so
    both halves are tiles as they come. Scales multiply sums of groups in float32, and small integers lose nothing in
    16 bits: only the products' sum is rounded.
    """
    row_M, output_N = _tile(num_rows, num_outputs, BLOCK_M, BLOCK_N, GROUP_M)
    byte_K = tl.arange(0, HALF)
    is_row_M1 = (row_M < num_rows)[:, None]
    is_output_N = output_N < num_outputs
    x_MK = x + row_M.to(tl.int64)[:, None] * x_row + byte_K[None, :]
    weight_KN = weight + output_N.to(tl.int64)[None, :] * (num_groups * HALF) + byte_K[:, None]
    scale_N = scales + output_N.to(tl.int64) * num_groups
    acc_MN = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for group in range(0, bound(num_groups)):
        input_K = group * 2 * HALF + byte_K
        low_MK = tl.load(x_MK, mask=is_row_M1 & (input_K < num_inputs)[None, :], other=0.0)
        high_MK = tl.load(x_MK + HALF, mask=is_row_M1 & (input_K + HALF < num_inputs)[None, :], other=0.0)
        bytes_KN = tl.load(weight_KN, mask=is_output_N[None, :], other=136)
        low_KN = ((bytes_KN & 15).to(tl.int8) - 8).to(tl.float32).to(low_MK.dtype)
        high_KN = ((bytes_KN >> 4).to(tl.int8) - 8).to(tl.float32).to(low_MK.dtype)
        part_MN = dot(low_MK, low_KN, tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32))
        part_MN = dot(high_MK, high_KN, part_MN)
        acc_MN += part_MN * tl.load(scale_N + group, mask=is_output_N, other=0.0)[None, :]
        x_MK += 2 * HALF
        weight_KN += HALF
    _store(acc_MN, bias, out, row_M, output_N, num_rows, num_outputs, HAS_BIAS)
