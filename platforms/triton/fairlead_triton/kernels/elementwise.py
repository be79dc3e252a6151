"""Gates, rotation and gathers: every element of the result from a few of the inputs, nothing summed."""

import triton
import triton.language as tl

SILU = tl.constexpr(0)
GELU_TANH = tl.constexpr(1)


@triton.jit
def gate_and_mul_kernel(x, out, width, inner, x_outer, x_inner, BLOCK: tl.constexpr, GATE: tl.constexpr):
    """A program makes BLOCK of the `width` results of one row: gate(first half) times second half."""
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    start = x + (row // inner).to(tl.int64) * x_outer + (row % inner).to(tl.int64) * x_inner
    gate = tl.load(start + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(start + width + columns, mask=mask, other=0.0).to(tl.float32)
    if GATE == SILU:
        opened = gate / (1.0 + tl.exp(-gate))
    else:
        # tanh(z) = 2 sigmoid(2 z) - 1, so half of 1 + tanh(z) is sigmoid(2 z); sqrt(2 / pi) doubled
        doubled = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
        opened = gate / (1.0 + tl.exp(-doubled))
    tl.store(out + row.to(tl.int64) * width + columns, (opened * up).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _rotate(source, target, heads, num_heads, cos_1D, sin_1D, i, j, is_pair, stride, head_size):
    mask = (heads < num_heads)[:, None] & is_pair[None, :]
    places = source + heads[:, None] * stride
    first = tl.load(places + i[None, :], mask=mask, other=0.0).to(tl.float32)
    second = tl.load(places + j[None, :], mask=mask, other=0.0).to(tl.float32)
    results = target + heads[:, None] * head_size
    turned = (first * cos_1D - second * sin_1D).to(target.dtype.element_ty)
    tl.store(results + i[None, :], turned, mask=mask)
    turned = (second * cos_1D + first * sin_1D).to(target.dtype.element_ty)
    tl.store(results + j[None, :], turned, mask=mask)


@triton.jit
def rotary_kernel(
    q,
    k,
    positions,
    cos,
    sin,
    q_out,
    k_out,
    num_q_heads,
    num_k_heads,
    half,
    q_token,
    q_head,
    k_token,
    k_head,
    table_row,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """A program turns HEADS heads of one token: those of q come first, k's after them; BLOCK pairs of each."""
    token = tl.program_id(0).to(tl.int64)
    position = tl.load(positions + token).to(tl.int64)
    pairs = tl.arange(0, BLOCK)
    if INTERLEAVED:
        i, j = 2 * pairs, 2 * pairs + 1
    else:
        i, j = pairs, pairs + half
    is_pair = pairs < half
    cos_1D = tl.load(cos + position * table_row + i, mask=is_pair, other=0.0).to(tl.float32)[None, :]
    sin_1D = tl.load(sin + position * table_row + i, mask=is_pair, other=0.0).to(tl.float32)[None, :]
    part = tl.program_id(1)
    q_parts = tl.cdiv(num_q_heads, HEADS)
    size = 2 * half
    if part < q_parts:
        heads = part * HEADS + tl.arange(0, HEADS)
        _rotate(
            q + token * q_token, q_out + token * num_q_heads * size,
            heads, num_q_heads, cos_1D, sin_1D, i, j, is_pair, q_head, size,
        )  # fmt: skip
    else:
        heads = (part - q_parts) * HEADS + tl.arange(0, HEADS)
        _rotate(
            k + token * k_token, k_out + token * num_k_heads * size,
            heads, num_k_heads, cos_1D, sin_1D, i, j, is_pair, k_head, size,
        )  # fmt: skip


@triton.jit
def embedding_kernel(token_ids, weight, out, width, ids_stride, weight_row, BLOCK: tl.constexpr):
    """A program copies BLOCK places of one token's row."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(token_ids + token * ids_stride).to(tl.int64)
    values = tl.load(weight + row * weight_row + columns, mask=columns < width)
    tl.store(out + token * width + columns, values, mask=columns < width)


@triton.jit
def copy_blocks_kernel(sources, targets, pairs, block_words, source_block, target_block, BLOCK: tl.constexpr):
    """A program copies BLOCK words of one pair of blocks of one layer: (source, target) at pairs[2 p], pairs[2 p + 1].

    `sources` and `targets` hold the addresses of the layers' caches; strides are in words of 4 bytes.
    """
    pair = tl.program_id(0)
    layer = tl.program_id(1)
    words = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    source = tl.load(sources + layer).to(tl.pointer_type(tl.int32)) + tl.load(pairs + 2 * pair) * source_block
    target = tl.load(targets + layer).to(tl.pointer_type(tl.int32)) + tl.load(pairs + 2 * pair + 1) * target_block
    values = tl.load(source + words, mask=words < block_words)
    tl.store(target + words, values, mask=words < block_words)
