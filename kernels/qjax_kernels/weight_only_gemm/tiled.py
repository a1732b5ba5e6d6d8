"""The product for many tokens, which lasts as long as the tensor cores need.

Two warpgroups own 64 rows of the weight each and share a tile of up to 256 tokens; a third copies.
The weights are converted and scaled in registers, where `wgmma` takes its first operand from. While
one warpgroup converts, the other multiplies. Blocks stay on their multiprocessor and walk over the
tiles in an order that keeps tokens and weights in the L2 cache; the blocks of a cluster work on the
same tokens, which are copied once for all of them.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from qjax_kernels.hopper import load_row, swizzled
from qjax_kernels.weight_only_gemm.config import Config
from qjax_kernels.weight_only_gemm.convert import strided, to_registers
from qjax_kernels.weight_only_gemm.layout import LANES, Prepared, words_per_tile

OUT_TOKENS = 64  # of the pieces in which a tile of the result leaves


def tiled(
    x: jax.Array,
    weight: Prepared,
    bias: jax.Array | None,
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
    width, group = config.tiles * 64, weight.group_size
    rows = words_per_tile(weight.format) * config.tiles
    grouped, zeros = weight.groups > 1, weight.zero_point is not None
    parts = config.parts
    piece = min(OUT_TOKENS, tile)
    token_tiles = -(-tokens // tile)
    row_tiles = -(-weight.words.shape[0] // (wgs * cluster))
    per_step = max(1, width // group) if grouped else 1

    def pipeline(step, context, has_zero):  # type: ignore[no-untyped-def]
        of_group = plgpu.BlockSpec(
            (wgs, per_step, 64),
            lambda k: (0, k if per_step > 1 or width >= group else k * width // group, 0),
        )
        shared = ("cluster",) if cluster > 1 else ()
        return plgpu.emit_pipeline_warp_specialized(
            step,
            grid=(-(-features // width),),
            memory_registers=40,
            wg_axis="wg",
            num_compute_wgs=wgs,
            max_concurrent_steps=config.stages,
            compute_context=context,
            in_specs=[
                plgpu.BlockSpec((wgs, rows, LANES), lambda k: (0, k, 0)),
                plgpu.BlockSpec(
                    (tile, width),
                    lambda k: (0, k),
                    transforms=swizzled(width, 16),
                    collective_axes=shared,
                ),
                *[of_group] * (grouped + has_zero),
            ],
        )

    def body(*refs):  # type: ignore[no-untyped-def]
        words_g, x_g, scale_g, *optional, out_g = refs
        bias_g = optional[-1] if bias is not None else None
        # What the pipeline copies: numbers of one group for all columns stay where they are.
        zero_g = optional[:1] if zeros and grouped else []
        streamed = [words_g, x_g, *([scale_g] if grouped else []), *zero_g]

        def at_tile(refs, row_tile, token_tile):  # type: ignore[no-untyped-def]
            of_rows = pl.ds(row_tile * wgs, wgs)
            return [
                ref.at[pl.ds(token_tile * tile, tile)] if ref is x_g else ref.at[of_rows]
                for ref in refs
            ]

        def tile_loop(allocations, out_s):  # type: ignore[no-untyped-def]
            wg = lax.axis_index("wg")

            @plgpu.nd_loop((token_tiles * row_tiles,), collective_axes="block")
            def _(info):  # type: ignore[no-untyped-def]
                (index,) = info.index
                token_tile, row_tile = plgpu.planar_snake(
                    index, (token_tiles, row_tiles), 0, config.width
                )
                row_tile = row_tile * cluster + lax.axis_index("cluster")
                n = row_tile * wgs + wg  # block of 64 rows
                # The last tile may have blocks that are not there: nothing of them is stored.
                there = jnp.minimum(n, weight.words.shape[0] - 1)

                def context(evaluate):  # type: ignore[no-untyped-def]
                    def with_accumulator(acc):  # type: ignore[no-untyped-def]
                        evaluate(acc)
                        finish(acc[...], n, token_tile)

                    pl.run_scoped(with_accumulator, plgpu.ACC((64, tile), jnp.float32))

                def finish(y, n, token_tile):  # type: ignore[no-untyped-def]
                    if not grouped:
                        scale = load_row(scale_g.at[there, 0]).astype(jnp.float32)
                        y = y * lax.broadcast_in_dim(scale, y.shape, [0])
                    if bias_g is not None:
                        offset = load_row(bias_g.at[pl.ds(there * 64, 64)]).astype(jnp.float32)
                        y = y + lax.broadcast_in_dim(offset, y.shape, [0])
                    for i in range(tile // piece):
                        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                        part = y[:, i * piece : (i + 1) * piece].astype(out_dtype)
                        slot = out_s.at[wg, i % 2]
                        slot.T[...] = plgpu.layout_cast(part, plgpu.Layout.WGMMA_TRANSPOSED)
                        plgpu.commit_smem()
                        first = token_tile * tile + i * piece
                        target = out_g.at[pl.ds(first, piece), pl.ds(n * 64, 64)]
                        plgpu.copy_smem_to_gmem(slot, target)

                def step(_, words_s, x_s, *rest):  # type: ignore[no-untyped-def]
                    *per_group, acc = rest

                    def numbers(ref):  # type: ignore[no-untyped-def]
                        loaded = [load_row(ref.at[wg, i]) for i in range(per_step)]
                        return [row.astype(x.dtype) for row in loaded]

                    zero = numbers(per_group[1]) if zeros and grouped else ()
                    if zeros and not grouped:
                        zero = [load_row(optional[0].at[there, 0]).astype(x.dtype)]
                    scale = numbers(per_group[0]) if grouped else ()
                    per_part = rows // parts
                    for part in range(parts):
                        # While one part is multiplied, the next is converted.
                        words = words_s.at[wg, pl.ds(part * per_part, per_part)]
                        a = to_registers(
                            plgpu.load(words, layout=strided(per_part), optimized=False),
                            weight.format,
                            x.dtype,
                            of_part(zero, part),
                            of_part(scale, part),
                            interpret=interpret,
                        )
                        columns = pl.ds(part * width // parts, width // parts)
                        plgpu.wgmma(acc, a, x_s.at[:, columns].T)
                    # Not later: registers of a product that runs on into the next step are
                    # overwritten there (seen on an H200).
                    plgpu.wgmma_wait(0)
                    return acc

                def of_part(arrays, part):  # type: ignore[no-untyped-def]
                    """Those of some arrays, each for an equal share of the columns."""
                    share = max(1, len(arrays) // parts)
                    return arrays[part * len(arrays) // parts :][:share]

                pipeline(step, context, zeros and grouped)(
                    *at_tile(streamed, row_tile, token_tile), allocations=allocations
                )

            plgpu.wait_smem_to_gmem(0)

        def ignore(*_, **__):  # type: ignore[no-untyped-def]
            return None

        pl.run_scoped(
            tile_loop,
            allocations=pipeline(ignore, ignore, zeros and grouped).get_allocations(*streamed),
            out_s=plgpu.SMEM(
                (wgs, 2, piece, 64),
                out_dtype,
                transforms=swizzled(64, jnp.dtype(out_dtype).itemsize * 8),
            ),
            collective_axes="wg",
        )

    operands = [weight.words, x, weight.scale]
    operands += [array for array in (weight.zero_point, bias) if array is not None]
    blocks = min(cores // cluster, token_tiles * row_tiles)
    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((tokens, 64 * weight.words.shape[0]), out_dtype),
        grid=(blocks,),
        grid_names=("block",),
        cluster=(cluster,),
        cluster_names=("cluster",),
        num_threads=wgs + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=plgpu.InterpretGPUParams() if interpret else False,
    )
    return kernel(*operands)
