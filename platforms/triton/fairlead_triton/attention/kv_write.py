"""Writing keys and values to the paged cache, as they are or quantised, alone or with the rotary embedding of q and k.

Shapes: T packed tokens, C heads of a program, H query heads, K kv-heads, D head size, R rotated dimensions.
Sources: Micikevicius et al., "FP8 Formats for Deep Learning" (2022), section 3; Su et al., "RoFormer" (2021), 3.4.2.
"""

import triton
import triton.language as tl

SLOTS_AT: tl.constexpr = tl.constexpr(8)
"""Where the slot mapping begins in the words of a step, see plan.py."""


@triton.jit
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


@triton.jit
def store_heads(
    x, cache, scales, slot, plane, heads_C, is_head_C, columns, inverse_scale,
    K: tl.constexpr, D: tl.constexpr, PLANES: tl.constexpr, BLOCK_SIZE: tl.constexpr, FORMAT: tl.constexpr,
    TOKEN_SCALES: tl.constexpr,
):  # fmt: skip
    """Stores float32 rows (C, D padded) of one token in a plane of the cache."""
    block = (slot // BLOCK_SIZE).to(tl.int64) * PLANES + plane
    rows_C = (block * K + heads_C) * BLOCK_SIZE + slot % BLOCK_SIZE
    pointers = cache + rows_C[:, None] * D + columns[None, :]
    mask = is_head_C[:, None] & (columns < D)[None, :]
    if FORMAT == 0:
        tl.store(pointers, x.to(cache.dtype.element_ty), mask=mask)
    else:
        if TOKEN_SCALES:
            LARGEST: tl.constexpr = 448.0 if FORMAT == 1 else 57344.0
            scale_C = tl.max(tl.abs(x), 1) / LARGEST
            scale_C = tl.where(scale_C > 0.0, scale_C, 1.0)
            tl.store(scales + rows_C, scale_C, mask=is_head_C)
            x = x / scale_C[:, None]
        else:
            x = x * inverse_scale
        tl.store(pointers, encode_fp8(x, FORMAT), mask=mask)


@triton.jit
def kv_write_kernel(
    k, v, cache, scales, words, k_stride_t, k_stride_h, v_stride_t, v_stride_h, inverse_k_scale, inverse_v_scale,
    K: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr, BLOCK_SIZE: tl.constexpr, LATENT: tl.constexpr,
    FORMAT: tl.constexpr, TOKEN_SCALES: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Program (token, HEADS kv-heads)."""
    PLANES: tl.constexpr = 1 if LATENT else 2
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(words + SLOTS_AT + token)
    heads_C = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    is_head_C = heads_C < K
    columns = tl.arange(0, D_PADDED)
    mask = is_head_C[:, None] & (columns < D)[None, :]
    x = tl.load(k + token * k_stride_t + heads_C[:, None] * k_stride_h + columns[None, :], mask=mask, other=0.0)
    store_heads(x.to(tl.float32), cache, scales, slot, 0, heads_C, is_head_C, columns, inverse_k_scale, K, D, PLANES,
                BLOCK_SIZE, FORMAT, TOKEN_SCALES)  # fmt: skip
    if not LATENT:
        x = tl.load(v + token * v_stride_t + heads_C[:, None] * v_stride_h + columns[None, :], mask=mask, other=0.0)
        store_heads(x.to(tl.float32), cache, scales, slot, 1, heads_C, is_head_C, columns, inverse_v_scale, K, D,
                    PLANES, BLOCK_SIZE, FORMAT, TOKEN_SCALES)  # fmt: skip


@triton.jit
def rotate(
    x, token, stride_t, stride_h, cos, sin, position, heads_C, is_head_C, columns,
    D: tl.constexpr, R: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Rows of one token, the first R dimensions turned by its position: (C, D padded) in float32."""
    row = x + token * stride_t + heads_C[:, None] * stride_h
    mask = is_head_C[:, None] & (columns < D)[None, :]
    own = tl.load(row + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    is_turned = columns < R
    if INTERLEAVED:
        partner = columns ^ 1
        is_first = columns % 2 == 0
    else:
        is_first = columns < R // 2
        partner = tl.where(is_first, columns + R // 2, columns - R // 2)
    partner = tl.where(is_turned, partner, columns)
    other = tl.load(row + partner[None, :], mask=mask & is_turned[None, :], other=0.0).to(tl.float32)
    c = tl.load(cos + position * R + columns, mask=is_turned, other=1.0).to(tl.float32)
    s = tl.load(sin + position * R + columns, mask=is_turned, other=0.0).to(tl.float32)
    return own * c[None, :] + tl.where(is_first[None, :], -other, other) * s[None, :]


@triton.jit
def rotary_kv_write_kernel(
    q, k, v, q_out, cos, sin, positions, cache, scales, words, q_stride_t, q_stride_h, k_stride_t, k_stride_h,
    v_stride_t, v_stride_h, inverse_k_scale, inverse_v_scale,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr, R: tl.constexpr,
    INTERLEAVED: tl.constexpr, BLOCK_SIZE: tl.constexpr, FORMAT: tl.constexpr, TOKEN_SCALES: tl.constexpr,
    HEADS: tl.constexpr,
):  # fmt: skip
    """Program (token, HEADS heads): first those of the queries, which go to `q_out` (T, H, D), then the kv-heads."""
    QUERY_PARTS: tl.constexpr = (H + HEADS - 1) // HEADS
    token = tl.program_id(0).to(tl.int64)
    position = tl.load(positions + token)
    part = tl.program_id(1)
    columns = tl.arange(0, D_PADDED)
    if part < QUERY_PARTS:
        heads_C = part * HEADS + tl.arange(0, HEADS)
        is_head_C = heads_C < H
        x = rotate(q, token, q_stride_t, q_stride_h, cos, sin, position, heads_C, is_head_C, columns, D, R, INTERLEAVED)
        mask = is_head_C[:, None] & (columns < D)[None, :]
        rows_C = (token * H + heads_C) * D
        tl.store(q_out + rows_C[:, None] + columns[None, :], x.to(q_out.dtype.element_ty), mask=mask)
    else:
        heads_C = (part - QUERY_PARTS) * HEADS + tl.arange(0, HEADS)
        is_head_C = heads_C < K
        slot = tl.load(words + SLOTS_AT + token)
        x = rotate(k, token, k_stride_t, k_stride_h, cos, sin, position, heads_C, is_head_C, columns, D, R, INTERLEAVED)
        store_heads(x, cache, scales, slot, 0, heads_C, is_head_C, columns, inverse_k_scale, K, D, 2, BLOCK_SIZE,
                    FORMAT, TOKEN_SCALES)  # fmt: skip
        mask = is_head_C[:, None] & (columns < D)[None, :]
        x = tl.load(v + token * v_stride_t + heads_C[:, None] * v_stride_h + columns[None, :], mask=mask, other=0.0)
        store_heads(x.to(tl.float32), cache, scales, slot, 1, heads_C, is_head_C, columns, inverse_v_scale, K, D, 2,
                    BLOCK_SIZE, FORMAT, TOKEN_SCALES)  # fmt: skip
