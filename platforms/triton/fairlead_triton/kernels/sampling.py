"""Edits of logits, and draws of tokens from probabilities without sorting them.

A row of V probabilities is one program's own. Non-negative float32 are ordered as their bits are, so thresholds are
searched for among integers: -1 stands for places beyond the row.
"""

import triton
import triton.language as tl

from fairlead_triton.interpreted import bound

NO_BITS = tl.constexpr(-1)
MOST_BITS = tl.constexpr(0x7FFFFFFF)


@triton.jit(do_not_specialize=["num_places"])
def penalties_kernel(logits, index, repetition, frequency, presence, num_places, BLOCK: tl.constexpr):
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = places < num_places
    target = logits + tl.load(index + places, mask=mask, other=0)
    old = tl.load(target, mask=mask, other=0.0)
    factor = tl.load(repetition + places, mask=mask, other=1.0)
    new = tl.where(old > 0, tl.div_rn(old, factor), old * factor)
    new = new - tl.load(frequency + places, mask=mask, other=0.0) - tl.load(presence + places, mask=mask, other=0.0)
    new = tl.minimum(tl.maximum(new, -3.4028234663852886e38), 3.4028234663852886e38)
    is_finite = tl.abs(old) <= 3.4028234663852886e38
    tl.store(target, new, mask=mask & is_finite)


@triton.jit
def bitmask_kernel(logits, bitmask, out, num_tokens, logits_row, bitmask_row, bitmask_word, BLOCK: tl.constexpr):
    """A program masks BLOCK tokens of one row."""
    row = tl.program_id(0).to(tl.int64)
    tokens = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = tokens < num_tokens
    words = tl.load(bitmask + row * bitmask_row + (tokens // 32) * bitmask_word, mask=mask, other=0)
    values = tl.load(logits + row * logits_row + tokens, mask=mask, other=0.0).to(tl.float32)
    is_allowed = ((words >> (tokens % 32)) & 1) != 0
    masked = tl.where(is_allowed, values, float("-inf"))
    tl.store(out + row * num_tokens + tokens, masked.to(out.dtype.element_ty), mask=mask)


@triton.jit
def draw_kernel(probs, uniform, out, num_tokens, probs_row, BLOCK: tl.constexpr):
    """The first token whose cumulative probability exceeds the threshold; cumulative sums run block by block."""
    row = tl.program_id(0)
    start = probs + row.to(tl.int64) * probs_row
    total = tl.full((), 0.0, tl.float64)
    for first in range(0, bound(num_tokens), BLOCK):
        tokens = first + tl.arange(0, BLOCK)
        total += tl.sum(tl.load(start + tokens, mask=tokens < num_tokens, other=0.0).to(tl.float64), axis=0)
    threshold = tl.load(uniform + row) * total
    before = tl.full((), 0.0, tl.float64)
    found = num_tokens + 0
    last = num_tokens * 0
    first = num_tokens * 0
    while (first < num_tokens) & (found == num_tokens):
        tokens = first + tl.arange(0, BLOCK)
        p = tl.load(start + tokens, mask=tokens < num_tokens, other=0.0).to(tl.float64)
        after = before + tl.sum(p, axis=0)
        last = tl.maximum(last, tl.max(tl.where(p > 0, tokens, 0), axis=0))
        if after > threshold:
            # Sums in a block's tree may step where nothing is added, so a token of probability 0 is asked about too.
            is_beyond = (before + tl.cumsum(p, axis=0) > threshold) & (p > 0)
            found = tl.min(tl.where(is_beyond, tokens, num_tokens), axis=0)
        before = after
        first += BLOCK
    tl.store(out + row, tl.where(found < num_tokens, found, last).to(tl.int64))


@triton.jit
def _above(start, num_tokens, bits, BLOCK: tl.constexpr):
    """Of the probabilities above the one of these bits: (number, sum in float64, the least); and the largest other."""
    count_B = tl.zeros([BLOCK], dtype=tl.int32)
    mass_B = tl.zeros([BLOCK], dtype=tl.float64)
    next_B = tl.full([BLOCK], MOST_BITS, dtype=tl.int32)
    other_B = tl.full([BLOCK], NO_BITS, dtype=tl.int32)
    for first in range(0, bound(num_tokens), BLOCK):
        tokens = first + tl.arange(0, BLOCK)
        p = tl.load(start + tokens, mask=tokens < num_tokens, other=-1.0)
        p_bits = tl.where(p >= 0, tl.abs(p).to(tl.int32, bitcast=True), NO_BITS)
        is_above = p_bits > bits
        count_B += is_above.to(tl.int32)
        mass_B += tl.where(is_above, p, 0.0).to(tl.float64)
        next_B = tl.minimum(next_B, tl.where(is_above, p_bits, MOST_BITS))
        other_B = tl.maximum(other_B, tl.where(is_above, NO_BITS, p_bits))
    return tl.sum(count_B, axis=0), tl.sum(mass_B, axis=0), tl.min(next_B, axis=0), tl.max(other_B, axis=0)


@triton.jit
def _search(start, num_tokens, low, best, max_count, limit, INCLUSIVE: tl.constexpr, BLOCK: tl.constexpr):
    """The least probability above `low` (bits) that fewer than `max_count` are above, whose sum is below `limit`
    (INCLUSIVE: or equals it); `best` if there is none. Returns its bits, and that number and sum.

    Both ends of the interval are moved to probabilities that are there, so it ends after at most 31 readings, and after
    as many as bits tell apart the few that usually matter.
    """
    high = best
    high_count = low * 0
    high_mass = tl.full((), 0.0, tl.float64)
    while high - low > 1:
        middle = low + (high - low) // 2
        count, mass, above, below = _above(start, num_tokens, middle, BLOCK)
        is_within = mass < limit
        if INCLUSIVE:
            is_within = mass <= limit
        if (count < max_count) & is_within:
            high = below
            high_count = count
            high_mass = mass
        else:
            low = above - 1
    return high, high_count, high_mass


@triton.jit
def draw_filtered_kernel(probs, settings, out, num_tokens, probs_row, settings_kind, settings_row, BLOCK: tl.constexpr):
    """Finds the last probability that is kept, then the one that is drawn, then the token among its equals."""
    row = tl.program_id(0)
    start = probs + row.to(tl.int64) * probs_row
    setting = settings + row * settings_row
    top_k = tl.load(setting)
    top_p = tl.load(setting + settings_kind)
    min_p = tl.load(setting + 2 * settings_kind)
    uniform = tl.load(setting + 3 * settings_kind)
    infinity = tl.full((), float("inf"), tl.float64)

    none = num_tokens * 0 - 1
    _, _, least, _ = _above(start, num_tokens, none, BLOCK)
    _, _, _, best = _above(start, num_tokens, none + MOST_BITS + 1, BLOCK)
    best = tl.maximum(best, 0)
    least = tl.minimum(least, best)
    best_p = best.to(tl.float32, bitcast=True).to(tl.float64)

    last = least
    max_count = num_tokens + 0
    limit = infinity
    mass = tl.full((), 1.0, tl.float64)
    if (top_k > 0) & (top_k < num_tokens):
        max_count = top_k.to(tl.int32)
        last, count, above_mass = _search(start, num_tokens, least - 1, best, max_count, infinity, False, BLOCK)
        mass = above_mass + (max_count - count).to(tl.float64) * last.to(tl.float32, bitcast=True).to(tl.float64)
    if top_p != 1:
        limit = top_p * mass
        last, count, above_mass = _search(start, num_tokens, last - 1, best, max_count, limit, False, BLOCK)
    if min_p > 0:
        floor = min_p * best_p
        floor32 = floor.to(tl.float32)
        floor_bits = floor32.to(tl.int32, bitcast=True) + (floor32.to(tl.float64) < floor).to(tl.int32)
        _, _, allowed, _ = _above(start, num_tokens, floor_bits - 1, BLOCK)
        last = tl.minimum(tl.maximum(last, allowed), best)

    count, above_mass, _, _ = _above(start, num_tokens, last, BLOCK)
    num_equal, _, _, _ = _above(start, num_tokens, last - 1, BLOCK)
    last_p = last.to(tl.float32, bitcast=True).to(tl.float64)
    kept_equal = tl.minimum(num_equal - count, max_count - count)
    if (limit < infinity) & (last_p > 0):
        # The number of equals before which less than the limit lies; the quotient is rounded, so it is tried.
        room = tl.minimum((limit - above_mass) / last_p, num_tokens.to(tl.float64)).to(tl.int32)
        room = tl.maximum(room - 1, 0)
        room += (above_mass + room.to(tl.float64) * last_p < limit).to(tl.int32)
        room += (above_mass + room.to(tl.float64) * last_p < limit).to(tl.int32)
        kept_equal = tl.minimum(kept_equal, room)
    kept_equal = tl.maximum(kept_equal, 1)

    threshold = uniform * (above_mass + kept_equal.to(tl.float64) * last_p)
    drawn, drawn_count, drawn_mass = _search(start, num_tokens, last - 1, best, num_tokens + 1, threshold, True, BLOCK)
    drawn_p = drawn.to(tl.float32, bitcast=True).to(tl.float64)
    if drawn > last:
        num_equal, _, _, _ = _above(start, num_tokens, drawn - 1, BLOCK)
        kept_equal = num_equal - drawn_count
    nth = num_tokens * 0
    if drawn_p > 0:
        nth = tl.minimum((threshold - drawn_mass) / drawn_p, num_tokens.to(tl.float64)).to(tl.int32)
        nth = tl.maximum(nth - 1, 0)
        nth += (drawn_mass + (nth + 1).to(tl.float64) * drawn_p <= threshold).to(tl.int32)
        nth += (drawn_mass + (nth + 1).to(tl.float64) * drawn_p <= threshold).to(tl.int32)
    nth = tl.minimum(nth, kept_equal - 1)

    found = num_tokens + 0
    seen = num_tokens * 0
    first = num_tokens * 0
    while (first < num_tokens) & (found == num_tokens):
        tokens = first + tl.arange(0, BLOCK)
        p = tl.load(start + tokens, mask=tokens < num_tokens, other=-1.0)
        is_equal = (p >= 0) & (tl.abs(p).to(tl.int32, bitcast=True) == drawn)
        place = seen + tl.cumsum(is_equal.to(tl.int32), axis=0)
        found = tl.min(tl.where(is_equal & (place == nth + 1), tokens, num_tokens), axis=0)
        seen += tl.sum(is_equal.to(tl.int32), axis=0)
        first += BLOCK
    tl.store(out + row, tl.minimum(found, num_tokens - 1).to(tl.int64))
