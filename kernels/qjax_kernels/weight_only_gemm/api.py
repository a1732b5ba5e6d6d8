"""y = x @ dequantize(w).T for weights in int4, int8 or fp8 and activations in their own type."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from qjax_kernels.dispatch import dispatch
from qjax_kernels.weight_only_gemm import mosaic, xla
from qjax_kernels.weight_only_gemm.layout import Prepared
from qjax_kernels.weight_only_gemm.layout import prepare as prepare
from qjax_kernels.weight_only_gemm.layout import unprepare as unprepare

IMPLEMENTATIONS = {"xla": xla.weight_only_gemm}
PREPARED_IMPLEMENTATIONS: dict[str, Callable[..., jax.Array]] = {
    "mosaic": mosaic.prepared_gemm,
    "xla": xla.prepared_gemm,
}


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


def prepared_gemm(
    x: jax.Array,
    weight: Prepared,
    bias: jax.Array | None = None,
    *,
    out_dtype: jnp.dtype,
    implementation: str | None = None,
) -> jax.Array:
    """`weight_only_gemm` with a weight that `prepare` has repacked, and a bias.

    y[..., n] = bias[n] + sum_k x[..., k] * (values[n, k] - zero_point[n, k/bk]) * scale[n, k/bk]

    Args:
      x: [..., in], bfloat16 or float16 (any float for 'xla').
      weight: [out, in], prepared.
      bias: [out], or None.
      out_dtype: of the result.
      implementation: a name of PREPARED_IMPLEMENTATIONS; None: the first that takes the call.

    Returns:
      [..., out], accumulated in float32. With groups of fewer than 64 columns, or many tokens, a
      weight times its scale is rounded to the type of x, as a dequantized weight would be.
    """
    if x.shape[-1] != weight.in_features:
        raise ValueError(f"x is {x.shape}, the weight {weight.shape}: their last axes must agree")
    if bias is not None and bias.shape != (weight.out_features,):
        raise ValueError(f"bias is {bias.shape}; it must be ({weight.out_features},)")
    return dispatch(
        "prepared_gemm",
        PREPARED_IMPLEMENTATIONS,
        implementation,
        x,
        weight,
        bias,
        out_dtype=out_dtype,
    )
