"""y = activation(gate) * up, rounded to int8 or fp8 with a scale for each row."""

from typing import Any, cast

import jax
import jax.numpy as jnp

from qjax_kernels.dispatch import dispatch
from qjax_kernels.glu_quant import triton, xla
from qjax_kernels.glu_quant.result import Glu
from qjax_kernels.row_quant import FLOATS, check_output

IMPLEMENTATIONS = {"triton": triton.glu_quant, "xla": xla.glu_quant}


def glu_quant(
    x: jax.Array,
    *,
    activation: str = "silu",
    out_dtype: jnp.dtype | None = None,
    scale: jax.Array | None = None,
    group_sums: bool = False,
    implementation: str | None = None,
) -> Glu:
    """A gated linear unit and quantization of its result in one pass over the rows.

    y[..., i] = activation(x[..., i]) * x[..., features + i], in float32; arXiv:2002.05202
    values = round(y / scale), half to even; scale = max|y| / 127 (int8) or 448 (fp8) over each
    row, 1 where that is 0, unless it is given.

    Args:
      x: [..., 2 * features], gate and up side by side, bfloat16, float16 or float32.
      activation: 'silu' (SwiGLU), 'gelu' or 'gelu_tanh' (GeGLU, exact or with the tanh formula).
      out_dtype: int8, float8_e4m3fn, or a float dtype, for which there is no scale; None: of x.
      scale: float32 [] or [1, 1], static quantization; None: one for each row.
      group_sums: also sum the values over each 128 neighbours; features % 128 must be 0.
      implementation: a name of IMPLEMENTATIONS; None: the first that takes the call.

    Raises:
      ValueError: shapes or dtypes that do not fit together, an unknown activation.
    """
    out_dtype = x.dtype if out_dtype is None else jnp.dtype(out_dtype)
    check_output("glu_quant", x.shape[-1] // 2, out_dtype, scale, group_sums)
    if x.dtype not in FLOATS or x.shape[-1] % 2:
        raise ValueError(
            f"x is {x.dtype}{x.shape}; glu_quant takes bfloat16, float16 or float32 with a gate "
            "and an up of one length side by side"
        )
    if activation not in xla.ACTIVATIONS:
        raise ValueError(
            f"activation is {activation!r}; choose one of: {', '.join(xla.ACTIVATIONS)}"
        )
    result: Any = dispatch(
        "glu_quant",
        cast(Any, IMPLEMENTATIONS),
        implementation,
        x,
        scale,
        activation=activation,
        out_dtype=out_dtype,
        group_sums=group_sums,
    )
    return result
