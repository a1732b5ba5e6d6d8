"""The product of activations with packed weights, for every NVIDIA GPU with tensor cores."""

# Triton's language: neither typed nor all of Python (no starred expressions).
# mypy: ignore-errors

import triton
import triton.language as tl

from qjax_kernels.triton_weights import CHUNK, decode_8bit, decode_int4, times

BYTES = tl.constexpr(CHUNK)


@triton.jit
def product(
    x,
    words,
    row_scale,
    table,
    bias,
    tokens,
    y,
    OUT: tl.constexpr,
    FEATURES: tl.constexpr,
    GROUP: tl.constexpr,
    FORMAT: tl.constexpr,
    OUTS: tl.constexpr,
    TOKENS: tl.constexpr,
    CHUNKS: tl.constexpr,
    SPLITS: tl.constexpr,
    BAND: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SUMS: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """A tile of OUTS x TOKENS, over one of SPLITS parts of the features, CHUNKS chunks at a time.

    x: [tokens, FEATURES]; words, row_scale, table: as in `portable.Packed`.
    y: [tokens, OUT], or float32 [SPLITS, tokens, OUT], parts of sums, neither scaled by row_scale
      nor with a bias.
    GROUP: features that share a scale and a zero point; a power of two if all of them do.
    BAND: tiles of tokens that are visited before the next tile of outputs.
    SUMS: scale the sum over each group; else the weights, in the type of x.
    AHEAD: load what weights are converted with a step ahead into registers. They are then converted
      by all warps together and exchanged in shared memory; else each warp converts what it takes.
    """
    DTYPE: tl.constexpr = x.dtype.element_ty
    FOUR: tl.constexpr = FORMAT == "int4"
    WIDTH: tl.constexpr = 64 if FOUR else 32  # features of a chunk
    STEP: tl.constexpr = CHUNKS * WIDTH
    TOTAL: tl.constexpr = (FEATURES + WIDTH - 1) // WIDTH
    STEPS: tl.constexpr = (TOTAL + CHUNKS - 1) // CHUNKS
    PART: tl.constexpr = (STEPS + SPLITS - 1) // SPLITS
    WHOLE: tl.constexpr = FEATURES % STEP == 0
    # Groups of 32: one is the low nibbles of a chunk, the next the high ones.
    PAIR: tl.constexpr = FOUR and GROUP == 32
    HAS_TABLE: tl.constexpr = HAS_SCALE or HAS_ZERO
    tl.static_assert(GROUP % STEP == 0 or (PAIR and CHUNKS == 1 and not SUMS))

    across: tl.constexpr = (OUT + OUTS - 1) // OUTS
    pid, split = tl.program_id(0), tl.program_id(1)
    band = pid // (BAND * across)
    inside = pid % (BAND * across)
    width = tl.minimum(tl.cdiv(tokens, TOKENS) - band * BAND, BAND)
    n = (inside // width) * OUTS + tl.arange(0, OUTS)
    m = (band * BAND + inside % width) * TOKENS + tl.arange(0, TOKENS)

    byte = tl.arange(0, CHUNKS * BYTES)
    row = tl.minimum(n, OUT - 1) if OUT % OUTS else n
    words_at = words + row[:, None] * BYTES + (byte % BYTES)[None, :]
    words_at += (byte // BYTES)[None, :].to(tl.int64) * (OUT * BYTES)
    feature = tl.arange(0, STEP)
    x_at = x + m[:, None].to(tl.int64) * FEATURES + feature[None, :]
    here = (m < tokens)[:, None]

    first = split * PART
    last = tl.minimum(first + PART, STEPS)
    total = tl.zeros([OUTS, TOKENS], tl.float32)
    # Numbers of the table are loaded a step ahead, while this one multiplies. Those that weights
    # are converted with can travel in the copies of the weights instead.
    raw = _look_up(table, first * STEP // GROUP, row, OUT, HAS_TABLE, PAIR)
    for step in tl.range(first, last):
        codes_at = words_at + tl.cast(step, tl.int64) * (CHUNKS * OUT * BYTES)
        tile_at = x_at + step * STEP
        if WHOLE:
            codes = tl.load(codes_at, eviction_policy="evict_first")
            tile = tl.load(tile_at, mask=here, other=0.0)
        else:
            chunk = step * CHUNKS + byte // BYTES
            codes = tl.load(codes_at, mask=(chunk < TOTAL)[None, :], other=0)
            inner = step * STEP + feature < FEATURES
            tile = tl.load(tile_at, mask=here & inner[None, :], other=0.0)
        now = raw
        if not AHEAD:
            now = _look_up(table, step * STEP // GROUP, row, OUT, HAS_TABLE, PAIR)
        low_scale, low_zero = _scale_and_zero(now[0], HAS_ZERO, DTYPE)
        high_scale, high_zero = _scale_and_zero(now[1], HAS_ZERO, DTYPE)
        sum_scale, _ = _scale_and_zero(raw[0], HAS_ZERO, DTYPE)
        after = tl.minimum(step + 1, STEPS - 1)
        raw = _look_up(table, after * STEP // GROUP, row, OUT, HAS_TABLE, PAIR)

        if FOUR:
            low, high = decode_int4(
                codes, low_zero if HAS_ZERO else None, high_zero if HAS_ZERO else None, DTYPE
            )
            if HAS_SCALE and not SUMS:
                low = times(low, low_scale.to(DTYPE))
                high = times(high, high_scale.to(DTYPE))
            # Registers are renamed, nothing moves: the nibble is a bit of the feature's number.
            weights = tl.join(low, high).reshape(OUTS, CHUNKS, BYTES, 2)
            weights = weights.permute(0, 1, 3, 2).reshape(OUTS, STEP)
        else:
            weights = decode_8bit(codes, low_zero if HAS_ZERO else None, FORMAT, DTYPE)
            if HAS_SCALE and not SUMS:
                weights = times(weights, low_scale.to(DTYPE))
        if HAS_SCALE and SUMS:
            total += tl.dot(weights, tile.T) * sum_scale
        else:
            total = tl.dot(weights, tile.T, total)

    if SPLITS == 1:
        total *= tl.load(row_scale + row)[:, None]
        if HAS_BIAS:
            total += tl.load(bias + row).to(tl.float32)[:, None]
    at = (split * tokens + m[:, None]).to(tl.int64) * OUT + n[None, :]
    tl.store(y + at, total.T.to(y.dtype.element_ty), mask=here & (n < OUT)[None, :])


@triton.jit
def _look_up(table, group, row, OUT: tl.constexpr, HAS: tl.constexpr, PAIR: tl.constexpr):
    """Rows `group` and, if PAIR, the one after it of table [groups, OUT], else the same twice."""
    if HAS:
        a = tl.load(table + group * OUT + row)[:, None]
    else:
        a = tl.zeros([row.shape[0], 1], table.dtype.element_ty)
    b = a
    if HAS and PAIR:
        b = tl.load(table + (group + 1) * OUT + row)[:, None]
    return a, b


@triton.jit
def _scale_and_zero(raw, HAS_ZERO: tl.constexpr, DTYPE: tl.constexpr):
    """What an entry of the table says: float32 and, if there are zero points, DTYPE."""
    zero = raw
    scale = raw.to(tl.float32)
    if HAS_ZERO:
        scale = (raw & -256).to(tl.float32, bitcast=True)
        zero = ((raw << 24) >> 24).to(tl.float32).to(DTYPE)
    return scale, zero
