"""The activation between the products of a prepared layer's feed-forward part."""

import jax
import jax.numpy as jnp

from qjax import ops
from qjax.nn.mlp import ACTIVATIONS
from qjax.nn.moe import MoEConfig
from qjax.runtime.dense import row_output
from qjax.runtime.products import Rows, quantized
from qjax.runtime.weights import LayerWeights


def activated(x: jax.Array, weights: LayerWeights) -> Rows:
    """activation(gate) * up, or activation(up), of the last columns of x, as down takes it."""
    mlp = weights.config.mlp
    gated = isinstance(mlp, MoEConfig) or mlp.gated
    if gated and mlp.activation not in ops.GATES:
        gate, up = jnp.split(x, 2, axis=-1)
        return quantized(ACTIVATIONS[mlp.activation](gate) * up, [weights.down])
    dtype, static = row_output([weights.down]) or (x.dtype, None)
    y = ops.glu_quant(
        x,
        activation=mlp.activation,
        gated=gated,
        features=mlp.features,
        out_dtype=dtype,
        scale=static,
    )
    return Rows(y.values, y.scale)
