"""Rows rounded to int8 or fp8 with a scale for each, where no other kernel writes them."""

from typing import Any, cast

import jax
import jax.numpy as jnp

from qjax_kernels.dispatch import dispatch
from qjax_kernels.quantize_rows import triton, xla
from qjax_kernels.quantize_rows.result import Quantized
from qjax_kernels.row_quant import FLOATS, RANGES, check_output

IMPLEMENTATIONS = {"triton": triton.quantize_rows, "xla": xla.quantize_rows}


def quantize_rows(
    x: jax.Array,
    *,
    out_dtype: jnp.dtype,
    scale: jax.Array | None = None,
    implementation: str | None = None,
) -> Quantized:
    """Quantization in one pass over the rows.

    values = round(x / scale), half to even; scale = max|x| / 127 (int8) or 448 (fp8) over each
    row, 1 where that is 0, unless it is given.

    Args:
      x: [..., features], bfloat16, float16 or float32.
      out_dtype: int8 or float8_e4m3fn.
      scale: float32 [] or [1, 1], static quantization; None: one for each row.
      implementation: a name of IMPLEMENTATIONS; None: the first that takes the call.

    Raises:
      ValueError: shapes or dtypes that do not fit together.
    """
    out_dtype = jnp.dtype(out_dtype)
    check_output("quantize_rows", x.shape[-1], out_dtype, scale, False)
    if x.dtype not in FLOATS or out_dtype not in RANGES:
        raise ValueError(
            f"quantize_rows takes bfloat16, float16 or float32 and writes int8 or float8_e4m3fn, "
            f"not {x.dtype} and {out_dtype}"
        )
    result: Any = dispatch(
        "quantize_rows",
        cast(Any, IMPLEMENTATIONS),
        implementation,
        x,
        scale,
        out_dtype=out_dtype,
    )
    return result
