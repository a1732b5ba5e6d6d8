"""y = x @ weight.T of floats, for few tokens in one kernel."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from qjax_kernels.dispatch import dispatch
from qjax_kernels.plain_gemm import mosaic, xla
from qjax_kernels.row_quant import FLOATS
from qjax_kernels.scaled_gemm import choice

IMPLEMENTATIONS: dict[str, Callable[..., jax.Array]] = {
    "mosaic": mosaic.plain_gemm,
    "xla": xla.plain_gemm,
}
# Tokens up to which Mosaic is faster. On an H200, in us, Mosaic's and XLA's: qkv of Llama 3 8B 14.0
# and 17.7 for one token, 15.2 and 19.8 for 64; gate and up 54.9 and 58.1, 59.9 and 60.2; the logits
# of 128256 words 236.2 and 242.8 for one.
FEW = 64


def plain_gemm(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None = None,
    residual: jax.Array | None = None,
    *,
    out_dtype: jnp.dtype,
    implementation: str | None = None,
) -> jax.Array:
    """Product of floats, summed in float32.

    y[..., n] = sum_k x[..., k] * weight[n, k] + bias[n] + residual[..., n]

    Args:
      x: [..., in], bfloat16 or float16 (float32 too, for xla).
      weight: [out, in], of the dtype of x.
      bias: [out], floating point, or None.
      residual: [..., out], floating point, or None.
      out_dtype: of the result: bfloat16, float16 or float32.
      implementation: a name of IMPLEMENTATIONS; None: the first that takes the call, but XLA for
        more than 64 tokens and where the tuned table has it faster.

    Returns:
      [..., out]; bias and residual are added in float32, and the sum is rounded once.

    Raises:
      ValueError: shapes or dtypes that do not fit together.
    """
    if weight.ndim != 2 or x.shape[-1] != weight.shape[1] or x.dtype != weight.dtype:
        raise ValueError(
            f"x {x.dtype}{x.shape} and weight {weight.dtype}{weight.shape} must agree in dtype and "
            "last axis"
        )
    if x.dtype not in FLOATS or jnp.dtype(out_dtype) not in FLOATS:
        names = ", ".join(dtype.name for dtype in FLOATS)
        raise ValueError(f"plain_gemm takes and writes {names}, not {x.dtype} and {out_dtype}")
    out, features = weight.shape
    for name, array, shape in (
        ("bias", bias, (out,)),
        ("residual", residual, (*x.shape[:-1], out)),
    ):
        if array is not None and array.shape != shape:
            raise ValueError(f"{name} is {array.shape}; it must be {shape}")
    tokens = x.size // max(features, 1)
    if implementation is None and tokens > FEW:
        implementation = "xla"
    return dispatch(
        "plain_gemm",
        IMPLEMENTATIONS,
        implementation,
        x,
        weight,
        jnp.dtype(out_dtype),
        bias,
        residual,
        passed_over=choice.passed_over(tokens, out, features, x.dtype, blocked=False),
    )
