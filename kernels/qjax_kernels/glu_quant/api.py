"""y = activation(gate) * up, or activation(x), rounded to int8 or fp8 with a scale for each row."""

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
    gated: bool = True,
    features: int | None = None,
    out_dtype: jnp.dtype | None = None,
    scale: jax.Array | None = None,
    group_sums: bool = False,
    implementation: str | None = None,
) -> Glu:
    """An activation, gated or not, and quantization of its result in one pass over the rows.

    y[..., i] = activation(x[..., i]) * x[..., features + i], in float32; arXiv:2002.05202
    y[..., i] = activation(x[..., i]) if not gated
    values = round(y / scale), half to even; scale = max|y| / 127 (int8) or 448 (fp8) over each
    row, 1 where that is 0, unless it is given.

    Args:
      x: [..., 2 * features], gate and up side by side, or [..., features] if not gated; bfloat16,
        float16 or float32.
      activation: 'silu' (SwiGLU), 'gelu' or 'gelu_tanh' (GeGLU, exact or with the tanh formula);
        not gated also 'relu' and 'quick_gelu', x / (1 + exp(-1.702 x)).
      gated: whether there is an up.
      features: of the result; x may have other columns in front of those that are read. None: it
        has none.
      out_dtype: int8, float8_e4m3fn, or a float dtype, for which there is no scale; None: of x.
      scale: float32 [] or [1, 1], static quantization; None: one for each row.
      group_sums: also sum the values over each 128 neighbours; features % 128 must be 0.
      implementation: a name of IMPLEMENTATIONS; None: the first that takes the call.

    Raises:
      ValueError: shapes or dtypes that do not fit together, an unknown activation.
    """
    out_dtype = x.dtype if out_dtype is None else jnp.dtype(out_dtype)
    parts = 2 if gated else 1
    width = x.shape[-1] if features is None else parts * features
    check_output("glu_quant", width // parts, out_dtype, scale, group_sums)
    if x.dtype not in FLOATS or width % parts:
        raise ValueError(
            f"x is {x.dtype}{x.shape}; glu_quant takes bfloat16, float16 or float32 with a gate "
            "and an up of one length side by side"
        )
    if width > x.shape[-1]:
        raise ValueError(f"x is {x.shape}; {features} features of a result need {width} columns")
    known = xla.ACTIVATIONS if gated else xla.UNGATED
    if activation not in known:
        raise ValueError(f"activation is {activation!r}; choose one of: {', '.join(known)}")
    result: Any = dispatch(
        "glu_quant",
        cast(Any, IMPLEMENTATIONS),
        implementation,
        x,
        scale,
        activation=activation,
        gated=gated,
        features=width // parts,
        out_dtype=out_dtype,
        group_sums=group_sums,
    )
    return result
