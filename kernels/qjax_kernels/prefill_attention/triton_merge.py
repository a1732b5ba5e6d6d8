"""What several blocks found for different keys of one query, added up."""

# Triton's language: neither typed nor all of Python (no starred expressions).
# mypy: ignore-errors

import triton
import triton.language as tl

from qjax_kernels.prefill_attention.triton_span import LOWEST, sizes, span


@triton.jit
def merge(
    part,
    weight,
    context,
    lengths,
    y,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_CONTEXT: tl.constexpr,
    LENGTHS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SPLIT: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLITS_WIDTH: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """The sum of the parts of one head of one query, weighted by 2 ** weight.

    Constants as those of `attend`; the WIDTHs are powers of two that cover what they are of.
    """
    GROUP: tl.constexpr = HEADS // KV_HEADS
    place = tl.program_id(0).to(tl.int64)
    head = tl.program_id(0) % HEADS
    query = tl.program_id(0) // HEADS % TOKENS
    b = tl.program_id(0) // (HEADS * TOKENS)
    start, count = sizes(b, context, lengths, TOKENS, HAS_CONTEXT, LENGTHS)
    tile = (query * GROUP + head % GROUP) // ROWS
    _, _, low, high = span(tile, start, count, ROWS, GROUP, WINDOW)
    keys = tl.maximum(high - low // KEYS * KEYS, 0)
    parts = (keys + (SPLIT * KEYS - 1)) // (SPLIT * KEYS)

    column = tl.arange(0, WIDTH)
    index = tl.arange(0, SPLITS_WIDTH)
    weight += place * SPLITS
    part += place * (SPLITS * HEAD_DIM)
    top = tl.max(tl.load(weight + index, mask=index < parts, other=float("-inf")), axis=0)
    top = tl.maximum(top, LOWEST)
    total = tl.zeros([AT_ONCE, 1], tl.float32)
    mixed = tl.zeros([AT_ONCE, WIDTH], tl.float32)
    for first in tl.range(0, parts, AT_ONCE):
        i = first + tl.arange(0, AT_ONCE)[:, None]
        w = tl.exp2(tl.load(weight + i, mask=i < parts, other=float("-inf")) - top)
        mask = (i < parts) & (column < HEAD_DIM)[None, :]
        total += w
        mixed += w * tl.load(part + i * HEAD_DIM + column[None, :], mask=mask, other=0.0)
    total = tl.sum(total)
    mixed = tl.sum(mixed, axis=0)
    result = tl.where((query < count) & (total != 0), mixed / total, 0.0)
    tl.store(y + place * HEAD_DIM + column, result.to(y.dtype.element_ty), mask=column < HEAD_DIM)
