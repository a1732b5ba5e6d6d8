"""Second kernel: a token of each row, from the largest logits of its tiles.

Every question is of one kind: the largest t for which the numbers at positions >= t weigh at least
so much. Positions are keys of logits and weights 1 for the k-th largest logit, exponentials for
top_p; positions are ids for the token that is drawn.
"""

# Triton's language: neither typed nor all of Python (no starred expressions).
# mypy: ignore-errors
# ruff: noqa: RUF005

import triton
import triton.language as tl

from qjax_kernels.sampling.triton_tiles import LOG2_E, key_of, number_of, weight_of

LEAST = tl.constexpr(-(2**31))
LEAST_SHORT = tl.constexpr(-(2**15) - 1)


@triton.jit
def _probes(low, high, COUNT: tl.constexpr):
    """int64 [COUNT] that divide low .. high; the last is above low if they are 2 or more apart."""
    return low + ((high - low) * (1 + tl.arange(0, COUNT))) // (COUNT + 1)


@triton.jit
def _above(position, weight, probes, CHUNKS: tl.constexpr):
    """The weight of positions at or above each probe; position, weight: CHUNKS tensors each.

    [probes, numbers], and a number a thread: so a thread has all probes of its own numbers.
    """
    total = tl.zeros([probes.shape[0], position[0].shape[0]], tl.float32)
    for c in tl.static_range(CHUNKS):
        inside = position[c][None, :] >= probes[:, None]
        total += tl.where(inside, weight[c][None, :], 0.0)
    return tl.sum(total, axis=1)


@triton.jit
def _total(position, weight, lowest, CHUNKS: tl.constexpr):
    """The weight from `lowest` on, added up in the same order as in a search."""
    probes = tl.full([8], 0, tl.int32) + lowest
    return tl.max(_above(position, weight, probes, CHUNKS), axis=0)


@triton.jit
def _search(position, weight, target, low, high, CHUNKS: tl.constexpr):
    """The largest t in low .. high - 1 with a weight of at least target at or above it."""
    low = low.to(tl.int64)
    high = high.to(tl.int64)
    while high - low > 1:
        probes = _probes(low, high, 8)
        enough = _above(position, weight, probes.to(tl.int32), CHUNKS) >= target
        low = tl.max(tl.where(enough, probes, low), axis=0)
        high = tl.min(tl.where(enough, high, probes), axis=0)
    return low.to(tl.int32)


@triton.jit
def _row_above(
    row, probes, lowest, largest, inverse, COUNT: tl.constexpr, BY_ID: tl.constexpr,
    VOCAB: tl.constexpr, CHUNK: tl.constexpr, SHORT: tl.constexpr,
):  # fmt: skip
    """`_above` of the logits of a whole row with keys from `lowest` on, read anew."""
    AT_ONCE: tl.constexpr = 8  # loads in flight
    total = tl.zeros([probes.shape[0], CHUNK], tl.float32)
    for start in tl.range(0, VOCAB, AT_ONCE * CHUNK):
        loaded = ()
        for c in tl.static_range(AT_ONCE):
            at = start + c * CHUNK + tl.arange(0, CHUNK)
            loaded = loaded + (tl.load(row + at, mask=at < VOCAB, other=float("-inf")),)
        for c in tl.static_range(AT_ONCE):
            at = start + c * CHUNK + tl.arange(0, CHUNK)
            x = loaded[c].to(tl.float32)
            key = key_of(x) >> 16 if SHORT else key_of(x)
            weight = tl.full([CHUNK], 1.0, tl.float32) if COUNT else weight_of(x, largest, inverse)
            weight = tl.where((key >= lowest) & (at < VOCAB), weight, 0.0)
            position = at if BY_ID else key
            inside = position[None, :] >= probes[:, None]
            total += tl.where(inside, weight[None, :], 0.0)
    return tl.sum(total, axis=1)


@triton.jit
def _row_search(
    row, target, low, high, lowest, largest, inverse, COUNT: tl.constexpr, BY_ID: tl.constexpr,
    VOCAB: tl.constexpr, CHUNK: tl.constexpr, SHORT: tl.constexpr,
):  # fmt: skip
    """`_search` of a whole row; fewer probes at once, since here each costs more than a pass."""
    low = low.to(tl.int64)
    high = high.to(tl.int64)
    while high - low > 1:
        probes = _probes(low, high, 4)
        above = _row_above(
            row, probes.to(tl.int32), lowest, largest, inverse, COUNT, BY_ID, VOCAB, CHUNK, SHORT
        )
        low = tl.max(tl.where(above >= target, probes, low), axis=0)
        high = tl.min(tl.where(above >= target, high, probes), axis=0)
    return low.to(tl.int32)


@triton.jit
def _row_total(
    row, lowest, largest, inverse, VOCAB: tl.constexpr, CHUNK: tl.constexpr, SHORT: tl.constexpr
):
    """The weight of all logits with keys from `lowest` on, added up as in a search."""
    probes = tl.full([4], 0, tl.int32)
    above = _row_above(row, probes, lowest, largest, inverse, False, True, VOCAB, CHUNK, SHORT)
    return tl.max(above, axis=0)


@triton.jit
def _from_whole_row(
    row, k, p, uniform, low, high, largest, inverse,
    VOCAB: tl.constexpr, CHUNK: tl.constexpr, SHORT: tl.constexpr,
):  # fmt: skip
    """The slow way, which needs no candidates: some 20 to 40 passes over the row."""
    lowest = low
    if k < VOCAB:
        count = k.to(tl.float32)
        lowest = _row_search(
            row, count, low, high, low, largest, inverse, True, False, VOCAB, CHUNK, SHORT
        )
    if p < 1:
        total = _row_total(row, lowest, largest, inverse, VOCAB, CHUNK, SHORT)
        lowest = _row_search(
            row, p * total, lowest, high, low, largest, inverse, False, False, VOCAB, CHUNK, SHORT
        )
    total = _row_total(row, lowest, largest, inverse, VOCAB, CHUNK, SHORT)
    zero = tl.full([], 0, tl.int32)
    return _row_search(
        row, (1 - uniform) * total, zero, zero + VOCAB, lowest, largest, inverse, False, True,
        VOCAB, CHUNK, SHORT,
    )  # fmt: skip


@triton.jit
def _first_of_row(row, VOCAB: tl.constexpr, CHUNK: tl.constexpr):
    """The first place of the largest logit of a whole row."""
    best = tl.full([CHUNK], float("-inf"), tl.float32)
    best_at = tl.full([CHUNK], VOCAB, tl.int32)
    for start in tl.range(0, VOCAB, CHUNK):
        at = start + tl.arange(0, CHUNK)
        x = tl.load(row + at, mask=at < VOCAB, other=float("-inf")).to(tl.float32)
        better = (x > best) | (best_at == VOCAB)
        best = tl.where(better, x, best)
        best_at = tl.where(better, at, best_at)
    largest = tl.max(best, axis=0)
    return tl.min(tl.where(best == largest, best_at, VOCAB), axis=0)


@triton.jit
def _run_weights(
    keys, sums, largest, inverse, TILES: tl.constexpr, KEEP: tl.constexpr, RUNS: tl.constexpr,
    RUNS_WIDTH: tl.constexpr, SHORT: tl.constexpr,
):  # fmt: skip
    """The weights of a row's runs relative to the row's largest logit, not to its tile's."""
    run = tl.arange(0, RUNS_WIDTH)
    weight = tl.load(sums + run, mask=run < RUNS, other=0.0)
    top = number_of(tl.load(keys + (run % TILES) * KEEP), SHORT)
    return weight * weight_of(top, largest, inverse)


@triton.jit
def _from_all(
    row, weight, uniform, largest, inverse,
    VOCAB: tl.constexpr, RUN: tl.constexpr, RUNS: tl.constexpr,
):  # fmt: skip
    """A token of an unfiltered row: first the run that it is in, then its place there."""
    cumulative = tl.cumsum(weight, axis=0)
    # Below the sum of all, so that it is passed somewhere.
    target = tl.max(cumulative, axis=0)
    target = tl.minimum(uniform * target, target * (1 - 2.0**-23))
    before = cumulative <= target
    at = tl.minimum(tl.sum(before.to(tl.int32), axis=0), RUNS - 1)
    rest = target - tl.max(tl.where(before, cumulative, 0.0), axis=0)

    element = at * RUN + tl.arange(0, RUN)
    x = tl.load(row + element, mask=element < VOCAB, other=float("-inf")).to(tl.float32)
    weight = weight_of(x, largest, inverse)
    inside = tl.cumsum(weight, axis=0) <= rest
    possible = tl.max(tl.where(weight > 0, element, at * RUN), axis=0)
    return tl.minimum(at * RUN + tl.sum(inside.to(tl.int32), axis=0), possible)


@triton.jit
def draw(
    logits,
    uniform,
    temperature,
    top_k,
    top_p,
    keys,
    ids,
    sums,
    token,
    VOCAB: tl.constexpr,
    TILES: tl.constexpr,
    KEEP: tl.constexpr,
    RUN: tl.constexpr,
    RUNS: tl.constexpr,
    TILE_BITS: tl.constexpr,
    THREADS: tl.constexpr,
    CHUNKS: tl.constexpr,
    TILES_WIDTH: tl.constexpr,
    RUNS_WIDTH: tl.constexpr,
):
    """A block takes a row. CHUNKS * THREADS cover the candidates; TILES_WIDTH, RUNS_WIDTH: powers
    of two that cover the tiles and the runs; RUNS: of a row."""
    SHORT: tl.constexpr = logits.dtype.element_ty == tl.bfloat16
    row_id = tl.program_id(0).to(tl.int64)
    row = logits + row_id * VOCAB
    keys += row_id * (TILES * KEEP)
    ids += row_id * (TILES * KEEP)
    sums += row_id * RUNS

    low = tl.full([], LEAST_SHORT if SHORT else LEAST, tl.int32)
    key = ()
    at = ()
    for c in tl.static_range(CHUNKS):
        candidate = c * THREADS + tl.arange(0, THREADS)
        here = candidate < TILES * KEEP
        key = key + (tl.load(keys + candidate, mask=here, other=LEAST),)
        at = at + (tl.load(ids + candidate, mask=here, other=VOCAB),)
    tile = tl.arange(0, TILES_WIDTH)
    last_keys = tl.load(keys + tile * KEEP + (KEEP - 1), mask=tile < TILES, other=LEAST)
    heat = tl.load(temperature + row_id)
    k = tl.load(top_k + row_id)
    k = tl.where(k <= 0, VOCAB, k)
    p = tl.load(top_p + row_id)
    u = tl.load(uniform + row_id)

    best = key[0]
    for c in tl.static_range(1, CHUNKS):
        best = tl.maximum(best, key[c])
    top_key = tl.max(best, axis=0)
    first_at = tl.where(key[0] == top_key, at[0], VOCAB)
    for c in tl.static_range(1, CHUNKS):
        first_at = tl.minimum(first_at, tl.where(key[c] == top_key, at[c], VOCAB))
    largest = number_of(top_key, SHORT)
    # Bits that the first kernel did not compare: no logit is above `high`, and none that is not a
    # candidate is above `missing`.
    unknown: tl.constexpr = 0 if SHORT else (1 << TILE_BITS) - 1
    missing = tl.max(last_keys, axis=0) | unknown
    high = (top_key | unknown) + 1
    inverse = LOG2_E / tl.where(heat > 0, heat, 1.0)
    if heat <= 0:
        if missing < top_key:
            tl.store(token + row_id, tl.min(first_at, axis=0))
        else:
            tl.store(token + row_id, _first_of_row(row, VOCAB, THREADS))
    elif (k >= VOCAB) & (p >= 1):
        runs = _run_weights(keys, sums, largest, inverse, TILES, KEEP, RUNS, RUNS_WIDTH, SHORT)
        tl.store(token + row_id, _from_all(row, runs, u, largest, inverse, VOCAB, RUN, RUNS))
    else:
        ones = ()
        weights = ()
        for c in tl.static_range(CHUNKS):
            real = at[c] < VOCAB
            weight = weight_of(number_of(key[c], SHORT), largest, inverse)
            weights = weights + (tl.where(real, weight, 0.0),)
            ones = ones + (tl.where(real, 1.0, 0.0),)
        lowest = low
        if k < VOCAB:
            count = tl.minimum(k.to(tl.float32), _total(key, ones, low, CHUNKS))
            lowest = _search(key, ones, count, low, high, CHUNKS)
        if p < 1:
            if k < VOCAB:
                total = _total(key, weights, lowest, CHUNKS)
            else:
                runs = _run_weights(
                    keys, sums, largest, inverse, TILES, KEEP, RUNS, RUNS_WIDTH, SHORT
                )
                total = tl.sum(runs, axis=0)
            lowest = _search(key, weights, p * total, lowest, high, CHUNKS)
        if missing < lowest:
            kept = ()
            for c in tl.static_range(CHUNKS):
                kept = kept + (tl.where(key[c] >= lowest, weights[c], 0.0),)
            zero = tl.full([], 0, tl.int32)
            total = _total(at, kept, zero, CHUNKS)
            drawn = _search(at, kept, (1 - u) * total, zero, zero + VOCAB, CHUNKS)
        else:
            drawn = _from_whole_row(
                row, k, p, u, low, high, largest, inverse, VOCAB, THREADS, SHORT
            )
        tl.store(token + row_id, drawn)
