"""Activations in fp8, for products with int4 weights."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from qjax_kernels.weight_only_gemm.layout import Prepared


@partial(jax.tree_util.register_dataclass, data_fields=["scale", "sums"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Fp8:
    """What a kernel needs to know of fp8 activations [tokens, in] beside their values.

    Attributes:
      scale: float32 [tokens rounded up to 256], of each token.
      sums: float32 [groups, tokens rounded up to 256]: sums over the groups of the weight, times
        8 / 512. Weights are multiplied as (w + 8) / 512; this is what the 8 adds.
    """

    scale: jax.Array
    sums: jax.Array


def describe(x: jax.Array, x_scale: jax.Array, weight: Prepared) -> Fp8:
    """Fp8 of x [tokens, in] with x_scale, [] or [tokens, 1]."""
    tokens = x.shape[0]
    padding = (0, -tokens % 256)
    grouped = x.astype(jnp.float32).reshape(tokens, weight.groups, -1)
    scale = jnp.broadcast_to(x_scale.astype(jnp.float32).reshape(-1), (tokens,))
    return Fp8(
        scale=jnp.pad(scale, padding),
        sums=jnp.pad(grouped.sum(axis=2).T / 64, ((0, 0), padding)),
    )
