"""y = (x * x_scale) @ (w * w_scale).T with x and w both in int8 or both in fp8."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from qjax_kernels.dispatch import dispatch
from qjax_kernels.scaled_gemm import choice, mosaic, triton, xla
from qjax_kernels.scaled_gemm.config import BLOCK, blocks_of

IMPLEMENTATIONS: dict[str, Callable[..., jax.Array]] = {
    "mosaic": mosaic.scaled_gemm,
    "triton": triton.scaled_gemm,
    "xla": xla.scaled_gemm,
}


def scaled_gemm(
    x: jax.Array,
    x_scale: jax.Array,
    values: jax.Array,
    scale: jax.Array,
    *,
    out_dtype: jnp.dtype,
    bias: jax.Array | None = None,
    residual: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Product of two quantized operands.

    y[..., n] = x_scale[...] * scale[n] * sum_k x[..., k] * values[n, k]
                + bias[n] + residual[..., n]

    With scales for blocks (arXiv:2412.19437, section 3.3), where b counts blocks of 128 k, the
    first line is sum_b x_scale[..., b] * scale[n/128, b] * sum_{k in b} x[..., k] * values[n, k].

    Args:
      x: [..., in], int8 or fp8.
      x_scale: float32, [] for all of x, [..., 1] for each row, or [..., in/128] for blocks.
      values: [out, in], of the dtype of x.
      scale: float32, [1, 1] for the whole weight, [out, 1] for each output, or, together with an
        x_scale for blocks, [ceil(out/128), in/128]; then x is fp8 and in % 128 is 0.
      out_dtype: of the result.
      bias: [out], floating point, or None.
      residual: [..., out], floating point, or None.
      implementation: a name of IMPLEMENTATIONS; None: the first that takes the call, but XLA where
        the tuned table has it faster.

    Returns:
      [..., out]; int8 sums are exact (int32), fp8 sums are float32. Scales, bias and residual are
      applied in float32 before the result is rounded once.
    """
    out, features = values.shape
    if x.shape[-1] != features or x.dtype != values.dtype:
        raise ValueError(
            f"x {x.dtype}{x.shape} and values {values.dtype}{values.shape} must agree in dtype and "
            "last axis"
        )
    if blocks_of(x_scale, scale, values) and x.dtype == jnp.int8:
        raise ValueError("int8 operands take no scales for blocks of 128")
    elif scale.shape not in ((1, 1), (out, 1)) and not blocks_of(x_scale, scale, values):
        raise ValueError(
            f"scale is {scale.shape} and x_scale {x_scale.shape}; scaled_gemm takes a scale of "
            f"(1, 1) or ({out}, 1), or blocks of {BLOCK} on both sides"
        )
    for name, array, shape in (
        ("bias", bias, (out,)),
        ("residual", residual, (*x.shape[:-1], out)),
    ):
        if array is not None and array.shape != shape:
            raise ValueError(f"{name} is {array.shape}; it must be {shape}")
    return dispatch(
        "scaled_gemm",
        IMPLEMENTATIONS,
        implementation,
        x,
        x_scale,
        values,
        scale,
        out_dtype,
        bias,
        residual,
        passed_over=choice.passed_over(
            x.size // max(features, 1), out, features, x.dtype, blocks_of(x_scale, scale, values)
        ),
    )
