"""Blocks: which numbers of a matrix share a scale. Shapes and reshapes alone.

A block is (rows, columns) of the last two axes, -1 meaning the whole axis.
"""

import jax
import jax.numpy as jnp

from qjax.errors import ConfigError, one_of


def block_for(granularity: str, group_size: int, axis: int) -> tuple[int, int]:
    """The `block` of a granularity: 'per_tensor', 'per_channel', 'per_group' or 'per_block'.

    >>> block_for("per_group", 128, -1), block_for("per_channel", -1, -2)
    ((1, 128), (-1, 1))
    >>> block_for("per_block", 128, -1)
    (128, 128)
    """
    one_of("granularity", granularity, ("per_tensor", "per_channel", "per_group", "per_block"))
    if granularity == "per_tensor":
        return (-1, -1)
    if granularity == "per_block":
        return (group_size, group_size)
    along = group_size if granularity == "per_group" else -1
    return (1, along) if axis == -1 else (along, 1)


def scale_shape(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """Shape of the scales of an array of `shape`.

    Raises:
      ConfigError: if a block of one row or column does not divide its axis, naming both.
    """
    if len(shape) < 2:
        raise ConfigError(f"an array of shape {shape} cannot be quantized: it needs two axes")
    may_be_cut = min(block) > 1
    blocks = []
    for size, length in zip(shape[-2:], block, strict=True):
        length = size if length == -1 else length
        if length < 1 or (size % length and not may_be_cut):
            raise ConfigError(
                f"group size {length} does not divide an axis of {size} (array {shape}); choose a "
                f"divisor of {size}, or -1 for one scale per channel"
            )
        blocks.append(-(-size // length))
    return (*shape[:-2], *blocks)


def blocked(x: jax.Array, block: tuple[int, int]) -> jax.Array:
    """[..., R, C] -> [..., r, rows of a block, c, columns of one], filled up with zeros."""
    lengths = [size if n == -1 else n for size, n in zip(x.shape[-2:], block, strict=True)]
    fill = [-size % n for size, n in zip(x.shape[-2:], lengths, strict=True)]
    if any(fill):
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, n) for n in fill])
    (rows, columns), lead = x.shape[-2:], x.shape[:-2]
    return x.reshape(*lead, rows // lengths[0], lengths[0], columns // lengths[1], lengths[1])


def unblocked(blocks: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The inverse of `blocked`."""
    r, rows, c, columns = blocks.shape[-4:]
    whole = blocks.reshape(*blocks.shape[:-4], r * rows, c * columns)
    return whole[..., : shape[-2], : shape[-1]]


def spread(scale: jax.Array) -> jax.Array:
    """[..., r, c] -> [..., r, 1, c, 1], to broadcast against `blocked`."""
    return scale[..., :, None, :, None]
