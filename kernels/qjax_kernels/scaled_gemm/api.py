"""y = (x * x_scale) @ (w * w_scale).T with x and w both in int8 or both in fp8."""

import jax
import jax.numpy as jnp

from qjax_kernels.dispatch import dispatch
from qjax_kernels.scaled_gemm import xla

IMPLEMENTATIONS = {"xla": xla.scaled_gemm}


def scaled_gemm(
    x: jax.Array,
    x_scale: jax.Array,
    values: jax.Array,
    scale: jax.Array,
    *,
    out_dtype: jnp.dtype,
    implementation: str | None = None,
) -> jax.Array:
    """Product of two quantized operands.

    y[..., n] = x_scale[...] * scale[n] * sum_k x[..., k] * values[n, k]

    Args:
      x: [..., in], int8 or fp8.
      x_scale: float32, [] for all of x or [..., 1], one for each row.
      values: [out, in], of the dtype of x.
      scale: float32, [1, 1] for the whole weight or [out, 1], one for each output.
      out_dtype: of the result.
      implementation: a name of IMPLEMENTATIONS; None: the first that takes the call.

    Returns:
      [..., out]; int8 sums are exact (int32), fp8 sums are float32.
    """
    if x.shape[-1] != values.shape[-1] or x.dtype != values.dtype:
        raise ValueError(
            f"x {x.dtype}{x.shape} and values {values.dtype}{values.shape} must agree in dtype and "
            "last axis"
        )
    if scale.shape not in ((1, 1), (values.shape[0], 1)):
        raise ValueError(
            f"scale is {scale.shape}; scaled_gemm takes (1, 1) or ({values.shape[0]}, 1)"
        )
    return dispatch(
        "scaled_gemm", IMPLEMENTATIONS, implementation, x, x_scale, values, scale, out_dtype
    )
