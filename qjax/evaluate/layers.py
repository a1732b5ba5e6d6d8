"""How far each quantized weight is from the original."""

from typing import Any

import jax
import jax.numpy as jnp

from qjax.qarray import QArray, dequantize
from qjax.tree import named_leaves


def layer_errors(params: Any, quantized: Any) -> dict[str, float]:
    """Relative error of each quantized weight: ||W - dequantize(Q)|| / ||W||, Frobenius.

    Args:
      params: the original tree.
      quantized: what `quantize` made of it.

    Returns:
      name -> error, for the leaves that are QArrays, in tree order.
    """
    original = dict(named_leaves(params))
    return {
        name: float(_relative_error(original[name], leaf))
        for name, leaf in named_leaves(quantized)
        if isinstance(leaf, QArray)
    }


@jax.jit
def _relative_error(weight: jax.Array, q: QArray) -> jax.Array:
    weight = weight.astype(jnp.float32)
    norm = jnp.linalg.norm(weight)
    error = jnp.linalg.norm(weight - dequantize(q, "float32"))
    return jnp.where(norm > 0, error / norm, 0.0)
