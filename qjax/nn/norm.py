"""Normalization."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from qjax import ops


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormConfig:
    """Which norm.

    Attributes:
      kind: 'rms' (arXiv:1910.07467) or 'layer' (arXiv:1607.06450).
      eps: added to the mean square.
      scale: whether there is one; only layer norms may have none.
      bias: whether there is one, in layer norms.
      plus_one: what is stored is the scale - 1, in RMS norms (Gemma).
    """

    kind: str = "rms"
    eps: float = 1e-6
    scale: bool = True
    bias: bool = False
    plus_one: bool = False


class RMSNorm(nnx.Module):
    """x / rms(x) * scale; arXiv:1910.07467.

    Attributes:
      scale: Param [features].
      eps: added to the mean square.
      plus_one: multiply by 1 + scale instead, before the result is rounded (Gemma).
    """

    def __init__(
        self,
        features: int,
        *,
        eps: float = 1e-6,
        plus_one: bool = False,
        param_dtype: jnp.dtype = jnp.float32,
    ) -> None:
        self.scale = nnx.Param(jnp.full(features, 0.0 if plus_one else 1.0, param_dtype))
        self.eps = eps
        self.plus_one = plus_one

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., features] -> the same shape and dtype."""
        scale = self.scale.get_value()
        if self.plus_one:
            wide = x.astype(jnp.float32)
            return ops.rms_norm(wide, 1 + scale.astype(jnp.float32), self.eps).astype(x.dtype)
        return ops.rms_norm(x, scale, self.eps)


class LayerNorm(nnx.Module):
    """(x - mean) / deviation * scale + bias; arXiv:1607.06450.

    Attributes:
      scale, bias: Param [features], or None.
      eps: added to the mean square of x - mean.
    """

    def __init__(
        self,
        features: int,
        *,
        eps: float = 1e-5,
        use_scale: bool = True,
        use_bias: bool = True,
        param_dtype: jnp.dtype = jnp.float32,
    ) -> None:
        self.scale = nnx.Param(jnp.ones(features, param_dtype)) if use_scale else nnx.data(None)
        self.bias = nnx.Param(jnp.zeros(features, param_dtype)) if use_bias else nnx.data(None)
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., features] -> the same shape and dtype."""
        scale, bias = (None if p is None else p.get_value() for p in (self.scale, self.bias))
        return ops.layer_norm(x, scale, bias, self.eps)


def make_norm(features: int, cfg: NormConfig, param_dtype: jnp.dtype) -> RMSNorm | LayerNorm:
    """The module of a NormConfig."""
    if cfg.kind == "rms":
        return RMSNorm(features, eps=cfg.eps, plus_one=cfg.plus_one, param_dtype=param_dtype)
    return LayerNorm(
        features, eps=cfg.eps, use_scale=cfg.scale, use_bias=cfg.bias, param_dtype=param_dtype
    )
