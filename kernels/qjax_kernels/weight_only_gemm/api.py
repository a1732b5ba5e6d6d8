"""y = x @ dequantize(w).T for weights in int4, int8, fp8 or fp4, and activations as they are."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qjax_kernels.dispatch import dispatch
from qjax_kernels.gemm_swiglu.layout import BLOCK
from qjax_kernels.glu_quant.xla import ACTIVATIONS
from qjax_kernels.weight_only_gemm import mosaic, xla
from qjax_kernels.weight_only_gemm.layout import Prepared
from qjax_kernels.weight_only_gemm.layout import prepare as prepare
from qjax_kernels.weight_only_gemm.layout import unprepare as unprepare

IMPLEMENTATIONS = {"xla": xla.weight_only_gemm}
PREPARED_IMPLEMENTATIONS: dict[str, Callable[..., jax.Array]] = {
    "mosaic": mosaic.prepared_gemm,
    "xla": xla.prepared_gemm,
}
RESIDUAL_IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "mosaic": mosaic.residual_gemm,
    "xla": xla.residual_gemm,
}
W4A8_IMPLEMENTATIONS: dict[str, Callable[..., jax.Array]] = {
    "mosaic": mosaic.fp8_prepared_gemm,
    "xla": xla.fp8_prepared_gemm,
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
    residual: jax.Array | None = None,
    *,
    out_dtype: jnp.dtype,
    activation: str | None = None,
    squares: jax.Array | None = None,
    eps: float = 0.0,
    implementation: str | None = None,
) -> jax.Array:
    """`weight_only_gemm` with a weight that `prepare` has repacked, a bias and a residual.

    y[..., n] = sum_k x[..., k] * (values[n, k] - zero_point[n, k/bk]) * scale[n, k/bk] * factor
                + bias[n] + residual[..., n]

    Args:
      x: [..., in], bfloat16 or float16 (any float for 'xla').
      weight: [out, in], prepared.
      bias: [out], or None.
      residual: [..., out], of out_dtype (any float for 'xla'), or None.
      out_dtype: of the result.
      activation: 'silu', 'gelu' or 'gelu_tanh' of a gated unit whose weights are `interleave`d (see
        `gemm_swiglu`): the result is activation(gate) * up [..., out / 2]; or None. Not together
        with a residual.
      squares: float32 [parts, at least tokens], of which the sum over parts is a token's sum of
        squares over the in features, when RMSNorm stands in front of the product and x was only
        multiplied by its gain, see `residual_gemm`: y is then multiplied by
        1 / sqrt(sum / in + eps) before bias and activation. None: nothing of that.
      eps: of that norm.
      implementation: a name of PREPARED_IMPLEMENTATIONS; None: the first that takes the call.

    Returns:
      [..., out], accumulated in float32. With groups of fewer than 64 columns, or many tokens, a
      weight times its scale is rounded to the type of x, as a dequantized weight would be.
    """
    if x.shape[-1] != weight.in_features:
        raise ValueError(f"x is {x.shape}, the weight {weight.shape}: their last axes must agree")
    _check_added(x, weight, bias, residual, activation)
    _check_squares(x, squares)
    return dispatch(
        "prepared_gemm",
        PREPARED_IMPLEMENTATIONS,
        implementation,
        x,
        weight,
        bias,
        residual,
        activation=activation,
        squares=squares,
        eps=eps,
        out_dtype=out_dtype,
    )


class Summed(NamedTuple):
    """A residual stream that is not normalized yet. See `residual_gemm`.

    Attributes:
      total: [..., out], product and residual.
      scaled: [..., out], that times the gain.
      squares: float32 [parts, at least tokens]: the sum over parts is that of total squared.
    """

    total: jax.Array
    scaled: jax.Array
    squares: jax.Array


def residual_gemm(
    x: jax.Array,
    weight: Prepared,
    residual: jax.Array,
    gain: jax.Array,
    bias: jax.Array | None = None,
    *,
    implementation: str | None = None,
) -> Summed:
    """The product, the residual, and what an RMSNorm behind them needs, in one kernel.

    total = x @ weight.T + bias + residual;  scaled = total * gain;  squares: see `Summed`

    RMSNorm(total) @ w.T is prepared_gemm(scaled, w, squares=squares, eps=eps): 1 / rms is the same
    for all features of a token, so that it can follow the sum over them (Zhang & Sennrich 2019).

    Args:
      x, weight, bias: see `prepared_gemm`.
      residual: [..., out], of the type of the results.
      gain: [out], of the norm, in the type of the results or wider.
      implementation: a name of RESIDUAL_IMPLEMENTATIONS; None: the first that takes the call.
    """
    if x.shape[-1] != weight.in_features:
        raise ValueError(f"x is {x.shape}, the weight {weight.shape}: their last axes must agree")
    _check_added(x, weight, bias, residual, None)
    if gain.shape != (weight.out_features,):
        raise ValueError(f"gain is {gain.shape}; it must be {(weight.out_features,)}")
    return Summed(
        *dispatch(
            "residual_gemm",
            RESIDUAL_IMPLEMENTATIONS,
            implementation,
            x,
            weight,
            bias,
            residual,
            gain,
        )
    )


def _check_squares(x: jax.Array, squares: jax.Array | None) -> None:
    tokens = x.size // x.shape[-1]
    if squares is not None and (squares.ndim != 2 or squares.shape[1] < tokens):
        raise ValueError(f"squares is {squares.shape}; it must be (parts, at least {tokens})")


def _check_added(
    x: jax.Array,
    weight: Prepared,
    bias: jax.Array | None,
    residual: jax.Array | None,
    activation: str | None,
) -> None:
    if activation is not None:
        if activation not in ACTIVATIONS:
            names = ", ".join(ACTIVATIONS)
            raise ValueError(f"activation is {activation!r}; choose one of: {names}, or None")
        if residual is not None or weight.out_features % (2 * BLOCK):
            raise ValueError(
                "an activation takes no residual, and a weight of gates and ups, "
                f"{BLOCK} and {BLOCK} in turn, not one of {weight.out_features} out features"
            )
    for name, array, shape in (
        ("bias", bias, (weight.out_features,)),
        ("residual", residual, (*x.shape[:-1], weight.out_features)),
    ):
        if array is not None and array.shape != shape:
            raise ValueError(f"{name} is {array.shape}; it must be {shape}")


def w4a8_gemm(
    x: jax.Array,
    x_scale: jax.Array,
    weight: Prepared,
    bias: jax.Array | None = None,
    residual: jax.Array | None = None,
    *,
    out_dtype: jnp.dtype,
    activation: str | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Product of fp8 activations with int4 weights.

    y[..., n] = x_scale[...] * sum_k x[..., k] * values[n, k] * scale[n, k/bk]
                + bias[n] + residual[..., n]

    Args:
      x: [..., in], float8_e4m3fn.
      x_scale: float32, [] for all of x or [..., 1], one for each row.
      weight: [out, in], `prepare`d with operand='float8_e4m3fn'.
      bias: [out], or None.
      residual: [..., out], of out_dtype (any float for 'xla'), or None.
      out_dtype: of the result.
      activation: 'silu', 'gelu' or 'gelu_tanh' of a gated unit whose weights are `interleave`d (see
        `gemm_swiglu`): the result is activation(gate) * up [..., out / 2]; or None. Not together
        with a residual.
      implementation: a name of W4A8_IMPLEMENTATIONS; None: the first that takes the call.

    Returns:
      [..., out]. Products of a group are summed by the tensor cores, with the 14 bits or so that
      Hopper's fp8 sums have; groups are summed in float32.
    """
    if x.shape[-1] != weight.in_features or weight.operand != "float8_e4m3fn":
        raise ValueError(
            f"x is {x.dtype}{x.shape}, the weight {weight.shape} for {weight.operand}: their last "
            "axes must agree, and it must be prepared with operand='float8_e4m3fn'"
        )
    _check_added(x, weight, bias, residual, activation)
    return dispatch(
        "w4a8_gemm",
        W4A8_IMPLEMENTATIONS,
        implementation,
        x,
        x_scale,
        weight,
        bias,
        residual,
        activation=activation,
        out_dtype=out_dtype,
    )
