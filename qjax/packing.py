"""Bit order of narrow numbers at the checkpoint boundary.

In memory an array has the logical shape; int3, int5, int6 and int7 take a byte each there. On disk
a row, the last axis, is one stream of bits in uint8: element i has the bits i*b to i*b + b - 1, its
lowest bit first, and bit j is bit j % 8 (from the lowest) of byte j // 8. Integers are in two's
complement, e2m1 is sign, exponent, mantissa from its highest bit down. A row is filled up to whole
bytes with zeros. So int4 and e2m1 have the even element in the low nibble.

XLA's own bitcast has this order for 2 and 4 bits: there packing is free of arithmetic. Packing of
any width keeps the sharding of the array where each shard has whole bytes.
"""

from functools import partial

import jax
import jax.numpy as jnp

from qjax.numerics import Format

# Bits of a number -> numbers that fill whole bytes together, with no smaller number of them.
_TOGETHER = {2: 4, 3: 8, 4: 2, 5: 8, 6: 4, 7: 8}


def packed_shape(shape: tuple[int, ...], bits: int) -> tuple[int, ...]:
    """Shape of the uint8 array that holds an array of `shape`, rank 1 or more.

    >>> packed_shape((2, 128), 3), packed_shape((2, 5), 4)
    ((2, 48), (2, 3))
    """
    return (*shape[:-1], -(-shape[-1] * bits // 8))


@partial(jax.jit, static_argnames="fmt")
def pack(values: jax.Array, fmt: Format) -> jax.Array:
    """Numbers of `fmt` [..., n] -> uint8 [..., ceil(n * bits / 8)].

    Args:
      fmt: of fewer than 8 bits.

    Raises:
      TypeError: values are not of the dtype of `fmt`, or it has whole bytes.

    >>> from qjax.numerics import FORMATS
    >>> pack(jnp.array([1, -2, 7, -8], jnp.int4), FORMATS["int4"]).tolist()
    [225, 135]
    >>> pack(jnp.array([1, -1, 3, -4], jnp.int8), FORMATS["int3"]).tolist()
    [249, 8]
    """
    if values.dtype != fmt.dtype or fmt.bits not in _TOGETHER:
        raise TypeError(f"{values.dtype} is not packed as {fmt.name}, which is {fmt.dtype}")
    n, together = values.shape[-1], _TOGETHER[fmt.bits]
    fill = [(0, 0)] * (values.ndim - 1) + [(0, -n % together)]
    grouped = jnp.pad(values, fill).reshape(*values.shape[:-1], -(-n // together), together)
    if fmt.bits in (2, 4):
        return jax.lax.bitcast_convert_type(grouped, jnp.uint8)
    codes = jax.lax.bitcast_convert_type(grouped, jnp.uint8)
    ones = (codes[..., None] >> jnp.arange(fmt.bits, dtype=jnp.uint8)) & jnp.uint8(1)
    return _bytes(ones)[..., : packed_shape(values.shape, fmt.bits)[-1]]


@partial(jax.jit, static_argnames=("fmt", "n"))
def unpack(packed: jax.Array, fmt: Format, n: int) -> jax.Array:
    """uint8 [..., ceil(n * bits / 8)] -> numbers of `fmt` [..., n]; the inverse of `pack`.

    >>> from qjax.numerics import FORMATS
    >>> unpack(jnp.array([225, 135], jnp.uint8), FORMATS["int4"], 4).tolist()
    [1, -2, 7, -8]
    """
    lead = packed.shape[:-1]
    if fmt.bits in (2, 4):
        numbers = jax.lax.bitcast_convert_type(packed, fmt.dtype)
        return numbers.reshape(*lead, packed.shape[-1] * (8 // fmt.bits))[..., :n]
    together = _TOGETHER[fmt.bits]
    whole = -(-n // together) * together * fmt.bits // 8
    fill = [(0, 0)] * len(lead) + [(0, whole - packed.shape[-1])]
    ones = (jnp.pad(packed, fill)[..., None] >> jnp.arange(8, dtype=jnp.uint8)) & jnp.uint8(1)
    ones = ones.reshape(*lead, whole * 8 // fmt.bits, fmt.bits)
    # Two's complement: the highest bit counts negative.
    weights = [*(2**i for i in range(fmt.bits - 1)), -(2 ** (fmt.bits - 1))]
    numbers = jnp.sum(ones.astype(jnp.int8) * jnp.array(weights, jnp.int8), axis=-1, dtype=jnp.int8)
    return numbers[..., :n]


def _bytes(ones: jax.Array) -> jax.Array:
    """uint8 zeros and ones [..., groups, together, bits] -> all bits of a row, 8 to a byte."""
    lead, (groups, together, bits) = ones.shape[:-3], ones.shape[-3:]
    eights = ones.reshape(*lead, groups * together * bits // 8, 8)
    return jnp.sum(eights << jnp.arange(8, dtype=jnp.uint8), axis=-1, dtype=jnp.uint8)
