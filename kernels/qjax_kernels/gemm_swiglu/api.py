"""h = activation(x @ gate.T) * (x @ up.T), in one kernel."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from qjax_kernels.dispatch import dispatch
from qjax_kernels.gemm_swiglu import mosaic, xla
from qjax_kernels.gemm_swiglu.layout import BLOCK
from qjax_kernels.glu_quant.xla import ACTIVATIONS
from qjax_kernels.row_quant import FLOATS, RANGES

IMPLEMENTATIONS: dict[str, Callable[..., jax.Array]] = {
    "mosaic": mosaic.gemm_swiglu,
    "xla": xla.gemm_swiglu,
}
_NARROW = (jnp.int8, jnp.float8_e4m3fn, jnp.float8_e5m2)


def gemm_swiglu(
    x: jax.Array,
    weight: jax.Array,
    *,
    out_dtype: jnp.dtype,
    activation: str = "silu",
    x_scale: jax.Array | None = None,
    scale: jax.Array | None = None,
    out_scale: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """A gated linear unit (arXiv:2002.05202) of quantized or of 16-bit operands.

    gate[..., i] = x_scale[...] * gate_scale[i] * sum_k x[..., k] * gate_weight[i, k]
    up[..., i] likewise
    h[..., i] = activation(gate[..., i]) * up[..., i]
    and, with an out_scale, h[..., i] = round(h[..., i] / out_scale), half to even, clipped to the
    range of out_dtype.

    Args:
      x: [..., in], int8, fp8, bfloat16 or float16 (float32 too, for xla).
      weight: [2 * features, in], of the dtype of x: `layout.interleave` of the gate's and the up's;
        features is a multiple of 8.
      out_dtype: of the result: bfloat16, float16 or float32; int8 or e4m3 with an out_scale.
      activation: 'silu' (SwiGLU), 'gelu' or 'gelu_tanh' (GeGLU, exact or with the tanh formula).
      x_scale: float32, [] for all of x or [..., 1] for each row; None for floats.
      scale: float32, [1, 1] for both weights or [2 * features, 1] for each row, interleaved as the
        weight is; None for floats.
      out_scale: float32 [] or [1, 1], known beforehand. A scale for each row of the result needs
        all of the row first: see `glu_quant`.
      implementation: a name of IMPLEMENTATIONS; None: the first that takes the call.

    Returns:
      [..., features]; everything after the sums is in float32, and rounded once.

    Raises:
      ValueError: shapes or dtypes that do not fit together, an unknown activation.
    """
    _check_operands(x, weight, x_scale, scale)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; choose one of: {', '.join(ACTIVATIONS)}")
    _check_result(jnp.dtype(out_dtype), out_scale)
    return dispatch(
        "gemm_swiglu",
        IMPLEMENTATIONS,
        implementation,
        x,
        x_scale,
        weight,
        scale,
        out_scale,
        out_dtype=jnp.dtype(out_dtype),
        activation=activation,
    )


def _check_operands(
    x: jax.Array, weight: jax.Array, x_scale: jax.Array | None, scale: jax.Array | None
) -> None:
    both, features = weight.shape
    if x.shape[-1] != features or x.dtype != weight.dtype or both % (2 * BLOCK):
        raise ValueError(
            f"x {x.dtype}{x.shape} and weight {weight.dtype}{weight.shape} must agree in dtype and "
            f"last axis, and the weight be gates and ups, {BLOCK} and {BLOCK} in turn"
        )
    if x.dtype in _NARROW:
        if x_scale is None or scale is None:
            raise ValueError(f"operands of {x.dtype} need an x_scale and a scale")
        if x_scale.shape not in ((), (*x.shape[:-1], 1)) or scale.shape not in ((1, 1), (both, 1)):
            raise ValueError(
                f"x_scale is {x_scale.shape} and scale {scale.shape}; they must be () or "
                f"{(*x.shape[:-1], 1)}, and (1, 1) or ({both}, 1)"
            )
    elif x.dtype not in FLOATS:
        raise ValueError(f"gemm_swiglu takes int8, fp8 and floats, not {x.dtype}")
    elif x_scale is not None or scale is not None:
        raise ValueError(f"operands of {x.dtype} have no scales")


def _check_result(out_dtype: jnp.dtype, out_scale: jax.Array | None) -> None:
    if out_dtype not in RANGES and out_dtype not in FLOATS:
        names = ", ".join(dtype.name for dtype in (*FLOATS, *RANGES))
        raise ValueError(f"gemm_swiglu writes {names}, not {out_dtype.name}")
    if out_dtype in RANGES and out_scale is None:
        raise ValueError(
            f"a result of {out_dtype.name} needs an out_scale; a scale for each row takes a kernel "
            "of its own: write floats, and quantize their rows"
        )
    if out_scale is not None and (
        out_dtype not in RANGES or out_scale.dtype != jnp.float32 or out_scale.size != 1
    ):
        raise ValueError(
            f"out_scale {out_scale.dtype}{out_scale.shape} must be float32 [] or [1, 1], and the "
            f"result int8 or e4m3, not {out_dtype.name}"
        )
