"""The key-value cache of a decoder, as data."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp


@partial(jax.tree_util.register_dataclass, data_fields=["k", "v"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of one layer, for a fixed number of sequences of bounded length.

    Attributes:
      k, v: [batch, kv_heads, length, head_dim]. Position p of sequence b lives at [b, :, p].
    """

    k: jax.Array
    v: jax.Array


def init_cache(
    layers: int, batch: int, kv_heads: int, length: int, head_dim: int, dtype: jnp.dtype
) -> list[KVCache]:
    """Empty caches, one a layer. Zeros, so that masked positions stay finite in products."""
    shape = (batch, kv_heads, length, head_dim)
    return [KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(layers)]


def write(cache: KVCache, k: jax.Array, v: jax.Array, start: jax.Array) -> KVCache:
    """Put new keys and values of each sequence at its own position.

    Args:
      k, v: [batch, tokens, kv_heads, head_dim].
      start: int32 [batch], position of the first new token of each sequence; start + tokens
        must not pass the length of the cache (JAX would clamp it silently).
    """

    def put(old: jax.Array, new: jax.Array, at: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice(old, new.swapaxes(0, 1), (0, at, 0))

    return KVCache(
        jax.vmap(put)(cache.k, k.astype(cache.k.dtype), start),
        jax.vmap(put)(cache.v, v.astype(cache.v.dtype), start),
    )
