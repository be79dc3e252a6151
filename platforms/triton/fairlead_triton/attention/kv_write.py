"""Writing keys and values to the paged cache, as they are or quantised, alone or with the rotary embedding of q and k.

Shapes: T packed tokens, H query heads, K kv-heads, D head size; an index R counts the rows of a program, each a head of
a token, while the constant R is the number of rotated dimensions.
Sources: Micikevicius et al., "FP8 Formats for Deep Learning" (2022), section 3; Su et al., "RoFormer" (2021), 3.4.2.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-calls=False
# Triton reads types of its own from the arguments of a launch.

import triton
import triton.language as tl

from fairlead_triton.interpreted import device_function, largest_of

SLOTS_AT: tl.constexpr = tl.constexpr(8)
"""Where the slot mapping begins in the words of a step, see plan.py."""


@device_function
def encode_fp8(x, FORMAT: tl.constexpr):
    """float32 to the nearest OCP fp8 value, ties to even, as bytes; what is too large becomes the largest, NaN stays.

    In integers, so that it is the same on every device: those that convert differ in what they do at the ends.
    """
    MANTISSA: tl.constexpr = 3 if FORMAT == 1 else 2
    BIAS: tl.constexpr = 7 if FORMAT == 1 else 15
    LARGEST: tl.constexpr = 448.0 if FORMAT == 1 else 57344.0
    DROP: tl.constexpr = 23 - MANTISSA
    SUBNORMAL: tl.constexpr = 2.0 ** (BIAS - 1 + MANTISSA)  # the smallest values are counts of this one's inverse
    size = tl.minimum(tl.abs(x), LARGEST)
    bits = size.to(tl.uint32, bitcast=True)
    normal = ((bits + ((1 << (DROP - 1)) - 1) + ((bits >> DROP) & 1)) >> DROP) - ((127 - BIAS) << MANTISSA)
    # In [2^23, 2^24) floats are whole numbers: the addition rounds to one, which stands in the lowest bits.
    small = (size * SUBNORMAL + 8388608.0).to(tl.uint32, bitcast=True) & 0xFF
    code = tl.where(size < 2.0 ** (1 - BIAS), small, normal)
    code = tl.where(x != x, 0x7F, code)
    sign = (x.to(tl.uint32, bitcast=True) >> 24) & 0x80
    return (code | sign).to(tl.uint8)


@device_function
def store_rows(
    x, cache, scales, slots_R, plane, heads_R, is_row_R, columns, inverse_scale,
    K: tl.constexpr, D: tl.constexpr, PLANES: tl.constexpr, BLOCK_SIZE: tl.constexpr, FORMAT: tl.constexpr,
    TOKEN_SCALES: tl.constexpr,
):  # fmt: skip
    """Stores float32 rows (R, D padded) in a plane of the cache."""
    blocks_R = (slots_R // BLOCK_SIZE).to(tl.int64) * PLANES + plane
    rows_R = (blocks_R * K + heads_R) * BLOCK_SIZE + slots_R % BLOCK_SIZE
    pointers = cache + rows_R[:, None] * D + columns[None, :]
    mask = is_row_R[:, None] & (columns < D)[None, :]
    if FORMAT == 0:
        tl.store(pointers, x.to(cache.dtype.element_ty), mask=mask)
    else:
        if TOKEN_SCALES:
            LARGEST: tl.constexpr = 448.0 if FORMAT == 1 else 57344.0
            scale_R = largest_of(tl.abs(x), 1) / LARGEST
            scale_R = tl.where(scale_R > 0.0, scale_R, 1.0)
            tl.store(scales + rows_R, scale_R, mask=is_row_R)
            x = x / scale_R[:, None]
        else:
            x = x * inverse_scale
        tl.store(pointers, encode_fp8(x, FORMAT), mask=mask)


@device_function
def load_rows(x, stride_t, stride_h, tokens_R, heads_R, is_row_R, columns, D: tl.constexpr):
    """Rows (R, D padded) of q, k or v in float32."""
    pointers = x + tokens_R[:, None] * stride_t + heads_R[:, None] * stride_h + columns[None, :]
    return tl.load(pointers, mask=is_row_R[:, None] & (columns < D)[None, :], other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["num_tokens"])
def kv_write_kernel(
    k, v, cache, scales, words, num_tokens, k_stride_t, k_stride_h, v_stride_t, v_stride_h, inverse_k_scale,
    inverse_v_scale,
    K: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr, BLOCK_SIZE: tl.constexpr, LATENT: tl.constexpr,
    FORMAT: tl.constexpr, TOKEN_SCALES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Program (ROWS rows of the T * K heads of keys and values)."""
    PLANES: tl.constexpr = 1 if LATENT else 2
    row_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row_R = row_R < num_tokens * K
    tokens_R = (row_R // K).to(tl.int64)
    heads_R = row_R % K
    slots_R = tl.load(words + SLOTS_AT + tokens_R, mask=is_row_R, other=0)
    columns = tl.arange(0, D_PADDED)
    x = load_rows(k, k_stride_t, k_stride_h, tokens_R, heads_R, is_row_R, columns, D)
    store_rows(x, cache, scales, slots_R, 0, heads_R, is_row_R, columns, inverse_k_scale, K, D, PLANES, BLOCK_SIZE,
               FORMAT, TOKEN_SCALES)  # fmt: skip
    if not LATENT:
        x = load_rows(v, v_stride_t, v_stride_h, tokens_R, heads_R, is_row_R, columns, D)
        store_rows(x, cache, scales, slots_R, 1, heads_R, is_row_R, columns, inverse_v_scale, K, D, PLANES, BLOCK_SIZE,
                   FORMAT, TOKEN_SCALES)  # fmt: skip


@device_function
def turned_rows(
    x, stride_t, stride_h, cos, sin, positions, tokens_R, heads_R, is_row_R, columns,
    D: tl.constexpr, R: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Rows of q or k, their first R dimensions turned by their tokens' positions: (R, D padded) in float32."""
    own = load_rows(x, stride_t, stride_h, tokens_R, heads_R, is_row_R, columns, D)
    is_turned = columns < R
    if INTERLEAVED:
        partner = columns ^ 1
        is_first = columns % 2 == 0
    else:
        is_first = columns < R // 2
        partner = tl.where(is_first, columns + R // 2, columns - R // 2)
    partner = tl.where(is_turned, partner, columns)
    other = load_rows(x, stride_t, stride_h, tokens_R, heads_R, is_row_R, partner, D)
    at = tl.load(positions + tokens_R, mask=is_row_R, other=0)[:, None] * R + columns[None, :]
    mask = is_row_R[:, None] & is_turned[None, :]
    c = tl.load(cos + at, mask=mask, other=1.0).to(tl.float32)
    s = tl.load(sin + at, mask=mask, other=0.0).to(tl.float32)
    return own * c + tl.where(is_first[None, :], -other, other) * s


@triton.jit(do_not_specialize=["num_tokens"])
def rotary_kv_write_kernel(
    q, k, v, q_out, cos, sin, positions, cache, scales, words, num_tokens, q_stride_t, q_stride_h, k_stride_t,
    k_stride_h, v_stride_t, v_stride_h, inverse_k_scale, inverse_v_scale,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr, R: tl.constexpr,
    INTERLEAVED: tl.constexpr, BLOCK_SIZE: tl.constexpr, FORMAT: tl.constexpr, TOKEN_SCALES: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Program (ROWS rows): the T * H heads of the queries, which go to `q_out` (T, H, D), then the T * K others."""
    part = tl.program_id(0)
    query_parts = (num_tokens * H + ROWS - 1) // ROWS
    columns = tl.arange(0, D_PADDED)
    if part < query_parts:
        row_R = part * ROWS + tl.arange(0, ROWS)
        is_row_R = row_R < num_tokens * H
        tokens_R = (row_R // H).to(tl.int64)
        x = turned_rows(q, q_stride_t, q_stride_h, cos, sin, positions, tokens_R, row_R % H, is_row_R, columns, D, R,
                        INTERLEAVED)  # fmt: skip
        pointers = q_out + row_R.to(tl.int64)[:, None] * D + columns[None, :]
        tl.store(pointers, x.to(q_out.dtype.element_ty), mask=is_row_R[:, None] & (columns < D)[None, :])
    else:
        row_R = (part - query_parts) * ROWS + tl.arange(0, ROWS)
        is_row_R = row_R < num_tokens * K
        tokens_R = (row_R // K).to(tl.int64)
        heads_R = row_R % K
        slots_R = tl.load(words + SLOTS_AT + tokens_R, mask=is_row_R, other=0)
        x = turned_rows(k, k_stride_t, k_stride_h, cos, sin, positions, tokens_R, heads_R, is_row_R, columns, D, R,
                        INTERLEAVED)  # fmt: skip
        store_rows(x, cache, scales, slots_R, 0, heads_R, is_row_R, columns, inverse_k_scale, K, D, 2, BLOCK_SIZE,
                   FORMAT, TOKEN_SCALES)  # fmt: skip
        x = load_rows(v, v_stride_t, v_stride_h, tokens_R, heads_R, is_row_R, columns, D)
        store_rows(x, cache, scales, slots_R, 1, heads_R, is_row_R, columns, inverse_v_scale, K, D, 2, BLOCK_SIZE,
                   FORMAT, TOKEN_SCALES)  # fmt: skip
