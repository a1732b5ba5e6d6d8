"""The norm of one or several rows by one block, with everything of a row in registers."""

# Triton's language: neither typed nor all of Python (no starred expressions).
# mypy: ignore-errors
# ruff: noqa: RUF005

import triton
import triton.language as tl

from qjax_kernels.triton_rows import quantized, scale_of, store_sums, sum_and_max


@triton.jit
def rms(
    x,
    weight,
    bias,
    residual,
    static_scale,
    rows,
    values,
    scale,
    new_residual,
    sums,
    FEATURES: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_SUMS: tl.constexpr,
    QUANTIZE: tl.constexpr,
    EPS: tl.constexpr,
    OFFSET: tl.constexpr,
):
    """RMSNorm. The largest |h * w| gives the largest result, so one reduction does for both.

    x .. static_scale are inputs, values .. sums outputs; those not HAS_ are not touched. A block
    takes ROWS rows, CHUNK columns at a time. QUANTIZE is 'none', 'per_token' or 'static'.
    """
    CHUNKS: tl.constexpr = (FEATURES + CHUNK - 1) // CHUNK
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    base = row.to(tl.int64) * FEATURES
    column = tl.arange(0, CHUNK)[None, :]

    # All loads are issued before the first is needed.
    loaded = ()
    for c in tl.static_range(CHUNKS):
        at = c * CHUNK + column
        here = (row < rows) & (at < FEATURES)
        h = tl.load(x + base + at, mask=here, other=0.0, eviction_policy="evict_first")
        r = h
        if HAS_RESIDUAL:
            r = tl.load(residual + base + at, mask=here, other=0.0, eviction_policy="evict_first")
        w = tl.load(weight + at, mask=at < FEATURES, other=0.0, eviction_policy="evict_last")
        loaded = loaded + ((h, r, w),)

    total = tl.zeros([ROWS, CHUNK], tl.float32)
    largest = tl.zeros([ROWS, CHUNK], tl.float32)
    products = ()
    for c in tl.static_range(CHUNKS):
        h = loaded[c][0].to(tl.float32)
        if HAS_RESIDUAL:
            at = c * CHUNK + column
            new = (h + loaded[c][1].to(tl.float32)).to(x.dtype.element_ty)
            tl.store(new_residual + base + at, new, mask=(row < rows) & (at < FEATURES))
            h = new.to(tl.float32)
        w = loaded[c][2].to(tl.float32)
        if OFFSET != 0:
            w += OFFSET
        total += h * h
        largest = tl.maximum(largest, tl.abs(h * w))
        products = products + (h * w,)
    total, largest = tl.reduce((total, largest), 1, sum_and_max, keep_dims=True)

    factor = tl.rsqrt(total / FEATURES + EPS)
    if QUANTIZE == "per_token":
        step = scale_of(largest * factor, values.dtype.element_ty)
        tl.store(scale + row, step, mask=row < rows)
        factor = tl.div_rn(factor, step)
    elif QUANTIZE == "static":
        factor = factor / tl.load(static_scale)
    for c in tl.static_range(CHUNKS):
        at = c * CHUNK + column
        y = products[c] * factor
        if QUANTIZE == "none":
            y = y.to(values.dtype.element_ty)
        else:
            y = quantized(y, values.dtype.element_ty, QUANTIZE == "static")
        tl.store(values + base + at, y, mask=(row < rows) & (at < FEATURES))
        if HAS_SUMS:
            store_sums(sums, y, row, rows, c, FEATURES)


@triton.jit
def layer(
    x,
    weight,
    bias,
    residual,
    static_scale,
    rows,
    values,
    scale,
    new_residual,
    sums,
    FEATURES: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_SUMS: tl.constexpr,
    QUANTIZE: tl.constexpr,
    EPS: tl.constexpr,
    OFFSET: tl.constexpr,
):
    """LayerNorm: the mean, then the mean square of what is left, then the largest result.

    Parameters as those of `rms`.
    """
    CHUNKS: tl.constexpr = (FEATURES + CHUNK - 1) // CHUNK
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    base = row.to(tl.int64) * FEATURES
    column = tl.arange(0, CHUNK)[None, :]

    loaded = ()
    for c in tl.static_range(CHUNKS):
        at = c * CHUNK + column
        here = (row < rows) & (at < FEATURES)
        h = tl.load(x + base + at, mask=here, other=0.0, eviction_policy="evict_first")
        r = h
        if HAS_RESIDUAL:
            r = tl.load(residual + base + at, mask=here, other=0.0, eviction_policy="evict_first")
        w = tl.load(weight + at, mask=at < FEATURES, other=0.0, eviction_policy="evict_last")
        b = w
        if HAS_BIAS:
            b = tl.load(bias + at, mask=at < FEATURES, other=0.0, eviction_policy="evict_last")
        loaded = loaded + ((h, r, w, b),)

    total = tl.zeros([ROWS, CHUNK], tl.float32)
    hidden = ()
    for c in tl.static_range(CHUNKS):
        h = loaded[c][0].to(tl.float32)
        if HAS_RESIDUAL:
            at = c * CHUNK + column
            new = (h + loaded[c][1].to(tl.float32)).to(x.dtype.element_ty)
            tl.store(new_residual + base + at, new, mask=(row < rows) & (at < FEATURES))
            h = new.to(tl.float32)
        total += h
        hidden = hidden + (h,)
    mean = tl.sum(total, axis=1, keep_dims=True) / FEATURES

    squares = tl.zeros([ROWS, CHUNK], tl.float32)
    for c in tl.static_range(CHUNKS):
        h = tl.where(c * CHUNK + column < FEATURES, hidden[c] - mean, 0.0)
        squares += h * h
    factor = tl.rsqrt(tl.sum(squares, axis=1, keep_dims=True) / FEATURES + EPS)

    largest = tl.zeros([ROWS, CHUNK], tl.float32)
    results = ()
    for c in tl.static_range(CHUNKS):
        w = loaded[c][2].to(tl.float32)
        if OFFSET != 0:
            w += OFFSET
        y = (hidden[c] - mean) * factor * w
        if HAS_BIAS:
            y += loaded[c][3].to(tl.float32)
        y = tl.where(c * CHUNK + column < FEATURES, y, 0.0)
        largest = tl.maximum(largest, tl.abs(y))
        results = results + (y,)

    inverse = tl.full([ROWS, 1], 1.0, tl.float32)
    if QUANTIZE == "per_token":
        step = scale_of(tl.max(largest, axis=1, keep_dims=True), values.dtype.element_ty)
        tl.store(scale + row, step, mask=row < rows)
        inverse = tl.div_rn(inverse, step)
    elif QUANTIZE == "static":
        inverse = inverse / tl.load(static_scale)
    for c in tl.static_range(CHUNKS):
        at = c * CHUNK + column
        if QUANTIZE == "none":
            y = results[c].to(values.dtype.element_ty)
        else:
            y = quantized(results[c] * inverse, values.dtype.element_ty, QUANTIZE == "static")
        tl.store(values + base + at, y, mask=(row < rows) & (at < FEATURES))
        if HAS_SUMS:
            store_sums(sums, y, row, rows, c, FEATURES)
