"""First kernels: what each part of a row has to say."""

# Triton's language: neither typed nor all of Python (no starred expressions).
# mypy: ignore-errors

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def key_of(x):
    """int32 keys in the order of float32 numbers; both zeros have one."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def number_of(key, SHORT: tl.constexpr):
    """The float32 number of a key, or of its upper half, which is all that bfloat16 needs."""
    if SHORT:
        key = (key << 16) | tl.where(key < 0, 0xFFFF, 0)
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def weight_of(x, largest, inverse):
    """exp((x - largest) / temperature), inverse being log2(e) / temperature; 0 of -inf."""
    return tl.exp2((x - tl.maximum(largest, LOWEST)) * inverse)


@triton.jit
def ids_of(tile, element, TILES: tl.constexpr, RUN: tl.constexpr):
    """Which logits a tile has: runs of neighbours from all over the row, in ascending order."""
    return ((element // RUN) * TILES + tile) * RUN + element % RUN


@triton.jit
def tiles(
    logits,
    temperature,
    keys,
    ids,
    sums,
    VOCAB: tl.constexpr,
    TILE_BITS: tl.constexpr,
    TILES: tl.constexpr,
    KEEP: tl.constexpr,
    RUN: tl.constexpr,
):
    """The KEEP largest of the 2^TILE_BITS logits of a tile, and the weights of its runs.

    keys, ids: [rows, TILES, KEEP], descending but for the last TILE_BITS bits of keys: logits that
    differ only there are in the order of the row, and so may be those that are kept of them. Keys
    of bfloat16 are 16 bits, and exact.
    sums: [rows, TILE / RUN * TILES], in the order of the row, relative to the tile's first key.
    """
    SHORT: tl.constexpr = logits.dtype.element_ty == tl.bfloat16
    TILE: tl.constexpr = 1 << TILE_BITS
    row = logits + tl.program_id(0).to(tl.int64) * VOCAB
    tile = tl.program_id(1)
    element = tl.arange(0, TILE)
    at = ids_of(tile, element, TILES, RUN)
    x = tl.load(row + at, mask=at < VOCAB, other=float("-inf")).to(tl.float32)
    heat = tl.load(temperature + tl.program_id(0))

    # The key and, for equal ones, the position, in 32 bits: 64 would be twice the work.
    dropped: tl.constexpr = 16 if SHORT else TILE_BITS
    packed = ((key_of(x) >> dropped) << TILE_BITS) | (TILE - 1 - element)
    best = tl.topk(packed, KEEP)
    best_at = ids_of(tile, TILE - 1 - (best & (TILE - 1)), TILES, RUN)
    if SHORT:
        key = best >> TILE_BITS
    else:
        again = tl.load(row + best_at, mask=best_at < VOCAB, other=float("-inf"))
        key = key_of(again.to(tl.float32))
    number = tl.arange(0, KEEP)
    kept = (tl.program_id(0).to(tl.int64) * TILES + tile) * KEEP + number
    tl.store(keys + kept, key)
    tl.store(ids + kept, best_at)

    first = number_of(tl.sum(tl.where(number == 0, key, 0), axis=0), SHORT)
    inverse = LOG2_E / tl.where(heat > 0, heat, 1.0)
    weight = weight_of(x, first, inverse)
    total = tl.sum(tl.reshape(weight, [TILE // RUN, RUN]), axis=1)
    run = tl.arange(0, TILE // RUN) * TILES + tile
    tl.store(sums + tl.program_id(0).to(tl.int64) * (TILE // RUN * TILES) + run, total)


@triton.jit
def argmax_part(
    logits,
    maxima,
    ids,
    VOCAB: tl.constexpr,
    PART: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The largest of PART logits and the first place where it is, both [rows, parts].

    PART is a multiple of CHUNK.
    """
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    best = tl.full([CHUNK], float("-inf"), tl.float32)
    best_id = tl.full([CHUNK], VOCAB, tl.int32)
    for start in tl.range(0, PART, CHUNK):
        at = part * PART + start + tl.arange(0, CHUNK)
        x = tl.load(logits + row * VOCAB + at, mask=at < VOCAB, other=float("-inf"))
        x = x.to(tl.float32)
        larger = x > best
        best = tl.where(larger, x, best)
        best_id = tl.where(larger, at, best_id)
    largest = tl.max(best, axis=0)
    first = tl.min(tl.where(best == largest, best_id, VOCAB), axis=0)
    place = row * tl.num_programs(1) + part
    tl.store(maxima + place, largest)
    tl.store(ids + place, tl.where(first < VOCAB, first, 0))


@triton.jit
def argmax_whole(maxima, ids, token, PARTS: tl.constexpr, WIDTH: tl.constexpr):
    """The part with the largest logit says which token it is; of equal ones the first."""
    row = tl.program_id(0)
    part = tl.arange(0, WIDTH)
    x = tl.load(maxima + row * PARTS + part, mask=part < PARTS, other=float("-inf"))
    at = tl.load(ids + row * PARTS + part, mask=part < PARTS, other=0x7FFFFFFF)
    tl.store(token + row, tl.min(tl.where(x == tl.max(x, axis=0), at, 0x7FFFFFFF), axis=0))
