"""The products of a layer with prepared weights, and what their kernels do besides: norms, rounding
for the product behind, the gate."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qjax import ops
from qjax.qarray import QArray
from qjax.runtime.fuse import row_output
from qjax.runtime.weights import INTERLEAVED, LayerWeights, Projection

FEW = 64  # tokens, up to which a product lasts as long as its weights take to arrive


class Rows(NamedTuple):
    """Activations [tokens, features] on their way into a product.

    Attributes:
      values: as they are, or quantized.
      scale: of quantized ones, float32 [] or [tokens, 1]; else None.
      squares, eps: of rows that are still to be multiplied by 1 / rms, see `ops.residual_gemm`.
    """

    values: jax.Array
    scale: jax.Array | None = None
    squares: jax.Array | None = None
    eps: float = 0.0


def project(rows: Rows, part: Projection, dtype: jnp.dtype) -> jax.Array:
    """[..., in] -> [..., out] of `dtype`."""
    if isinstance(part.weight, ops.Prepared):
        return repacked_product(rows, part, dtype)
    if not isinstance(part.weight, QArray):
        weight = part.weight.astype(rows.values.dtype)
        return ops.plain_gemm(rows.values, weight, part.bias, out_dtype=dtype)
    if rows.scale is None:
        return ops.linear(rows.values, part.weight, part.bias, out_dtype=dtype)
    return ops.scaled_gemm(
        rows.values,
        rows.scale,
        part.weight.values,
        part.weight.scale,
        bias=part.bias,
        out_dtype=dtype,
    )


def repacked_product(
    rows: Rows, part: Projection, dtype: jnp.dtype, activation: str | None = None
) -> jax.Array:
    """[..., in] -> [..., out], or half of them behind a gate, with an `ops.Prepared`."""
    how: dict[str, Any] = {"out_dtype": dtype, "activation": activation}
    if part.input is None:
        how |= {"squares": rows.squares, "eps": rows.eps}
        return ops.prepared_gemm(rows.values, part.weight, part.bias, **how)
    x, scale = rows.values, rows.scale
    if scale is None:
        x, scale = ops.quantize_activations(x, part.input)
    return ops.w4a8_gemm(x, scale, part.weight, part.bias, **how)


def side_by_side(parts: list[jax.Array]) -> jax.Array:
    """[..., features] of each part -> [..., all features]; nothing to do for one."""
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)


def splits(tokens: int, before: Projection, behind: tuple[Projection, ...]) -> bool:
    """Whether a norm is done by the products around it, see `ops.residual_gemm`, with no kernel of
    its own: those of few tokens and weight-only weights."""
    parts = (before, *behind)
    return tokens <= FEW and all(
        isinstance(part.weight, ops.Prepared) and part.input is None for part in parts
    )


def added(
    rows: Rows, part: Projection, residual: jax.Array, gain: jax.Array | None
) -> jax.Array | ops.Summed:
    """A product that goes to the residual; with the gain of the norm behind it their sum."""
    if gain is None:
        return project(rows, part, residual.dtype)
    return ops.residual_gemm(rows.values, part.weight, residual, gain, part.bias)


def normed(
    x: jax.Array | ops.Summed,
    residual: jax.Array | None,
    scale: jax.Array,
    parts: tuple[Projection, ...],
    eps: float,
) -> tuple[Rows, jax.Array]:
    """RMSNorm of x + residual, as the product behind it takes it; and that sum."""
    if isinstance(x, ops.Summed):
        return Rows(x.scaled, squares=x.squares, eps=eps), x.total
    dtype, static = row_output(parts) or (None, None)
    norm = ops.norm_quant(x, scale, residual=residual, eps=eps, out_dtype=dtype, scale=static)
    return Rows(norm.values, norm.scale), x if norm.residual is None else norm.residual


def quantized(x: jax.Array, part: Projection) -> Rows:
    """Rows as the product takes them, where what made them could not write them so."""
    output = row_output([part])
    if output is None:
        return Rows(x)
    return Rows(*ops.quantize_rows(x, out_dtype=output[0], scale=output[1]))


def gate(rows: Rows, weights: LayerWeights, dtype: jnp.dtype) -> Rows:
    """silu(gate) * up, as the product with down takes it."""
    out_dtype, static = row_output([weights.down]) or (dtype, None)
    if weights.gated != INTERLEAVED:
        both = side_by_side([project(rows, part, dtype) for part in weights.gate_up])
        glu = ops.glu_quant(both, out_dtype=out_dtype, scale=static)
        return Rows(glu.values, glu.scale)
    (part,) = weights.gate_up
    weight = part.weight
    if isinstance(weight, ops.Prepared):
        return quantized(repacked_product(rows, part, dtype, "silu"), weights.down)
    if isinstance(weight, QArray):
        x, x_scale = rows.values, rows.scale
        if x_scale is None and weight.input is not None:
            x, x_scale = ops.quantize_activations(x, weight.input)
        operands: dict[str, Any] = {"x_scale": x_scale, "scale": weight.scale}
        weight = weight.values
    else:
        x, operands = rows.values, {}
    values = ops.gemm_swiglu(x, weight, out_dtype=out_dtype, out_scale=static, **operands)
    return Rows(values, static)
