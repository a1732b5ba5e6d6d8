"""x @ weight.T as the XLA implementations compute it."""

import math

import jax
import jax.numpy as jnp


def matmul(x: jax.Array, weight: jax.Array, *, accumulator: jnp.dtype = jnp.float32) -> jax.Array:
    """[..., in] x [out, in] of one dtype -> [..., out] in the dtype of the accumulator.

    float32 products are float32 products: GPUs would take TF32, with 11 bits, by default.

    A row of the result does not depend on the rows beside it: XLA's CPU sums the product of a
    single row in another order than that of several, so there a single row is computed twice.
    """
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None

    def product(x: jax.Array, weight: jax.Array) -> jax.Array:
        contract = (((x.ndim - 1,), (1,)), ((), ()))
        return jax.lax.dot_general(
            x, weight, contract, precision=precision, preferred_element_type=accumulator
        )

    def twice(x: jax.Array, weight: jax.Array) -> jax.Array:
        row = x.reshape(1, -1)
        y = product(jnp.concatenate([row, row]), weight)
        return y[:1].reshape(*x.shape[:-1], -1)

    if math.prod(x.shape[:-1]) != 1:
        return product(x, weight)
    return jax.lax.platform_dependent(x, weight, cpu=twice, default=product)
