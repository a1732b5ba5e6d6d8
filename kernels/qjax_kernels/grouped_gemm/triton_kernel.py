"""One tile of one expert's product: a program finds its expert, streams K, scales, stores."""

# Triton's language: neither typed nor all of Python (no starred expressions).
# mypy: ignore-errors

import triton
import triton.language as tl

from qjax_kernels.triton_weights import decode_8bit


@triton.jit
def _add4(a0, a1, a2, a3, b0, b1, b2, b3):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3


@triton.jit
def find(group_sizes, tile, EXPERTS: tl.constexpr, ROWS: tl.constexpr, BM: tl.constexpr):
    """The expert of a tile of rows, the tile's first row and the row after the group's last.

    Each group has its own tiles, which start at its first row. The rows after the last group have
    tiles too, of expert EXPERTS or more, so that somebody writes their zeros.
    """
    i = tl.arange(0, triton.next_power_of_2(EXPERTS))
    sizes = tl.load(group_sizes + i, mask=i < EXPERTS, other=0)
    tiles = (sizes + (BM - 1)) // BM
    after = tl.cumsum(tiles, 0)
    before = after <= tile
    began = after - tiles <= tile  # before, or the tile's own, or empty
    zero = tl.zeros_like(sizes)
    expert, skipped, start, end = tl.reduce(
        (
            before.to(tl.int32),
            tl.where(before, tiles, zero),
            tl.where(before, sizes, zero),
            tl.where(began, sizes, zero),
        ),
        0,
        _add4,
    )
    end = tl.where(expert < EXPERTS, end, ROWS)
    return expert, start + (tile - skipped) * BM, tl.minimum(end, ROWS)


@triton.jit
def tile_of(program, ROW_TILES: tl.constexpr, COLUMN_TILES: tl.constexpr, BAND: tl.constexpr):
    """(row tile, column tile) of a program: bands of BAND row tiles, down each column of a band, so
    that programs side by side in time share an expert's columns, and its rows with the next."""
    band = program // (BAND * COLUMN_TILES)
    first = band * BAND
    height = tl.minimum(ROW_TILES - first, BAND)
    inside = program % (BAND * COLUMN_TILES)
    return first + inside % height, inside // height


@triton.jit
def store(
    acc,
    y,
    row,
    token,
    live,
    column,
    inside,
    x_scale,
    scale,
    row_scale,
    OUT: tl.constexpr,
    HAS_X_SCALE: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_ROW_SCALE: tl.constexpr,
):
    """The sums [rows, columns] of a tile times its scales; `scale` is the expert's."""
    result = acc.to(tl.float32)
    if HAS_X_SCALE:
        result *= tl.load(x_scale + token, mask=live, other=0.0)[:, None]
    if HAS_SCALE:
        result *= tl.load(scale + inside).to(tl.float32)[None, :]
    if HAS_ROW_SCALE:
        result *= tl.load(row_scale + row, mask=live, other=0.0)[:, None]
    y_at = y + row.to(tl.int64)[:, None] * OUT + column[None, :]
    tl.store(y_at, result.to(y.dtype.element_ty), mask=live[:, None] & (column < OUT)[None, :])


@triton.jit
def store_zeros(y, row, live, column, OUT: tl.constexpr):
    """For rows of no expert."""
    y_at = y + row.to(tl.int64)[:, None] * OUT + column[None, :]
    zeros = tl.zeros([row.shape[0], column.shape[0]], y.dtype.element_ty)
    tl.store(y_at, zeros, mask=live[:, None] & (column < OUT)[None, :])


@triton.jit
def grouped(
    x,
    values,
    group_sizes,
    x_scale,
    scale,
    row_ids,
    row_scale,
    y,
    ROWS: tl.constexpr,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    EXPERTS: tl.constexpr,
    ROW_TILES: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BAND: tl.constexpr,
    SWAP: tl.constexpr,
    CONVERT: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_X_SCALE: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_ROW_SCALE: tl.constexpr,
):
    """Weights of the type of x, or of 8 bits that CONVERT ('int8', 'float8_e4m3fn',
    'float8_e5m2') names, with at most one scale an output."""
    COLUMN_TILES: tl.constexpr = (OUT + BN - 1) // BN
    row_tile, column_tile = tile_of(tl.program_id(0), ROW_TILES, COLUMN_TILES, BAND)
    expert, first, end = find(group_sizes, row_tile, EXPERTS, ROWS, BM)
    if first >= end:
        return
    STEPS: tl.constexpr = (IN + BK - 1) // BK
    row = first + tl.arange(0, BM)
    live = row < end
    column = column_tile * BN + tl.arange(0, BN)
    if expert >= EXPERTS:
        store_zeros(y, row, live, column, OUT)
        return

    token = row
    if HAS_IDS:
        token = tl.load(row_ids + row, mask=live, other=0)
    inside = tl.minimum(column, OUT - 1)  # the columns after the last are computed, not stored
    k = tl.arange(0, BK)
    expert = expert.to(tl.int64)
    x_at = x + token.to(tl.int64)[:, None] * IN + k[None, :]
    w_at = values + expert * (OUT * IN) + inside[:, None] * IN + k[None, :]

    SUM: tl.constexpr = tl.int32 if x.dtype.element_ty == tl.int8 else tl.float32
    acc = tl.zeros([BN, BM] if SWAP else [BM, BN], SUM)
    for step in range(STEPS):
        if IN % BK == 0:
            x_tile = tl.load(x_at, mask=live[:, None], other=0.0)
            w_tile = tl.load(w_at)
        else:
            rest = (k < IN - step * BK)[None, :]
            x_tile = tl.load(x_at, mask=live[:, None] & rest, other=0.0)
            w_tile = tl.load(w_at, mask=rest, other=0.0)
        if CONVERT != "":
            w_tile = decode_8bit(w_tile.to(tl.uint8, bitcast=True), None, CONVERT, x_tile.dtype)
        if SWAP:
            acc = tl.dot(w_tile, tl.trans(x_tile), acc, out_dtype=SUM)
        else:
            acc = tl.dot(x_tile, tl.trans(w_tile), acc, out_dtype=SUM)
        x_at += BK
        w_at += BK
    store(
        tl.trans(acc) if SWAP else acc,
        y,
        row,
        token,
        live,
        column,
        inside,
        x_scale,
        scale + expert * OUT,
        row_scale,
        OUT,
        HAS_X_SCALE,
        HAS_SCALE,
        HAS_ROW_SCALE,
    )
