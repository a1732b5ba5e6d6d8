"""Choosing the next token from logits."""

import dataclasses

import jax
import jax.numpy as jnp

from qjax.errors import DataError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn. Hashable: it is part of what is compiled.

    Attributes:
      temperature: 0 takes the largest logit (greedy); else logits are divided by it.
      top_k: keep the k largest logits; None keeps all.
      top_p: keep the fewest most likely tokens whose probabilities, after temperature and top_k,
        reach p (the one that crosses is kept); None keeps all. arXiv:1904.09751.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        number = int | float
        t = self.temperature
        # Below a thousandth, logits would overflow; 0 is what is meant.
        if not isinstance(t, number) or not (t == 0 or 1e-3 <= t <= 1e3):
            raise DataError(f"temperature is {t!r}; it must be 0 (greedy), or from 0.001 to 1000")
        if self.top_k is not None and not (isinstance(self.top_k, int) and 1 <= self.top_k < 2**31):
            raise DataError(f"top_k is {self.top_k!r}; it must be an integer, 1 or more, or None")
        if self.top_p is not None and not (isinstance(self.top_p, number) and 0 < self.top_p <= 1):
            raise DataError(f"top_p is {self.top_p}; it must be in (0, 1], or None")


def sample(logits: jax.Array, key: jax.Array, step: jax.Array, how: Sampling) -> jax.Array:
    """float32 logits [batch, vocab] -> int32 tokens [batch]; rows are drawn independently.

    Args:
      key: PRNG key of the whole generation.
      step: int32 [], number of the token; folded into the key.
    """
    if how.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    key = jax.random.fold_in(key, step)
    kept = filter_logits(logits / how.temperature, how)
    return jax.random.categorical(key, kept, axis=-1).astype(jnp.int32)


def filter_logits(logits: jax.Array, how: Sampling) -> jax.Array:
    """Logits with -inf for every token that top_k and top_p exclude. Ties at the edge stay."""
    if how.top_k is None and how.top_p is None:
        return logits
    ordered = jnp.flip(jnp.sort(logits, axis=-1), axis=-1)
    keep = jnp.ones(ordered.shape, bool)
    if how.top_k is not None:
        keep = keep & (jnp.arange(ordered.shape[-1]) < how.top_k)
    if how.top_p is not None and how.top_p < 1:
        probabilities = jax.nn.softmax(jnp.where(keep, ordered, -jnp.inf), axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        keep = keep & (before < how.top_p)
    lowest = jnp.min(jnp.where(keep, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= lowest, logits, -jnp.inf)
