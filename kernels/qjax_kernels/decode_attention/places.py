"""Where in memory the threads of a warpgroup put what they have: queries, zeros, results."""

import dataclasses
from collections.abc import Callable

import numpy as np

from qjax_kernels.decode_attention.threads import Memory, Threads, Value


def offset(t: Threads, row: Value, byte: Value, row_bytes: int, swizzle: int | None) -> Value:
    """Bytes from the start of a matrix in shared memory to byte `byte` of row `row`.

    A swizzled matrix is cut into tiles of 8 rows by `swizzle` bytes; in a tile, the 16-byte chunk
    of an address is exclusive-ored with the address's bits 7 and up.
    """
    if swizzle is None:
        return t.add(t.mul(row, row_bytes), byte)
    (block, row), (tile, byte) = t.divmod(row, 8), t.divmod(byte, swizzle)
    start = t.add(t.mul(block, 8 * row_bytes), t.mul(tile, 8 * swizzle))
    within = t.add(t.mul(row, swizzle), byte)
    chunk = t.mul(t.divmod(t.divmod(within, 128)[0], swizzle // 16)[1], 16)
    return t.add(start, t.xor(within, chunk))


def emit_put_queries(
    t: Threads,
    raw: Memory,
    queries: Memory,
    shape: tuple[int, int],
    swizzle: int,
    convert: Callable[[Threads, Value, Value], tuple[Value, Value]] | None,
) -> None:
    """Copy rows of 16-bit values to a swizzled matrix, a pair of neighbours at a time.

    Args:
      t: the threads.
      raw: rows of `shape`.
      queries: the matrix.
      shape: rows, columns.
      swizzle: bytes.
      convert: (threads, pair, its column) -> (pair, its new column); None: as they are.
    """
    rows, columns = shape
    pairs = rows * columns // 2
    for start in range(0, pairs, 128):
        index = t.add(t.index(), start)
        with t.when(t.less(index, pairs)):
            row, pair = t.divmod(index, columns // 2)
            x, column = t.load_pair(raw, t.mul(index, 4)), t.mul(pair, 2)
            if convert is not None:
                x, column = convert(t, x, column)
            where = offset(t, row, t.mul(column, 2), 2 * columns, swizzle)
            t.store_pair(queries, where, x)


def emit_clear_rows(
    t: Threads,
    matrix: Memory,
    bounds: tuple[Value, Value],
    shape: tuple[int, int],
    swizzle: int | None,
) -> None:
    """Zero the rows of a matrix that are not between two bounds.

    Args:
      t: the threads.
      matrix: in shared memory.
      bounds: the first row that is kept, and the one behind the last.
      shape: rows, bytes of a row.
      swizzle: bytes; None: rows are contiguous.
    """
    rows, row_bytes = shape
    low, high = bounds
    chunks = row_bytes // 16
    for start in range(0, rows * chunks, 128):
        index = t.add(t.index(), start)
        row, chunk = t.divmod(index, chunks)
        outside = t.either(t.less(row, low), t.less(t.add(high, -1), row))
        with t.when(outside), t.when(t.less(index, rows * chunks)):
            t.store_zeros(matrix, offset(t, row, t.mul(chunk, 16), row_bytes, swizzle))


@dataclasses.dataclass(frozen=True)
class Rows:
    """A contiguous matrix in global memory, of the heads that share keys and values.

    Attributes:
      memory: of a 16-bit type, int8 or e4m3.
      shape: its rows, and its columns, a multiple of 16.
      itemsize: bytes of an element.
      through: the 16-bit type that everything is rounded to, first or only.
      scale: float32 that divides what 8 bits then hold; else None.
    """

    memory: Memory
    shape: tuple[int, int]
    itemsize: int
    through: np.dtype
    scale: Value | None = None

    def put(self, t: Threads, head: Value, feature: Value, values: list[Value], step: int) -> None:
        """Store two features of a head, `step` from each other."""
        where = t.mul(t.add(t.mul(head, self.shape[1]), feature), self.itemsize)
        if step == 1:
            t.store_rounded(self.memory, where, values, self.through, self.scale)
            return
        for i, x in enumerate(values):
            at = t.add(where, step * i * self.itemsize)
            t.store_rounded(self.memory, at, [x], self.through, self.scale)


def emit_put_rows(t: Threads, mixed: np.ndarray, rows: Rows, start: Value, neighbours: int) -> None:
    """Store the transpose of an accumulator [features, columns], as far as it is within `rows`.

    Args:
      t: the threads.
      mixed: registers [blocks of 64 rows, blocks of 8 columns, 2 halves of a warp's rows], each two
        neighbouring columns.
      rows: no more of them than columns of `mixed`.
      start: the feature that the first row holds.
      neighbours: rows i and i + 8 of every 16 hold features i and i + 8 (1), or features 2i and
        2i + 1 (2).
    """
    heads, head_dim = rows.shape
    warp, lane = t.divmod(t.index(), 32)
    i, c = t.divmod(lane, 4)
    first = t.add(t.add(t.mul(warp, 16), t.mul(i, neighbours)), start)
    for block, eight, column in np.ndindex(*mixed.shape[:2], 2):
        head, feature = t.add(t.mul(c, 2), 8 * eight + column), t.add(first, 64 * block)
        halves = [t.part(x, column) for x in mixed[block, eight]]
        with t.when(t.less(head, heads)), t.when(t.less(feature, head_dim)):
            rows.put(t, head, feature, halves, 1 if neighbours == 2 else 8)
