"""Moving a scale s from an input into the weights that read it, without changing the function.

Columns of the readers are multiplied by s; what gives the input is divided by it (structure.Fold).
Everything here is float32 and is rounded by the quantization that follows, but for gains of norms,
which are stored: there s becomes what the stored gain really divides by, so that the rounding of
the gain changes nothing.
"""

from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from qjax.structure import NORM, Fold, Group

Leaves = dict[str, Any]


def shared(scale: jax.Array, fold: Fold | None) -> jax.Array:
    """The scale as the fold can take it: heads that share their values share their part of it.

    Args:
      scale: float32 [..., in].

    Returns:
      [..., in], the geometric mean over the heads that one block of rows reaches.
    """
    if fold is None or fold.repeats == 1:
        return scale
    parts = scale.reshape(*scale.shape[:-1], -1, fold.repeats, fold.width)
    mean = jnp.exp(jnp.mean(jnp.log(parts), axis=-2, keepdims=True))
    return jnp.broadcast_to(mean, parts.shape).reshape(scale.shape)


def is_exact(group: Group, leaves: Mapping[str, Any], quantized: Collection[str]) -> bool:
    """Whether all weights that the scale meets are quantized afterwards.

    If not, it has to be a power of two: other weights stay in their 16 bits, and a router's
    rounding would send tokens elsewhere.
    """
    met = [f"{reader}.weight" for reader in group.readers]
    if group.fold is not None and group.fold.kind != NORM:
        met.append(f"{group.fold.module}.weight")
    return all(name in quantized for name in met if name in leaves)


def power_of_two(scale: jax.Array) -> jax.Array:
    """The nearest power of two, by the exponent."""
    return jnp.exp2(jnp.round(jnp.log2(scale)))


def fold(
    leaves: Leaves, group: Group, scale: jax.Array, quantized: Collection[str], plus_one: bool
) -> tuple[Leaves, jax.Array]:
    """Divide what gives the group's input by `scale`, multiply its readers by it.

    Args:
      leaves: of the block. Weights in `quantized` come back in float32, others in their own type.
      scale: float32 [in], or [experts, in] for experts with scales of their own.
      plus_one: the norm's gain is 1 + what is stored.

    Returns:
      the new leaves, and the scale that was applied.
    """
    assert group.fold is not None
    leaves = dict(leaves)
    name = group.fold.module
    if group.fold.kind == NORM:
        gain, scale = _divided_gain(leaves[f"{name}.scale"], scale, plus_one)
        leaves[f"{name}.scale"] = gain
        if f"{name}.bias" in leaves:
            bias = leaves[f"{name}.bias"]
            leaves[f"{name}.bias"] = (bias.astype(jnp.float32) / scale).astype(bias.dtype)
    else:
        rows = _rows(scale, group.fold)
        weight = leaves[f"{name}.weight"]
        wide = weight.astype(jnp.float32) / rows[..., None]
        leaves[f"{name}.weight"] = _typed(wide, weight, f"{name}.weight" in quantized)
        if f"{name}.bias" in leaves:
            bias = leaves[f"{name}.bias"]
            leaves[f"{name}.bias"] = (bias.astype(jnp.float32) / rows).astype(bias.dtype)
    for reader in group.readers:
        leaves |= multiplied(leaves, f"{reader}.weight", scale, quantized)
    return leaves, scale


def multiplied(
    leaves: Mapping[str, Any], name: str, scale: jax.Array, quantized: Collection[str]
) -> Leaves:
    """{name: the weight with its columns multiplied}; scale [in] or [experts, in]."""
    weight = leaves[name]
    wide = weight.astype(jnp.float32) * scale[..., None, :]
    return {name: _typed(wide, weight, name in quantized)}


def _divided_gain(gain: jax.Array, scale: jax.Array, plus_one: bool) -> tuple[jax.Array, jax.Array]:
    """The stored gain of a norm after a division by about `scale`, and by what it was divided."""
    one = jnp.float32(1 if plus_one else 0)
    full = gain.astype(jnp.float32) + one
    # What is stored is a number of the gain's type, near full / scale.
    stored = (full / scale - one).astype(gain.dtype)
    real = stored.astype(jnp.float32) + one
    if plus_one:
        # Near -1 a 16-bit number has no room for small gains: the smallest is one step away.
        step = jnp.asarray(jnp.finfo(gain.dtype).epsneg, jnp.float32)
        real = jnp.where((real == 0) & (full != 0), jnp.sign(full) * step, real)
        stored = (real - one).astype(gain.dtype)
    kept = (real != 0) & jnp.isfinite(real)
    return stored, jnp.where(kept & (full != 0), full / jnp.where(kept, real, 1), scale)


def _rows(scale: jax.Array, how: Fold) -> jax.Array:
    """[..., in] -> one number for each row that gives the input."""
    if how.width == 0:
        return scale
    return scale.reshape(-1, how.repeats, how.width)[:, 0].reshape(-1)


def _typed(wide: jax.Array, weight: Any, quantized: bool) -> jax.Array:
    return wide if quantized else wide.astype(weight.dtype)
