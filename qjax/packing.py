"""Bit order of sub-byte integers at the checkpoint boundary.

In memory int4 is `jnp.int4` with the logical shape. On disk two neighbours along the last axis
share a byte, the even one in the low nibble, each in two's complement: byte j of a row holds
elements 2j (bits 0-3) and 2j+1 (bits 4-7). An odd axis is filled up with a zero. XLA's own int4
bitcast has this order, so packing is free of arithmetic and keeps the sharding of the array.
"""

from functools import partial

import jax
import jax.numpy as jnp


def packed_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the uint8 array that holds an int4 array of `shape`, rank 1 or more."""
    return (*shape[:-1], -(-shape[-1] // 2))


@jax.jit
def pack_int4(values: jax.Array) -> jax.Array:
    """int4 [..., n] -> uint8 [..., ceil(n/2)], low nibble first.

    >>> pack_int4(jnp.array([1, -2, 7, -8], jnp.int4)).tolist()
    [225, 135]
    """
    if values.dtype != jnp.int4:
        raise TypeError(f"pack_int4 packs int4, not {values.dtype}")
    if values.shape[-1] % 2:
        fill = [(0, 0)] * (values.ndim - 1) + [(0, 1)]
        values = jnp.pad(values, fill)
    pairs = values.reshape(*packed_shape(values.shape), 2)
    return jax.lax.bitcast_convert_type(pairs, jnp.uint8)


@partial(jax.jit, static_argnames="n")
def unpack_int4(packed: jax.Array, n: int) -> jax.Array:
    """uint8 [..., ceil(n/2)] -> int4 [..., n]; the inverse of `pack_int4`.

    >>> unpack_int4(jnp.array([225, 135], jnp.uint8), 4).tolist()
    [1, -2, 7, -8]
    """
    nibbles = jax.lax.bitcast_convert_type(packed, jnp.int4)
    return nibbles.reshape(*packed.shape[:-1], 2 * packed.shape[-1])[..., :n]
