"""What calibration keeps of a layer's input: its Gram matrix and four sums, whatever the tokens.

With H = sum over tokens of x x^T, the squared error that a change dW of the weight makes in the
outputs of all tokens is tr(dW H dW^T): GPTQ, AWQ, clipping and sensitivity read H, not the data.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

EXACT = lax.Precision.HIGHEST  # float32 products in float32: GPUs would take TF32


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["gram", "total", "total_abs", "amax", "tokens"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class InputStats:
    """Statistics of the inputs x [tokens, in] of a layer, float32.

    Attributes:
      gram: [in, in], sum over tokens of x x^T; or None, if nobody reads it.
      total: [in], sum of x.
      total_abs: [in], sum of |x|.
      amax: [in], largest |x|.
      tokens: scalar, how many rows went in.
    """

    gram: Any
    total: Any
    total_abs: Any
    amax: Any
    tokens: Any

    @property
    def mean(self) -> jax.Array:
        """[in], mean input; 0 before the first token."""
        return self.total / jnp.maximum(self.tokens, 1)

    @property
    def mean_abs(self) -> jax.Array:
        """[in], mean magnitude; 0 before the first token."""
        return self.total_abs / jnp.maximum(self.tokens, 1)


def init_stats(features: int, *, gram: bool = True) -> InputStats:
    """Statistics of no tokens; with a Gram matrix or, where only sums are needed, without."""
    zeros = jnp.zeros(features, jnp.float32)
    return InputStats(
        gram=jnp.zeros((features, features), jnp.float32) if gram else None,
        total=zeros,
        total_abs=zeros,
        amax=zeros,
        tokens=jnp.float32(0),
    )


def gram_update(gram: jax.Array, x: jax.Array) -> jax.Array:
    """gram + x^T x, with products of bfloat16 and sums of float32.

    Args:
      gram: float32 [in, in].
      x: [tokens, in].
    """
    x = x.astype(jnp.bfloat16)
    return gram + jnp.einsum("ti,tj->ij", x, x, preferred_element_type=jnp.float32)


@jax.jit
def update_stats(stats: InputStats, x: jax.Array, mask: jax.Array | None = None) -> InputStats:
    """Add a batch. Inside of a loop under jit the Gram matrix, which is large, stays in its place.

    Args:
      x: [..., tokens, in], the inputs of the layer, of any float type.
      mask: bool [..., tokens], False for rows to leave out (padding, tokens of other experts).

    Returns:
      statistics of both. Where an input was NaN or infinite its amax is NaN.
    """
    x = x.reshape(-1, x.shape[-1])
    count = jnp.float32(x.shape[0])
    if mask is not None:
        x = jnp.where(mask.reshape(-1, 1), x, jnp.zeros((), x.dtype))
        count = jnp.sum(mask, dtype=jnp.float32)
    gram = None if stats.gram is None else gram_update(stats.gram, x)
    x = x.astype(jnp.float32)
    size = jnp.abs(x)
    finite = jnp.isfinite(size).all(axis=0)
    amax = jnp.where(finite, size.max(axis=0, initial=0), jnp.nan)
    return InputStats(
        gram=gram,
        total=stats.total + x.sum(axis=0),
        total_abs=stats.total_abs + size.sum(axis=0),
        amax=_larger(stats.amax, amax),
        tokens=stats.tokens + count,
    )


def merge_stats(a: InputStats, b: InputStats) -> InputStats:
    """Statistics of the tokens of both, of two devices say."""
    return InputStats(
        gram=None if a.gram is None else a.gram + b.gram,
        total=a.total + b.total,
        total_abs=a.total_abs + b.total_abs,
        amax=_larger(a.amax, b.amax),
        tokens=a.tokens + b.tokens,
    )


def _larger(a: jax.Array, b: jax.Array) -> jax.Array:
    """Said outright: a maximum need not pass NaN on."""
    return jnp.where(jnp.isnan(a) | jnp.isnan(b), jnp.nan, jnp.maximum(a, b))


def scale_stats(stats: InputStats, factor: jax.Array) -> InputStats:
    """Statistics of x * factor, without the data.

    Args:
      factor: float32 [in], positive: 1 / s after AWQ or SmoothQuant moved s into the weights.
    """
    return InputStats(
        gram=None if stats.gram is None else stats.gram * factor[:, None] * factor[None, :],
        total=stats.total * factor,
        total_abs=stats.total_abs * factor,
        amax=stats.amax * factor,
        tokens=stats.tokens,
    )


def gram_loss(change: jax.Array, gram: jax.Array) -> jax.Array:
    """tr(dW H dW^T), one row at a time: the squared error in each output, over all tokens.

    Args:
      change: dW, float32 [..., out, in].
      gram: H, float32 [..., in, in], or one [in, in] for all.

    Returns:
      float32 [..., out]. Products are of the device's default precision (TF32 on GPUs): losses
      are compared with each other, and each is a sum of thousands of terms.
    """
    return jnp.sum(jnp.matmul(change, gram) * change, axis=-1)
