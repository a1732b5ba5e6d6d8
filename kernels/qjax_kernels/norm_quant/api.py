"""y = norm(x + residual) * weight + bias, rounded to int8 or fp8 with a scale for each row."""

from typing import Any, cast

import jax
import jax.numpy as jnp

from qjax_kernels.dispatch import dispatch
from qjax_kernels.norm_quant import triton, xla
from qjax_kernels.norm_quant.result import Norm
from qjax_kernels.row_quant import FLOATS, check_output

IMPLEMENTATIONS = {"triton": triton.norm_quant, "xla": xla.norm_quant}


def norm_quant(
    x: jax.Array,
    weight: jax.Array,
    *,
    bias: jax.Array | None = None,
    residual: jax.Array | None = None,
    kind: str = "rms",
    eps: float,
    weight_offset: float = 0.0,
    out_dtype: jnp.dtype | None = None,
    scale: jax.Array | None = None,
    group_sums: bool = False,
    implementation: str | None = None,
) -> Norm:
    """Residual sum, norm and quantization in one pass over the rows.

    h = x + residual, rounded to the dtype of x: the new residual
    rms:   y[..., i] = h[..., i] / sqrt(mean(h^2) + eps) * (weight_offset + weight[i])
    layer: y[..., i] = (h[..., i] - mean(h)) / sqrt(var(h) + eps) * (weight_offset + weight[i])
                       + bias[i]
    values = round(y / scale), half to even; scale = max|y| / 127 (int8) or 448 (fp8) over each
    row, 1 where that is 0, unless it is given.

    y is float32 and rounded once, where models round it to the dtype of x before the weight
    multiplies it. arXiv:1910.07467 (rms), arXiv:1607.06450 (layer).

    Args:
      x: [..., features], bfloat16, float16 or float32.
      weight: [features].
      bias: [features], for kind 'layer'.
      residual: of the shape and dtype of x.
      kind: 'rms' or 'layer'.
      eps: added to the mean square.
      weight_offset: added to the weight; 1 in Gemma.
      out_dtype: int8, float8_e4m3fn, or a float dtype, for which there is no scale; None: of x.
      scale: float32 [] or [1, 1], static quantization; None: one for each row.
      group_sums: also sum the values over each 128 neighbours; features % 128 must be 0.
      implementation: a name of IMPLEMENTATIONS; None: the first that takes the call.

    Raises:
      ValueError: shapes or dtypes that do not fit together.
    """
    features = x.shape[-1]
    out_dtype = x.dtype if out_dtype is None else jnp.dtype(out_dtype)
    check_output("norm_quant", features, out_dtype, scale, group_sums)
    if x.dtype not in FLOATS:
        raise ValueError(f"x is {x.dtype}; norm_quant takes bfloat16, float16 or float32")
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None and vector.shape != (features,):
            raise ValueError(f"{name} is {vector.shape}; it must be ({features},)")
    if residual is not None and (residual.shape, residual.dtype) != (x.shape, x.dtype):
        raise ValueError(
            f"residual {residual.dtype}{residual.shape} must be like x, {x.dtype}{x.shape}"
        )
    if kind not in ("rms", "layer") or (kind == "rms" and bias is not None):
        raise ValueError(f"kind is {kind!r}; it must be 'rms', without a bias, or 'layer'")
    result: Any = dispatch(
        "norm_quant",
        cast(Any, IMPLEMENTATIONS),
        implementation,
        x,
        weight,
        bias,
        residual,
        scale,
        kind=kind,
        eps=float(eps),
        weight_offset=float(weight_offset),
        out_dtype=out_dtype,
        group_sums=group_sums,
    )
    return result
