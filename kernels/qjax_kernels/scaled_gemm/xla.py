"""The reference: one XLA product of the low-precision operands, scales after it."""

from functools import partial

import jax
import jax.numpy as jnp

from qjax_kernels.matmul import matmul


@partial(jax.jit, static_argnames="out_dtype")
def scaled_gemm(
    x: jax.Array, x_scale: jax.Array, values: jax.Array, scale: jax.Array, out_dtype: jnp.dtype
) -> jax.Array:
    """See `api.scaled_gemm`."""
    accumulator = jnp.int32 if jnp.issubdtype(x.dtype, jnp.integer) else jnp.float32
    sums = matmul(x, values, accumulator=accumulator)
    return (sums.astype(jnp.float32) * x_scale * scale[:, 0]).astype(out_dtype)
