"""The way of the kernels for many tokens over the tiles of the result.

Two warpgroups own 64 rows of the weight each and share a tile of up to 256 tokens; a third copies.
Blocks stay on their multiprocessor and walk over the tiles in an order that keeps tokens and
weights in the L2 cache; the blocks of a cluster work on the same tokens, which are copied once for
all of them.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from qjax_kernels.hopper import swizzled
from qjax_kernels.weight_only_gemm import epilogue
from qjax_kernels.weight_only_gemm.config import Config
from qjax_kernels.weight_only_gemm.layout import LANES, Prepared, words_per_tile

Ref = Any


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a warpgroup is: `of`, the operands in global memory by name; its own index; the block
    of 64 rows that it works on, or the last one if its own is not there."""

    of: dict[str, Ref]
    warpgroup: Any
    block: Any


def walk(
    given: dict[str, jax.Array],
    weight: Prepared,
    config: Config,
    *,
    by_group: Sequence[str],
    step: Callable[..., Any],
    sums: Callable[[Callable[[Any], Any]], jax.Array],
    multiplier: float = 1.0,
    memory_registers: int = 40,
    activation: str | None,
    out_dtype: jnp.dtype,
    cores: int,
    interpret: bool,
) -> jax.Array:
    """x @ weight.T and what follows -> [tokens, out rounded up to 64].

    Args:
      given: the operands by name.
      weight: prepared.
      config: tiles.
      by_group: names of operands that a step has numbers of, one row for each of its groups.
      step: (place, words, x, *those numbers, carry) -> carry, for `config.tiles` tiles of columns.
        All but the carry are in shared memory: words and numbers of both warpgroups.
      sums: of a function from the first carry to the last one: the sums [64 rows, tile], float32.
      multiplier: of the sums.
      memory_registers: of the threads that copy; the others share what is left.
      activation: see `Epilogue`.
      out_dtype, cores, interpret: see `mosaic`.
    """
    tokens, features = given["x"].shape
    tile, wgs, cluster = config.tokens, config.warpgroups, config.cluster
    token_tiles = -(-tokens // tile)
    row_tiles = -(-weight.words.shape[0] // (wgs * cluster))
    specs = _specs(weight, config, jnp.dtype(given["x"].dtype).itemsize * 8, len(by_group))

    def pipeline(step, context):  # type: ignore[no-untyped-def]
        return plgpu.emit_pipeline_warp_specialized(
            step,
            grid=(-(-features // (64 * config.tiles)),),
            memory_registers=memory_registers,
            wg_axis="wg",
            num_compute_wgs=wgs,
            max_concurrent_steps=config.stages,
            compute_context=context,
            in_specs=specs,
        )

    def body(*refs):  # type: ignore[no-untyped-def]
        of, out = dict(zip(given, refs, strict=False)), refs[-1]

        def tile_loop(allocations, staged, copied, token_scales=None):  # type: ignore[no-untyped-def]
            wg = lax.axis_index("wg")

            @plgpu.nd_loop((token_tiles * row_tiles,), collective_axes="block")
            def _(info):  # type: ignore[no-untyped-def]
                token_tile, row_tile = plgpu.planar_snake(
                    info.index[0], (token_tiles, row_tiles), 0, config.width
                )
                row_tile = row_tile * cluster + lax.axis_index("cluster")
                # The last tile may have blocks that are not there: nothing of them is stored.
                block = row_tile * wgs + wg
                place = Place(of, wg, jnp.minimum(block, weight.words.shape[0] - 1))

                def context(evaluate):  # type: ignore[no-untyped-def]
                    end = epilogue.Epilogue(
                        of,
                        out,
                        staged.at[wg],
                        None if token_scales is None else token_scales.at[wg],
                        copied,
                        wg * (epilogue.SLOTS + 1),
                        tile,
                        per_channel=epilogue.per_channel(weight),
                        multiplier=multiplier,
                        activation=activation,
                        interpret=interpret,
                    )
                    end.fetch(block, token_tile * tile)
                    end.finish(sums(evaluate), block, token_tile * tile)

                of_rows = pl.ds(row_tile * wgs, wgs)
                streamed = [
                    of["words"].at[of_rows],
                    of["x"].at[pl.ds(token_tile * tile, tile)],
                    *[of[name].at[of_rows] for name in by_group],
                ]

                def at_place(_, *arguments):  # type: ignore[no-untyped-def]
                    return step(place, *arguments)

                pipeline(at_place, context)(*streamed, allocations=allocations)

            plgpu.wait_smem_to_gmem(0)

        def ignore(*_, **__):  # type: ignore[no-untyped-def]
            return None

        everything = [of[name] for name in ("words", "x", *by_group)]
        pl.run_scoped(
            tile_loop,
            allocations=pipeline(ignore, ignore).get_allocations(*everything),
            collective_axes="wg",
            **epilogue.scratch(given, tile, out_dtype, wgs, activation),
        )

    width_out = epilogue.rows_out(activation) * weight.words.shape[0]
    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((tokens, width_out), out_dtype),
        grid=(min(cores // cluster, token_tiles * row_tiles),),
        grid_names=("block",),
        cluster=(cluster,),
        cluster_names=("cluster",),
        num_threads=wgs + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=plgpu.InterpretGPUParams() if interpret else False,
    )
    return kernel(*given.values())


def groups_per_step(weight: Prepared, config: Config) -> int:
    """Rows of numbers that a step has."""
    return max(1, 64 * config.tiles // weight.group_size)


def _specs(weight: Prepared, config: Config, bits: int, by_group: int) -> list[plgpu.BlockSpec]:
    width, group = 64 * config.tiles, weight.group_size
    rows = words_per_tile(weight.format) * config.tiles
    shared = ("cluster",) if config.cluster > 1 else ()
    of_groups = plgpu.BlockSpec(
        (config.warpgroups, groups_per_step(weight, config), 64),
        lambda k: (0, k if width >= group else k * width // group, 0),
    )
    return [
        plgpu.BlockSpec((config.warpgroups, rows, LANES), lambda k: (0, k, 0)),
        plgpu.BlockSpec(
            (config.tokens, width),
            lambda k: (0, k),
            transforms=swizzled(width, bits),
            collective_axes=shared,
        ),
        *[of_groups] * by_group,
    ]
