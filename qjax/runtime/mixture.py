"""A mixture of experts in a prepared layer: rows sorted by expert, and two grouped products."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from qjax.nn.moe import MoEConfig, choose
from qjax.runtime import experts
from qjax.runtime.activation import activated
from qjax.runtime.products import Rows, project, quantized, side_by_side
from qjax.runtime.weights import LayerWeights

FEW = 512  # rows, up to which comparing each with each is faster than a sort


class Order(NamedTuple):
    """Rows (token, choice) sorted by expert; equal ones stay in their order.

    Attributes:
      order: int32 [rows], which row comes where.
      place: int32 [rows], its inverse: where a row went.
      group_sizes: int32 [experts], rows of each.
    """

    order: jax.Array
    place: jax.Array
    group_sizes: jax.Array


def mixture(rows: Rows, weights: LayerWeights, dtype: jnp.dtype) -> jax.Array:
    """sum over a token's experts of router weight * expert(x); arXiv:1701.06538, 2401.04088.

    Args:
      rows: [tokens, features], floats.
    """
    cfg = weights.config.mlp
    assert isinstance(cfg, MoEConfig)
    assert weights.router is not None
    each = cfg.experts_per_token
    chosen, shares = choose(project(rows, weights.router, jnp.dtype(jnp.float32)), cfg)
    by_expert = sort(chosen.reshape(-1), cfg.experts)
    x = quantized(rows.values, weights.gate_up)
    row_ids = by_expert.order // each
    both = side_by_side(
        [
            experts.product(x, part, by_expert.group_sizes, dtype, row_ids=row_ids)
            for part in weights.gate_up
        ]
    )
    y = experts.product(
        activated(both, weights),
        weights.down,
        by_expert.group_sizes,
        dtype,
        row_scale=shares.reshape(-1)[by_expert.order],
    )
    y = y[by_expert.place].reshape(*chosen.shape, -1).astype(jnp.float32)
    total = y[:, 0]
    for i in range(1, each):
        total = total + y[:, i]
    return total.astype(dtype)


def sort(chosen: jax.Array, experts: int) -> Order:
    """int32 [rows], the expert of each -> Order."""
    rows = chosen.size
    index = jnp.arange(rows, dtype=jnp.int32)
    sizes = jnp.sum(chosen[:, None] == jnp.arange(experts), axis=0, dtype=jnp.int32)
    if rows > FEW:
        order = jnp.argsort(chosen, stable=True).astype(jnp.int32)
        return Order(order, jnp.zeros_like(order).at[order].set(index), sizes)
    before = (chosen < chosen[:, None]) | ((chosen == chosen[:, None]) & (index < index[:, None]))
    place = jnp.sum(before, axis=1, dtype=jnp.int32)
    order = jnp.sum(jnp.where(place == index[:, None], index, 0), axis=1, dtype=jnp.int32)
    return Order(order, place, sizes)
