"""activation(gate) * up, or an activation alone, of a row or of a part of it where no scale needs
the whole row."""

# Triton's language: neither typed nor all of Python (no starred expressions).
# mypy: ignore-errors
# ruff: noqa: RUF005

import triton
import triton.language as tl

from qjax_kernels.triton_rows import logistic, quantized, scale_of, store_sums


@triton.jit
def _activation(x, NAME: tl.constexpr):
    if NAME == "silu":
        return x * logistic(x)
    elif NAME == "gelu":
        return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif NAME == "relu":
        return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif NAME == "quick_gelu":
        return x * logistic(1.702 * x)
    else:  # gelu_tanh: (1 + tanh(z)) / 2 is the logistic function of 2 z
        return x * logistic(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def glu(
    x,
    static_scale,
    rows,
    values,
    scale,
    sums,
    FEATURES: tl.constexpr,
    WIDTH: tl.constexpr,
    FIRST: tl.constexpr,
    GATED: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_SUMS: tl.constexpr,
    QUANTIZE: tl.constexpr,
):
    """A block takes ROWS rows and CHUNKS * CHUNK columns of the result; the whole row if QUANTIZE
    (which is 'none', 'per_token' or 'static') is 'per_token'. Rows of x have WIDTH columns, which
    are read from FIRST on."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    base = row.to(tl.int64) * FEATURES
    source = x + row.to(tl.int64) * WIDTH + FIRST
    first = tl.program_id(1) * CHUNKS
    column = tl.arange(0, CHUNK)[None, :]

    # All loads are issued before the first is needed.
    loaded = ()
    for c in tl.static_range(CHUNKS):
        at = (first + c) * CHUNK + column
        here = (row < rows) & (at < FEATURES)
        gate = tl.load(source + at, mask=here, other=0.0, eviction_policy="evict_first")
        up = gate
        if GATED:
            up = tl.load(
                source + (FEATURES + at), mask=here, other=0.0, eviction_policy="evict_first"
            )
        loaded = loaded + ((gate, up),)

    largest = tl.zeros([ROWS, CHUNK], tl.float32)
    results = ()
    for c in tl.static_range(CHUNKS):
        y = _activation(loaded[c][0].to(tl.float32), ACTIVATION)
        if GATED:
            y *= loaded[c][1].to(tl.float32)
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
        at = (first + c) * CHUNK + column
        if QUANTIZE == "none":
            y = results[c].to(values.dtype.element_ty)
        else:
            y = quantized(results[c] * inverse, values.dtype.element_ty, QUANTIZE == "static")
        tl.store(values + base + at, y, mask=(row < rows) & (at < FEATURES))
        if HAS_SUMS:
            store_sums(sums, y, row, rows, first + c, FEATURES)
