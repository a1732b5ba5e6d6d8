"""The reference, in plain JAX."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from qjax_kernels.glu_quant.result import Glu
from qjax_kernels.row_quant import quantize_rows

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
}


@partial(jax.jit, static_argnames=("activation", "out_dtype", "group_sums"))
def glu_quant(
    x: jax.Array,
    scale: jax.Array | None,
    *,
    activation: str,
    out_dtype: jnp.dtype,
    group_sums: bool,
) -> Glu:
    """See `api.glu_quant`."""
    gate, up = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return Glu(*quantize_rows(ACTIVATIONS[activation](gate) * up, out_dtype, scale, group_sums))
