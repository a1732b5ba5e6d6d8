"""The slopes of ALiBi, a number a head; arXiv:2108.12409.

For a number of heads that is no power of 2, implementations differ in which slopes they take.
"""

import math


def geometric_slopes(heads: int) -> tuple[float, ...]:
    """2^(-8 i / n) for i = 1..n, n the largest power of 2 in `heads`; the rest from 2n, odd ones.

    >>> geometric_slopes(3)
    (0.0625, 0.00390625, 0.25)
    """
    n = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * i / n) for i in range(1, n + 1)]
    more = [2 ** (-8 * i / (2 * n)) for i in range(1, 2 * (heads - n) + 1, 2)]
    return tuple(slopes + more)


def interleaved_slopes(heads: int) -> tuple[float, ...]:
    """2^(-8 i / n) for i = 1..n, n the least power of 2 that holds `heads`; of those the even ones,
    then the odd ones, as many as there are heads.

    >>> interleaved_slopes(3)
    (0.0625, 0.00390625, 0.25)
    """
    n = 2 ** math.ceil(math.log2(heads))
    slopes = [2 ** (-8 * i / n) for i in range(1, n + 1)]
    if n != heads:
        slopes = [*slopes[1::2], *slopes[::2]][:heads]
    return tuple(slopes)
