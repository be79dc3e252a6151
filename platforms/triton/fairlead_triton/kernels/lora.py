"""Low-rank adapters of mixed rows.

A program takes BLOCK_M rows, whatever their adapters, and goes through those that they have, in rising order: rows of
other adapters are zeros in its products. So a row's sum does not depend on what shares its block. Adapter 0 is none.
"""

import triton
import triton.language as tl

from fairlead_triton.interpreted import bound, dot

NO_MORE = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _next_adapter(adapter_M, last):
    return tl.min(tl.where(adapter_M > last, adapter_M, NO_MORE), axis=0)


@triton.jit(do_not_specialize=["num_rows"])
def lora_shrink_kernel(
    x,
    a,
    adapters,
    h,
    num_rows,
    rank,
    num_inputs,
    x_row,
    a_adapter,
    a_rank,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row_M = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    rank_R = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    input_K = tl.arange(0, BLOCK_K)
    adapter_M = tl.load(adapters + row_M, mask=row_M < num_rows, other=0).to(tl.int32)
    h_MR = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
    adapter = _next_adapter(adapter_M, 0)
    while adapter < NO_MORE:
        x_MK = x + row_M.to(tl.int64)[:, None] * x_row + input_K[None, :]
        a_KR = a + adapter.to(tl.int64) * a_adapter + rank_R[None, :] * a_rank + input_K[:, None]
        for first in range(0, bound(num_inputs), BLOCK_K):
            is_input_K = first + input_K < num_inputs
            rows_MK = tl.load(x_MK, mask=(adapter_M == adapter)[:, None] & is_input_K[None, :], other=0.0)
            matrix_KR = tl.load(a_KR, mask=(rank_R < rank)[None, :] & is_input_K[:, None], other=0.0)
            h_MR = dot(rows_MK, matrix_KR.to(rows_MK.dtype), h_MR)
            x_MK += BLOCK_K
            a_KR += BLOCK_K
        adapter = _next_adapter(adapter_M, adapter)
    mask = (row_M < num_rows)[:, None] & (rank_R < rank)[None, :]
    tl.store(h + row_M.to(tl.int64)[:, None] * rank + rank_R[None, :], h_MR, mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def lora_expand_kernel(
    y,
    h,
    b,
    adapters,
    out,
    num_rows,
    rank,
    num_outputs,
    y_row,
    h_row,
    b_adapter,
    b_output,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    row_M = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    output_N = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    adapter_M = tl.load(adapters + row_M, mask=row_M < num_rows, other=0).to(tl.int32)
    mask = (row_M < num_rows)[:, None] & (output_N < num_outputs)[None, :]
    y_MN = tl.load(y + row_M.to(tl.int64)[:, None] * y_row + output_N[None, :], mask=mask, other=0.0)
    sum_MN = y_MN.to(tl.float32)
    adapter = _next_adapter(adapter_M, 0)
    while adapter < NO_MORE:
        for first in range(0, bound(rank), BLOCK_R):
            rank_R = first + tl.arange(0, BLOCK_R)
            is_own = (adapter_M == adapter)[:, None] & (rank_R < rank)[None, :]
            h_MR = tl.load(h + row_M.to(tl.int64)[:, None] * h_row + rank_R[None, :], mask=is_own, other=0.0)
            b_RN = b + adapter.to(tl.int64) * b_adapter + output_N[None, :] * b_output + rank_R[:, None]
            is_weight = (rank_R < rank)[:, None] & (output_N < num_outputs)[None, :]
            sum_MN = dot(h_MR, tl.load(b_RN, mask=is_weight, other=0.0).to(tl.float32), sum_MN)
        adapter = _next_adapter(adapter_M, adapter)
    result_MN = tl.where((adapter_M == 0)[:, None], y_MN, sum_MN.to(y_MN.dtype))
    tl.store(out + row_M.to(tl.int64)[:, None] * num_outputs + output_N[None, :], result_MN, mask=mask)
