"""Code for the threads of a warpgroup: addresses and instructions where array operations cannot say
which lane holds what.

Functions named emit_* take a `Threads`, which turns every operation on int32 values into
instructions. A test gives them one that computes instead, for all 128 threads at once.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm

Value = Any  # of each thread: an int32, a predicate, or two 16-bit floats
Memory = Any  # a memref
F16_MAX = 65504.0


class Threads:
    """Instructions of a warpgroup of 4 warps by 32 lanes."""

    def index(self) -> Value:
        """Of the thread in its warpgroup."""
        return self.divmod(utils.thread_idx(), 128)[1]

    def constant(self, x: int) -> Value:
        """x in every thread."""
        return utils.c(x, ir.IntegerType.get_signless(32))

    def add(self, x: Value, y: Any) -> Value:
        """x + y."""
        return arith.addi(x, self.constant(y) if isinstance(y, int) else y)

    def mul(self, x: Value, y: int) -> Value:
        """x * y."""
        return arith.muli(x, self.constant(y))

    def divmod(self, x: Value, y: int) -> tuple[Value, Value]:
        """(x // y, x % y) of x >= 0."""
        return arith.divui(x, self.constant(y)), arith.remui(x, self.constant(y))

    def xor(self, x: Value, y: Value) -> Value:
        """x ^ y."""
        return arith.xori(x, y)

    def less(self, x: Value, y: Any) -> Value:
        """x < y."""
        y = self.constant(y) if isinstance(y, int) else y
        return arith.cmpi(arith.CmpIPredicate.slt, x, y)

    def either(self, x: Value, y: Value) -> Value:
        """Both predicates or one of them."""
        return arith.ori(x, y)

    @contextlib.contextmanager
    def when(self, predicate: Value) -> Iterator[None]:
        """Only threads for which it holds do what is in here."""
        with utils.when(predicate):
            yield

    def load_pair(self, memory: Memory, byte: Value) -> Value:
        """Two 16-bit floats."""
        kind = ir.VectorType.get((2,), ir.MemRefType(memory.type).element_type)
        return llvm.load(kind, _address(memory, byte))

    def store_pair(self, memory: Memory, byte: Value, pair: Value) -> None:
        """Two 16-bit floats."""
        llvm.store(pair, _address(memory, byte))

    def store_rounded(self, memory: Memory, byte: Value, values: list[Value]) -> None:
        """Neighbouring floats, in the 16-bit type of the memory."""
        element = ir.MemRefType(memory.type).element_type
        wide = utils.vector_concat(values) if len(values) > 1 else values[0]
        rounded = arith.truncf(ir.VectorType.get((len(values),), element), wide)
        llvm.store(rounded, _address(memory, byte))

    def store_zeros(self, memory: Memory, byte: Value) -> None:
        """16 bytes of 0."""
        zero = utils.c(0, ir.VectorType.get((4,), ir.IntegerType.get_signless(32)))
        llvm.store(zero, _address(memory, byte))

    def part(self, pair: Value, i: int) -> Value:
        """One of two floats."""
        return utils.vector_slice(pair, slice(i, i + 1))

    def to_f16(self, pair: Value) -> Value:
        """Two 16-bit floats as float16; beyond its range they saturate."""
        f16 = _pair(jnp.float16)
        if pair.type == f16:
            return pair
        wide = arith.extf(_pair(jnp.float32), pair)
        limit = utils.c(F16_MAX, wide.type)
        return arith.truncf(f16, arith.maximumf(arith.minimumf(wide, limit), arith.negf(limit)))

    def ldmatrix(self, memory: Memory, byte: Value, count: int, *, transposed: bool) -> list[Value]:
        """`count` 8 x 8 matrices of pairs of bytes, a word of each; lane i's address is that of row
        i % 8 of matrix i / 8. Lane i has pairs 2 (i % 4) and the next of row i / 4; or, transposed,
        of column i / 4."""
        words = nvvm.ldmatrix(
            _address(memory, byte),
            layout=nvvm.MMALayout.col if transposed else nvvm.MMALayout.row,
            num=count,
            shape=ir.Attribute.parse("#nvvm.ld_st_matrix_shape<m=8, n=8>"),
            elt_type=nvvm.LdStMatrixEltType.B16,
        )
        i32 = ir.IntegerType.get_signless(32)
        return [llvm.extractvalue(i32, words, [i]) for i in range(count)]

    def widen(self, word: Value, dtype: np.dtype, *pairs: tuple[int, int]) -> list[Value]:
        """float16 pairs of the bytes named, of the 4 in a word of an 8-bit dtype."""
        i32 = ir.IntegerType.get_signless(32)
        if dtype == jnp.int8:
            # 0x6400 + n is 1024 + n in float16, for n = byte + 128 in its last 8 bits.
            ptx = "{ .reg .b32 n, bias; xor.b32 n, $2, 0x80808080; mov.b32 bias, 0x64806480; "
            for i, (low, high) in enumerate(pairs):
                ptx += f"prmt.b32 ${i}, n, 0x64646464, 0x4{high}4{low}; "
                ptx += f"sub.rn.f16x2 ${i}, ${i}, bias; "
        else:
            order = "".join(str(i) for i in itertools.chain(*pairs))[::-1]
            ptx = f"{{ .reg .b32 n; .reg .b16 a, b; prmt.b32 n, $2, 0, 0x{order}; "
            ptx += "mov.b32 {a, b}, n; cvt.rn.f16x2.e4m3x2 $0, a; cvt.rn.f16x2.e4m3x2 $1, b; "
        words = utils.inline_ptx(ptx + "}", word, result_types=(i32, i32))
        return [utils.bitcast(x, _pair(jnp.float16)) for x in words]


def _pair(dtype: Any) -> Any:
    return ir.VectorType.get((2,), utils.dtype_to_ir_type(np.dtype(dtype)))


def _address(memory: Memory, byte: Value) -> Value:
    i8 = ir.IntegerType.get_signless(8)
    return utils.getelementptr(utils.memref_ptr(memory), [byte], i8)


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


def emit_put_rows(
    t: Threads,
    mixed: np.ndarray,
    rows: Memory,
    shape: tuple[int, int],
    start: Value,
    neighbours: int,
) -> None:
    """Store the transpose of an accumulator [features, columns], as far as it is within `rows`.

    Args:
      t: the threads.
      mixed: registers [blocks of 64 rows, blocks of 8 columns, 2 halves of a warp's rows], each two
        neighbouring columns.
      rows: a contiguous matrix of a 16-bit type.
      shape: its rows, at most the columns of `mixed`, and its columns, a multiple of 16.
      start: the feature that the first row holds.
      neighbours: rows i and i + 8 of every 16 hold features i and i + 8 (1), or features 2i and
        2i + 1 (2).
    """
    heads, head_dim = shape
    warp, lane = t.divmod(t.index(), 32)
    i, c = t.divmod(lane, 4)
    first = t.add(t.add(t.mul(warp, 16), t.mul(i, neighbours)), start)
    for block, eight, column in np.ndindex(*mixed.shape[:2], 2):
        head, feature = t.add(t.mul(c, 2), 8 * eight + column), t.add(first, 64 * block)
        halves = [t.part(x, column) for x in mixed[block, eight]]
        with t.when(t.less(head, heads)), t.when(t.less(feature, head_dim)):
            where = t.mul(t.add(t.mul(head, head_dim), feature), 2)
            if neighbours == 2:
                t.store_rounded(rows, where, halves)
            else:
                for half, x in enumerate(halves):
                    t.store_rounded(rows, t.add(where, 16 * half), [x])


def emit_synchronize_cluster(context: Any) -> None:
    """Wait for all threads of the cluster, and see what they wrote to shared memory."""
    del context
    for what in ("arrive.release", "wait.acquire"):
        utils.inline_ptx(f"barrier.cluster.{what}.aligned;", has_side_effects=True, convergent=True)
