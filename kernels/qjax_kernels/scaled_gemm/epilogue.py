"""From a tile's sums to the result: scales, bias, activation, residual, rounding, and out."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from qjax_kernels.gate import gated as apply_gate
from qjax_kernels.scaled_gemm import gated
from qjax_kernels.scaled_gemm.config import BLOCK
from qjax_kernels.scaled_gemm.exchange import collect, publish
from qjax_kernels.scaled_gemm.tiling import Tiling


def fetch(
    t: Tiling, refs: SimpleNamespace, group: jax.Array, row: jax.Array, column: jax.Array
) -> dict[str, jax.Array]:
    """Start the copies of what a warpgroup's rows of a tile need at their end.

    Returns:
      The scales that are single numbers: 'x' and 'w', and 'out', one over the result's.
    """
    c = t.config
    rows, columns = pl.ds(row, 64), pl.ds(column, c.columns)
    outputs = rows if c.swap else columns
    scalars = {}
    if t.blocked:
        output = lax.div(row if c.swap else column, jnp.int32(BLOCK))
        _copy(refs, group, refs.w_scale.at[output], refs.scales.at[group, pl.ds(0, t.scale_blocks)])
    else:
        places = {"rows": (rows, pl.ds(0, 64)), "columns": (columns, pl.ds(64, c.columns))}
        for name, ref, vector, side in _factors(t, refs):
            if vector:
                source, target = places[side]
                _copy(refs, group, ref.at[source], refs.scales.at[group, target])
            else:
                scalars[name] = ref[0]
    if t.requantized:
        scalars["out"] = 1 / refs.out_scale[0]
    if t.bias is not None:
        size = 64 if c.swap else c.columns
        _copy(refs, group, refs.bias_in.at[outputs], refs.bias.at[group, pl.ds(0, size)])
    if t.residual:
        # The buffers are those of the last tile's results.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        @_if_owner(t)
        def _() -> None:
            for part in range(t.slots):
                _fetch_residual(t, refs, group, row, column + _owned_from(t), part)

    return scalars


def finish(
    t: Tiling,
    refs: SimpleNamespace,
    group: jax.Array,
    row: jax.Array,
    column: jax.Array,
    sums: jax.Array,
    scalars: dict[str, jax.Array],
) -> None:
    """Write a warpgroup's rows of a tile, of which this block may own only some columns."""
    if t.vectors and not t.blocked:
        plgpu.barrier_wait(refs.fetched.at[group])
    if t.config.splits == 1:
        _write(t, refs, group, row, column, jnp.int32(0), sums, scalars)
        return
    if t.aliased and t.config.warpgroups > 1:
        # The stages are free once every warpgroup has read them.
        plgpu.barrier_arrive(refs.drained)
        plgpu.barrier_wait(refs.drained)
    publish(t, refs.partial.at[group], sums)
    _meet(refs, group)

    @_if_owner(t)
    def _() -> None:
        total = collect(t, refs.partial.at[group], sums)
        _write(t, refs, group, row, column, _owned_from(t), total, scalars)

    # No block may end, or go on to its next tile, while others read its sums. (All threads of an
    # owner have read them: they have met since, to write the result.)
    _meet(refs, group + t.config.warpgroups)


def keep_plain(t: Tiling, staging: Any) -> None:
    """Say that the staging buffers are not swizzled: left alone, the compiler would do it."""
    if not t.interpret:
        plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))(lambda context, ref: None)(staging)


def _meet(refs: SimpleNamespace, barrier: jax.Array) -> None:
    plgpu.barrier_arrive(refs.summed.at[barrier])
    plgpu.barrier_wait(refs.summed.at[barrier])


def _if_owner(t: Tiling) -> Any:
    if t.owners == t.config.splits:
        return lambda body: body()
    return pl.when(lax.axis_index("split") < t.owners)


def _owned_from(t: Tiling) -> jax.Array:
    """First column of the tile that this block finishes."""
    if t.config.splits == 1:
        return jnp.int32(0)
    return lax.axis_index("split") * t.config.owned


def _factors(t: Tiling, refs: SimpleNamespace) -> list[tuple[str, Any, bool, str]]:
    """Name, array, whether it is a vector, and side of each scale."""
    if not t.scaled:
        return []
    tokens, outputs = ("columns", "rows") if t.config.swap else ("rows", "columns")
    return [
        ("x", refs.x_scale, t.token_scales, tokens),
        ("w", refs.w_scale, t.output_scales, outputs),
    ]


def _copy(refs: SimpleNamespace, group: jax.Array, source: Any, target: Any) -> None:
    plgpu.copy_gmem_to_smem(source, target, refs.fetched.at[group])


def _out(t: Tiling, ref: Any, row: jax.Array, column: jax.Array, part: int) -> Any:
    """The piece of the result (or the residual) that is staged as number `part`."""
    column = column + part * t.staged
    token, output = (column, row) if t.config.swap else (row, column)
    if t.activation:
        output = pl.multiple_of(lax.div(output, jnp.int32(2)), t.staging[1])
    return ref.at[pl.ds(token, t.staging[0]), pl.ds(output, t.staging[1])]


def _fetch_residual(
    t: Tiling, refs: SimpleNamespace, group: jax.Array, row: jax.Array, column: jax.Array, part: int
) -> None:
    slot = part % t.slots
    plgpu.copy_gmem_to_smem(
        _out(t, refs.residual_in, row, column, part),
        refs.staging.at[group, slot],
        refs.residual.at[group * t.slots + slot],
    )


def _write(
    t: Tiling,
    refs: SimpleNamespace,
    group: jax.Array,
    row: jax.Array,
    column: jax.Array,
    start: jax.Array,
    sums: jax.Array,
    scalars: dict[str, jax.Array],
) -> None:
    """Columns [start, start + owned) of the tile at (row, column)."""
    parts = t.config.owned // t.staged
    for part in range(parts):
        slot = part % t.slots
        y = sums[:, part * t.staged : (part + 1) * t.staged].astype(jnp.float32)
        y = _scale(t, refs, group, start + part * t.staged, y, scalars)
        if t.residual:
            plgpu.barrier_wait(refs.residual.at[group * t.slots + slot])
            y = y + _load(t, refs.staging.at[group, slot]).astype(jnp.float32)
        elif part == 0 and parts % t.slots:
            # The last copy of the tile before this one read the same buffer.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        else:
            plgpu.wait_smem_to_gmem(t.slots - 1, wait_read_only=True)
        if t.activation:
            y = apply_gate(y, t.activation, rows=t.config.swap, interpret=t.interpret)
            if t.requantized:
                y = gated.in_range(t, y * scalars["out"])
            gated.store(t, refs.staging.at[group, slot], y.astype(t.out_dtype))
        else:
            _store(t, refs.staging.at[group, slot], y.astype(t.out_dtype))
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(
            refs.staging.at[group, slot], _out(t, refs.out, row, column + start, part)
        )
        ahead = part - 1 + t.slots
        if t.residual and part >= 1 and ahead < parts:
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            _fetch_residual(t, refs, group, row, column + start, ahead)


def _scale(
    t: Tiling,
    refs: SimpleNamespace,
    group: jax.Array,
    column: jax.Array,
    y: jax.Array,
    scalars: dict[str, jax.Array],
) -> jax.Array:
    """y * x_scale * w_scale + bias for columns of the tile from `column` on."""
    for name, _, vector, side in [] if t.blocked else _factors(t, refs):
        if not vector:
            y = y * scalars[name]
            continue
        start = 0 if side == "rows" else 64 + column
        y = y * _spread(t, refs.scales, group, start, side)
    if t.bias is not None:
        side, start = ("rows", 0) if t.config.swap else ("columns", column)
        y = y + _spread(t, refs.bias, group, start, side).astype(jnp.float32)
    return y


def _spread(t: Tiling, ref: Any, group: jax.Array, start: Any, side: str) -> jax.Array:
    """A vector along the rows or the columns, for all of a piece [64, staged]."""
    shape = (64, t.staged)
    axis = 0 if side == "rows" else 1
    vector = plgpu.load(
        ref.at[group, pl.ds(start, shape[axis])],
        layout=plgpu.Layout.WGMMA.reduce(1 - axis),
        optimized=False,
    )
    return lax.broadcast_in_dim(vector, shape, [axis])


def _load(t: Tiling, ref: Any) -> jax.Array:
    if not t.config.swap:
        return plgpu.load(ref, layout=plgpu.Layout.WGMMA, optimized=False)
    transposed = plgpu.load(ref.T, layout=plgpu.Layout.WGMMA_TRANSPOSED, optimized=False)
    return plgpu.layout_cast(transposed, plgpu.Layout.WGMMA)


def _store(t: Tiling, ref: Any, y: jax.Array) -> None:
    if t.config.swap:
        ref.T[...] = plgpu.layout_cast(y, plgpu.Layout.WGMMA_TRANSPOSED)
    else:
        ref[...] = y
