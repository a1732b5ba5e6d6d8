"""The references, in plain JAX: here rows are sorted."""

import jax
import jax.numpy as jnp


@jax.jit
def argmax(logits: jax.Array) -> jax.Array:
    """See `api.argmax`."""
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


@jax.jit
def sample(
    logits: jax.Array,
    uniform: jax.Array,
    temperature: jax.Array,
    top_k: jax.Array,
    top_p: jax.Array,
) -> jax.Array:
    """See `api.sample`."""
    vocab = logits.shape[-1]
    x = logits.astype(jnp.float32)
    uniform, temperature, top_k, top_p = (a[:, None] for a in (uniform, temperature, top_k, top_p))
    heat = jnp.where(temperature > 0, temperature, 1)
    largest = jnp.max(x, axis=-1, keepdims=True)

    def weight(x: jax.Array, lowest: jax.Array) -> jax.Array:
        return jnp.where(x >= lowest, jnp.exp((x - largest) / heat), 0)

    ordered = jnp.flip(jnp.sort(x, axis=-1), axis=-1)
    k = jnp.where(top_k <= 0, vocab, jnp.minimum(top_k, vocab))
    lowest = jnp.take_along_axis(ordered, k - 1, axis=-1)
    descending = weight(ordered, lowest)
    before = jnp.cumsum(descending, axis=-1) - descending
    total = jnp.sum(descending, axis=-1, keepdims=True)
    nucleus = (before < top_p * total) & (ordered >= lowest)
    # The first always is one, also where top_p * total rounds to 0.
    nucleus = nucleus.at[:, 0].set(True)
    narrowed = jnp.min(jnp.where(nucleus, ordered, jnp.inf), axis=-1, keepdims=True)
    lowest = jnp.where(top_p < 1, narrowed, lowest)

    cumulative = jnp.cumsum(weight(x, lowest), axis=-1)
    total = cumulative[:, -1:]
    # Below the sum of all, so that it is passed somewhere.
    target = jnp.minimum(uniform * total, total * (1 - 2.0**-23))
    drawn = jnp.sum(cumulative <= target, axis=-1)
    first = jnp.argmax(x, axis=-1)
    return jnp.where(temperature[:, 0] > 0, drawn, first).astype(jnp.int32)
