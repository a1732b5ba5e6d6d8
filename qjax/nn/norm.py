"""Normalization."""

import jax
import jax.numpy as jnp
from flax import nnx

from qjax import ops


class RMSNorm(nnx.Module):
    """x / rms(x) * scale; arXiv:1910.07467.

    Attributes:
      scale: Param [features].
      eps: added to the mean square.
    """

    def __init__(
        self, features: int, *, eps: float = 1e-6, param_dtype: jnp.dtype = jnp.float32
    ) -> None:
        self.scale = nnx.Param(jnp.ones(features, param_dtype))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., features] -> the same shape and dtype."""
        return ops.rms_norm(x, self.scale.get_value(), self.eps)
