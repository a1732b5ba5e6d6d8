"""Prefill and decode as pure, jitted functions: the engine room of `qjax.generate`."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qjax import cache as kv
from qjax.sampling import Sampling, sample


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["step", "tokens", "done", "counts", "positions", "cache", "key"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeState:
    """Everything a decode step reads and writes.

    Attributes:
      step: int32 [], how many tokens each sequence has got so far.
      tokens: int32 [batch, max_new], the new tokens; what lies past `counts` is padding.
      done: bool [batch], sequences that have ended.
      counts: int32 [batch], valid tokens of each sequence, its end token included.
      positions: int32 [batch], where the next token of each sequence goes in the cache.
      cache: one KVCache a layer.
      key: PRNG key; each step folds its number into it.
    """

    step: jax.Array
    tokens: jax.Array
    done: jax.Array
    counts: jax.Array
    positions: jax.Array
    cache: list[kv.KVCache]
    key: jax.Array


@partial(jax.jit, static_argnames=("graphdef", "max_new", "cache_length", "how"))
def prefill(
    graphdef: nnx.GraphDef,
    state: Any,
    input_ids: jax.Array,
    lengths: jax.Array,
    end_ids: jax.Array,
    key: jax.Array,
    *,
    max_new: int,
    cache_length: int,
    how: Sampling,
) -> tuple[DecodeState, jax.Array]:
    """Run the prompts and draw the first token of each sequence.

    Args:
      input_ids: int32 [batch, tokens], each prompt left-aligned and padded on the right. Padding
        is never attended to: its cache slots are overwritten before a query can see them.
      lengths: int32 [batch], 1 or more.
      end_ids: int32 [ends], tokens that end a sequence; may be empty.
      key: PRNG key.
      max_new: room for new tokens.
      cache_length: positions in the cache, at least tokens and max(lengths) + max_new - 1.

    Returns:
      the state after one token, and bool []: whether all logits used were finite.
    """
    model = nnx.merge(graphdef, state)
    cfg = model.config
    batch, tokens = input_ids.shape
    cache = kv.init_cache(
        cfg.num_hidden_layers,
        batch,
        cfg.num_key_value_heads,
        cache_length,
        cfg.head_dim,
        activation_dtype(model),
    )
    positions = jnp.broadcast_to(jnp.arange(tokens), input_ids.shape)
    hidden, cache = model.hidden(input_ids, positions, cache)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    logits = model.logits(last)
    token = sample(logits, key, jnp.int32(0), how)
    first = DecodeState(
        step=jnp.int32(1),
        tokens=jnp.zeros((batch, max_new), jnp.int32).at[:, 0].set(token),
        done=jnp.isin(token, end_ids),
        counts=jnp.ones(batch, jnp.int32),
        positions=lengths,
        cache=cache,
        key=key,
    )
    return first, jnp.isfinite(logits).all()


@partial(jax.jit, static_argnames=("graphdef", "how"), donate_argnames="carry")
def decode(
    graphdef: nnx.GraphDef,
    state: Any,
    carry: DecodeState,
    end_ids: jax.Array,
    limit: jax.Array,
    *,
    how: Sampling,
) -> DecodeState:
    """Decode until `limit` tokens a sequence, or until all have ended: one `lax.while_loop`.

    The limit is an argument, not a constant, so that the same compiled loop serves generation
    (limit = max_new), streaming (limit = step + 1) and stop strings (some steps at a time).

    Args:
      carry: donated: the cache is updated in place.
      end_ids: int32 [ends].
      limit: int32 [], at most max_new.
    """
    model = nnx.merge(graphdef, state)

    def unfinished(carry: DecodeState) -> jax.Array:
        return (carry.step < limit) & ~jnp.all(carry.done)

    def step(carry: DecodeState) -> DecodeState:
        last = jax.lax.dynamic_index_in_dim(carry.tokens, carry.step - 1, axis=1)
        hidden, cache = model.hidden(last, carry.positions[:, None], carry.cache)
        token = sample(model.logits(hidden[:, 0]), carry.key, carry.step, how)
        token = jnp.where(carry.done, 0, token)
        return DecodeState(
            step=carry.step + 1,
            tokens=jax.lax.dynamic_update_index_in_dim(carry.tokens, token, carry.step, axis=1),
            done=carry.done | jnp.isin(token, end_ids),
            counts=carry.counts + (~carry.done).astype(jnp.int32),
            positions=carry.positions + 1,
            cache=cache,
            key=carry.key,
        )

    return jax.lax.while_loop(unfinished, step, carry)


def activation_dtype(model: Any) -> jnp.dtype:
    """The type of a model's activations: the (logical) dtype of its embedding table."""
    return jnp.dtype(model.embed_tokens.embedding.get_value().dtype)
