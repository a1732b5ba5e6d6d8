"""The product of many fp8 tokens with int4 weights.

As `tiled`, with the weights converted to e4m3, where a group's scale cannot be applied: it
multiplies the sum of the group, in float32, which also spares the tensor cores' short accumulator.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from qjax_kernels.hopper import load_column, load_row, swizzled
from qjax_kernels.weight_only_gemm.config import Config
from qjax_kernels.weight_only_gemm.convert import MMA, strided, to_fp8
from qjax_kernels.weight_only_gemm.fp8 import Fp8
from qjax_kernels.weight_only_gemm.layout import LANES, Prepared, words_per_tile

WIDTH = 128  # columns of a step
OUT_TOKENS = 64  # of the pieces in which a tile of the result leaves


def tiled_fp8(
    x: jax.Array,
    weight: Prepared,
    bias: jax.Array | None,
    fp8: Fp8,
    *,
    out_dtype: jnp.dtype,
    config: Config,
    cores: int,
    interpret: bool = False,
) -> jax.Array:
    """x [tokens, in] @ weight.T + bias -> [tokens, out rounded up to 64].

    tokens is a multiple of 8, or fewer; in is padded to 64. See `api.prepared_gemm`.
    """
    tokens, features = x.shape
    tile, wgs, cluster = config.tokens, config.warpgroups, config.cluster
    group, grouped = weight.group_size, weight.groups > 1
    rows = words_per_tile(weight.format) * WIDTH // 64
    piece = min(OUT_TOKENS, tile)
    token_tiles = -(-tokens // tile)
    row_tiles = -(-weight.words.shape[0] // (wgs * cluster))

    def pipeline(step, context):  # type: ignore[no-untyped-def]
        shared = ("cluster",) if cluster > 1 else ()
        of_groups = [
            plgpu.BlockSpec((wgs, 1, 64), lambda k: (0, k * WIDTH // group, 0)),
            plgpu.BlockSpec((1, tile), lambda k: (k * WIDTH // group, 0)),
        ]
        return plgpu.emit_pipeline_warp_specialized(
            step,
            grid=(-(-features // WIDTH),),
            memory_registers=40,
            wg_axis="wg",
            num_compute_wgs=wgs,
            max_concurrent_steps=config.stages,
            compute_context=context,
            in_specs=[
                plgpu.BlockSpec((wgs, rows, LANES), lambda k: (0, k, 0)),
                plgpu.BlockSpec(
                    (tile, WIDTH),
                    lambda k: (0, k),
                    transforms=swizzled(WIDTH, 8),
                    collective_axes=shared,
                ),
                *(of_groups if grouped else []),
            ],
        )

    def body(*refs):  # type: ignore[no-untyped-def]
        words_g, x_g, scale_g, token_scale_g, sums_g, *bias_g, out_g = refs

        everything = [words_g, x_g, *([scale_g, sums_g] if grouped else [])]

        def at_tile(row_tile, token_tile):  # type: ignore[no-untyped-def]
            of_rows = pl.ds(row_tile * wgs, wgs)
            of_tokens = pl.ds(token_tile * tile, tile)
            streamed = [words_g.at[of_rows], x_g.at[of_tokens]]
            more = [scale_g.at[of_rows], sums_g.at[:, of_tokens]]
            return streamed + (more if grouped else [])

        def tile_loop(allocations, out_s):  # type: ignore[no-untyped-def]
            wg = lax.axis_index("wg")

            def finish(y, n, token_tile):  # type: ignore[no-untyped-def]
                there = jnp.minimum(n, weight.words.shape[0] - 1)
                of_tokens = pl.ds(token_tile * tile, tile)
                if not grouped:
                    y = y - _columns(load_column(sums_g.at[0, of_tokens]), y)
                    y = y * _rows(load_row(scale_g.at[there, 0]), y)
                y = y * _columns(load_column(token_scale_g.at[of_tokens]) * 512.0, y)
                for ref in bias_g:
                    y = y + _rows(load_row(ref.at[pl.ds(there * 64, 64)]), y)
                for i in range(tile // piece):
                    plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                    part = y[:, i * piece : (i + 1) * piece].astype(out_dtype)
                    slot = out_s.at[wg, i % 2]
                    slot.T[...] = plgpu.layout_cast(part, plgpu.Layout.WGMMA_TRANSPOSED)
                    plgpu.commit_smem()
                    first = token_tile * tile + i * piece
                    plgpu.copy_smem_to_gmem(slot, out_g.at[pl.ds(first, piece), pl.ds(n * 64, 64)])

            @plgpu.nd_loop((token_tiles * row_tiles,), collective_axes="block")
            def _(info):  # type: ignore[no-untyped-def]
                token_tile, row_tile = plgpu.planar_snake(
                    info.index[0], (token_tiles, row_tiles), 0, config.width
                )
                row_tile = row_tile * cluster + lax.axis_index("cluster")

                def context(evaluate):  # type: ignore[no-untyped-def]
                    zero = plgpu.layout_cast(jnp.zeros((64, tile), jnp.float32), MMA)
                    finish(evaluate(zero), row_tile * wgs + wg, token_tile)

                def step(_, words_s, x_s, *rest):  # type: ignore[no-untyped-def]
                    *numbers, total = rest
                    words = plgpu.load(words_s.at[wg], layout=strided(rows), optimized=False)
                    a = to_fp8(words, interpret=interpret)

                    def product(acc):  # type: ignore[no-untyped-def]
                        plgpu.wgmma(acc, a, x_s.T)
                        return acc[...]

                    added = pl.run_scoped(product, plgpu.ACC((64, tile), jnp.float32))
                    if grouped:
                        scale_s, sums_s = numbers
                        # A group of two steps has had its sum taken off half in each.
                        share = WIDTH / group
                        added = added - _columns(load_column(sums_s.at[0]) * share, added)
                        added = added * _rows(load_row(scale_s.at[wg, 0]), added)
                    return total + added

                pipeline(step, context)(*at_tile(row_tile, token_tile), allocations=allocations)

            plgpu.wait_smem_to_gmem(0)

        def ignore(*_, **__):  # type: ignore[no-untyped-def]
            return None

        pl.run_scoped(
            tile_loop,
            allocations=pipeline(ignore, ignore).get_allocations(*everything),
            out_s=plgpu.SMEM(
                (wgs, 2, piece, 64),
                out_dtype,
                transforms=swizzled(64, jnp.dtype(out_dtype).itemsize * 8),
            ),
            collective_axes="wg",
        )

    operands = [weight.words, x, weight.scale, fp8.scale, fp8.sums]
    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((tokens, 64 * weight.words.shape[0]), out_dtype),
        grid=(min(cores // cluster, token_tiles * row_tiles),),
        grid_names=("block",),
        cluster=(cluster,),
        cluster_names=("cluster",),
        num_threads=wgs + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=plgpu.InterpretGPUParams() if interpret else False,
    )
    return kernel(*operands, *([] if bias is None else [bias]))


def _rows(numbers: jax.Array, like: jax.Array) -> jax.Array:
    return lax.broadcast_in_dim(numbers.astype(jnp.float32), like.shape, [0])


def _columns(numbers: jax.Array, like: jax.Array) -> jax.Array:
    return lax.broadcast_in_dim(numbers.astype(jnp.float32), like.shape, [1])
