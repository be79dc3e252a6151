"""Mixture of experts: routing, the order of rows by expert, and products of the rows of each expert.

The N = T R rows (token t's r-th expert is row t R + r) are ordered by expert, each expert's rows filled up to whole
tiles of BLOCK_M with the row N, which is none. All sizes that depend on the choice stay on the device.
"""

import triton
import triton.language as tl

from fairlead_triton.interpreted import bound, dot


@triton.jit
def route_kernel(
    logits,
    correction,
    weights,
    experts,
    num_experts,
    logits_row,
    logits_expert,
    scale,
    TOP_K: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    GROUP_TOP: tl.constexpr,
    SIGMOID: tl.constexpr,
    HAS_CORRECTION: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """A program routes one token. Of equal experts the first is taken."""
    token = tl.program_id(0).to(tl.int64)
    expert_X = tl.arange(0, BLOCK)
    is_expert_X = expert_X < num_experts
    infinity = float("inf")
    logits_X = tl.load(logits + token * logits_row + expert_X * logits_expert, mask=is_expert_X, other=-infinity)
    logits_X = logits_X.to(tl.float32)
    if SIGMOID:
        scores_X = 1.0 / (1.0 + tl.exp(-logits_X))
    else:
        powers_X = tl.exp(logits_X - tl.max(logits_X, axis=0))
        scores_X = powers_X / tl.sum(powers_X, axis=0)
    choice_X = scores_X
    if HAS_CORRECTION:
        choice_X = scores_X + tl.load(correction + expert_X, mask=is_expert_X, other=0.0).to(tl.float32)
    choice_X = tl.where(is_expert_X, choice_X, -infinity)
    if TOP_GROUPS < NUM_GROUPS:
        group_X = expert_X // (num_experts // NUM_GROUPS)
        group_G = tl.arange(0, BLOCK_G)
        score_G = tl.full([BLOCK_G], -infinity, dtype=tl.float32)
        for group in range(NUM_GROUPS):
            inside_X = tl.where((group_X == group) & is_expert_X, choice_X, -infinity)
            score = 0.0
            for _ in range(GROUP_TOP):
                score += tl.max(inside_X, axis=0)
                inside_X = tl.where(expert_X == tl.argmax(inside_X, axis=0), -infinity, inside_X)
            score_G = tl.where(group_G == group, score, score_G)
        is_in_X = expert_X < 0
        for _ in range(TOP_GROUPS):
            best = tl.argmax(score_G, axis=0)
            is_in_X = is_in_X | (group_X == best)
            score_G = tl.where(group_G == best, -infinity, score_G)
        choice_X = tl.where(is_in_X, choice_X, -infinity)
    place_R = tl.arange(0, BLOCK_K)
    weights_R = tl.zeros([BLOCK_K], dtype=tl.float32)
    experts_R = tl.zeros([BLOCK_K], dtype=tl.int32)
    for place in range(TOP_K):
        # Scores that are no numbers choose nothing that can be relied on, but never an expert that there is not.
        best = tl.minimum(tl.argmax(choice_X, axis=0), num_experts - 1)
        weight = tl.sum(tl.where(expert_X == best, scores_X, 0.0), axis=0)
        weights_R = tl.where(place_R == place, weight, weights_R)
        experts_R = tl.where(place_R == place, best, experts_R)
        choice_X = tl.where(expert_X == best, -infinity, choice_X)
    if NORMALIZE:
        weights_R = weights_R / (tl.sum(weights_R, axis=0) + 1e-20)
    tl.store(weights + token * TOP_K + place_R, weights_R * scale, mask=place_R < TOP_K)
    tl.store(experts + token * TOP_K + place_R, experts_R, mask=place_R < TOP_K)


@triton.jit(do_not_specialize=["num_rows"])
def order_kernel(
    experts,
    rows,
    tile_experts,
    num_tiles,
    num_rows,
    BLOCK_M: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program places the rows of one expert, in their order: it counts everybody's itself, so one launch does."""
    expert = tl.program_id(0)
    counts_X = tl.zeros([BLOCK_X], dtype=tl.int32)
    for first in range(0, bound(num_rows), BLOCK):
        row = first + tl.arange(0, BLOCK)
        # What lies beyond the rows is counted as expert 0's, and taken off again below.
        counts_X += tl.histogram(tl.load(experts + row, mask=row < num_rows, other=0), BLOCK_X)
    expert_X = tl.arange(0, BLOCK_X)
    beyond = tl.cdiv(num_rows, BLOCK) * BLOCK - num_rows
    counts_X = tl.where(expert_X == 0, counts_X - beyond, counts_X)
    tiles_X = (counts_X + BLOCK_M - 1) // BLOCK_M
    first_tile = tl.sum(tl.where(expert_X < expert, tiles_X, 0), axis=0)
    own_tiles = tl.sum(tl.where(expert_X == expert, tiles_X, 0), axis=0)
    if expert == 0:
        tl.store(num_tiles, tl.sum(tiles_X, axis=0))
    for tile in range(0, bound(own_tiles)):
        tl.store(tile_experts + first_tile + tile, expert)
    target = rows + first_tile * BLOCK_M
    placed = num_rows * 0
    for first in range(0, bound(num_rows), BLOCK):
        row = first + tl.arange(0, BLOCK)
        is_own = tl.load(experts + row, mask=row < num_rows, other=-1) == expert
        place = placed + tl.cumsum(is_own.to(tl.int32), axis=0) - 1
        tl.store(target + place, row, mask=is_own)
        placed += tl.sum(is_own.to(tl.int32), axis=0)
    filling = placed + tl.arange(0, BLOCK_M)
    tl.store(target + filling, tl.zeros([BLOCK_M], dtype=tl.int32) + num_rows, mask=filling < own_tiles * BLOCK_M)


@triton.jit(do_not_specialize=["num_rows", "max_tiles"])
def expert_matmul_kernel(
    x,
    weight,
    row_weights,
    out,
    rows,
    tile_experts,
    num_tiles,
    max_tiles,
    num_rows,
    rows_per_x,
    num_outputs,
    num_inputs,
    x_row,
    weight_expert,
    weight_output,
    weight_input,
    GATED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A program multiplies one tile of one expert's rows by BLOCK_N of its outputs.

    Row n reads x's row n // rows_per_x. GATED: the weight has 2 num_outputs outputs; silu of the first half times the
    second is stored in out's dtype. Else the product times the row's weight is stored in float32.
    """
    tile = tl.program_id(0) % max_tiles
    if tile < tl.load(num_tiles):
        output_N = (tl.program_id(0) // max_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
        row_M = tl.load(rows + tile * BLOCK_M + tl.arange(0, BLOCK_M))
        is_row_M1 = (row_M < num_rows)[:, None]
        is_output_1N = (output_N < num_outputs)[None, :]
        input_K = tl.arange(0, BLOCK_K)
        expert = tl.load(tile_experts + tile).to(tl.int64)
        x_MK = x + (row_M // rows_per_x).to(tl.int64)[:, None] * x_row + input_K[None, :]
        weight_KN = (
            weight + expert * weight_expert + output_N[None, :] * weight_output + input_K[:, None] * weight_input
        )
        acc_MN = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        up_MN = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        for first in range(0, bound(num_inputs), BLOCK_K):
            is_input_K = first + input_K < num_inputs
            a_MK = tl.load(x_MK, mask=is_row_M1 & is_input_K[None, :], other=0.0)
            b_KN = tl.load(weight_KN, mask=is_output_1N & is_input_K[:, None], other=0.0)
            acc_MN = dot(a_MK, b_KN, acc_MN)
            if GATED:
                up_KN = weight_KN + num_outputs * weight_output
                b_KN = tl.load(up_KN, mask=is_output_1N & is_input_K[:, None], other=0.0)
                up_MN = dot(a_MK, b_KN, up_MN)
            x_MK += BLOCK_K
            weight_KN += BLOCK_K * weight_input
        out_MN = out + row_M.to(tl.int64)[:, None] * num_outputs + output_N[None, :]
        if GATED:
            acc_MN = acc_MN / (1.0 + tl.exp(-acc_MN)) * up_MN
        else:
            acc_MN *= tl.load(row_weights + row_M, mask=row_M < num_rows, other=0.0)[:, None]
        tl.store(out_MN, acc_MN.to(out.dtype.element_ty), mask=is_row_M1 & is_output_1N)


@triton.jit
def sum_experts_kernel(parts, out, width, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    """A program sums BLOCK places of one token's experts, best expert first."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for place in range(TOP_K):
        total += tl.load(parts + (token * TOP_K + place) * width + columns, mask=columns < width, other=0.0)
    tl.store(out + token * width + columns, total.to(out.dtype.element_ty), mask=columns < width)
