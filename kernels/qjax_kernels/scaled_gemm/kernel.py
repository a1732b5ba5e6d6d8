"""The Mosaic kernel: one warpgroup loads tiles of both operands, the others multiply them.

Blocks are persistent: the loads of a block's next tile begin while its present one is finished.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from qjax_kernels.scaled_gemm import epilogue, memory
from qjax_kernels.scaled_gemm.exchange import split_of_k
from qjax_kernels.scaled_gemm.tiling import Tiling


def build(t: Tiling) -> Callable[[dict[str, Any]], jax.Array]:
    """The kernel as a function of its operands by name (see `mosaic`)."""

    def run(operands: dict[str, Any]) -> jax.Array:
        names = list(operands)

        def body(*refs: Any, **scratch: Any) -> None:
            named = dict(zip(names, refs, strict=False))
            _block(t, SimpleNamespace(**named, out=refs[len(names)], **scratch))

        op = "gemm_swiglu" if t.activation else "scaled_gemm" if t.scaled else "plain_gemm"
        body.__name__ = f"{op}_{jnp.dtype(t.dtype).name}"
        kernel = plgpu.kernel(
            body,
            out_type=jax.ShapeDtypeStruct((t.m, t.outputs), t.out_dtype),
            scratch_types=memory.scratch(t),
            grid=(t.clusters,),
            grid_names=("clusters",),
            cluster=(t.config.multicast, t.config.splits),
            cluster_names=("along", "split"),
            num_threads=t.config.warpgroups + 1,
            thread_name="warpgroup",
            interpret=plgpu.InterpretGPUParams() if t.interpret else None,
        )
        return kernel(*operands.values())

    return run


def _block(t: Tiling, refs: SimpleNamespace) -> None:
    if t.aliased:
        refs.ring, (refs.partial,) = refs.ring
    refs.rows, refs.columns, *rest = refs.ring
    refs.token_ring = rest[0] if rest else None
    registers = t.moved_registers
    if not t.swizzled:
        epilogue.keep_plain(t, refs.staging)

    def loader() -> None:
        if registers:
            plgpu.set_max_registers(registers[1], action="decrease")
        _load(t, refs)

    def multiplier() -> None:
        if registers:
            plgpu.set_max_registers(registers[0], action="increase")
        _multiply(t, refs)

    lax.cond(lax.axis_index("warpgroup") == t.config.warpgroups, loader, multiplier)


def _each_tile(t: Tiling, body: Callable[..., jax.Array]) -> jax.Array:
    """Run body(first row, first column, count) -> count for the tiles of this cluster.

    The count is of the stages used so far; it says where in the ring the next one is.
    """

    def tile(linear: jax.Array, count: jax.Array) -> jax.Array:
        if t.column_tiles == 1:
            row, column = linear, jnp.int32(0)
        elif t.row_tiles == 1:
            row, column = jnp.int32(0), linear
        else:
            grid = (t.row_tiles, t.column_tiles)
            row, column = plgpu.planar_snake(linear, grid, 0, t.config.snake)
        if t.config.multicast > 1:
            row = row * t.config.multicast + lax.axis_index("along")
        return body(row * t.config.rows, column * t.config.columns, count)

    zero = jnp.int32(0)
    if t.once:
        return tile(lax.axis_index("clusters"), zero)
    loop = plgpu.nd_loop((t.tiles,), collective_axes="clusters", init_carry=zero)
    return loop(lambda info, carry: tile(info.index[0], carry))


def _slot(t: Tiling, count: jax.Array) -> jax.Array:
    return lax.rem(count, jnp.int32(t.config.stages))


def _load(t: Tiling, refs: SimpleNamespace) -> None:
    c = t.config
    together = "along" if c.multicast > 1 else None

    def tile(row: jax.Array, column: jax.Array, count: jax.Array) -> jax.Array:
        def step(i: jax.Array, count: jax.Array) -> jax.Array:
            slot = _slot(t, count)

            @pl.when(count >= c.stages)
            def _() -> None:
                plgpu.barrier_wait(refs.empty.at[slot])

            k = pl.ds(i * c.k_tile, c.k_tile)
            full = refs.full.at[slot]
            plgpu.copy_gmem_to_smem(refs.a.at[pl.ds(row, c.rows), k], refs.rows.at[slot], full)
            plgpu.copy_gmem_to_smem(
                refs.b.at[pl.ds(column, c.columns), k],
                refs.columns.at[slot],
                full,
                collective_axes=together,
            )
            if t.blocked:
                tokens = pl.ds(column if c.swap else row, t.token_blocks)
                plgpu.copy_gmem_to_smem(
                    refs.x_scale.at[i, tokens],
                    refs.token_ring.at[slot, pl.ds(0, t.token_blocks)],
                    full,
                )
            return count + 1

        return lax.fori_loop(*split_of_k(t), step, count)

    count = _each_tile(t, tile)

    # The other blocks of the cluster may still have to arrive at this one's barriers.
    @pl.loop(lax.max(count - c.stages, 0), count)
    def _(last: jax.Array) -> None:
        plgpu.barrier_wait(refs.empty.at[_slot(t, last)])


def _multiply(t: Tiling, refs: SimpleNamespace) -> None:
    group = lax.axis_index("warpgroup")

    def tile(row: jax.Array, column: jax.Array, count: jax.Array) -> jax.Array:
        row = row + group * 64
        factors = epilogue.fetch(t, refs, group, row, column)
        if t.blocked:  # its scales are needed from the first step on
            plgpu.barrier_wait(refs.fetched.at[group])
        if t.chunk:
            sums, count = _sum_of_chunks(t, refs, group, count)
        else:
            begin, end = split_of_k(t)
            sums, count = _sum(t, refs, group, begin, end, count)
            _release(t, refs, count)
        epilogue.finish(t, refs, group, row, column, sums, factors)
        return count

    _each_tile(t, tile)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _release(t: Tiling, refs: SimpleNamespace, count: jax.Array) -> None:
    """The stage before `count` may be loaded anew."""
    plgpu.barrier_arrive(refs.empty.at[_slot(t, count + (t.config.stages - 1))])


def _sum(
    t: Tiling, refs: SimpleNamespace, group: jax.Array, begin: Any, end: Any, count: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The products of steps [begin, end), all stages but the last one released."""
    shape = (64, t.config.columns)

    def scope(accumulator: Any) -> tuple[jax.Array, jax.Array]:
        def step(i: jax.Array, count: jax.Array) -> jax.Array:
            slot = _slot(t, count)
            plgpu.barrier_wait(refs.full.at[slot])
            rows = refs.rows.at[slot, pl.ds(group * 64, 64)]
            plgpu.wgmma(accumulator, rows, refs.columns.at[slot].T)
            plgpu.wgmma_wait(1)  # the step before this one is done

            @pl.when(i > begin)
            def _() -> None:
                _release(t, refs, count)

            return count + 1

        count_after = lax.fori_loop(begin, end, step, count)
        return accumulator[...], count_after

    return pl.run_scoped(scope, plgpu.ACC(shape, t.accumulator))


def _sum_of_chunks(
    t: Tiling, refs: SimpleNamespace, group: jax.Array, count: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The same for a whole tile, with sums over chunks of K added up outside the tensor cores."""
    begin, end = split_of_k(t)
    shape = (64, t.config.columns)

    def chunk(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        total, count = carry
        first = begin + i * t.chunk
        part, count = _sum(t, refs, group, first, lax.min(first + t.chunk, end), count)
        if t.blocked:
            part = part * _block_scales(t, refs, group, first, _slot(t, count - 1))
        _release(t, refs, count)
        return total + part, count

    zeros = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)
    chunks = lax.div(end - begin + (t.chunk - 1), jnp.int32(t.chunk))
    return lax.fori_loop(0, chunks, chunk, (zeros, count))


def _block_scales(
    t: Tiling, refs: SimpleNamespace, group: jax.Array, block: jax.Array, slot: jax.Array
) -> jax.Array:
    """Scale of the tokens times that of the weight's block."""
    swap = t.config.swap
    start, size = (0, t.config.columns) if swap else (group * 64, 64)
    tokens = plgpu.load(
        refs.token_ring.at[slot, pl.ds(start, size)],
        layout=plgpu.Layout.WGMMA.reduce(0 if swap else 1),
        optimized=False,
    )
    tokens = tokens * refs.scales[group, block]
    return lax.broadcast_in_dim(tokens, (64, t.config.columns), [1 if swap else 0])
