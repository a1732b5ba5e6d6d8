"""The reference: dequantize to the type of x, then one product. Takes every valid call."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from qjax_kernels.matmul import matmul
from qjax_kernels.weight_only_gemm.layout import Prepared, unprepare


@partial(jax.jit, static_argnames="out_dtype")
def weight_only_gemm(
    x: jax.Array,
    values: jax.Array,
    scale: jax.Array,
    zero_point: jax.Array | None,
    out_dtype: jnp.dtype,
) -> jax.Array:
    """See `api.weight_only_gemm`."""
    out, features = values.shape
    rows, columns = scale.shape
    if rows in (1, out) and columns == 1 and zero_point is None:
        # The scale leaves the sum: the product runs on exact small numbers, whatever the type.
        y = matmul(x, values.astype(x.dtype))
        return (y * scale.astype(jnp.float32).reshape(rows)).astype(out_dtype)
    blocks = values.astype(jnp.float32).reshape(rows, out // rows, columns, features // columns)
    if zero_point is not None:
        blocks = blocks - zero_point.astype(jnp.float32)[:, None, :, None]
    weight = (blocks * scale.astype(jnp.float32)[:, None, :, None]).reshape(out, features)
    return matmul(x, weight.astype(x.dtype)).astype(out_dtype)


@partial(jax.jit, static_argnames="out_dtype")
def prepared_gemm(
    x: jax.Array, weight: Prepared, bias: jax.Array | None, *, out_dtype: jnp.dtype
) -> jax.Array:
    """See `api.prepared_gemm`."""
    values, scale, zero_point = unprepare(weight)
    y = weight_only_gemm(x, values, scale, zero_point, out_dtype=jnp.dtype(jnp.float32))
    return (y if bias is None else y + bias.astype(jnp.float32)).astype(out_dtype)


@partial(jax.jit, static_argnames="out_dtype")
def fp8_prepared_gemm(
    x: jax.Array,
    x_scale: jax.Array,
    weight: Prepared,
    bias: jax.Array | None,
    described: Any,
    *,
    out_dtype: jnp.dtype,
) -> jax.Array:
    """See `api.w4a8_gemm`: float32 products, which are exact."""
    del described
    y = prepared_gemm(x.astype(jnp.float32), weight, None, out_dtype=jnp.dtype(jnp.float32))
    y = y * x_scale
    return (y if bias is None else y + bias.astype(jnp.float32)).astype(out_dtype)
