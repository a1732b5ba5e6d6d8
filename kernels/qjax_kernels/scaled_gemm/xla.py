"""The reference: XLA products of the low-precision operands, scales after them."""

from functools import partial

import jax
import jax.numpy as jnp

from qjax_kernels.matmul import matmul
from qjax_kernels.scaled_gemm.config import BLOCK, blocks_of


@partial(jax.jit, static_argnames="out_dtype")
def scaled_gemm(
    x: jax.Array,
    x_scale: jax.Array,
    values: jax.Array,
    scale: jax.Array,
    out_dtype: jnp.dtype,
    bias: jax.Array | None = None,
    residual: jax.Array | None = None,
) -> jax.Array:
    """See `api.scaled_gemm`."""
    if blocks_of(x_scale, scale, values):
        y = _blocked(x, x_scale, values, scale)
    else:
        accumulator = jnp.int32 if jnp.issubdtype(x.dtype, jnp.integer) else jnp.float32
        sums = matmul(x, values, accumulator=accumulator)
        y = sums.astype(jnp.float32) * x_scale * scale[:, 0]
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    if residual is not None:
        y = y + residual.astype(jnp.float32)
    return y.astype(out_dtype)


def _blocked(x: jax.Array, x_scale: jax.Array, values: jax.Array, scale: jax.Array) -> jax.Array:
    """The sum over blocks of 128 k, one product each."""
    out, features = values.shape
    scale = jnp.repeat(scale, BLOCK, axis=0)[:out]

    def add(block: jax.Array, total: jax.Array) -> jax.Array:
        take = partial(jax.lax.dynamic_slice_in_dim, start_index=block * BLOCK, slice_size=BLOCK)
        row = jax.lax.dynamic_index_in_dim(x_scale, block, axis=-1)
        column = jax.lax.dynamic_index_in_dim(scale, block, axis=-1, keepdims=False)
        return total + matmul(take(x, axis=-1), take(values, axis=-1)) * row * column

    zeros = jnp.zeros((*x.shape[:-1], out), jnp.float32)
    return jax.lax.fori_loop(0, features // BLOCK, add, zeros)
