"""Attention in Triton: tiles of queries over tiles of keys with an online softmax.

arXiv:2307.08691. A tile's rows are queries of all heads of one KV head, side by side: row r is
query r // GROUP of head r % GROUP, so that few queries fill a tile too; the one of a decode step
is a tile of its heads. Keys come from one array or from pages; what is not seen is never used, for
it may hold anything. Where tiles are few and keys many, the keys are split; `triton_merge` adds up.

A head's features are in one part, a power of two, or in two, of which the second covers the rest;
those of an 8-bit cache are in twice as many, even and odd ones (see `triton_words`). Queries and
sums of values are tuples of these.
"""

# Triton's language: neither typed nor all of Python (no starred expressions).
# mypy: ignore-errors
# ruff: noqa: RUF005

import triton
import triton.language as tl

from qjax_kernels.prefill_attention.triton_span import LOWEST, sizes, span
from qjax_kernels.prefill_attention.triton_words import split_words

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _read(
    at, seen, ITEMS: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr, FORMAT: tl.constexpr
):
    """WIDTH columns from each of the addresses `at`: (even, odd) ones, or all of them twice.

    ITEMS: how many there are. MASKED: only rows that are seen are read, the others are zeros.
    """
    column = tl.arange(0, WIDTH)[None, :]
    if MASKED:
        x = tl.load(at + column, mask=seen[:, None] & (column < ITEMS), other=0.0)
    elif ITEMS < WIDTH:
        x = tl.load(at + column, mask=column < ITEMS, other=0.0)
    else:
        x = tl.load(at + column)
    if FORMAT == "float":
        return x, x
    else:
        return split_words(x, FORMAT)


@triton.jit
def attend(
    q,
    k,
    v,
    table,
    context,
    lengths,
    k_scale,
    v_scale,
    slopes,
    y,
    part,
    weight,
    BATCH: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH2: tl.constexpr,
    LENGTH: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    PAGES: tl.constexpr,
    SCALE: tl.constexpr,
    WINDOW: tl.constexpr,
    CAP: tl.constexpr,
    HAS_CONTEXT: tl.constexpr,
    LENGTHS: tl.constexpr,
    K_SCALES: tl.constexpr,
    V_SCALES: tl.constexpr,
    HAS_SLOPES: tl.constexpr,
    FORMAT: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SPLIT: tl.constexpr,
    SPLITS: tl.constexpr,
    SECTION: tl.constexpr,
):
    """A tile of rows over all keys, or over one of SPLITS parts of SPLIT tiles each.

    Of `q` to `slopes` those are read that the constants speak of. y is written where SPLITS is 1,
    else part [batch, query, head, split, dim] and weight [.., split].

    k, v: [pages, kv_heads, PAGE_SIZE, dim]; PAGE_SIZE 0: [batch, LENGTH, kv_heads, dim].
    PAGES: of a row of `table`; 0: there is none, page b is sequence b.
    WIDTH, WIDTH2: powers of two, the parts of a row of the cache, in words if it is of 8 bits. The
    last one may be wider than what is left of the row; WIDTH2 0: there is one part.
    SECTION: pairs of a sequence and a KV head whose tiles are done before the next pairs', while
    their keys are in the cache; among these the tiles with the most keys come first.
    """
    NARROW: tl.constexpr = FORMAT != "float"
    EACH: tl.constexpr = 2 if NARROW else 1  # features of a word; parts of a read
    READS: tl.constexpr = 2 if WIDTH2 > 0 else 1
    DTYPE: tl.constexpr = tl.float16 if NARROW else k.dtype.element_ty
    GROUP: tl.constexpr = HEADS // KV_HEADS
    TILES: tl.constexpr = (TOKENS * GROUP + ROWS - 1) // ROWS
    section = tl.program_id(0) // (SECTION * TILES)
    index = tl.program_id(0) % (SECTION * TILES)
    pairs = tl.minimum(SECTION, BATCH * KV_HEADS - section * SECTION)
    tile = TILES - 1 - index // pairs
    pair = section * SECTION + index % pairs
    b = pair // KV_HEADS
    g = pair % KV_HEADS

    start, count = sizes(b, context, lengths, TOKENS, HAS_CONTEXT, LENGTHS)
    first, last, low, high = span(tile, start, count, ROWS, GROUP, WINDOW)
    begin = low // KEYS * KEYS
    end = high
    if SPLITS > 1:
        begin += tl.program_id(1) * (SPLIT * KEYS)
        end = tl.minimum(begin + SPLIT * KEYS, high)
        if begin >= end:
            return

    row = tile * ROWS + tl.arange(0, ROWS)
    query = row // GROUP
    head = g * GROUP + row % GROUP
    there = query < TOKENS
    real = query < count
    place = (b.to(tl.int64) * TOKENS + query) * HEADS + head
    queries = ()
    mixed = ()
    for i in tl.static_range(READS):
        for parity in tl.static_range(EACH):
            column = (i * WIDTH + tl.arange(0, (WIDTH2 if i else WIDTH))[None, :]) * EACH + parity
            mask = real[:, None] & (column < HEAD_DIM)
            x = tl.load(q + place[:, None] * HEAD_DIM + column, mask=mask, other=0.0)
            queries = queries + (x.to(DTYPE),)
            mixed = mixed + (tl.zeros([ROWS, (WIDTH2 if i else WIDTH)], tl.float32),)
    factor = SCALE * LOG2E
    if K_SCALES > 0:
        factor = factor * tl.load(k_scale + g % K_SCALES)
    slope = tl.zeros([ROWS], tl.float32)
    if HAS_SLOPES:
        slope = tl.load(slopes + head, mask=real, other=0.0) * LOG2E
    position = start + query

    # Rows of keys and values are STRIDE elements apart.
    ITEMS: tl.constexpr = HEAD_DIM // EACH
    STRIDE: tl.constexpr = ITEMS if PAGE_SIZE > 0 else KV_HEADS * ITEMS
    PAGE_STRIDE: tl.constexpr = KV_HEADS * ITEMS * (PAGE_SIZE if PAGE_SIZE > 0 else LENGTH)
    if NARROW:
        k = k.to(tl.pointer_type(tl.int16))
        v = v.to(tl.pointer_type(tl.int16))
    origin = g.to(tl.int64) * (ITEMS * (PAGE_SIZE if PAGE_SIZE > 0 else 1))
    if PAGES == 0:
        origin += b.to(tl.int64) * PAGE_STRIDE
    table += b * PAGES
    # Keys of a tile are memory of the call where tiles do not end in the middle of a page.
    ALIGNED: tl.constexpr = (PAGE_SIZE if PAGES > 0 else LENGTH) % KEYS == 0

    # Keys between these are seen by all rows.
    inner_low = 0
    if WINDOW > 0:
        inner_low = tl.maximum(start + last + 1 - WINDOW, 0)
    inner_high = tl.minimum(start + first + 1, high)
    in_tile = tl.arange(0, KEYS)
    top = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for t0 in tl.range(begin, end, KEYS):
        t = t0 + in_tile
        seen = (t >= low) & (t < high)
        if PAGES == 0:
            offset = origin + t0 * tl.full([], STRIDE, tl.int64)
            rows = (in_tile * STRIDE)[:, None]
        elif ALIGNED:
            page = tl.load(table + t0 // PAGE_SIZE).to(tl.int64)
            offset = origin + page * PAGE_STRIDE + t0 % PAGE_SIZE * STRIDE
            rows = (in_tile * STRIDE)[:, None]
        else:
            page = tl.load(table + t // PAGE_SIZE, mask=seen, other=0).to(tl.int64)
            offset = origin
            rows = (page * PAGE_STRIDE + t % PAGE_SIZE * STRIDE)[:, None]

        # Scores are powers of 2 in the end: exponents times log2(e).
        s = tl.zeros([ROWS, KEYS], tl.float32)
        for i in tl.static_range(READS):
            at = k + offset + (rows + i * WIDTH)
            keys = _read(at, seen, ITEMS - i * WIDTH, (WIDTH2 if i else WIDTH), not ALIGNED, FORMAT)
            for parity in tl.static_range(EACH):
                s = tl.dot(queries[i * EACH + parity], tl.trans(keys[parity]), s)
        times = factor
        if CAP > 0:
            s = (CAP * LOG2E) * (1 - 2 / (1 + tl.exp2(s * (factor * (2 / CAP)))))
            times = 1.0
        if HAS_SLOPES:
            distance = (t[None, :] - position[:, None]).to(tl.float32)
            s = s * times + slope[:, None] * distance
            times = 1.0
        if (t0 < inner_low) | (t0 + KEYS > inner_high):
            visible = seen[None, :] & (t[None, :] <= position[:, None])
            if WINDOW > 0:
                visible = visible & (t[None, :] > position[:, None] - WINDOW)
            s = tl.where(visible, s, float("-inf"))

        new_top = tl.maximum(top, tl.max(s, axis=1) * times)
        weights = tl.exp2(s * times - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        top = new_top
        total = total * shrink + tl.sum(weights, axis=1)
        weights = weights.to(DTYPE)
        new = ()
        for i in tl.static_range(READS):
            at = v + offset + (rows + i * WIDTH)
            values = _read(at, seen, ITEMS - i * WIDTH, (WIDTH2 if i else WIDTH), True, FORMAT)
            for parity in tl.static_range(EACH):
                old = mixed[i * EACH + parity] * shrink[:, None]
                new = new + (tl.dot(weights, values[parity], old),)
        mixed = new

    some = real & (total != 0)
    inverse = 1 / total
    if V_SCALES > 0:
        inverse = inverse * tl.load(v_scale + g % V_SCALES)
    if SPLITS > 1:
        place = place * SPLITS + tl.program_id(1)
        tl.store(weight + place, tl.where(some, top + tl.log2(total), float("-inf")), mask=there)
        y = part
    for i in tl.static_range(READS):
        result = mixed[i * EACH]
        if NARROW:
            both = tl.join(result, mixed[i * EACH + 1])
            result = tl.reshape(both, [ROWS, 2 * (WIDTH2 if i else WIDTH)])
        column = EACH * i * WIDTH + tl.arange(0, EACH * (WIDTH2 if i else WIDTH))[None, :]
        result = tl.where(some[:, None], result * inverse[:, None], 0.0)
        mask = there[:, None] & (column < HEAD_DIM)
        tl.store(y + place[:, None] * HEAD_DIM + column, result.to(y.dtype.element_ty), mask=mask)
