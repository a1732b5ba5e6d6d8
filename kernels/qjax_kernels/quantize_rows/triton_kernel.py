"""Scale and rounding of one or several rows by one block, with everything of a row in registers."""

# Triton's language: neither typed nor all of Python (no starred expressions).
# mypy: ignore-errors
# ruff: noqa: RUF005

import triton
import triton.language as tl

from qjax_kernels.triton_rows import quantized, scale_of


@triton.jit
def quantize(
    x,
    static_scale,
    rows,
    values,
    scale,
    FEATURES: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    STATIC: tl.constexpr,
):
    """A block takes ROWS rows, CHUNK columns at a time; `scale` is written unless it is STATIC."""
    CHUNKS: tl.constexpr = (FEATURES + CHUNK - 1) // CHUNK
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    base = row.to(tl.int64) * FEATURES
    column = tl.arange(0, CHUNK)[None, :]

    # All loads are issued before the first is needed.
    loaded = ()
    for c in tl.static_range(CHUNKS):
        at = c * CHUNK + column
        here = (row < rows) & (at < FEATURES)
        loaded = loaded + (
            tl.load(x + base + at, mask=here, other=0.0, eviction_policy="evict_first"),
        )

    inverse = tl.full([ROWS, 1], 1.0, tl.float32)
    if STATIC:
        inverse = inverse / tl.load(static_scale)
    else:
        largest = tl.zeros([ROWS, CHUNK], tl.float32)
        for c in tl.static_range(CHUNKS):
            largest = tl.maximum(largest, tl.abs(loaded[c].to(tl.float32)))
        step = scale_of(tl.max(largest, axis=1, keep_dims=True), values.dtype.element_ty)
        tl.store(scale + row, step, mask=row < rows)
        inverse = tl.div_rn(inverse, step)
    for c in tl.static_range(CHUNKS):
        at = c * CHUNK + column
        y = quantized(loaded[c].to(tl.float32) * inverse, values.dtype.element_ty, STATIC)
        tl.store(values + base + at, y, mask=(row < rows) & (at < FEATURES))
