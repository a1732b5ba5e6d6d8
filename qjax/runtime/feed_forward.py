"""The feed-forward part of a prepared layer: products, and what lies between them."""

from typing import Any

import jax
import jax.numpy as jnp

from qjax import ops
from qjax.qarray import QArray
from qjax.runtime.activation import activated
from qjax.runtime.dense import row_output
from qjax.runtime.mixture import mixture
from qjax.runtime.products import Rows, project, quantized, repacked_product, side_by_side
from qjax.runtime.weights import INTERLEAVED, LayerWeights


def feed_forward(
    rows: Rows, weights: LayerWeights, dtype: jnp.dtype, residual: jax.Array | None = None
) -> jax.Array:
    """What the MLP gives for rows [tokens, features], and a residual added."""
    if weights.router is not None:
        y = mixture(rows, weights, dtype)
        return y if residual is None else y + residual
    return project(inner(rows, weights, dtype), weights.down, dtype, residual)


def inner(rows: Rows, weights: LayerWeights, dtype: jnp.dtype) -> Rows:
    """What the last product of the MLP takes."""
    if weights.gated == INTERLEAVED:
        return _gated_product(rows, weights, dtype)
    return activated(
        side_by_side([project(rows, part, dtype) for part in weights.gate_up]), weights
    )


def _gated_product(rows: Rows, weights: LayerWeights, dtype: jnp.dtype) -> Rows:
    """activation(gate) * up by the kernel of their product."""
    activation = weights.config.mlp.activation
    (part,) = weights.gate_up
    weight = part.weight
    if isinstance(weight, ops.Prepared):
        return quantized(repacked_product(rows, part, dtype, activation), [weights.down])
    if isinstance(weight, QArray):
        x, x_scale = rows.values, rows.scale
        if x_scale is None and weight.input is not None:
            x, x_scale = ops.quantize_activations(x, weight.input)
        operands: dict[str, Any] = {"x_scale": x_scale, "scale": weight.scale}
        weight = weight.values
    else:
        x, operands = rows.values, {}
    out_dtype, static = row_output([weights.down]) or (dtype, None)
    values = ops.gemm_swiglu(
        x, weight, activation=activation, out_dtype=out_dtype, out_scale=static, **operands
    )
    return Rows(values, static)
