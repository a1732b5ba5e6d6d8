"""The reference, in plain JAX."""

from functools import partial

import jax
import jax.numpy as jnp

from qjax_kernels import row_quant
from qjax_kernels.quantize_rows.result import Quantized


@partial(jax.jit, static_argnames="out_dtype")
def quantize_rows(x: jax.Array, scale: jax.Array | None, *, out_dtype: jnp.dtype) -> Quantized:
    """See `api.quantize_rows`."""
    wide = x.astype(jnp.float32)
    values, step, _ = row_quant.quantize_rows(wide, out_dtype, scale, group_sums=False)
    assert step is not None
    return Quantized(values, step)
