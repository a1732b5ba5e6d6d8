"""The product for few tokens, which lasts as long as the weights take to arrive.

A block of threads owns 64 rows of the weight. Its warpgroups split the columns (and so may the
blocks of a cluster); each copies its part through a ring of stages of its own, converts it in
registers and multiplies it with the tokens, and the partial sums are added through shared memory at
the end. The operands are swapped: weights are the 64 rows of `wgmma`, tokens its 8 to 256 columns,
so that few tokens waste nothing. With groups of 64 columns or more the scale multiplies the sum of
a group, not the weights: fewer instructions, and no rounding.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from qjax_kernels.hopper import load_column, load_row, swizzled
from qjax_kernels.weight_only_gemm.config import Config, stream_steps
from qjax_kernels.weight_only_gemm.convert import MMA, strided, to_fp8, to_registers
from qjax_kernels.weight_only_gemm.fp8 import Fp8
from qjax_kernels.weight_only_gemm.layout import LANES, Prepared, words_per_tile


def stream(
    x: jax.Array,
    weight: Prepared,
    bias: jax.Array | None,
    fp8: Fp8 | None = None,
    *,
    out_dtype: jnp.dtype,
    config: Config,
    interpret: bool = False,
) -> jax.Array:
    """x [tokens, in] @ weight.T + bias -> [tokens, out rounded up to 64].

    tokens is a multiple of 8, or fewer; in is padded to 64. See `api.prepared_gemm`.
    """
    tokens = x.shape[0]
    tile, wgs, tiles, stages = config.tokens, config.warpgroups, config.tiles, config.stages
    steps = stream_steps(config, weight)
    width = tiles * 64  # columns of a stage
    per_tile = words_per_tile(weight.format)  # rows of `words`
    rows = per_tile * tiles
    group = weight.group_size
    grouped, zeros = weight.groups > 1, weight.zero_point is not None
    # The columns whose products are summed before the scale: a stage, or a group within it.
    in_sum = grouped and group % 64 == 0
    # What is converted at a time.
    part = min(group, width) if in_sum else min(128, width)
    groups = -(-steps * width // group)  # of a warpgroup
    slots, copies = wgs * stages, grouped + zeros + (fp8 is not None)

    def body(*refs, **scratch):  # type: ignore[no-untyped-def]
        words_g, x_g, scale_g, *optional, out_g = refs
        zero_g = optional.pop(0) if zeros else None
        token_scale_g, token_sums_g = (optional.pop(0), optional.pop(0)) if fp8 else (None, None)
        bias_g = optional.pop(0) if bias is not None else None
        words_s, x_s, sums_s, out_s = (scratch[k] for k in ("words", "x", "sums", "out"))
        full, ready, summed = (scratch[k] for k in ("full", "ready", "summed"))
        n, m, wg = (lax.axis_index(name) for name in ("rows", "tokens", "wg"))
        member = lax.axis_index("cluster")
        first = (member * wgs + wg) * steps * width  # column of this warpgroup

        def fetch(step, slot):  # type: ignore[no-untyped-def]
            at = first + step * width
            source = words_g.at[n, pl.ds(at // 64 * per_tile, rows), :]
            plgpu.copy_gmem_to_smem(source, words_s.at[wg, slot], full.at[wg * stages + slot])
            source = x_g.at[pl.ds(m * tile, tile), pl.ds(at, width)]
            plgpu.copy_gmem_to_smem(source, x_s.at[wg, slot], full.at[wg * stages + slot])

        per_group = [(scale_g, "scale")] * grouped + [(zero_g, "zero")] * zeros
        for ref, name in per_group:
            source = ref.at[n, pl.ds(first // group, groups), :]
            plgpu.copy_gmem_to_smem(source, scratch[name].at[wg], ready.at[wg])
        if fp8:
            source = token_sums_g.at[pl.ds(first // group, groups), pl.ds(m * tile, tile)]
            target = scratch["token_sums"].at[wg, pl.ds(0, groups)]
            plgpu.copy_gmem_to_smem(source, target, ready.at[wg])
        for step in range(min(stages, steps)):
            fetch(step, step)
        if copies:
            plgpu.barrier_wait(ready.at[wg])

        def of_groups(name, step, start, columns):  # type: ignore[no-untyped-def]
            """Numbers of the groups of some columns of a stage."""
            at = (step * width + start) // group
            rows_of = scratch[name].at[wg]
            loaded = [load_row(rows_of.at[at + i]) for i in range(max(1, columns // group))]
            return [row.astype(x.dtype) for row in loaded]

        def without_bias(y, ref):  # type: ignore[no-untyped-def]
            """What the 8 in the weights' codes added for each token."""
            return y - lax.broadcast_in_dim(load_column(ref), y.shape, [1])

        def multiply(acc, i, slot, start, columns):  # type: ignore[no-untyped-def]
            """Issue the product of some columns of a stage; it goes on while others convert."""
            of_columns = pl.ds(start // 64 * per_tile, columns // 64 * per_tile)
            layout = strided(columns // 64 * per_tile)
            words = plgpu.load(words_s.at[wg, slot, of_columns], layout=layout, optimized=False)
            if fp8:
                a = to_fp8(words, interpret=interpret)
            else:
                a = to_registers(
                    words,
                    weight.format,
                    x.dtype,
                    of_groups("zero", i, start, columns) if zeros else (),
                    of_groups("scale", i, start, columns) if grouped and not in_sum else (),
                    interpret=interpret,
                )
            plgpu.wgmma(acc, a, x_s.at[wg, slot, :, pl.ds(start, columns)].T)

        def step(i, total):  # type: ignore[no-untyped-def]
            slot = lax.rem(i, stages)
            plgpu.barrier_wait(full.at[wg * stages + slot])
            starts = range(0, width, part)

            def sums(*accumulators):  # type: ignore[no-untyped-def]
                for number, start in enumerate(starts):
                    multiply(accumulators[number % len(accumulators)], i, slot, start, part)
                last = len(accumulators) - 1
                return [
                    plgpu.wgmma_accumulator_load(acc, wait_n=last - number)
                    for number, acc in enumerate(accumulators)
                ]

            # Groups are summed apart; without groups in the sum one accumulator takes all.
            kinds = [plgpu.ACC((64, tile), jnp.float32)] * (len(starts) if in_sum else 1)
            for start, added in zip(starts, pl.run_scoped(sums, *kinds), strict=False):
                at = (i * width + start) // group
                if fp8 and grouped:
                    added = without_bias(added, scratch["token_sums"].at[wg, at])
                if in_sum:
                    scale = load_row(scratch["scale"].at[wg, at]).astype(jnp.float32)
                    added = added * lax.broadcast_in_dim(scale, added.shape, [0])
                total = total + added

            @pl.when(i + stages < steps)
            def _():  # type: ignore[no-untyped-def]
                fetch(i + stages, slot)

            return total

        zero = plgpu.layout_cast(jnp.zeros((64, tile), jnp.float32), MMA)
        total = lax.fori_loop(0, steps, step, zero)

        @pl.when(wg > 0)
        def _():  # type: ignore[no-untyped-def]
            sums_s[wg - 1] = total
            plgpu.barrier_arrive(summed)

        def share(y):  # type: ignore[no-untyped-def]
            """Add the sums of the cluster's blocks, in the first of them."""
            partial_s, written, read = (scratch[k] for k in ("partial", "written", "read"))
            partial_s[...] = y
            plgpu.barrier_arrive(written)
            plgpu.barrier_wait(written)

            @pl.when(member == 0)
            def _():  # type: ignore[no-untyped-def]
                everything = y
                for other in range(1, config.cluster):
                    theirs = plgpu.cluster_ref(partial_s, {"cluster": other})
                    everything = everything + plgpu.load(theirs, layout=MMA, optimized=False)
                finish(everything)

            # The memory of a block is there until all of it has been read.
            plgpu.barrier_arrive(read)
            plgpu.barrier_wait(read)

        def finish(y):  # type: ignore[no-untyped-def]
            if fp8:
                if not grouped:
                    y = without_bias(y, scratch["token_sums"].at[0, 0])
                scale = load_column(token_scale_g.at[pl.ds(m * tile, tile)]) * 512.0
                y = y * lax.broadcast_in_dim(scale, y.shape, [1])
            if not grouped:
                scale = load_row(scale_g.at[n, 0]).astype(jnp.float32)
                y = y * lax.broadcast_in_dim(scale, y.shape, [0])
            if bias_g is not None:
                offset = load_row(bias_g.at[pl.ds(n * 64, 64)]).astype(jnp.float32)
                y = y + lax.broadcast_in_dim(offset, y.shape, [0])
            out_s.T[...] = plgpu.layout_cast(y.astype(out_dtype), plgpu.Layout.WGMMA_TRANSPOSED)
            plgpu.commit_smem()
            target = out_g.at[pl.ds(m * tile, tile), pl.ds(n * 64, 64)]
            plgpu.copy_smem_to_gmem(out_s, target)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == 0)
        def _():  # type: ignore[no-untyped-def]
            y = total
            if wgs > 1:
                plgpu.barrier_wait(summed)
            for other in range(wgs - 1):
                y = y + plgpu.load(sums_s.at[other], layout=MMA, optimized=False)
            if config.cluster == 1:
                finish(y)
            else:
                share(y)

    scratch = {
        "words": plgpu.SMEM((wgs, stages, rows, LANES), jnp.int32),
        "x": plgpu.SMEM(
            (wgs, stages, tile, width), x.dtype, transforms=swizzled(width, x.dtype.itemsize * 8)
        ),
        "sums": plgpu.SMEM((max(1, wgs - 1), 64, tile), jnp.float32),
        "out": plgpu.SMEM(
            (tile, 64), out_dtype, transforms=swizzled(64, jnp.dtype(out_dtype).itemsize * 8)
        ),
        "full": plgpu.Barrier(num_arrivals=2, num_barriers=slots),
        "ready": plgpu.Barrier(num_arrivals=max(1, copies), num_barriers=wgs),
        "summed": plgpu.Barrier(num_arrivals=max(1, wgs - 1)),
    }
    if grouped:
        scratch["scale"] = plgpu.SMEM((wgs, groups, 64), weight.scale.dtype)
    if zeros:
        scratch["zero"] = plgpu.SMEM((wgs, groups, 64), jnp.bfloat16)
    if fp8:
        # Each warpgroup's begin at a multiple of 128 bytes, as the copy engine needs.
        scratch["token_sums"] = plgpu.SMEM((wgs, -(-groups // 4) * 4, tile), jnp.float32)
    if config.cluster > 1:
        scratch["partial"] = plgpu.SMEM((64, tile), jnp.float32)
        scratch["written"] = plgpu.ClusterBarrier(collective_axes=("cluster",))
        scratch["read"] = plgpu.ClusterBarrier(collective_axes=("cluster",))
    operands = [weight.words, x, weight.scale]
    optional = (weight.zero_point, *((fp8.scale, fp8.sums) if fp8 else ()), bias)
    operands += [array for array in optional if array is not None]
    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((tokens, 64 * weight.words.shape[0]), out_dtype),
        grid=(weight.words.shape[0], -(-tokens // tile)),
        grid_names=("rows", "tokens"),
        cluster=(config.cluster,),
        cluster_names=("cluster",),
        num_threads=wgs,
        thread_name="wg",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=plgpu.InterpretGPUParams() if interpret else False,
    )
    return kernel(*operands)
