"""The reference: XLA's product."""

from functools import partial

import jax
import jax.numpy as jnp

from qjax_kernels.matmul import matmul


@partial(jax.jit, static_argnames="out_dtype")
def plain_gemm(
    x: jax.Array,
    weight: jax.Array,
    out_dtype: jnp.dtype,
    bias: jax.Array | None = None,
    residual: jax.Array | None = None,
) -> jax.Array:
    """See `api.plain_gemm`."""
    y = matmul(x, weight)
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    if residual is not None:
        y = y + residual.astype(jnp.float32)
    return y.astype(out_dtype)
