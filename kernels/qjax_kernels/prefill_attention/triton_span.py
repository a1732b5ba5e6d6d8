"""Which queries and keys a tile has: what the Triton kernels must agree on."""

# Triton's language: neither typed nor all of Python (no starred expressions).
# mypy: ignore-errors

import triton
import triton.language as tl

LOWEST = tl.constexpr(-1.0e30)  # of a running maximum: finite, so that differences are numbers


@triton.jit
def sizes(
    b, context, lengths, TOKENS: tl.constexpr, HAS_CONTEXT: tl.constexpr, LENGTHS: tl.constexpr
):
    """(position of query 0, queries) of sequence b."""
    start = 0
    count = TOKENS
    if LENGTHS == "keys":  # of a decode step, whose query is the last of them
        start = tl.load(lengths + b) - 1
    elif LENGTHS == "queries":
        count = tl.minimum(tl.load(lengths + b), TOKENS)
    if HAS_CONTEXT:
        start = tl.load(context + b)
    return start, count


@triton.jit
def span(tile, start, count, ROWS: tl.constexpr, GROUP: tl.constexpr, WINDOW: tl.constexpr):
    """(first and last query of a tile, first key that one of them sees, last one + 1)."""
    first = tile * ROWS // GROUP
    last = tl.minimum((tile * ROWS + ROWS - 1) // GROUP, count - 1)
    low = 0
    if WINDOW > 0:
        low = tl.maximum(start + first + 1 - WINDOW, 0)
    high = tl.where(first < count, start + last + 1, 0)
    return first, last, low, high
