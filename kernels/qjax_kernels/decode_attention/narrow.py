"""An 8-bit cache as float16 operands in registers, without moving a value to another lane.

Of every 16 values along the summed axis, the tensor cores want values 2c, 2c+1, 8+2c and 9+2c in
lane c of each four. What `ldmatrix` gives are 4 neighbouring bytes of a row.

  - Keys are summed over features; lane c gets features 4c..4c+3 of every 16. Any order of the sum
    will do if both sides have it: feature 16g + 4c + 2j + t takes place 16g + 8j + 2c + t, in the
    queries too.
  - Values are summed over tokens, and `ldmatrix.trans` of pairs of bytes gives lane c features 2i
    and 2i+1 of tokens 2c and 2c+1. Taken apart, they are what rows i and i+8 want: row
    16g + 8j + i of the product is feature 16g + 2i + j.

The functions named emit_* emit code for the threads; the others are what they compute, in jnp.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax_kernels.decode_attention.places import offset
from qjax_kernels.decode_attention.threads import F16_MAX, Memory, Threads, Value


def _summed_order(x: jax.Array) -> jax.Array:
    return x.reshape(x.shape[0], -1, 4, 2, 2).swapaxes(2, 3).reshape(x.shape)


def queries(x: jax.Array) -> jax.Array:
    """[columns, head_dim] of 16 bits in the order of `keys`; beyond float16 they saturate."""
    x = jnp.clip(x.astype(jnp.float32), -F16_MAX, F16_MAX)
    return _summed_order(x.astype(jnp.float16))


def keys(x: jax.Array) -> jax.Array:
    """[tokens, head_dim] as a left operand."""
    return _summed_order(x.astype(jnp.float16))


def values(x: jax.Array) -> jax.Array:
    """[tokens, head_dim] as a left operand [head_dim rounded up to 64, tokens]."""
    tokens, head_dim = x.shape
    full = jnp.zeros((-(-head_dim // 64) * 64, tokens), jnp.float16)
    full = lax.dynamic_update_slice(full, x.astype(jnp.float16).T, (0, 0))
    return full.reshape(-1, 8, 2, tokens).swapaxes(1, 2).reshape(full.shape)


def rows(mixed: jax.Array) -> jax.Array:
    """A product with `values` [features, columns], features in order again: [columns, features]."""
    features, columns = mixed.shape
    return mixed.reshape(-1, 2, 8, columns).swapaxes(1, 2).reshape(features, columns).T


def emit_query_pair(t: Threads, pair: Value, column: Value) -> tuple[Value, Value]:
    """Two neighbouring `queries` and where they go."""
    group, place = t.divmod(column, 16)
    c, place = t.divmod(place, 4)
    return t.to_f16(pair), t.add(t.add(t.mul(group, 16), t.mul(place, 4)), t.mul(c, 2))


def emit_keys(
    t: Threads, source: Memory, tokens: int, head_dim: int, dtype: np.dtype, swizzle: int | None
) -> np.ndarray:
    """`keys` of shared memory [tokens, head_dim].

    Returns:
      Registers [tokens / 64, head_dim / 8, 2]: of each 64 rows by 8 columns, the two halves of a
      warp's 16 rows; a lane has two neighbouring columns.
    """
    registers = np.empty((tokens // 64, head_dim // 8, 2), object)
    warp, lane = t.divmod(t.index(), 32)
    second, row = t.divmod(lane, 16)
    row = t.add(row, t.mul(warp, 16))
    chunks = head_dim // 16
    for block, chunk in itertools.product(range(tokens // 64), range(0, chunks, 2)):
        count = min(2, chunks - chunk)  # a warp's 16 rows by 16 or 32 columns
        byte = t.mul(t.add(second, chunk), 16) if count == 2 else t.constant(16 * chunk)
        where = offset(t, t.add(row, 64 * block), byte, head_dim, swizzle)
        words = t.ldmatrix(source, where, 2 * count, transposed=False)
        for i, word in enumerate(words):
            for j, pair in enumerate(t.widen(word, dtype, (0, 1), (2, 3))):
                registers[block, 2 * (chunk + i // 2) + j, i % 2] = pair
    return registers


def emit_values(
    t: Threads, source: Memory, tokens: int, head_dim: int, dtype: np.dtype, swizzle: int | None
) -> np.ndarray:
    """`values` of shared memory [tokens, head_dim]; rows behind head_dim repeat others.

    Returns:
      Registers [blocks of 64 rows, tokens / 8, 2], as `emit_keys` has them.
    """
    blocks, chunks = -(-head_dim // 64), head_dim // 16
    registers = np.empty((blocks, tokens // 8, 2), object)
    warp, lane = t.divmod(t.index(), 32)
    for block, start in itertools.product(range(blocks), range(0, tokens, 32)):
        chunk = t.add(warp, 4 * block)
        if 4 * block + 4 > chunks:
            chunk = t.divmod(chunk, chunks)[1]
        where = offset(t, t.add(lane, start), t.mul(chunk, 16), head_dim, swizzle)
        words = t.ldmatrix(source, where, 4, transposed=True)
        for i, word in enumerate(words):
            for j, pair in enumerate(t.widen(word, dtype, (0, 2), (1, 3))):
                registers[block, start // 8 + i, j] = pair
    return registers
