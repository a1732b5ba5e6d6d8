"""The reference: XLA's product with both weights, the rest after it."""

from functools import partial

import jax
import jax.numpy as jnp

from qjax_kernels.gemm_swiglu.layout import separate
from qjax_kernels.glu_quant.xla import ACTIVATIONS
from qjax_kernels.matmul import matmul
from qjax_kernels.row_quant import quantize_rows


@partial(jax.jit, static_argnames=("out_dtype", "activation"))
def gemm_swiglu(
    x: jax.Array,
    x_scale: jax.Array | None,
    weight: jax.Array,
    scale: jax.Array | None,
    out_scale: jax.Array | None,
    *,
    out_dtype: jnp.dtype,
    activation: str,
) -> jax.Array:
    """See `api.gemm_swiglu`."""
    accumulator = jnp.int32 if jnp.issubdtype(x.dtype, jnp.integer) else jnp.float32
    y = matmul(x, weight, accumulator=accumulator).astype(jnp.float32)
    if x_scale is not None and scale is not None:
        y = y * x_scale * scale[:, 0]
    gate, up = separate(y, axis=-1)
    h = ACTIVATIONS[activation](gate) * up
    return quantize_rows(h, out_dtype, out_scale, group_sums=False)[0]
