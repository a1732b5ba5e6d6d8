"""The reference, in plain JAX."""

from functools import partial

import jax
import jax.numpy as jnp

from qjax_kernels.norm_quant.result import Norm
from qjax_kernels.row_quant import quantize_rows


@partial(jax.jit, static_argnames=("kind", "eps", "weight_offset", "out_dtype", "group_sums"))
def norm_quant(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    residual: jax.Array | None,
    scale: jax.Array | None,
    *,
    kind: str,
    eps: float,
    weight_offset: float,
    out_dtype: jnp.dtype,
    group_sums: bool,
) -> Norm:
    """See `api.norm_quant`."""
    h = x.astype(jnp.float32)
    if residual is not None:
        residual = (h + residual.astype(jnp.float32)).astype(x.dtype)
        h = residual.astype(jnp.float32)
    if kind == "layer":
        h = h - jnp.mean(h, axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(h), axis=-1, keepdims=True) + eps)
    y = h * inverse * (weight.astype(jnp.float32) + weight_offset)
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    values, scale, sums = quantize_rows(y, out_dtype, scale, group_sums)
    return Norm(values, scale, residual, sums)
