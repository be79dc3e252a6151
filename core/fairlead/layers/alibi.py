"""Attention with linear biases in place of positions."""

import math


def alibi_slopes(num_heads: int) -> tuple[float, ...]:
    """One slope per head: 2^(-8/n), its square, … for a power of two n of heads; for others those of the next smaller
    one, and every second of the next larger one.

    Source: Press et al., "Train Short, Test Long" (2021), section 3 and the appendix's reference code.
    """
    n = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 * i / n) for i in range(1, n + 1)]
    slopes += [2 ** (-4 * i / n) for i in range(1, 2 * (num_heads - n) + 1, 2)]
    return tuple(slopes)
