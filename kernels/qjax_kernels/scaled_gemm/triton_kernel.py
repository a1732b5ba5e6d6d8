"""The product of two operands in int8 or in fp8, for every NVIDIA GPU that multiplies them."""

# Triton's language: neither typed nor all of Python (no starred expressions).
# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def product(
    x,
    x_scale,
    values,
    scale,
    bias,
    residual,
    tokens,
    y,
    OUT: tl.constexpr,
    FEATURES: tl.constexpr,
    OUTS: tl.constexpr,
    TOKENS: tl.constexpr,
    STEP: tl.constexpr,
    SPLITS: tl.constexpr,
    BAND: tl.constexpr,
    BLOCKED: tl.constexpr,
    TOKEN_SCALES: tl.constexpr,
    OUT_SCALES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    """A tile of OUTS x TOKENS, over one of SPLITS parts of the features, STEP at a time.

    x: [tokens, FEATURES]; values: [OUT, FEATURES]; x_scale, scale: as many as TOKEN_SCALES and
      OUT_SCALES say, or, BLOCKED, [tokens, FEATURES / 128] and [OUT / 128, FEATURES / 128].
    y: [tokens, OUT], or int32 or float32 [SPLITS, tokens, OUT], parts of sums without all the rest
      (but for the scales of blocks).
    BAND: tiles of tokens that are visited before the next tile of outputs.
    """
    INTEGER: tl.constexpr = x.dtype.element_ty == tl.int8
    SUM: tl.constexpr = tl.int32 if INTEGER else tl.float32
    STEPS: tl.constexpr = (FEATURES + STEP - 1) // STEP
    PART: tl.constexpr = (STEPS + SPLITS - 1) // SPLITS
    WHOLE: tl.constexpr = FEATURES % STEP == 0
    if BLOCKED:
        tl.static_assert(128 % STEP == 0)
        tl.static_assert(128 % OUTS == 0)

    across: tl.constexpr = (OUT + OUTS - 1) // OUTS
    pid, split = tl.program_id(0), tl.program_id(1)
    band = pid // (BAND * across)
    inside = pid % (BAND * across)
    width = tl.minimum(tl.cdiv(tokens, TOKENS) - band * BAND, BAND)
    n0 = (inside // width) * OUTS
    n = n0 + tl.arange(0, OUTS)
    m = (band * BAND + inside % width) * TOKENS + tl.arange(0, TOKENS)

    k = tl.arange(0, STEP)
    row = tl.minimum(n, OUT - 1) if OUT % OUTS else n
    values_at = values + row[:, None].to(tl.int64) * FEATURES + k[None, :]
    x_at = x + m[:, None].to(tl.int64) * FEATURES + k[None, :]
    here = (m < tokens)[:, None]

    first = split * PART
    last = tl.minimum(first + PART, STEPS)
    total = tl.zeros([OUTS, TOKENS], SUM)
    # The scales of a block of features are loaded while the one before it is multiplied.
    factor = _block_scale(x_scale, scale, first, m, n0, tokens, FEATURES, STEP, BLOCKED)
    for step in tl.range(first, last):
        at = step * STEP
        if WHOLE:
            w_tile = tl.load(values_at + at, eviction_policy="evict_first")
            x_tile = tl.load(x_at + at, mask=here, other=0.0)
        else:
            inner = (at + k < FEATURES)[None, :]
            w_tile = tl.load(values_at + at, mask=inner, other=0.0)
            x_tile = tl.load(x_at + at, mask=here & inner, other=0.0)
        if BLOCKED:
            now = factor
            after = tl.minimum(step + 1, STEPS - 1)
            factor = _block_scale(x_scale, scale, after, m, n0, tokens, FEATURES, STEP, BLOCKED)
            total += tl.dot(w_tile, x_tile.T) * now[None, :]
        else:
            total = tl.dot(w_tile, x_tile.T, total, out_dtype=SUM)

    at = (split * tokens + m[:, None]).to(tl.int64) * OUT + n[None, :]
    there = here & (n < OUT)[None, :]
    if SPLITS == 1:
        result = total.to(tl.float32)
        if not BLOCKED:
            if TOKEN_SCALES:
                result *= tl.load(x_scale + m, mask=m < tokens, other=0.0)[None, :]
            else:
                result *= tl.load(x_scale)
            if OUT_SCALES:
                result *= tl.load(scale + row)[:, None]
            else:
                result *= tl.load(scale)
        if HAS_BIAS:
            result += tl.load(bias + row).to(tl.float32)[:, None]
        result = result.T
        if HAS_RESIDUAL:
            result += tl.load(residual + at, mask=there, other=0.0).to(tl.float32)
        tl.store(y + at, result.to(y.dtype.element_ty), mask=there)
    else:
        tl.store(y + at, total.T, mask=there)


@triton.jit
def _block_scale(
    x_scale,
    scale,
    step,
    m,
    n0,
    tokens,
    FEATURES: tl.constexpr,
    STEP: tl.constexpr,
    BLOCKED: tl.constexpr,
):
    """float32 [TOKENS]: of the tokens and the tile's outputs, for the block that a step is in."""
    if BLOCKED:
        BLOCKS: tl.constexpr = FEATURES // 128
        block = step * STEP // 128
        at = x_scale + m.to(tl.int64) * BLOCKS + block
        of_tokens = tl.load(at, mask=m < tokens, other=0.0)
        return of_tokens * tl.load(scale + n0 // 128 * BLOCKS + block)
    else:
        return tl.zeros([m.shape[0]], tl.float32)
