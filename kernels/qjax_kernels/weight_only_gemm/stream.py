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

from qjax_kernels.hopper import load_row, swizzled
from qjax_kernels.weight_only_gemm import epilogue
from qjax_kernels.weight_only_gemm.config import Config, stream_steps
from qjax_kernels.weight_only_gemm.convert import MMA, strided, to_fp8, to_registers
from qjax_kernels.weight_only_gemm.layout import LANES, Prepared, words_per_tile
from qjax_kernels.weight_only_gemm.operands import Added, operands


def stream(
    x: jax.Array,
    weight: Prepared,
    token_scale: jax.Array | None,
    added: Added,
    *,
    eps: float = 0.0,
    activation: str | None,
    out_dtype: jnp.dtype,
    config: Config,
    interpret: bool = False,
) -> list[jax.Array]:
    """x [tokens, in] @ weight.T + bias + residual -> [tokens, out rounded up to 64].

    With a gain also that times the gain, and sums of squares [blocks, tokens rounded up].

    tokens is a multiple of 8, or fewer; in is padded to 64. token_scale: [tokens] or [1], of fp8
    activations; or None. See `api.prepared_gemm`.
    """
    tokens, fp8 = x.shape[0], token_scale is not None
    given = operands(x, weight, token_scale, added)
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
    slots, copies = wgs * stages, grouped + zeros
    grid = weight.words.shape[0], -(-tokens // tile)

    def body(*refs, **scratch):  # type: ignore[no-untyped-def]
        of = dict(zip(given, refs, strict=False))  # in global memory
        results = refs[len(given) :]  # [out], or [out, scaled, squares]
        words_s, x_s, sums_s = (scratch[k] for k in ("words", "x", "sums"))
        full, ready, summed = (scratch[k] for k in ("full", "ready", "summed"))
        n, m, wg = (lax.axis_index(name) for name in ("rows", "tokens", "wg"))
        member = lax.axis_index("cluster")
        first = (member * wgs + wg) * steps * width  # column of this warpgroup

        def fetch(step, slot):  # type: ignore[no-untyped-def]
            at = first + step * width
            source = of["words"].at[n, pl.ds(at // 64 * per_tile, rows), :]
            plgpu.copy_gmem_to_smem(source, words_s.at[wg, slot], full.at[wg * stages + slot])
            source = of["x"].at[pl.ds(m * tile, tile), pl.ds(at, width)]
            plgpu.copy_gmem_to_smem(source, x_s.at[wg, slot], full.at[wg * stages + slot])

        for name in ["scale"] * grouped + ["zero"] * zeros:
            source = of[name].at[n, pl.ds(first // group, groups), :]
            plgpu.copy_gmem_to_smem(source, scratch[name].at[wg], ready.at[wg])
        for step in range(min(stages, steps)):
            fetch(step, step)
        end = epilogue.Epilogue(
            of,
            results[0],
            scratch["staged"].at[0],
            scratch["token_scales"].at[0] if fp8 else None,
            scratch["copied"],
            0,
            tile,
            per_channel=not grouped,
            multiplier=512.0 if fp8 else 1.0,
            activation=activation,
            features=weight.in_features,
            eps=eps,
            shared={name: scratch[name] for name in of_norms},
            scaled=results[1] if added.gain is not None else None,
            squares=results[2] if added.gain is not None else None,
            interpret=interpret,
        )
        if end.fetches:
            pl.when((wg == 0) & (member == 0))(lambda: end.fetch(n, m * tile))
        if copies:
            plgpu.barrier_wait(ready.at[wg])

        def of_groups(name, step, start, columns):  # type: ignore[no-untyped-def]
            """Numbers of the groups of some columns of a stage."""
            at = (step * width + start) // group
            rows_of = scratch[name].at[wg]
            loaded = [load_row(rows_of.at[at + i]) for i in range(max(1, columns // group))]
            return [row.astype(x.dtype) for row in loaded]

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
            for start, of_part in zip(starts, pl.run_scoped(sums, *kinds), strict=False):
                if in_sum:
                    at = (i * width + start) // group
                    scale = load_row(scratch["scale"].at[wg, at]).astype(jnp.float32)
                    of_part = of_part * lax.broadcast_in_dim(scale, of_part.shape, [0])
                total = total + of_part

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
                end.finish(everything, n, m * tile)

            # The memory of a block is there until all of it has been read.
            plgpu.barrier_arrive(read)
            plgpu.barrier_wait(read)

        @pl.when(wg == 0)
        def _():  # type: ignore[no-untyped-def]
            y = total
            if wgs > 1:
                plgpu.barrier_wait(summed)
            for other in range(wgs - 1):
                y = y + plgpu.load(sums_s.at[other], layout=MMA, optimized=False)
            if config.cluster == 1:
                end.finish(y, n, m * tile)
            else:
                share(y)
            # Shared memory has been read: that it is written, the next kernel waits for.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    of_norms = epilogue.norm_scratch(given, tile, out_dtype)
    scratch = {
        "words": plgpu.SMEM((wgs, stages, rows, LANES), jnp.int32),
        "x": plgpu.SMEM(
            (wgs, stages, tile, width), x.dtype, transforms=swizzled(width, x.dtype.itemsize * 8)
        ),
        "sums": plgpu.SMEM((max(1, wgs - 1), 64, tile), jnp.float32),
        "full": plgpu.Barrier(num_arrivals=2, num_barriers=slots),
        "ready": plgpu.Barrier(num_arrivals=max(1, copies), num_barriers=wgs),
        "summed": plgpu.Barrier(num_arrivals=max(1, wgs - 1)),
        **epilogue.scratch(given, tile, out_dtype, 1, activation),
        **of_norms,
    }
    if grouped:
        scratch["scale"] = plgpu.SMEM((wgs, groups, 64), weight.scale.dtype)
    if zeros:
        scratch["zero"] = plgpu.SMEM((wgs, groups, 64), jnp.bfloat16)
    if config.cluster > 1:
        scratch["partial"] = plgpu.SMEM((64, tile), jnp.float32)
        scratch["written"] = plgpu.ClusterBarrier(collective_axes=("cluster",))
        scratch["read"] = plgpu.ClusterBarrier(collective_axes=("cluster",))
    width_out = epilogue.rows_out(activation) * weight.words.shape[0]
    types = [jax.ShapeDtypeStruct((tokens, width_out), out_dtype)]
    if added.gain is not None:
        types *= 2
        types.append(jax.ShapeDtypeStruct((grid[0], grid[1] * tile), jnp.float32))
    kernel = plgpu.kernel(
        body,
        out_type=types,
        grid=grid,
        grid_names=("rows", "tokens"),
        cluster=(config.cluster,),
        cluster_names=("cluster",),
        num_threads=wgs,
        thread_name="wg",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=plgpu.InterpretGPUParams() if interpret else False,
    )
    return kernel(*given.values())
