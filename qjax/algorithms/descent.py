"""Coordinate descent: rounded weights are revisited, one column at a time, given all others.

Behdin et al., QuantEase, https://arxiv.org/abs/2309.01885, equation 12. GPTQ chooses a column
knowing the errors of earlier ones only, and counts on later ones to make up for it. Given all
others, with d = w - q, the best q_j is the number nearest to

    w_j + (sum over i != j of d_i H_ij) / H_jj,

and no step makes the output error d H d^T larger.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qjax import numerics
from qjax.algorithms.scales import (
    Grid,
    WeightSpec,
    as_qarray,
    block_length,
    decode,
    encode,
    expand,
    scales_in,
)
from qjax.algorithms.statistics import EXACT
from qjax.qarray import QArray


@partial(jax.jit, static_argnames=("spec", "sweeps", "damping", "block"))
def descend(
    weight: jax.Array,
    quantized: QArray,
    gram: jax.Array,
    spec: WeightSpec,
    *,
    sweeps: int = 2,
    damping: float = 0.01,
    block: int = 128,
) -> QArray:
    """Improve what another method, GPTQ say, has rounded; scales stay.

    Args:
      weight: floating point [..., out, in].
      quantized: of the same shape, on the grid of `spec`.
      gram: float32 [..., in, in], sum over tokens of x x^T.
      sweeps: how often all columns are revisited.
      damping: share of the mean of diag(H) that is added to the diagonal, as in GPTQ. Inputs that
        are 0 in all calibration data are rounded to nearest.
      block: columns between products with all others. Speed only.

    Returns:
      `quantized` with other values; tr(dW H dW^T), H damped, is not larger.
    """
    lead, matrix = weight.shape[:-2], weight.shape[-2:]
    scales = scales_in(quantized)
    grid = expand(scales, spec, weight.shape)
    length = block_length(matrix[1], block)

    def improve(w: jax.Array, codes: jax.Array, h: jax.Array, grid: Grid) -> jax.Array:
        rows, cells = jax.tree.map(lambda x: x.T.reshape(-1, length, matrix[0]), (w, grid))
        sweep = partial(
            _sweep,
            weight=rows,
            grid=cells,
            h=_damped(h, damping),
            fmt=numerics.get_format(spec.format),
        )
        state = (w - decode(codes, *grid)).T, codes.T.reshape(rows.shape)
        _, codes = lax.fori_loop(0, sweeps, lambda _, state: sweep(state[0]), state)
        return codes.reshape(matrix[::-1]).T

    flat = partial(jax.tree.map, lambda x: x.reshape(-1, *x.shape[-2:]))
    codes = quantized.values.astype(jnp.float32)
    args = flat((weight.astype(jnp.float32), codes, gram, grid))
    codes = jax.vmap(improve)(*args).reshape(*lead, *matrix)
    values = as_qarray(codes, spec, scales, weight.dtype).values
    return dataclasses.replace(quantized, values=values)


def _damped(gram: jax.Array, damping: float) -> jax.Array:
    """H [in, in] in units of the mean of its diagonal, which is nowhere 0."""
    diagonal = jnp.diagonal(gram)
    alive = diagonal > 0
    mean = jnp.sum(diagonal) / jnp.maximum(jnp.sum(alive, dtype=jnp.float32), 1)
    return gram / jnp.where(mean > 0, mean, 1) + jnp.diag(damping + jnp.where(alive, 0.0, 1.0))


def _sweep(
    delta: jax.Array, weight: jax.Array, grid: Grid, h: jax.Array, fmt: numerics.Format
) -> tuple[jax.Array, jax.Array]:
    """Revisit each column once.

    Args:
      delta: float32 [in, out], w - q of each column.
      weight: float32 [blocks, columns, out]; step and zero point of grid as well.
      h: float32 [in, in].

    Returns:
      delta and codes [blocks, columns, out], as they are now.
    """
    count, length, _ = weight.shape

    def one_block(delta: jax.Array, xs: Any) -> tuple[jax.Array, jax.Array]:
        start, w, grid = xs
        columns = lax.dynamic_slice_in_dim(h, start, length, axis=1)
        own = lax.dynamic_slice_in_dim(columns, start, length, axis=0)
        before = lax.dynamic_slice_in_dim(delta, start, length, axis=0)
        owed = jnp.matmul(columns.T, delta, precision=EXACT)
        # What the product says of a column itself is not owed by others.
        best = w - before + owed / jnp.diagonal(own)[:, None]
        codes, moved = _revisit_block(w, before, best, own, grid, fmt)
        return lax.dynamic_update_slice_in_dim(delta, before + moved, start, axis=0), codes

    return lax.scan(one_block, delta, (jnp.arange(count) * length, weight, grid))


def _revisit_block(
    w: jax.Array, before: jax.Array, best: jax.Array, h: jax.Array, grid: Grid, fmt: numerics.Format
) -> tuple[jax.Array, jax.Array]:
    """Codes, and by how much w - q moved, float32 [columns, out], of the columns of one block.

    Args:
      w: [columns, out], the original columns; before: w - q as it was.
      best: [columns, out], what each column would be rounded from if those before it had not moved.
      h: [columns, columns], the block's own part of H.
    """

    def column(j: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        codes, moved = state
        step, zero = jax.tree.map(lambda x: x[j], grid)
        target = best[j] + jnp.sum(h[:, j, None] * moved, axis=0) / h[j, j]
        code = encode(target, step, zero, fmt)
        error = w[j] - decode(code, step, zero)
        return codes.at[j].set(code), moved.at[j].set(error - before[j])

    return lax.fori_loop(0, len(w), column, (jnp.zeros_like(w), jnp.zeros_like(w)))
