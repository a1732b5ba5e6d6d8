"""The reference: dequantize to the type of x, then one product. Takes every valid call."""

from functools import partial

import jax
import jax.numpy as jnp

from qjax_kernels.gemm_swiglu.layout import separate
from qjax_kernels.glu_quant.xla import ACTIVATIONS
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


@partial(jax.jit, static_argnames=("activation", "eps", "out_dtype"))
def prepared_gemm(
    x: jax.Array,
    weight: Prepared,
    bias: jax.Array | None,
    residual: jax.Array | None,
    *,
    activation: str | None = None,
    squares: jax.Array | None = None,
    eps: float = 0.0,
    out_dtype: jnp.dtype,
) -> jax.Array:
    """See `api.prepared_gemm`."""
    y = _product(x, weight)
    if squares is not None:
        mean = squares.sum(0)[: x.size // x.shape[-1]] / weight.in_features
        y = y * jax.lax.rsqrt(mean + eps).reshape(*x.shape[:-1], 1)
    return _finished(y, bias, residual, activation, out_dtype)


@jax.jit
def residual_gemm(
    x: jax.Array,
    weight: Prepared,
    bias: jax.Array | None,
    residual: jax.Array,
    gain: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `api.residual_gemm`: one part."""
    wide = jnp.dtype(jnp.float32)
    total = _finished(_product(x, weight), bias, residual, None, wide)
    scaled = (total * gain.astype(wide)).astype(residual.dtype)
    squares = jnp.sum(total * total, axis=-1).reshape(1, -1)
    return total.astype(residual.dtype), scaled, squares


@partial(jax.jit, static_argnames=("activation", "out_dtype"))
def fp8_prepared_gemm(
    x: jax.Array,
    x_scale: jax.Array,
    weight: Prepared,
    bias: jax.Array | None,
    residual: jax.Array | None,
    *,
    activation: str | None = None,
    out_dtype: jnp.dtype,
) -> jax.Array:
    """See `api.w4a8_gemm`: float32 products, which are exact."""
    y = _product(x.astype(jnp.float32), weight) * x_scale
    return _finished(y, bias, residual, activation, out_dtype)


def _product(x: jax.Array, weight: Prepared) -> jax.Array:
    values, scale, zero_point = unprepare(weight)
    y = weight_only_gemm(x, values, scale, zero_point, out_dtype=jnp.dtype(jnp.float32))
    return y if weight.factor is None else y * weight.factor


def _finished(
    y: jax.Array,
    bias: jax.Array | None,
    residual: jax.Array | None,
    activation: str | None,
    out_dtype: jnp.dtype,
) -> jax.Array:
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    if activation is not None:
        gate, up = separate(y, axis=-1)
        y = ACTIVATIONS[activation](gate) * up
    if residual is not None:
        y = y + residual.astype(jnp.float32)
    return y.astype(out_dtype)
