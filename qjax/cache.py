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


PAGE_SIZE = 64  # tokens; what the attention kernels read fastest


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["k_pages", "v_pages", "block_table", "k_scale", "v_scale"],
    meta_fields=["length"],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class PagedCache:
    """Keys and values of all layers, in pages of a fixed number of tokens.

    Attributes:
      k_pages, v_pages: one array a layer, [pages, kv_heads, page_size, head_dim]: floats,
        float8_e4m3fn or int8.
      block_table: int32 [batch, pages of a sequence, at most]. Position p of sequence b lives in
        row p % page_size of page block_table[b, p // page_size].
      k_scale, v_scale: of 8-bit pages, one array a layer, float32 [] or [kv_heads]: what the
        numbers in the pages are multiplied by; else None, one a layer.
      length: tokens that each sequence may have; None: all that the pages hold. Static: two lengths
        in as many pages are two programs.
    """

    k_pages: list[jax.Array]
    v_pages: list[jax.Array]
    block_table: jax.Array
    k_scale: list[jax.Array | None]
    v_scale: list[jax.Array | None]
    length: int | None = None

    @property
    def page_size(self) -> int:
        return self.k_pages[0].shape[2]


def init_pages(
    layers: int,
    batch: int,
    kv_heads: int,
    length: int,
    head_dim: int,
    dtype: jnp.dtype,
    *,
    page_size: int = PAGE_SIZE,
    scales: list[tuple[jax.Array, jax.Array]] | None = None,
) -> PagedCache:
    """Empty pages, as many for each sequence as `length` tokens need.

    Args:
      scales: (k_scale, v_scale) of each layer, for dtypes of 8 bits; None: no scales.
    """
    each = -(-length // page_size)
    shape = (batch * each, kv_heads, page_size, head_dim)
    return PagedCache(
        k_pages=[jnp.zeros(shape, dtype) for _ in range(layers)],
        v_pages=[jnp.zeros(shape, dtype) for _ in range(layers)],
        block_table=jnp.arange(batch * each, dtype=jnp.int32).reshape(batch, each),
        k_scale=[None] * layers if scales is None else [k for k, _ in scales],
        v_scale=[None] * layers if scales is None else [v for _, v in scales],
    )


def places(cache: PagedCache, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Page and slot, int32 [batch * tokens], of int32 positions [batch, tokens].

    The page of a position behind the last page is -1: what goes there is not written.
    """
    pages = jnp.take_along_axis(
        cache.block_table, positions // cache.page_size, axis=1, mode="fill", fill_value=-1
    )
    return pages.reshape(-1), (positions % cache.page_size).reshape(-1)
