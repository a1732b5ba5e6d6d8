"""y = x @ dequantize(w).T for weights in int4, int8 or fp8 and activations in their own type."""

import jax
import jax.numpy as jnp

from qjax_kernels.dispatch import dispatch
from qjax_kernels.weight_only_gemm import xla

IMPLEMENTATIONS = {"xla": xla.weight_only_gemm}


def weight_only_gemm(
    x: jax.Array,
    values: jax.Array,
    scale: jax.Array,
    zero_point: jax.Array | None = None,
    *,
    out_dtype: jnp.dtype,
    implementation: str | None = None,
) -> jax.Array:
    """Product of activations with a block-quantized weight.

    y[..., n] = sum_k x[..., k] * (values[n, k] - zero_point[n/bn, k/bk]) * scale[n/bn, k/bk],
    where a scale covers a block of bn x bk weights.

    Args:
      x: [..., in], bfloat16 or float32.
      values: [out, in], int4, int8 or fp8.
      scale: [out/bn, in/bk], float32 or bfloat16.
      zero_point: like scale, integer; or None.
      out_dtype: of the result.
      implementation: a name of IMPLEMENTATIONS; None: the first that takes the call.

    Returns:
      [..., out], accumulated in float32.
    """
    if x.shape[-1] != values.shape[-1]:
        raise ValueError(f"x {x.shape} and values {values.shape} disagree in their last axis")
    return dispatch(
        "weight_only_gemm",
        IMPLEMENTATIONS,
        implementation,
        x,
        values,
        scale,
        zero_point,
        out_dtype,
    )
