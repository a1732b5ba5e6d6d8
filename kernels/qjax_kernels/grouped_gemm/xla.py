"""The reference: a loop over tiles of rows of one expert each. Takes every valid call.

Its work is that of the rows there are, whatever the number of experts (`jax.lax.ragged_dot` does
every row for every expert on GPUs), and it dequantizes one expert at a time.
"""

from functools import partial

import jax
import jax.numpy as jnp

from qjax_kernels.grouped_gemm.layout import Prepared, unprepare
from qjax_kernels.matmul import matmul

TILE = 32  # always, so that a row's bits do not depend on the rows beside it


@partial(jax.jit, static_argnames="out_dtype")
def grouped_gemm(
    x: jax.Array,
    values: jax.Array,
    group_sizes: jax.Array,
    scale: jax.Array | None,
    zero_point: jax.Array | None,
    x_scale: jax.Array | None,
    row_ids: jax.Array | None,
    row_scale: jax.Array | None,
    *,
    out_dtype: jnp.dtype,
) -> jax.Array:
    """See `api.grouped_gemm`."""
    rows = x.shape[0] if row_ids is None else row_ids.shape[0]
    ends = jnp.cumsum(group_sizes)
    tiles = -(-group_sizes // TILE)
    tile_ends = jnp.cumsum(tiles)

    def one(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        tile, y = state
        expert = jnp.searchsorted(tile_ends, tile, side="right")
        first = ends[expert] - group_sizes[expert]
        first = first + (tile - (tile_ends[expert] - tiles[expert])) * TILE
        row = first + jnp.arange(TILE)
        live = row < ends[expert]
        token = row if row_ids is None else row_ids.at[row].get(mode="fill", fill_value=0)
        part = x.at[jnp.where(live, token, x.shape[0])].get(mode="fill", fill_value=0)
        part = _product(
            part,
            values[expert],
            None if scale is None else scale[expert],
            None if zero_point is None else zero_point[expert],
        )
        if x_scale is not None:
            part = part * x_scale.at[token].get(mode="fill", fill_value=0)
        if row_scale is not None:
            part = part * row_scale.at[row].get(mode="fill", fill_value=0)[:, None]
        return tile + 1, y.at[jnp.where(live, row, rows)].set(part.astype(out_dtype), mode="drop")

    zeros = jnp.zeros((rows, values.shape[1]), out_dtype)
    if rows == 0:
        return zeros
    start = (jnp.zeros((), tile_ends.dtype), zeros)
    return jax.lax.while_loop(lambda state: state[0] < tile_ends[-1], one, start)[1]


@partial(jax.jit, static_argnames="out_dtype")
def prepared_grouped_gemm(
    x: jax.Array,
    weight: Prepared,
    group_sizes: jax.Array,
    row_ids: jax.Array | None,
    row_scale: jax.Array | None,
    *,
    out_dtype: jnp.dtype,
) -> jax.Array:
    """See `api.prepared_grouped_gemm`."""
    values, scale, zero_point = unprepare(weight)
    return grouped_gemm(
        x, values, group_sizes, scale, zero_point, None, row_ids, row_scale, out_dtype=out_dtype
    )


def _product(
    x: jax.Array, values: jax.Array, scale: jax.Array | None, zero_point: jax.Array | None
) -> jax.Array:
    """x [rows, in] times one expert's weight [out, in], float32 [rows, out]."""
    accumulator = jnp.int32 if jnp.issubdtype(x.dtype, jnp.integer) else jnp.float32
    if scale is None or (scale.shape[1] == 1 and zero_point is None):
        # The scale leaves the sum: the product runs on exact small numbers, whatever the type.
        y = matmul(x, values.astype(x.dtype), accumulator=accumulator).astype(jnp.float32)
        return y if scale is None else y * scale.astype(jnp.float32)[:, 0]
    out, features = values.shape
    groups = values.astype(jnp.float32).reshape(out, scale.shape[1], -1)
    if zero_point is not None:
        groups = groups - zero_point.astype(jnp.float32)[:, :, None]
    weight = (groups * scale.astype(jnp.float32)[:, :, None]).reshape(out, features)
    return matmul(x, weight.astype(x.dtype))
