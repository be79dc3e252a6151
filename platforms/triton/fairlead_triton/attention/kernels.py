"""Paged attention in Triton: one loop over key tiles, in a kernel for prompts and one for decodes, and their merge.

A row of a tile is a query of one head: the G heads that share a kv-head lie side by side, so that its keys and values
are read once for all of them. Rows of a sequence's new tokens are numbered r = query * G + head within the group; tile
i has rows BLOCK_M * i and on. Keys come in tiles at absolute positions (multiples of BLOCK_N), and a decode's context
is cut into splits at absolute positions (multiples of SPLIT), which the merge adds in one fixed order: what else is in
the batch changes no bit of a sequence's results.

The cache of a layer is (blocks, planes, K, block_size, D): keys, then values, or one plane where keys hold the values.
`words` are the integers of a step, as `plan.py` lays them out. Sources: Dao, "FlashAttention-2" (2023), section 3;
Dao et al., "Flash-Decoding" (2023); Kwon et al., "PagedAttention" (SOSP 2023); Milakov and Gimelshein, "Online
normalizer calculation for softmax" (2018).

Shapes: M rows of a tile, N keys of a tile, D head size, E head size of the values, K kv-heads, G heads per kv-head.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-calls=False
# Triton reads types of its own from the arguments of a launch.

import triton
import triton.language as tl

from fairlead_triton.interpreted import bound, device_function, dot, largest_of, sum_of

FORMATS = {"auto": 0, "fp8_e4m3": 1, "float8_e4m3fn": 1, "fp8_e5m2": 2, "float8_e5m2": 2}
"""What a stored element is: the model's dtype, or OCP fp8 bits in bytes, by users' names and torch's."""
ENTRY: tl.constexpr = tl.constexpr(8)
"""Words of an entry of every section, see plan.py."""
LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@device_function
def decode_fp8(x, FORMAT: tl.constexpr, NATIVE: tl.constexpr, dtype: tl.constexpr):
    """Stored bytes as numbers. e4m3's exponent has another bias than float16's: 2^8 makes up for it, exactly."""
    if FORMAT == 0:
        return x
    elif NATIVE:
        if FORMAT == 1:
            return x.to(tl.float8e4nv, bitcast=True).to(dtype)
        else:
            return x.to(tl.float8e5, bitcast=True).to(dtype)
    elif FORMAT == 1:
        bits = x.to(tl.uint16)
        half = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
        half = tl.where((bits & 0x7F) == 0x7F, float("nan"), half * 256.0)
        return half.to(dtype)
    else:
        return (x.to(tl.uint16) << 8).to(tl.float16, bitcast=True).to(dtype)


@device_function
def load_tile(ptr, rows_N, columns_D, is_row_N, SIZE: tl.constexpr, PADDED: tl.constexpr, MASKED: tl.constexpr):
    """(N, D) elements at element offsets rows + columns; 0 outside of the row mask and past SIZE columns."""
    pointers = ptr + rows_N[:, None] + columns_D[None, :]
    if MASKED:
        if SIZE < PADDED:
            return tl.load(pointers, mask=is_row_N[:, None] & (columns_D < SIZE)[None, :], other=0)
        else:
            return tl.load(pointers, mask=is_row_N[:, None], other=0)
    elif SIZE < PADDED:
        return tl.load(pointers, mask=(columns_D < SIZE)[None, :], other=0)
    else:
        return tl.load(pointers)


@device_function
def attend_tiles(
    acc, m_M, l_M, q0, q1, cache, scales, table, begin, end, lo, hi, pos_M, slope_M, kv_head, qk_scale, v_scale,
    MASKED: tl.constexpr, K: tl.constexpr, D: tl.constexpr, E: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    LATENT: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr, WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr, ALIBI: tl.constexpr, FORMAT: tl.constexpr, NATIVE: tl.constexpr,
    TOKEN_SCALES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The online softmax over the keys of tiles [begin, end), of which [lo, hi) exist. Unless MASKED, all rows see all.

    `acc` (M, E), `m_M` (largest score, in powers of two) and `l_M` (sum) are updated and returned.
    """
    PLANES: tl.constexpr = 1 if LATENT else 2
    PLANE: tl.constexpr = K * BLOCK_SIZE * D
    dtype: tl.constexpr = q0.dtype
    columns0 = tl.arange(0, D0)
    for n0 in tl.range(bound(begin), bound(end), BLOCK_N, num_stages=STAGES):
        n_N = n0 + tl.arange(0, BLOCK_N)
        is_key_N = (n_N >= lo) & (n_N < hi)
        if BLOCK_SIZE % BLOCK_N == 0:
            block = tl.load(table + n0 // BLOCK_SIZE).to(tl.int64)
            slots_N = n0 % BLOCK_SIZE + tl.arange(0, BLOCK_N)
        else:
            block = tl.load(table + n_N // BLOCK_SIZE, mask=is_key_N, other=0).to(tl.int64)
            slots_N = n_N % BLOCK_SIZE
        rows_N = block * (PLANES * PLANE) + (kv_head * BLOCK_SIZE + slots_N) * D
        k0 = decode_fp8(
            load_tile(cache, rows_N, columns0, is_key_N, E if LATENT else D, D0, MASKED), FORMAT, NATIVE, dtype
        )
        s = dot(q0, tl.trans(k0), tl.full((q0.shape[0], BLOCK_N), 0.0, tl.float32))
        if D1 > 0:
            k1 = load_tile(cache + E, rows_N, tl.arange(0, D1), is_key_N, D - E, D1, MASKED)
            s = dot(q1, tl.trans(decode_fp8(k1, FORMAT, NATIVE, dtype)), s)
        if TOKEN_SCALES:
            scale_rows_N = (block * PLANES * K + kv_head) * BLOCK_SIZE + slots_N
            s *= tl.load(scales + scale_rows_N, mask=is_key_N, other=0.0)[None, :]
        if SOFT_CAP > 0.0:
            # tanh(x) = 1 - 2 / (1 + e^2x); qk_scale holds 2 / cap * log2(e), so that e^2x is one power of two.
            s = (1.0 - 2.0 / (1.0 + tl.exp2(s * qk_scale))) * (SOFT_CAP * LOG2E)
        else:
            s *= qk_scale
        if ALIBI:
            s += slope_M[:, None] * (n_N[None, :] - pos_M[:, None]).to(tl.float32)
        if MASKED:
            is_seen = (n_N[None, :] <= pos_M[:, None]) & (n_N < hi)[None, :]
            if WINDOW > 0:
                is_seen &= n_N[None, :] > pos_M[:, None] - WINDOW
            s = tl.where(is_seen, s, float("-inf"))
        new_m_M = tl.maximum(m_M, largest_of(s, 1))
        zero_M = new_m_M
        if MASKED:
            zero_M = tl.where(new_m_M == float("-inf"), 0.0, new_m_M)  # a row that has seen nothing yet
        p = tl.exp2(s - zero_M[:, None])
        alpha_M = tl.exp2(m_M - zero_M)
        l_M = l_M * alpha_M + sum_of(p, 1)
        acc *= alpha_M[:, None]
        if LATENT:
            v = k0
        else:
            v = load_tile(cache + PLANE, rows_N, columns0, is_key_N, D, D0, MASKED)
            v = decode_fp8(v, FORMAT, NATIVE, dtype)
        if TOKEN_SCALES:
            PLANE_OF_V: tl.constexpr = 0 if LATENT else K * BLOCK_SIZE
            p *= tl.load(scales + PLANE_OF_V + scale_rows_N, mask=is_key_N, other=0.0)[None, :]
        acc = dot(p.to(dtype), v, acc)
        m_M = new_m_M
    return acc, m_M, l_M


@device_function
def attend_rows(
    q, cache, scales, slopes, words, first_row, query_len, seq_len, table_offset, tile, kv_head, split_begin, split_end,
    q_stride_t, q_stride_h, qk_scale, v_scale,
    G: tl.constexpr, K: tl.constexpr, D: tl.constexpr, E: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    LATENT: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, ALIBI: tl.constexpr, FORMAT: tl.constexpr,
    NATIVE: tl.constexpr, TOKEN_SCALES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One tile of rows over the keys of [split_begin, split_end): (acc, m, l, packed rows, heads, is a row).

    Only the tiles on the diagonal, at the window's left edge and at the end are masked.
    """
    row_M = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row_M = row_M < query_len * G
    query_M = tl.minimum(row_M // G, query_len - 1)
    head_M = kv_head * G + row_M % G
    token_M = first_row + query_M
    pos_M = seq_len - query_len + query_M
    columns0 = tl.arange(0, D0)
    q_rows_M = token_M.to(tl.int64) * q_stride_t + head_M * q_stride_h
    q0 = load_tile(q, q_rows_M, columns0, is_row_M, E if LATENT else D, D0, True)
    q1 = q0
    if D1 > 0:
        q1 = load_tile(q + E, q_rows_M, tl.arange(0, D1), is_row_M, D - E, D1, True)
    slope_M = pos_M.to(tl.float32)
    if ALIBI:
        slope_M = tl.load(slopes + head_M) * LOG2E

    first_pos = seq_len - query_len + tl.minimum(tile * BLOCK_M // G, query_len - 1)
    last_pos = seq_len - query_len + tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // G, query_len - 1)
    lo = split_begin
    hi = tl.minimum(last_pos + 1, split_end)
    all_begin = split_begin  # keys of [all_begin, all_end) are seen by all rows
    all_end = tl.minimum(first_pos + 1, split_end) // BLOCK_N * BLOCK_N
    if WINDOW > 0:
        lo = tl.maximum(lo, first_pos - WINDOW + 1)
        all_begin = (tl.maximum(all_begin, last_pos - WINDOW + 1) + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    all_end = tl.maximum(all_begin, all_end)

    acc = tl.full((BLOCK_M, D0), 0.0, tl.float32)
    m_M = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l_M = tl.full((BLOCK_M,), 0.0, tl.float32)
    table = words + table_offset
    if WINDOW > 0:
        acc, m_M, l_M = attend_tiles(
            acc, m_M, l_M, q0, q1, cache, scales, table, lo // BLOCK_N * BLOCK_N, tl.minimum(all_begin, hi), lo, hi,
            pos_M, slope_M, kv_head, qk_scale, v_scale, True, K, D, E, D0, D1, LATENT, BLOCK_SIZE, BLOCK_N, WINDOW,
            SOFT_CAP, ALIBI, FORMAT, NATIVE, TOKEN_SCALES, STAGES)  # fmt: skip
    acc, m_M, l_M = attend_tiles(
        acc, m_M, l_M, q0, q1, cache, scales, table, all_begin, all_end, lo, hi, pos_M, slope_M, kv_head, qk_scale,
        v_scale, False, K, D, E, D0, D1, LATENT, BLOCK_SIZE, BLOCK_N, WINDOW, SOFT_CAP, ALIBI, FORMAT, NATIVE,
        TOKEN_SCALES, STAGES)  # fmt: skip
    acc, m_M, l_M = attend_tiles(
        acc, m_M, l_M, q0, q1, cache, scales, table, all_end, hi, lo, hi, pos_M, slope_M, kv_head, qk_scale, v_scale,
        True, K, D, E, D0, D1, LATENT, BLOCK_SIZE, BLOCK_N, WINDOW, SOFT_CAP, ALIBI, FORMAT, NATIVE, TOKEN_SCALES,
        STAGES)  # fmt: skip
    return acc * v_scale, m_M, l_M, token_M, head_M, is_row_M


@triton.jit(do_not_specialize=["tiles_at"])
def prompt_kernel(
    out, q, cache, scales, slopes, words, tiles_at, q_stride_t, q_stride_h, qk_scale, v_scale,
    G: tl.constexpr, K: tl.constexpr, D: tl.constexpr, E: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    LATENT: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, ALIBI: tl.constexpr, FORMAT: tl.constexpr,
    NATIVE: tl.constexpr, TOKEN_SCALES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program (tile of the list at `tiles_at`, kv-head): a tile of many rows over all its keys."""
    entry = words + tiles_at + tl.program_id(0) * ENTRY
    kv_head = tl.program_id(1)
    seq_len = tl.load(entry + 2)
    acc, _, l_M, token_M, head_M, is_row_M = attend_rows(
        q, cache, scales, slopes, words, tl.load(entry), tl.load(entry + 1), seq_len, tl.load(entry + 3),
        tl.load(entry + 4), kv_head, 0, seq_len, q_stride_t, q_stride_h, qk_scale, v_scale, G, K, D, E, D0, D1, LATENT,
        BLOCK_SIZE, BLOCK_M, BLOCK_N, WINDOW, SOFT_CAP, ALIBI, FORMAT, NATIVE, TOKEN_SCALES, STAGES)  # fmt: skip
    columns = tl.arange(0, D0)
    rows_M = (token_M.to(tl.int64) * (G * K) + head_M) * E
    mask = is_row_M[:, None] & (columns < E)[None, :]
    tl.store(out + rows_M[:, None] + columns[None, :], (acc / l_M[:, None]).to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tiles_at"])
def decode_kernel(
    out, partials, partial_ml, q, cache, scales, slopes, words, tiles_at, q_stride_t, q_stride_h, qk_scale, v_scale,
    G: tl.constexpr, K: tl.constexpr, D: tl.constexpr, E: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    LATENT: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, ALIBI: tl.constexpr, FORMAT: tl.constexpr,
    NATIVE: tl.constexpr, TOKEN_SCALES: tl.constexpr, STAGES: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """A fixed number of programs share the list at `tiles_at`: a tile of few rows over one split of its keys each.

    The length of the list stands in word 0. A tile of one split goes to `out`, others to `partials` (unnormalised)
    and `partial_ml` (largest score and sum), (tiles, K, BLOCK_M, E) and (tiles, K, 2, BLOCK_M).
    """
    columns = tl.arange(0, D0)
    num_tiles = tl.load(words) * K
    for work in range(bound(tl.program_id(0)), bound(num_tiles), bound(tl.num_programs(0))):
        entry = words + tiles_at + work // K * ENTRY
        kv_head = work % K
        split = tl.load(entry + 5)
        partial = tl.load(entry + 6)
        seq_len = tl.load(entry + 2)
        acc, m_M, l_M, token_M, head_M, is_row_M = attend_rows(
            q, cache, scales, slopes, words, tl.load(entry), tl.load(entry + 1), seq_len, tl.load(entry + 3),
            tl.load(entry + 4), kv_head, split * SPLIT, tl.minimum(split * SPLIT + SPLIT, seq_len), q_stride_t,
            q_stride_h, qk_scale, v_scale, G, K, D, E, D0, D1, LATENT, BLOCK_SIZE, BLOCK_M, BLOCK_N, WINDOW, SOFT_CAP,
            ALIBI, FORMAT, NATIVE, TOKEN_SCALES, STAGES)  # fmt: skip
        mask = is_row_M[:, None] & (columns < E)[None, :]
        if partial < 0:
            rows_M = (token_M.to(tl.int64) * (G * K) + head_M) * E
            tl.store(out + rows_M[:, None] + columns[None, :], (acc / l_M[:, None]).to(out.dtype.element_ty), mask=mask)
        else:
            at = (partial * K + kv_head).to(tl.int64)
            rows_M = at * BLOCK_M + tl.arange(0, BLOCK_M)
            tl.store(partials + rows_M[:, None] * E + columns[None, :], acc, mask=mask)
            tl.store(partial_ml + at * BLOCK_M + rows_M, m_M, mask=is_row_M)
            tl.store(partial_ml + at * BLOCK_M + BLOCK_M + rows_M, l_M, mask=is_row_M)


@triton.jit(do_not_specialize=["merges_at"])
def merge_kernel(
    out, partials, partial_ml, words, merges_at,
    G: tl.constexpr, K: tl.constexpr, E: tl.constexpr, D0: tl.constexpr, BLOCK_M: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Program (entry of the list at `merges_at`, head): adds the splits of a token's head, CHUNK of them at a time.

    The length of the list stands in word 1; programs past it have nothing to do.
    """
    if tl.program_id(0) >= tl.load(words + 1):
        return
    entry = words + merges_at + tl.program_id(0) * ENTRY
    token, first, num_splits = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    num_tiles, query = tl.load(entry + 3), tl.load(entry + 4)
    head = tl.program_id(1)
    row = query * G + head % G
    columns = tl.arange(0, D0)
    acc = tl.full((D0,), 0.0, tl.float32)
    largest, total = float("-inf"), 0.0
    for c in range(0, bound(num_splits), CHUNK):
        split_C = c + tl.arange(0, CHUNK)
        is_split_C = split_C < num_splits
        at_C = ((first + split_C * num_tiles + row // BLOCK_M) * K + head // G).to(tl.int64)
        row_C = at_C * BLOCK_M + row % BLOCK_M
        m_C = tl.load(partial_ml + at_C * BLOCK_M + row_C, mask=is_split_C, other=float("-inf"))
        l_C = tl.load(partial_ml + at_C * BLOCK_M + BLOCK_M + row_C, mask=is_split_C, other=0.0)
        mask = is_split_C[:, None] & (columns < E)[None, :]
        acc_C = tl.load(partials + row_C[:, None] * E + columns[None, :], mask=mask, other=0.0)
        new = tl.maximum(largest, largest_of(m_C, 0))
        zero = tl.where(new == float("-inf"), 0.0, new)
        weight_C = tl.exp2(m_C - zero)
        alpha = tl.exp2(largest - zero)
        total = total * alpha + sum_of(l_C * weight_C, 0)
        acc = acc * alpha + sum_of(acc_C * weight_C[:, None], 0)
        largest = new
    out_row = (token.to(tl.int64) * (G * K) + head) * E
    tl.store(out + out_row + columns, (acc / total).to(out.dtype.element_ty), mask=columns < E)
