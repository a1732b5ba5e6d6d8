"""Prompts into the cache, in groups that bound the memory of what layers compute in between."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from qjax import cache as kv

# Of a group of prompts. Products are as fast as they get long before.
GROUP_TOKENS = 65536


def read_prompts(
    model: Any,
    input_ids: jax.Array,
    lengths: jax.Array,
    cache: list[kv.KVCache] | kv.PagedCache,
) -> tuple[jax.Array, Any]:
    """Run prompts through the stack, group after group if the cache is in pages.

    Args:
      model: with `hidden`, see `qjax.decode`.
      input_ids: int32 [batch, tokens], padded on the right.
      lengths: int32 [batch].
      cache: empty.

    Returns:
      the hidden state of each prompt's last token [batch, features], and the filled cache.
    """
    batch, tokens = input_ids.shape
    group = group_size(batch, tokens) if isinstance(cache, kv.PagedCache) else batch
    positions = jnp.broadcast_to(jnp.arange(tokens), (group, tokens))

    def read(ids: jax.Array, lengths: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        hidden, cache = model.hidden(ids, positions, cache, fresh=True)
        return jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0], cache

    if group == batch:
        return read(input_ids, lengths, cache)
    assert isinstance(cache, kv.PagedCache)

    def one(index: jax.Array, whole: kv.PagedCache) -> tuple[jax.Array, kv.PagedCache]:
        ids, ends, table = (
            jax.lax.dynamic_slice_in_dim(x, index * group, group)
            for x in (input_ids, lengths, whole.block_table)
        )
        last, mine = read(ids, ends, dataclasses.replace(whole, block_table=table))
        return last, dataclasses.replace(mine, block_table=whole.block_table)

    def step(index: jax.Array, carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        last, whole = carry
        hidden, whole = one(index, whole)
        return jax.lax.dynamic_update_slice_in_dim(last, hidden, index * group, axis=0), whole

    shape = jax.eval_shape(one, jnp.int32(0), cache)[0]
    last = jnp.zeros((batch, *shape.shape[1:]), shape.dtype)
    return jax.lax.fori_loop(0, batch // group, step, (last, cache))


def group_size(batch: int, tokens: int) -> int:
    """Prompts of a group: the largest number that divides the batch and has GROUP_TOKENS at most.

    >>> group_size(64, 2048), group_size(7, 100_000)
    (32, 1)
    """
    fitting = (n for n in range(1, batch + 1) if batch % n == 0 and n * tokens <= GROUP_TOKENS)
    return max(fitting, default=1)
