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
# What stands without a gate; quick_gelu is CLIP's.
UNGATED = ACTIVATIONS | {
    "relu": jax.nn.relu,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}


@partial(jax.jit, static_argnames=("activation", "gated", "features", "out_dtype", "group_sums"))
def glu_quant(
    x: jax.Array,
    scale: jax.Array | None,
    *,
    activation: str,
    out_dtype: jnp.dtype,
    group_sums: bool,
    gated: bool = True,
    features: int | None = None,
) -> Glu:
    """See `api.glu_quant`."""
    if features is not None:
        x = x[..., x.shape[-1] - features * (2 if gated else 1) :]
    x = x.astype(jnp.float32)
    if gated:
        gate, up = jnp.split(x, 2, axis=-1)
        y = ACTIVATIONS[activation](gate) * up
    else:
        y = UNGATED[activation](x)
    return Glu(*quantize_rows(y, out_dtype, scale, group_sums))
