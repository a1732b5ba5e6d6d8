"""The products of a layer with prepared weights, and the norms between them, which some are parts
of."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qjax import ops
from qjax.qarray import QArray
from qjax.runtime.dense import row_output
from qjax.runtime.weights import Norm, Projection

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


def project(
    rows: Rows, part: Projection, dtype: jnp.dtype, residual: jax.Array | None = None
) -> jax.Array:
    """[..., in] -> [..., out] of `dtype`, and a residual of that type added."""
    if isinstance(part.weight, ops.Prepared):
        return repacked_product(rows, part, dtype, residual=residual)
    if not isinstance(part.weight, QArray):
        weight = part.weight.astype(rows.values.dtype)
        return ops.plain_gemm(rows.values, weight, part.bias, residual, out_dtype=dtype)
    if rows.scale is None:
        y = ops.linear(rows.values, part.weight, part.bias, out_dtype=dtype)
        return y if residual is None else y + residual
    return ops.scaled_gemm(
        rows.values,
        rows.scale,
        part.weight.values,
        part.weight.scale,
        bias=part.bias,
        residual=residual,
        out_dtype=dtype,
    )


def repacked_product(
    rows: Rows,
    part: Projection,
    dtype: jnp.dtype,
    activation: str | None = None,
    residual: jax.Array | None = None,
) -> jax.Array:
    """[..., in] -> [..., out], or half of them behind a gate, with an `ops.Prepared`."""
    how: dict[str, Any] = {"out_dtype": dtype, "activation": activation}
    if part.weight.operand == "float16":
        x = rows.values if part.input is None else ops.rounded(rows.values, part.input)
        how |= {"squares": rows.squares, "eps": rows.eps}
        return ops.prepared_gemm(x, part.weight, part.bias, residual, **how)
    x, scale = rows.values, rows.scale
    if scale is None:
        x, scale = ops.quantize_activations(x, part.input)
    return ops.w4a8_gemm(x, scale, part.weight, part.bias, residual, **how)


def summed(rows: Rows, part: Projection, residual: jax.Array, norm: Norm) -> ops.Summed:
    """A product and the residual, and this product's part of the norm behind them."""
    return ops.residual_gemm(rows.values, part.weight, residual, norm.scale, part.bias)


def side_by_side(parts: list[jax.Array]) -> jax.Array:
    """[..., features] of each part -> [..., all features]; nothing to do for one."""
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)


def splits(tokens: int, norm: Norm, before: Projection, behind: Sequence[Projection]) -> bool:
    """Whether a norm is done by the products around it, see `ops.residual_gemm`, with no kernel of
    its own: RMSNorm between those of few tokens and weight-only weights."""
    return (
        tokens <= FEW
        and norm.kind == "rms"
        and norm.offset == 0
        and all(
            isinstance(part.weight, ops.Prepared) and part.input is None
            for part in (before, *behind)
        )
    )


def normed(
    x: jax.Array | ops.Summed,
    residual: jax.Array | None,
    norm: Norm,
    parts: Sequence[Projection],
) -> tuple[Rows, jax.Array]:
    """The norm of x + residual, as the product with `parts` behind it takes it; and that sum."""
    if isinstance(x, ops.Summed):
        return Rows(x.scaled, squares=x.squares, eps=norm.eps), x.total
    dtype, static = row_output(parts) or (None, None)
    scale = jnp.ones(x.shape[-1:], x.dtype) if norm.scale is None else norm.scale
    y = ops.norm_quant(
        x,
        scale,
        bias=norm.bias,
        residual=residual,
        kind=norm.kind,
        eps=norm.eps,
        weight_offset=norm.offset,
        out_dtype=dtype,
        scale=static,
    )
    return Rows(y.values, y.scale), x if y.residual is None else y.residual


def quantized(x: jax.Array, parts: Sequence[Projection]) -> Rows:
    """Rows as the product takes them, where what made them could not write them so."""
    output = row_output(parts)
    if output is None:
        return Rows(x)
    return Rows(*ops.quantize_rows(x, out_dtype=output[0], scale=output[1]))
